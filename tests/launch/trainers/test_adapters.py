"""Adapters in the words of other trainers, as their own code understands them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from advisor.catalog import trainers
from advisor.errors import SpecError
from advisor.launch.files import launch_files, write
from advisor.specs.job import Job
from advisor.specs.plan import Strategy
from launch.examples import plan
from launch.trainers.told import ARGUMENTS, command_of, job_for, launch_for, text_of, told

LORA: dict[str, Any] = {"method": "lora", "lora_rank": 16, "lora_dropout": 0.25, "lora_targets": ("q_proj", "o_proj")}


def read_by_trl(folder: Path, strategy: Strategy = Strategy.FSDP, **choices: Any) -> Any:
    """TRL's ModelConfig."""
    trl = pytest.importorskip("trl")
    write(launch_for("trl", plan(strategy), **choices), folder)
    parser = trl.TrlParser((trl.ScriptArguments, trl.SFTConfig, trl.ModelConfig))
    return parser.parse_args_and_config(["--config", str(folder / "sft.yaml"), "--use_cpu=true"])[2]


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.mark.usefixtures("on_a_cpu")
def test_trl_makes_the_adapters_that_were_priced(tmp_path: Path) -> None:
    utils = pytest.importorskip("trl.trainer.utils")
    held = read_by_trl(tmp_path, **LORA)

    made = utils.get_peft_config(held)

    assert (made.r, made.lora_alpha, made.lora_dropout) == (16, 8, 0.25)
    assert made.target_modules == {"q_proj", "o_proj"}
    assert (held.dtype, utils.get_quantization_config(held)) == ("bfloat16", None)


@pytest.mark.usefixtures("on_a_cpu")
@pytest.mark.parametrize(
    ("target", "adapted"),
    [
        ("q_proj", {"model.layers.0.self_attn.q_proj"}),
        ("self_attn.q_proj", {"model.layers.0.self_attn.q_proj"}),
    ],
)
def test_one_target_is_found_by_the_end_of_its_name(target: str, adapted: set[str], tmp_path: Path) -> None:
    """peft takes a word, as TRL makes of a list of one, for a pattern of the whole name."""
    utils = pytest.importorskip("trl.trainer.utils")
    names = {f"model.layers.0.{name}" for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "xq_proj")}

    pattern = utils.get_peft_config(read_by_trl(tmp_path, method="lora", lora_targets=(target,))).target_modules

    assert {name for name in names if re.fullmatch(pattern, name)} == adapted


@pytest.mark.usefixtures("on_a_cpu")
def test_trl_is_told_all_linear_layers_by_pefts_word(tmp_path: Path) -> None:
    assert read_by_trl(tmp_path, method="lora", lora_targets=("all-linear",)).lora_target_modules == "all-linear"
    assert read_by_trl(tmp_path / "usual", method="lora").lora_target_modules is None


@pytest.mark.usefixtures("on_a_cpu")
def test_four_bits_are_stored_as_fsdp_can_cut_them(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    utils = pytest.importorskip("trl.trainer.utils")

    made = utils.get_quantization_config(read_by_trl(tmp_path, method="qlora"))

    assert made.load_in_4bit
    assert (made.bnb_4bit_quant_type, made.bnb_4bit_use_double_quant) == ("nf4", True)
    assert made.bnb_4bit_quant_storage == made.bnb_4bit_compute_dtype == torch.bfloat16


@pytest.mark.parametrize(("version", "named"), [("0.25.1", False), ("0.26.0", True)])
def test_older_trl_stores_four_bits_so_by_itself(version: str, named: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainers, "installed", {"trl": version, "transformers": "5.0.0"}.get)

    settings = told("trl", launch_for("trl", plan(Strategy.FSDP), method="qlora", loss="full"))

    assert ("bnb_4bit_quant_storage" in settings) == named


def test_open_r1s_arguments_hold_a_list_of_targets() -> None:
    transformers, trl = pytest.importorskip("transformers"), pytest.importorskip("trl")
    words = command_of(launch_for("open-r1", plan(Strategy.ZERO2), **LORA))

    parser = transformers.HfArgumentParser(trl.ModelConfig)
    held, _ = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)

    assert (held.use_peft, held.lora_r, held.lora_target_modules) == (True, 16, ["q_proj", "o_proj"])


@pytest.mark.parametrize(
    ("targets", "method", "said"),
    [
        ((), "lora", {"finetuning_type": "lora", "lora_rank": 8, "lora_target": "q_proj,v_proj"}),
        (("all-linear",), "lora", {"lora_target": "all", "lora_alpha": 8, "lora_dropout": 0.0}),
        (("q_proj",), "qlora", {"lora_target": "q_proj", "quantization_bit": 4, "double_quantization": True}),
    ],
)
def test_llama_factory_is_told_what_to_train(targets: tuple[str, ...], method: str, said: dict[str, Any]) -> None:
    settings = told("llama-factory", launch_for("llama-factory", plan(), method=method, lora_targets=targets))

    assert said.items() <= settings.items()
    assert settings.keys() <= ARGUMENTS["llama-factory"]


@pytest.mark.parametrize(
    ("trainer", "method", "complaint"),
    [
        ("trl", "dora", r"--method dora is not modelled as trl \(trl [\d.]+\) runs it; give --method full"),
        ("axolotl", "lora", r"--method lora is not modelled as axolotl .* runs it; give --method full, or leave"),
        ("hf", "lora", r"--method lora is not modelled as hf .* runs it; give --method full, or leave --trainer out"),
    ],
)
def test_adapters_that_are_not_modelled_are_refused(trainer: Any, method: str, complaint: str) -> None:
    with pytest.raises(SpecError, match=complaint):
        trainers.refuse_job(job_for(trainer, method=method))


def test_what_trl_does_otherwise_with_adapters_is_said_of_adapters_alone() -> None:
    with_adapters, without = (list(trainers.differences(Job(trainer="trl", method=each))) for each in ("lora", "full"))

    assert set(without) < set(with_adapters)


def test_packages_of_the_job_are_installed_with_the_program() -> None:
    words: dict[str, Any] = {"gpus": 2, "gpu": "A100-80GB", "strategy": "ddp", "method": "lora", "loss": "fused"}

    launch = launch_files("Qwen2.5-0.5B", target="skypilot", **words)

    assert "accelerate deepspeed peft liger-kernel" in text_of(launch, "task.yaml")
    assert "accelerate deepspeed peft liger-kernel" in text_of(launch, "run.sh")
