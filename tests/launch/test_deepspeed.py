"""The DeepSpeed JSON says what the plan says, and DeepSpeed and accelerate read it so."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings

from advisor.launch.deepspeed import ADAMW, GRADIENT_CLIPPING, deepspeed_json
from advisor.specs.job import Job
from advisor.specs.plan import Offload, OffloadSettings, Plan, Strategy, ZeroSettings
from launch.examples import jobs, plan, zero_plans

UNUSUAL = ZeroSettings(
    reduce_bucket=11_000_000,
    prefetch_bucket=12_000_000,
    persistence_threshold=13_000,
    max_live_parameters=14_000_000,
    max_reuse_distance=15_000_000,
    sub_group=16_000_000,
    overlap_communication=True,
)
CASES = {
    "zero1": plan(Strategy.ZERO1, gpus=3, zero=UNUSUAL),
    "zero2": plan(Strategy.ZERO2, gpus=3, zero=UNUSUAL),
    "zero2-offload": plan(Strategy.ZERO2, gpus=3, zero=UNUSUAL, offload=Offload.OPTIMIZER),
    "zero3": plan(Strategy.ZERO3, gpus=3, zero=UNUSUAL),
    "zero3-offload": plan(Strategy.ZERO3, gpus=3, zero=UNUSUAL, offload=Offload.OPTIMIZER),
    "zero3-offload-all": plan(Strategy.ZERO3, gpus=3, zero=UNUSUAL, offload=Offload.OPTIMIZER_AND_PARAMETERS),
}
CASES |= {
    "zero3++": plan(
        Strategy.ZERO3_PLUS,
        gpus=3,
        zero=replace(UNUSUAL, hpz_partition=3, quantized_weights=True, quantized_gradients=True),
    ),
    "zero1-offload": plan(Strategy.ZERO1, gpus=3, zero=UNUSUAL, offload=Offload.OPTIMIZER),
    "zero3-nvme": plan(
        Strategy.ZERO3, gpus=3, zero=UNUSUAL, offload=Offload.OPTIMIZER_AND_PARAMETERS, offload_to="nvme"
    ),
}
each_case = pytest.mark.parametrize("chosen", CASES.values(), ids=CASES)


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for each in value.values() for leaf in leaves(each)]
    return [leaf for each in value for leaf in leaves(each)] if isinstance(value, list) else [value]


@given(job=jobs(), chosen=zero_plans())
@settings(deadline=None)
def test_no_value_is_left_to_the_reader_and_the_batch_adds_up(job: Job, chosen: Plan) -> None:
    written = json.loads(deepspeed_json(job, chosen))

    assert "auto" not in leaves(written)
    assert None not in leaves(written)
    assert written["train_batch_size"] == chosen.global_batch
    assert (
        written["train_micro_batch_size_per_gpu"] * written["gradient_accumulation_steps"] * chosen.gpus
        == chosen.global_batch
    )
    assert written["bf16"]["enabled"] + written["fp16"]["enabled"] == (job.precision != "fp32")


@each_case
def test_deepspeed_reads_the_sizes_of_the_plan(chosen: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    config_module = pytest.importorskip("deepspeed.runtime.config")

    class ThreeRanks:
        get_rank = staticmethod(lambda: 0)
        get_world_size = staticmethod(lambda: 3)

    monkeypatch.setattr(config_module, "dist", ThreeRanks)

    config = config_module.DeepSpeedConfig(json.loads(deepspeed_json(Job(precision="bf16"), chosen)))

    assert (config.train_batch_size, config.train_micro_batch_size_per_gpu) == (12, 2)
    assert config.gradient_accumulation_steps == 2
    assert config.gradient_clipping == GRADIENT_CLIPPING
    assert config.bfloat16_config.enabled
    assert not config.float16_config.enabled
    assert config.grad_accum_dtype == "bf16"
    zero = config.zero_config
    assert int(zero.stage) == chosen.strategy.zero_stage
    assert zero.reduce_bucket_size == UNUSUAL.reduce_bucket
    assert zero.overlap_comm is True
    assert zero.zero_hpz_partition_size == chosen.zero.hpz_partition
    assert zero.zero_quantized_weights == chosen.zero.quantized_weights
    assert zero.zero_quantized_gradients == chosen.zero.quantized_gradients
    if chosen.strategy.zero_stage == 3:
        assert zero.prefetch_bucket_size == UNUSUAL.prefetch_bucket
        assert zero.param_persistence_threshold == UNUSUAL.persistence_threshold
        assert zero.max_live_parameters == UNUSUAL.max_live_parameters
        assert zero.max_reuse_distance == UNUSUAL.max_reuse_distance
        assert zero.sub_group_size == UNUSUAL.sub_group
        assert zero.gather_16bit_weights_on_model_save
    assert _device(zero.offload_optimizer) == (chosen.offload_to if chosen.offload.optimizer else None)
    assert _device(zero.offload_param) == (chosen.offload_to if chosen.offload.parameters else None)
    assert config.optimizer_name == ("adamw" if chosen.offload.optimizer else None)


def test_deepspeed_reads_where_the_nvme_is_and_its_buffers() -> None:
    config_module = pytest.importorskip("deepspeed.runtime.zero.config")
    from deepspeed.runtime.swap_tensor.aio_config import get_aio_config

    held = OffloadSettings(nvme_path="/scratch", parameter_buffers=7, parameter_buffer=8, max_in_host=9, threads=2)
    chosen = replace(CASES["zero3-nvme"], offload_settings=replace(held, optimizer_buffers=6, pins=False))
    written = json.loads(deepspeed_json(Job(), chosen))
    zero = config_module.DeepSpeedZeroConfig(**written["zero_optimization"])
    aio = get_aio_config(written)

    assert str(zero.offload_optimizer.nvme_path) == str(zero.offload_param.nvme_path) == "/scratch"
    assert (zero.offload_optimizer.buffer_count, zero.offload_param.buffer_count) == (6, 7)
    assert (zero.offload_param.buffer_size, zero.offload_param.max_in_cpu) == (8, 9)
    assert not zero.offload_optimizer.pin_memory
    assert (aio["block_size"], aio["intra_op_parallelism"]) == (held.block_bytes, 2)


def test_without_nvme_no_file_is_spoken_of() -> None:
    written = json.loads(deepspeed_json(Job(), CASES["zero3-offload-all"]))

    assert "aio" not in written
    assert written["zero_optimization"]["offload_param"] == {"device": "cpu", "pin_memory": True}


def _device(offload: Any) -> str | None:
    return str(offload.device) if offload else None


@given(job=jobs(), chosen=zero_plans())
@settings(deadline=None)
def test_deepspeed_knows_every_key_of_its_zero_block(job: Job, chosen: Plan) -> None:
    config_module = pytest.importorskip("deepspeed.runtime.zero.config")
    block = json.loads(deepspeed_json(job, chosen))["zero_optimization"]

    read = config_module.DeepSpeedZeroConfig(**block)

    assert not read.model_extra
    assert read.model_dump(by_alias=True, exclude_unset=True, mode="json").items() >= _flat(block).items()


def _flat(block: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in block.items() if not isinstance(value, dict)}


@each_case
def test_accelerate_takes_stage_and_batch_from_the_file(chosen: Plan) -> None:
    utils = pytest.importorskip("accelerate.utils")
    pytest.importorskip("deepspeed")

    plugin = utils.DeepSpeedPlugin(hf_ds_config=json.loads(deepspeed_json(Job(precision="bf16"), chosen)))

    assert plugin.zero_stage == chosen.strategy.zero_stage
    assert plugin.gradient_accumulation_steps == 2
    assert plugin.gradient_clipping == GRADIENT_CLIPPING
    assert not any(plugin.is_auto(f"zero_optimization.{key}") for key in ("reduce_bucket_size", "stage"))


def test_fp16_scales_its_loss_and_fp32_enables_neither_half_format() -> None:
    half = json.loads(deepspeed_json(Job(precision="fp16"), plan(Strategy.ZERO2)))
    full = json.loads(deepspeed_json(Job(precision="fp32"), plan(Strategy.ZERO2)))

    assert half["fp16"]["enabled"]
    assert half["fp16"]["loss_scale"] == 0  # dynamic
    assert not half["bf16"]["enabled"]
    assert not full["fp16"]["enabled"]
    assert not full["bf16"]["enabled"]
    assert full["data_types"] == {"grad_accum_dtype": "fp32"}


def test_pure_bf16_keeps_masters_and_moments_in_bf16() -> None:
    written = json.loads(deepspeed_json(Job(parameter_format="bf16"), plan(Strategy.ZERO2)))

    assert written["bf16"] == {
        "enabled": True,
        "bf16_master_weights_and_grads": True,
        "bf16_optimizer_states": True,
    }


@given(job=jobs(), chosen=zero_plans())
@settings(deadline=None, max_examples=40)
def test_what_is_left_auto_is_what_transformers_trainer_fills_in_again(job: Job, chosen: Plan) -> None:
    integration = pytest.importorskip("transformers.integrations.deepspeed")
    pytest.importorskip("deepspeed")
    arguments = SimpleNamespace(
        world_size=int(chosen.gpus),
        per_device_train_batch_size=int(chosen.micro_batch),
        gradient_accumulation_steps=int(chosen.accumulation_steps),
        max_grad_norm=GRADIENT_CLIPPING,
        learning_rate=ADAMW["lr"],
        adam_beta1=ADAMW["betas"][0],
        adam_beta2=ADAMW["betas"][1],
        adam_epsilon=ADAMW["eps"],
        weight_decay=ADAMW["weight_decay"],
        save_on_each_node=False,
        fp16=job.precision == "fp16",
        bf16=job.precision == "bf16",
        fp16_full_eval=False,
        bf16_full_eval=False,
    )
    written = json.loads(deepspeed_json(job, chosen, keep_auto=True))
    assert leaves(written).count("auto") == (10 if chosen.offload.optimizer else 6)

    config = integration.HfTrainerDeepSpeedConfig(written)
    config.trainer_config_process(arguments)

    assert config.config == json.loads(deepspeed_json(job, chosen))
    assert config.mismatches == []
