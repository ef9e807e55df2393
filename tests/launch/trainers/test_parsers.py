"""Every trainer's own parser takes what is written for it, or its source has every name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from advisor.launch.files import write
from advisor.specs.job import Trainer
from advisor.specs.plan import Checkpointing, Offload, Plan, Strategy
from launch.examples import plan
from launch.trainers.told import ARGUMENTS, TRAINERS, command_of, launch_for, text_of, told

PLANS = {
    "ddp": plan(),
    "fsdp, checkpointed": plan(Strategy.FSDP, checkpointing=Checkpointing.FULL),
    "zero2": plan(Strategy.ZERO2, micro_batch=8),
    "zero3, checkpointed": plan(Strategy.ZERO3, checkpointing=Checkpointing.FULL),
}
ON_A_CPU = "--use_cpu=true"


def legal(trainer: Trainer, chosen: Plan) -> Plan:
    """*chosen*, or the nearest that the trainer runs."""
    if trainer == "megatron":
        return dataclasses.replace(chosen, strategy=Strategy.MEGATRON)
    if trainer == "torchtitan" and chosen.strategy.zero_stage is not None:
        return dataclasses.replace(chosen, strategy=Strategy.FSDP_GRAD_OP)
    if trainer == "axolotl" and chosen.strategy is Strategy.DDP:
        return dataclasses.replace(chosen, strategy=Strategy.ZERO1)
    if trainer == "open-r1":
        return dataclasses.replace(chosen, fsdp=dataclasses.replace(chosen.fsdp, version=1))
    return chosen


@pytest.mark.parametrize("trainer", [each for each in TRAINERS if each not in ("hf", "trl")])
@pytest.mark.parametrize("kind", PLANS)
def test_each_name_stands_in_the_trainers_source(trainer: Trainer, kind: str) -> None:
    names = told(trainer, launch_for(trainer, legal(trainer, PLANS[kind]))).keys()

    assert names - ARGUMENTS[trainer] == set()


@pytest.mark.parametrize("kind", PLANS)
def test_trl_understands_its_file(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    trl = pytest.importorskip("trl")
    launch = launch_for("trl", PLANS[kind], weights_from="a: {b} $(x) 'q' \n--no")
    write(launch, tmp_path)
    parser = trl.TrlParser((trl.ScriptArguments, trl.SFTConfig, trl.ModelConfig))

    script, training, held = parser.parse_args_and_config(["--config", str(tmp_path / "sft.yaml"), ON_A_CPU])

    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (PLANS[kind].micro_batch, 2)
    assert (training.max_length, training.packing, training.packing_strategy) == (2048, True, "wrapped")
    assert training.activation_checkpointing is (PLANS[kind].checkpointing is Checkpointing.FULL)
    assert (training.bf16, training.optim, training.loss_type) == (True, "adamw_torch_fused", "nll")
    assert held.model_name_or_path == "a: {b} $(x) 'q' \n--no"
    assert script.dataset_name == "trl-lib/Capybara"


@pytest.mark.parametrize("kind", PLANS)
def test_transformers_understands_the_arguments_of_its_example(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    transformers = pytest.importorskip("transformers")
    example = dataclasses.make_dataclass("Example", [(name, str, "") for name in sorted(ARGUMENTS["run_clm"])])
    words = command_of(launch_for("hf", PLANS[kind], weights_from="a 'b' $(x)"))

    described, training = transformers.HfArgumentParser(
        (example, transformers.TrainingArguments)
    ).parse_args_into_dataclasses([*words, ON_A_CPU])

    assert (described.model_name_or_path, described.block_size) == ("a 'b' $(x)", "2048")
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (PLANS[kind].micro_batch, 2)
    assert training.activation_checkpointing is (PLANS[kind].checkpointing is Checkpointing.FULL)
    assert (training.bf16, training.optim, training.torch_compile) == (True, "adamw_torch_fused", False)


@pytest.mark.parametrize("strategy", [Strategy.DDP, Strategy.FSDP, Strategy.ZERO1, Strategy.ZERO2, Strategy.ZERO3])
def test_open_r1_has_a_file_for_each_recipe_which_accelerate_loads(strategy: Strategy, tmp_path: Path) -> None:
    config_args = pytest.importorskip("accelerate.commands.config.config_args")
    launch = launch_for("open-r1", legal("open-r1", plan(strategy, micro_batch=8)))
    write(launch, tmp_path)

    loaded = {path.stem: config_args.load_config_from_file(str(path)) for path in tmp_path.glob("*.yaml")}

    kinds = {name: str(each.distributed_type.value) for name, each in loaded.items()}
    recipes = {"ddp": "MULTI_GPU", "fsdp": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    assert kinds == recipes | ({"zero1": "DEEPSPEED"} if strategy is Strategy.ZERO1 else {})
    assert loaded["zero2"].deepspeed_config["deepspeed_config_file"] == "zero2.json"
    assert loaded["fsdp"].fsdp_config["fsdp_version"] == 1
    assert launch.command[:5] == (
        "accelerate",
        "launch",
        "--config_file",
        f"{strategy.value}.yaml",
        "src/open_r1/sft.py",
    )


# open-r1's own recipe: packed sequences of 2,048 tokens, 8 at once, two accumulation steps, checkpointed, ZeRO-2.
def test_open_r1s_recipe_comes_out_as_it_is() -> None:
    recipe = plan(Strategy.ZERO2, gpus=4, micro_batch=8, checkpointing=Checkpointing.FULL)
    given_ = told("open-r1", launch_for("open-r1", recipe, weights_from="Qwen/Qwen2.5-1.5B-Instruct"))

    assert {
        "model_name_or_path": "Qwen/Qwen2.5-1.5B-Instruct",
        "max_length": 2048,
        "packing": True,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
        "bf16": True,
    }.items() <= given_.items()


@pytest.mark.parametrize("offload", [Offload.NONE, Offload.OPTIMIZER])
def test_transformers_finds_deepspeeds_json_and_its_arguments_to_agree(
    offload: Offload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    transformers = pytest.importorskip("transformers")
    integration = pytest.importorskip("transformers.integrations.deepspeed")
    launch = launch_for("hf", plan(Strategy.ZERO3, gpus=1, offload=offload))
    known = {each.name for each in dataclasses.fields(transformers.TrainingArguments)}
    given_ = {name: value for name, value in told("hf", launch).items() if name in known}
    arguments = transformers.TrainingArguments(**{**given_, "output_dir": str(tmp_path), "use_cpu": True})

    config = integration.HfTrainerDeepSpeedConfig(json.loads(text_of(launch, "ds_config.json")))
    config.trainer_config_process(arguments)

    assert config.mismatches == []
