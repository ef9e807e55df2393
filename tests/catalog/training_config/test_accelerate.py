"""accelerate's YAML as accelerate 1.15 resolves it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from advisor.catalog.training_config.accelerate import TOP_HARMLESS, TOP_UNMODELLED
from advisor.cost.estimate import plan_of
from advisor.errors import ConfigError, SpecError
from advisor.launch.files import launch_files
from advisor.specs.plan import Checkpointing, FsdpSettings, Offload, Plan, Strategy, ZeroSettings
from advisor.specs.question import Question
from catalog.training_config.examples import (
    ACCELERATE_FSDP1,
    ACCELERATE_FSDP2,
    ACCELERATE_ZERO,
    PLAIN_ZERO2,
    changed,
)


def planned(folder: Path, config: dict[str, Any], **words: Any) -> tuple[Question, Plan]:
    (folder / "accelerate.yaml").write_text(yaml.safe_dump(config))
    return plan_of("Qwen2.5-1.5B", gpu="A100-80GB", config=str(folder / "accelerate.yaml"), **words)


def test_without_a_json_every_bucket_has_deepspeed_s_default(tmp_path: Path) -> None:
    """``DeepSpeedPlugin`` makes a JSON of stage and offload alone; nothing follows the model's width."""
    question, plan = planned(tmp_path, ACCELERATE_ZERO)

    assert plan.strategy is Strategy.ZERO3
    assert (plan.gpus, question.job.precision) == (8, "bf16")
    assert plan.zero == ZeroSettings(overlap_communication=True)
    assert not question.warnings


def test_the_block_s_offload_stage_and_accumulation(tmp_path: Path) -> None:
    config = changed(ACCELERATE_ZERO, "deepspeed_config.zero_stage", 2)
    config = changed(config, "deepspeed_config.offload_optimizer_device", "cpu")
    config = changed(config, "deepspeed_config.gradient_accumulation_steps", 4)

    question, plan = planned(tmp_path, config)

    assert (plan.strategy, plan.offload, plan.accumulation_steps) == (Strategy.ZERO2, Offload.OPTIMIZER, 4)
    sources = {each.name: each.source for each in question.inputs}
    assert sources["strategy"] == "accelerate.yaml: deepspeed_config.zero_stage"
    assert sources["offload"] == "accelerate.yaml: deepspeed_config.offload_optimizer_device"
    assert sources["grad_accum"] == "accelerate.yaml: deepspeed_config.gradient_accumulation_steps"


def test_a_json_that_the_file_names_is_read_beside_it(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(PLAIN_ZERO2))
    config = changed(changed(ACCELERATE_ZERO, "deepspeed_config", None), "mixed_precision", None)
    config = changed(config, "deepspeed_config.deepspeed_config_file", "ds.json")

    _, plan = planned(tmp_path, config)

    assert (plan.strategy, plan.gpus, plan.zero.reduce_bucket) == (Strategy.ZERO2, 8, 200_000_000)


@pytest.mark.parametrize(("key", "value"), [("mixed_precision", "bf16"), ("deepspeed_config.zero_stage", 2)])
def test_what_accelerate_refuses_beside_a_json_is_refused(key: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(PLAIN_ZERO2))
    config = changed(changed(ACCELERATE_ZERO, "deepspeed_config", None), "mixed_precision", None)
    config = changed(config, "deepspeed_config.deepspeed_config_file", "ds.json")

    with pytest.raises(ConfigError, match=rf"accelerate.yaml: {key} stands beside .* which accelerate refuses"):
        planned(tmp_path, changed(config, key, value))


def test_a_json_that_is_not_there_is_told(tmp_path: Path) -> None:
    config = {"distributed_type": "DEEPSPEED", "deepspeed_config": {"deepspeed_config_file": "nowhere.json"}}

    with pytest.raises(ConfigError, match=r"nowhere\.json, which accelerate\.yaml names, cannot be read"):
        planned(tmp_path, config)


def test_fsdp_2(tmp_path: Path) -> None:
    question, plan = planned(tmp_path, ACCELERATE_FSDP2)

    assert (plan.strategy, plan.fsdp, plan.checkpointing) == (Strategy.FSDP, FsdpSettings(), Checkpointing.FULL)
    assert not question.warnings
    assert planned(tmp_path, changed(ACCELERATE_FSDP2, "fsdp_config.fsdp_reshard_after_forward", False))[
        1
    ].strategy is (Strategy.FSDP_GRAD_OP)


def test_keys_without_their_prefix_are_understood(tmp_path: Path) -> None:
    bare = {key.removeprefix("fsdp_"): value for key, value in ACCELERATE_FSDP2["fsdp_config"].items()}

    assert planned(tmp_path, {**ACCELERATE_FSDP2, "fsdp_config": bare})[1] == planned(tmp_path, ACCELERATE_FSDP2)[1]


def test_fsdp_is_of_the_first_version_unless_the_file_says_so(tmp_path: Path) -> None:
    question, plan = planned(tmp_path, ACCELERATE_FSDP1)

    assert (plan.strategy, plan.fsdp.version) == (Strategy.FSDP_GRAD_OP, 1)
    version = next(each for each in question.inputs if each.name == "fsdp_version")
    assert (version.origin, version.source) == ("default", "accelerate's default: fsdp_version 1")


