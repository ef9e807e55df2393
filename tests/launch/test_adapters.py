"""What the launch files say of adapters, and the words that ask for them."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from advisor.cli.main import cli
from advisor.errors import SpecError
from advisor.launch.files import launch_files
from advisor.specs.job import Job

WORDS = {"model": "Qwen2.5-0.5B", "gpus": 1, "gpu": "A100-80GB", "strategy": "ddp", "global_batch": 8}


def test_the_training_program_is_given_what_was_priced() -> None:
    launch = launch_files(**WORDS, method="lora", lora_rank=16, lora_targets=["q_proj", "o_proj"], lora_dropout=0.05)

    asked = [word for word in launch.command if word.startswith(("--method", "--lora", "--weights"))]
    assert asked == [
        "--weights=bf16",
        "--method=lora",
        "--lora-rank=16",
        "--lora-targets=q_proj,o_proj",
        "--lora-dropout=0.05",
    ]
    assert all("pip install peft" in file.text for file in launch.files if file.name == "run.sh")


def test_pure_bf16_keeps_adapters_in_the_model_s_format() -> None:
    assert "--lora-weights=as-model" in launch_files(**WORDS, method="lora", param_dtype="bf16").command


def test_four_bits_are_made_of_half_precision_as_the_weights_are_loaded() -> None:
    launch = launch_files(**WORDS, method="qlora")

    assert {"--weights=bf16", "--method=qlora"} <= set(launch.command)
    assert any("pip install peft bitsandbytes" in file.text for file in launch.files)


def test_full_training_says_nothing_of_adapters() -> None:
    assert not [word for word in launch_files(**WORDS).command if "lora" in word]


def test_the_machine_form_tells_trained_weights_from_all() -> None:
    flags = ["--model=Qwen2.5-0.5B", "--gpus=1", "--gpu=A100-80GB", "--strategy=ddp", "--global-batch=8"]
    result = CliRunner().invoke(cli, ["estimate", *flags, "--method=lora", "--lora-targets=q_proj,v_proj", "--json"])

    answer = json.loads(result.stdout)
    # 24 layers of width 896, two key-value heads of 64: 8 x (896 + 896) and 8 x (896 + 128) elements.
    trained = 24 * 8 * (896 + 896 + 896 + 128)
    assert answer["model"]["trainable_parameters"] == trained
    assert answer["model"]["parameters"] == 494_032_768 + trained
    assert answer["inputs"]["lora_rank"] == {"value": 8, "origin": "assumed"}
    assert answer["inputs"]["lora_targets"]["origin"] == "given"


def test_four_bits_leave_no_choice_of_formats() -> None:
    with pytest.raises(SpecError, match="qlora keeps adapters, norms and embeddings in fp32"):
        Job(method="qlora", parameter_format="bf16")


@pytest.mark.parametrize(("name", "value"), [("lora_rank", 0), ("lora_dropout", 1.0), ("method", "ia3")])
def test_a_job_refuses_adapters_that_cannot_be(name: str, value: object) -> None:
    with pytest.raises(SpecError, match=f"must be .*, got {value!r}"):
        Job(**{name: value})
