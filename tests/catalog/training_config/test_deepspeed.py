"""DeepSpeed's JSON as DeepSpeed, accelerate and the Trainer resolve it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from advisor.catalog.training_config.deepspeed import (
    AIO_SIZES,
    OFFLOAD_HARMLESS,
    OFFLOAD_SIZES,
    OFFLOAD_UNMODELLED,
    SIZES,
    ZERO_HARMLESS,
    ZERO_PLUS,
    ZERO_UNMODELLED,
    from_deepspeed,
)
from advisor.catalog.training_config.settings import Settings
from advisor.cost.estimate import plan_of
from advisor.errors import AdvisorError, ConfigError, SpecError
from advisor.launch.deepspeed import deepspeed_json
from advisor.specs.plan import Offload, OffloadSettings, Plan, Strategy, ZeroSettings
from advisor.specs.question import Question
from catalog.training_config.examples import PLAIN_ZERO2, TRAINER_ZERO3, changed

MODEL, WIDTH = "Qwen2.5-1.5B", 1536


def read(config: dict[str, Any]) -> Settings:
    return from_deepspeed("ds.json", config)


def planned(folder: Path, config: dict[str, Any], **words: Any) -> tuple[Question, Plan]:
    (folder / "ds.json").write_text(json.dumps(config))
    return plan_of(MODEL, gpu="A100-80GB", config=str(folder / "ds.json"), **words)


def test_auto_buckets_follow_the_model_s_width(tmp_path: Path) -> None:
    """transformers 5.23, integrations/deepspeed.py ``trainer_config_finalize``."""
    _, plan = planned(tmp_path, TRAINER_ZERO3, gpus=4)

    assert plan.strategy is Strategy.ZERO3
    assert plan.zero == ZeroSettings(
        reduce_bucket=WIDTH * WIDTH,
        prefetch_bucket=int(0.9 * WIDTH * WIDTH),
        persistence_threshold=10 * WIDTH,
        overlap_communication=True,
    )


def test_the_parts_of_zero_plus_plus_are_read(tmp_path: Path) -> None:
    parts = {"stage": 3, "zero_hpz_partition_size": 4, "zero_quantized_weights": True}
    config = {"train_batch_size": 8, "fp16": {"enabled": True}, "zero_optimization": parts}
    _, two = planned(tmp_path, config, gpus=8, nodes=2)
    _, three = planned(
        tmp_path, changed(config, "zero_optimization.zero_quantized_gradients", True), gpus=8, nodes=2, global_batch=16
    )

    assert two.strategy is three.strategy is Strategy.ZERO3_PLUS
    assert two.title == "ZeRO++ hpZ 4, qwZ"
    assert three.zero == replace(two.zero, quantized_gradients=True)
    assert three.zero.machine_gpus == 4


def test_zero_plus_plus_that_is_switched_off_is_stage_3(tmp_path: Path) -> None:
    parts = {"stage": 3, "zero_hpz_partition_size": 1, "zero_quantized_weights": False}
    _, plan = planned(tmp_path, {"train_batch_size": 8, "zero_optimization": parts}, gpus=8)

    assert plan.strategy is Strategy.ZERO3


def test_a_flag_for_stage_3_leaves_zero_plus_plus_out(tmp_path: Path) -> None:
    config = {"train_batch_size": 8, "zero_optimization": {"stage": 3, "zero_hpz_partition_size": 4}}
    question, plan = planned(tmp_path, config, gpus=8, strategy="zero3")

    assert plan.zero == ZeroSettings(overlap_communication=True)
    assert any("--strategy zero3 wins over zero3++" in warning for warning in question.warnings)


def test_stages_below_3_pass_over_zero_plus_plus() -> None:
    (warning,) = read({"zero_optimization": {"stage": 2, "zero_hpz_partition_size": 4}}).warnings

    key = "ds.json: zero_optimization.zero_hpz_partition_size"
    assert warning == f"{key} takes part in stage 3 alone; stage 2 passes over it"


def test_bf16_gradients_that_deepspeed_would_read_as_fp16_are_refused(tmp_path: Path) -> None:
    parts = {"stage": 3, "zero_quantized_gradients": True}
    config = {"train_batch_size": 8, "bf16": {"enabled": True}, "zero_optimization": parts}

    with pytest.raises(SpecError, match=r"quantises gradients in bf16 as if they were fp16.*zero_quantized_gradients"):
        planned(tmp_path, config, gpus=8)


def test_absent_keys_have_deepspeed_s_defaults(tmp_path: Path) -> None:
    _, plan = planned(tmp_path, {"train_batch_size": 8, "zero_optimization": {"stage": 2}}, gpus=4)

    assert plan.zero == ZeroSettings()
    assert (plan.micro_batch, plan.accumulation_steps) == (2, 1)


def test_communication_overlaps_by_default_in_stage_3_alone() -> None:
    overlaps = {
        stage: read({"zero_optimization": {"stage": stage}}).found["overlap_communication"].value for stage in range(4)
    }

    assert overlaps == {0: False, 1: False, 2: False, 3: True}


def test_a_tutorial_s_file_is_understood(tmp_path: Path) -> None:
    """``cpu_offload``, which DeepSpeed still takes, and a bucket in quotes."""
    question, plan = planned(tmp_path, PLAIN_ZERO2, gpus=8)

    assert (plan.strategy, plan.offload, plan.offload_to) == (Strategy.ZERO2, Offload.OPTIMIZER, "cpu")
    assert plan.zero == ZeroSettings(reduce_bucket=200_000_000, overlap_communication=True)
    assert (plan.micro_batch, plan.accumulation_steps, question.job.global_batch) == (4, 2, 64)
    assert (question.job.precision, question.job.optimizer) == ("bf16", "adamw-fused")


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"train_batch_size": 32, "train_micro_batch_size_per_gpu": 2}, (2, 4, 32)),
        ({"train_batch_size": 32, "gradient_accumulation_steps": 2}, (4, 2, 32)),
        ({"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3}, (2, 3, 24)),
        ({"train_batch_size": 32}, (8, 1, 32)),
        ({"train_micro_batch_size_per_gpu": 2}, (2, 1, 8)),
    ],
)
def test_missing_batch_sizes_follow_as_in_deepspeed(
    sizes: dict[str, int], expected: tuple[int, int, int], tmp_path: Path
) -> None:
    """deepspeed 0.19.8, runtime/config.py ``_set_batch_related_parameters``."""
    question, plan = planned(tmp_path, {"zero_optimization": {"stage": 2}, **sizes}, gpus=4)

    assert (plan.micro_batch, plan.accumulation_steps, question.job.global_batch) == expected


def test_the_gpu_count_follows_from_all_three_batch_sizes(tmp_path: Path) -> None:
    config = changed(PLAIN_ZERO2, "gradient_accumulation_steps", 2)

    assert planned(tmp_path, config)[1].gpus == 8


def test_batch_sizes_that_disagree_are_told_with_their_values(tmp_path: Path) -> None:
    config = changed(PLAIN_ZERO2, "gradient_accumulation_steps", 3)

    with pytest.raises(ConfigError, match=r"global_batch 64 .*train_batch_size\) is not 8 GPUs x .* = 96"):
        planned(tmp_path, config, gpus=8)


@pytest.mark.parametrize(
    ("blocks", "precision", "param_dtype", "gradients"),
    [
        ({"bf16": {"enabled": True}}, "bf16", "fp32", None),
        ({"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}, "bf16", "fp32", "fp32"),
        ({"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "bf16"}}, "bf16", "fp32", None),
        ({"fp16": {"enabled": True}}, "fp16", "fp32", None),
        ({"fp16": {"enabled": False}}, "fp32", "fp32", None),
        ({}, "fp32", "fp32", None),
        (
            {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}},
            "bf16",
            "bf16",
            None,
        ),
    ],
)
def test_number_formats(
    blocks: dict[str, Any], precision: str, param_dtype: str, gradients: str | None, tmp_path: Path
) -> None:
    config = {"train_batch_size": 8, "zero_optimization": {"stage": 2}, **blocks}

    question, plan = planned(tmp_path, config, gpus=4)

    assert (question.job.precision, question.job.parameter_format) == (precision, param_dtype)
    assert plan.zero.gradient_format == gradients


def test_flags_win_and_say_so(tmp_path: Path) -> None:
    question, plan = planned(tmp_path, PLAIN_ZERO2, gpus=8, bucket_size=1000, micro_batch=2)

    assert plan.zero.reduce_bucket == 1000
    assert (plan.micro_batch, plan.accumulation_steps) == (2, 4)
    assert "--micro-batch 2 wins over 4 of ds.json: train_micro_batch_size_per_gpu" in question.warnings
    assert (
        "--bucket-size 1000 wins over 200000000 of ds.json: zero_optimization.reduce_bucket_size" in question.warnings
    )


def test_another_stage_by_flag_takes_its_own_defaults(tmp_path: Path) -> None:
    _, plan = planned(tmp_path, {"train_batch_size": 8, "zero_optimization": {"stage": 2}}, gpus=4, strategy="zero3")

    assert plan.zero == ZeroSettings(overlap_communication=True)


def test_each_setting_shows_where_it_comes_from(tmp_path: Path) -> None:
    question, _ = planned(tmp_path, TRAINER_ZERO3, gpus=4)

    shown = {each.name: (each.origin, each.source) for each in question.inputs}
    assert shown["gpus"] == ("given", "")
    assert shown["strategy"] == ("file", "ds.json: zero_optimization.stage")
    assert shown["reduce_bucket"] == (
        "file",
        "ds.json: zero_optimization.reduce_bucket_size auto, for a width of 1536",
    )
    assert shown["offload"] == ("default", "DeepSpeed's default")
    assert shown["gpu"] == ("given", "")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (f"zero_optimization.{key}", value)
        for key, value in (("round_robin_gradients", True), ("zero_quantized_nontrainable_weights", True))
    ]
    + [
        ("zero_optimization.offload_optimizer", {"device": "cpu", "ratio": 0.5}),
        ("activation_checkpointing.cpu_checkpointing", True),
        ("torch_autocast.enabled", True),
        ("optimizer.type", "OneBitAdam"),
        ("bf16.immediate_grad_update", True),
    ],
)
def test_what_changes_memory_and_is_not_modelled_is_named(path: str, value: Any) -> None:
    config = changed(PLAIN_ZERO2, path, value)
    key = f"{path}.ratio" if isinstance(value, dict) else path

    assert any(f"ds.json: {key}" in warning and "not modelled" in warning for warning in read(config).warnings)
    assert not any("not modelled" in warning for warning in read(PLAIN_ZERO2).warnings)


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        (
            "zero_optimization.reduce_bucket_siz",
            1,
            "reduce_bucket_siz is not a known key; did you mean reduce_bucket_size",
        ),
        ("zero_optimisation", {}, "zero_optimisation is not a known key; did you mean zero_optimization"),
        ("zero_optimization.stage", 4, "zero_optimization.stage must be 0, 1, 2 or 3, got 4"),
        (
            "zero_optimization.reduce_bucket_size",
            "big",
            "reduce_bucket_size must be a whole number of at least 1, got 'big'",
        ),
        ("zero_optimization.overlap_comm", 7, "overlap_comm must be true or false, got 7"),
        ("zero_optimization", 2, "ds.json: zero_optimization must be a mapping of keys to values, got int '2'"),
        ("train_batch_size", True, "train_batch_size must be a whole number of at least 1, got True"),
        ("fp16.enabled", True, "bf16.enabled and ds.json: fp16.enabled are both true"),
        ("data_types.grad_accum_dtype", "int8", "grad_accum_dtype must be one of fp32"),
        (
            "zero_optimization.offload_optimizer",
            {"device": "disk"},
            "device must be one of none, cpu, nvme, got 'disk'",
        ),
    ],
)
def test_nonsense_is_told_with_file_and_key(path: str, value: Any, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(changed(PLAIN_ZERO2, path, value))

    assert str(caught.value).startswith("ds.json: ")
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[1]", '{"bf16": {}, "bf16": {}}', "\0"])
def test_a_file_that_is_no_mapping_is_told(text: str, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(text)

    with pytest.raises(AdvisorError, match=r"ds\.json"):
        plan_of(MODEL, config=str(tmp_path / "ds.json"))


def test_every_key_of_deepspeed_s_zero_block_is_known() -> None:
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    def names(kind: Any) -> set[str]:
        return {field.alias or name for name, field in kind.model_fields.items()} | set(kind.model_fields)

    read_keys = {key for keys in SIZES.values() for key in keys}
    read_keys |= set(ZERO_PLUS.values())
    read_keys |= {"stage", "overlap_comm", "offload_param", "offload_optimizer", "cpu_offload", "cpu_offload_param"}
    assert names(DeepSpeedZeroConfig) - read_keys == ZERO_UNMODELLED.keys() | set(ZERO_HARMLESS)
    offload = names(DeepSpeedZeroOffloadOptimizerConfig) | names(DeepSpeedZeroOffloadParamConfig)
    sizes = {key for keys in OFFLOAD_SIZES.values() for key in keys}
    read_ones = {"device", "pin_memory", "nvme_path"} | sizes
    assert offload - read_ones == OFFLOAD_UNMODELLED.keys() | set(OFFLOAD_HARMLESS)


def test_every_key_that_deepspeed_asks_for_is_known() -> None:
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.config import DeepSpeedConfig

    asked: set[str] = set()

    class Noting(dict[str, Any]):
        def get(self, key: Any, default: Any = None) -> Any:
            asked.add(key)
            return super().get(key, default)

        def __contains__(self, key: object) -> bool:
            asked.add(str(key))
            return super().__contains__(key)

    DeepSpeedConfig(Noting(train_batch_size=1, zero_optimization={"stage": 2}))

    assert len(asked) > 50
    for key in asked:
        read({key: None})


def test_the_defaults_are_deepspeed_s_own() -> None:
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    blocks = {
        "offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        "offload_param": DeepSpeedZeroOffloadParamConfig,
    }
    theirs, ours = DeepSpeedZeroConfig(), ZeroSettings()
    for name, keys in SIZES.items():
        field = keys[-1]
        assert getattr(theirs, field) == getattr(ours, name), field
    for block, kind in blocks.items():
        for key, name in OFFLOAD_SIZES[block].items():
            assert getattr(OffloadSettings(), name) == kind.model_fields[key].default, key
        assert kind.model_fields["pin_memory"].default == OffloadSettings().pins
    for key, name in AIO_SIZES.items():
        assert getattr(OffloadSettings(), name) == AIO_DEFAULT_DICT[key], key
    for key, usual in ZERO_UNMODELLED.items():
        if usual is not None and hasattr(theirs, key):
            assert getattr(theirs, key) == usual, key


NVME_ZERO3: dict[str, Any] = {
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "nvme", "nvme_path": "/scratch", "buffer_count": 6, "pin_memory": False},
        "offload_param": {"device": "nvme", "nvme_path": "/scratch", "buffer_size": 2e8, "max_in_cpu": 0},
    },
    "aio": {"block_size": 262144, "queue_depth": 32, "intra_op_parallelism": 2},
    "train_micro_batch_size_per_gpu": 1,
}


def test_an_nvme_and_its_buffers_are_read_and_no_longer_warned_of(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(NVME_ZERO3))
    question, plan = plan_of(MODEL, config=str(tmp_path / "ds.json"), gpus=8, gpu="A100-80GB")

    assert plan.swaps
    assert plan.offload.parameters
    assert plan.offload_settings == OffloadSettings(
        pins=False,
        nvme_path="/scratch",
        optimizer_buffers=6,
        parameter_buffer=200_000_000,
        max_in_host=0,
        block_bytes=262144,
        threads=2,
    )
    assert not any("NVMe" in warning or "nvme" in warning for warning in question.warnings)
    assert any(each.name == "nvme_gib" and each.origin == "assumed" for each in question.inputs)


@pytest.mark.parametrize("stage", [1, 2])
def test_stages_that_keep_the_optimizer_in_host_memory_whatever_is_said(stage: int, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(
        json.dumps({"zero_optimization": {"stage": stage, "offload_optimizer": {"device": "nvme"}}})
    )
    question, plan = plan_of(MODEL, config=str(tmp_path / "ds.json"), gpus=2, gpu="A100-80GB")

    assert (plan.offload, plan.offload_to) == (Offload.OPTIMIZER, "cpu")
    assert any(f"stage {stage} keeps the optimizer in host memory" in warning for warning in question.warnings)


def test_what_is_written_for_an_nvme_is_read_again(tmp_path: Path) -> None:
    words: dict[str, Any] = {"gpus": 8, "gpu": "A100-80GB", "nvme": 4000.0}
    asked, plan = plan_of(
        MODEL, strategy="zero3", offload="optimizer+params", offload_to="nvme", global_batch=64, **words
    )
    (tmp_path / "ds.json").write_text(deepspeed_json(asked.job, plan))

    again, read_plan = plan_of(MODEL, config=str(tmp_path / "ds.json"), **words)
    assert read_plan == plan
    assert again.cluster == asked.cluster