@pytest.mark.parametrize(("sharding", "strategy"), [(1, Strategy.FSDP), ("2", Strategy.FSDP_GRAD_OP)])
def test_sharding_strategies_may_be_numbers(sharding: Any, strategy: Strategy, tmp_path: Path) -> None:
    config = changed(ACCELERATE_FSDP1, "fsdp_config.fsdp_sharding_strategy", sharding)

    assert planned(tmp_path, config)[1].strategy is strategy


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("fsdp_config.fsdp_offload_params", True),
        ("fsdp_config.fsdp_cpu_ram_efficient_loading", False),
        ("fsdp_config.fsdp_auto_wrap_policy", None),
        ("dynamo_config", {"dynamo_backend": "INDUCTOR"}),
        ("parallelism_config", {"parallelism_config_tp_size": 2}),
        ("mixed_precision", "fp8"),
    ],
)
def test_what_changes_memory_and_is_not_modelled_is_named(path: str, value: Any, tmp_path: Path) -> None:
    question, _ = planned(tmp_path, changed(ACCELERATE_FSDP2, path, value))

    assert any(f"accelerate.yaml: {path}" in warning for warning in question.warnings)


def test_replicas_make_hsdp(tmp_path: Path) -> None:
    mesh = {"parallelism_config_dp_replicate_size": 2, "parallelism_config_dp_shard_size": 4}
    config = changed(changed(ACCELERATE_FSDP2, "parallelism_config", mesh), "num_processes", 8)
    plan = planned(tmp_path, config)[1]

    assert (plan.strategy, plan.shard_ranks) == (Strategy.HSDP, 4)


def test_ddp_and_one_process(tmp_path: Path) -> None:
    question, plan = planned(
        tmp_path, {"distributed_type": "MULTI_GPU", "num_processes": 4, "num_machines": 2, "mixed_precision": "fp16"}
    )
    assert (plan.strategy, plan.gpus, question.cluster.nodes, question.job.precision) == (Strategy.DDP, 4, 2, "fp16")
    assert planned(tmp_path, {"distributed_type": "NO", "num_processes": 1})[0].job.precision == "fp32"


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        ("distributed_type", "MEGATRON_LM", "distributed_type MEGATRON_LM is not modelled"),
        ("distributed_type", "SPEED", "distributed_type must be one of NO, MULTI_GPU"),
        ("num_processes", 0, "num_processes must be a whole number of at least 1, got 0"),
        ("fsdp_config.fsdp_version", 3, "fsdp_config.fsdp_version must be 1 or 2, got 3"),
        ("fsdp_config.fsdp_reshard_after_forwards", True, "did you mean fsdp_reshard_after_forward"),
        ("use_cpu", True, "use_cpu is true"),
        ("mixed_precison", "bf16", "did you mean mixed_precision"),
    ],
)
def test_nonsense_is_told_with_file_and_key(path: str, value: Any, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        planned(tmp_path, changed(ACCELERATE_FSDP2, path, value))

    assert str(caught.value).startswith("accelerate.yaml: ")
    assert complaint in str(caught.value)


def test_a_file_that_names_no_strategy_needs_the_flag(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="does not say the strategy; give --strategy"):
        planned(tmp_path, {"num_processes": 2})


def test_every_key_of_accelerate_s_file_is_known() -> None:
    pytest.importorskip("accelerate")
    from dataclasses import fields

    from accelerate.commands.config.config_args import ClusterConfig

    read = {"distributed_type", "use_cpu", "num_processes", "num_machines", "mixed_precision"}
    read |= {"deepspeed_config", "fsdp_config", "dynamo_config"}
    assert {field.name for field in fields(ClusterConfig)} <= read | set(TOP_HARMLESS) | TOP_UNMODELLED.keys()


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        ("zero3", {"sp": 4}),
        ("zero1", {"sp": 2, "micro_batch": 2}),
        ("fsdp", {"cp": 4}),
        ("fsdp", {"cp": 8, "cp_exchange": "alltoall"}),
    ],
)
def test_a_file_that_cuts_sequences_is_read_as_it_was_written(
    strategy: str, words: dict[str, Any], tmp_path: Path
) -> None:
    asked: dict[str, Any] = {"gpus": 8, "gpu": "H100", "seq_len": 4096, "global_batch": 8}
    written = launch_files("Llama-3.2-1B", strategy=strategy, **asked, **words)
    for each in written.files:
        (tmp_path / each.name).write_text(each.text, encoding="utf-8")

    own = {"micro_batch": words.get("micro_batch", 1)} if strategy == "fsdp" else {}
    _, plan = plan_of("Llama-3.2-1B", config=str(tmp_path / "accelerate.yaml"), **asked, **own)
    _, again = plan_of("Llama-3.2-1B", strategy=strategy, **asked, **words)

    assert plan == again


def test_mics_is_refused_as_deepspeed_refuses_it(tmp_path: Path) -> None:
    path = tmp_path / "ds_config.json"
    path.write_text('{"zero_optimization": {"stage": 3, "mics_shard_size": 8}}')

    with pytest.raises(ConfigError, match="has removed MiCS"):
        plan_of("Llama-3.2-1B", config=str(path), gpus=8)
