"""DeepSpeed's JSON, each key as deepspeed 0.19.8 resolves it (runtime/config.py, precision_config.py, zero/config.py).

``auto`` is a word of transformers and accelerate, which fill it before DeepSpeed sees the file
(transformers 5.23, integrations/deepspeed.py ``trainer_config_process``, ``trainer_config_finalize``; accelerate 1.15,
accelerator.py ``_prepare_deepspeed``): batch sizes and formats from the trainer's arguments, three bucket sizes from
the model's width. In any other key DeepSpeed drops it and takes its default.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from advisor.catalog.training_config.settings import AUTO, Setting, Settings, Table
from advisor.errors import ConfigError
from advisor.specs.plan import ZeroSettings

DEFAULT = "DeepSpeed's default"

SIZES: dict[str, tuple[str, ...]] = {
    "reduce_bucket": ("reduce_bucket_size",),
    "prefetch_bucket": ("stage3_prefetch_bucket_size", "prefetch_bucket_size"),
    "persistence_threshold": ("stage3_param_persistence_threshold", "param_persistence_threshold"),
    "max_live_parameters": ("stage3_max_live_parameters", "max_live_parameters"),
    "max_reuse_distance": ("stage3_max_reuse_distance", "max_reuse_distance"),
    "sub_group": ("sub_group_size",),
}
"""Fields of the plan's ZeRO settings and the keys they are read from: zero/config.py gives some two names."""

WIDTH_SIZES = ("reduce_bucket", "prefetch_bucket", "persistence_threshold")
"""Those whose ``auto`` is filled from the model's width."""

STAGE3_SIZES = tuple(name for name in SIZES if name != "reduce_bucket")

ZERO_PLUS = {
    "hpz_partition": "zero_hpz_partition_size",
    "quantized_weights": "zero_quantized_weights",
    "quantized_gradients": "zero_quantized_gradients",
}
"""Fields of the plan's ZeRO settings that make stage 3 ZeRO++, and their keys."""

FORMATS = {"fp32": "fp32", "float32": "fp32", "float": "fp32", "fp16": "fp16", "float16": "fp16", "half": "fp16"} | {
    "bf16": "bf16",
    "bfloat16": "bf16",
}

FP16_HARMLESS = (
    "auto_cast",
    "loss_scale",
    "initial_scale_power",
    "loss_scale_window",
    "hysteresis",
    "consecutive_hysteresis",
    "min_loss_scale",
    "opt_level",
)

ZERO_UNMODELLED: dict[str, Any] = {
    "contiguous_gradients": True,
    "reduce_scatter": True,
    "use_multi_rank_bucket_allreduce": True,
    "round_robin_gradients": False,
    "parameter_alignment": False,
    "legacy_stage1": False,
    "compute_grad_norm": True,
    "zenflow": None,
    "zero_quantized_nontrainable_weights": False,
    "memory_efficient_linear": True,
    "stage3_model_persistence_threshold": None,
    "model_persistence_threshold": None,
    "stage3_module_granularity_threshold": 0,
    "module_granularity_threshold": 0,
    "stage3_use_all_reduce_for_fetch_params": False,
    "use_all_reduce_for_fetch_params": False,
    "stage3_allgather_sequential": False,
    "allgather_sequential": False,
    "leaf_module": None,
}
"""Keys of ``zero_optimization`` that change memory or traffic, with the value that the model of the step has."""

ZERO_HARMLESS = (
    "allgather_partitions",
    "allgather_bucket_size",
    "load_from_fp32_weights",
    "elastic_checkpoint",
    "cpu_offload_use_pin_memory",
    "stage3_gather_16bit_weights_on_model_save",
    "gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save",
    "ignore_unused_parameters",
    "pipeline_loading_checkpoint",
    "override_module_apply",
    "log_trace_cache_warnings",
    "enable_sanity_checks",
    "save_muon_momentum_buffer_in_memory",
)
"""Keys that leave a step's memory and traffic as they are; ``allgather_bucket_size`` because torch gathers into the
flat weights in one call (runtime/utils.py ``all_gather_dp_groups``)."""

OFFLOAD_UNMODELLED: dict[str, Any] = {
    "ratio": 1.0,
    "super_offload": False,
    "pipeline_read": False,
    "pipeline_write": False,
}
OFFLOAD_HARMLESS = ("fast_init", "cpuadam_cores_perc")
OFFLOAD_SIZES: dict[str, dict[str, str]] = {
    "offload_optimizer": {"buffer_count": "optimizer_buffers"},
    "offload_param": {
        "buffer_count": "parameter_buffers",
        "buffer_size": "parameter_buffer",
        "max_in_cpu": "max_in_host",
    },
}
"""Keys of the two blocks and the fields of the plan's offload settings that they are read to."""
AIO_SIZES = {"block_size": "block_bytes", "intra_op_parallelism": "threads"}
AIO_HARMLESS = ("queue_depth", "single_submit", "overlap_events", "use_gds")

TOP_UNMODELLED: dict[str, Any] = {
    "communication_data_type": None,
    "seq_parallel_communication_data_type": None,
    "sparse_gradients": False,
    "sparse_attention": None,
    "pipeline": None,
    "expert_parallel": None,
    "zero_force_ds_cpu_optimizer": True,
    "managed_gradient_accumulation": None,
    "weight_quantization": None,
    "quantize_training": None,
    "compression_training": None,
    "hybrid_engine": None,
    "progressive_layer_drop": None,
    "msamp": None,
}
TOP_UNMODELLED_BLOCKS: dict[str, dict[str, Any]] = {
    "amp": {"enabled": False},
    "torch_autocast": {"enabled": False},
    "tensor_parallel": {"autotp_size": 0},
    "compile": {"deepcompile": False},
    "activation_checkpointing": {
        "partition_activations": False,
        "cpu_checkpointing": False,
        "contiguous_memory_optimization": False,
    },
}
"""Blocks of which some keys change memory, with the values that the model of the step has."""

TOP_HARMLESS = (
    "$schema",
    "_comment",
    "autotuning",
    "checkpoint",
    "comms_logger",
    "csv_monitor",
    "curriculum_learning",
    "data_efficiency",
    "dataloader_drop_last",
    "data_parallel_group",
    "datastates_ckpt",
    "disable_allgather",
    "disable_python_gc",
    "dump_state",
    "elasticity",
    "eigenvalue",
    "flops_profiler",
    "gradient_allreduce_op",
    "gradient_clipping",
    "gradient_predivide_factor",
    "graph_harvesting",
    "log_level",
    "memory_breakdown",
    "monitor_config",
    "nebula",
    "prescale_gradients",
    "scheduler",
    "steps_per_print",
    "timers",
    "tensorboard",
    "use_data_before_expert_parallelism",
    "vocabulary_size",
    "wall_clock_breakdown",
    "wandb",
    "comet",
    "zero_allow_untested_optimizer",
)

FUSED_TYPES = ("adam", "adamw")
"""``optimizer.type`` that DeepSpeed builds FusedAdam from, or DeepSpeedCPUAdam for an optimizer on the host
(runtime/engine.py ``_configure_basic_optimizer``)."""


REMOVED = {
    "mics_shard_size": "deepspeed 0.19.8 has removed MiCS; hsdp cuts states over the GPUs of a machine as it did",
    "mics_hierarchical_params_gather": "deepspeed 0.19.8 has removed MiCS; take the key out",
    "zeropp_loco_param": "deepspeed 0.19.8 has removed LoCo; take the key out",
}
"""Keys of ``zero_optimization`` that DeepSpeed refuses (runtime/config.py ``_REMOVED_ZERO_CONFIG_KEYS``)."""


def from_deepspeed(file: str, held: Any, places: Mapping[str, str] | None = None) -> Settings:
    """What DeepSpeed makes of the mapping *held* of a JSON *file*, of which *places* says what stands elsewhere."""
    top = Table(file, held, places=places)
    found: dict[str, Setting] = {}
    warnings: list[str] = []
    _batch(top, found)
    _formats(top, found, warnings)
    zero = top.table("zero_optimization")
    _zero(zero, found, warnings)
    _aio(top.table("aio"), found)
    warnings += _optimizer(top, found)
    warnings += top.not_modelled(TOP_UNMODELLED)
    for name, usual in TOP_UNMODELLED_BLOCKS.items():
        warnings += top.table(name).not_modelled(usual)
    top.refuse_others(TOP_HARMLESS)
    return Settings(found, tuple(warnings))


def _batch(top: Table, found: dict[str, Setting]) -> None:
    for name, key in (
        ("global_batch", "train_batch_size"),
        ("micro_batch", "train_micro_batch_size_per_gpu"),
        ("grad_accum", "gradient_accumulation_steps"),
        ("sp", "sequence_parallel_size"),
    ):
        value = top.count(key)
        if isinstance(value, int) and (name, value) != ("sp", 1):
            found[name] = Setting(value, top.place(key))


def _formats(top: Table, found: dict[str, Setting], warnings: list[str]) -> None:
    """Compute format, format of the optimizer's weights, and the gradients' where it is another than the model's."""
    half = top.table("bfloat16" if "bfloat16" in top and "bf16" not in top else "bf16")
    fp16 = top.table("fp16")
    top.raw("bfloat16")
    enabled = {"bf16": half.switch("enabled"), "fp16": fp16.switch("enabled")}
    if enabled["bf16"] is True and enabled["fp16"] is True:
        raise ConfigError(f"{half.place('enabled')} and {fp16.place('enabled')} are both true; enable one of them")
    for name, table in (("bf16", half), ("fp16", fp16)):
        if enabled[name] is True:
            found["precision"] = Setting(name, table.place("enabled"))
    if not found.get("precision") and AUTO not in enabled.values():
        written = [table for table, value in ((half, enabled["bf16"]), (fp16, enabled["fp16"])) if value is False]
        # Without a block accelerate adds one for the trainer's own format; DeepSpeed alone computes in fp32.
        said = Setting("fp32", written[0].place("enabled"), written=len(written) == 2) if written else None
        found["precision"] = said or Setting("fp32", DEFAULT, written=False)
    master = half.switch("bf16_master_weights_and_grads") is True
    states = half.switch("bf16_optimizer_states") is True
    if found.get("precision") and found["precision"].value == "bf16":
        if master and states:
            found["param_dtype"] = Setting("bf16", half.place("bf16_master_weights_and_grads"))
        elif master:
            warnings.append(
                f"{half.place('bf16_master_weights_and_grads')} without bf16_optimizer_states is not modelled; "
                "what follows assumes fp32 masters"
            )
    warnings += half.not_modelled({"immediate_grad_update": False})
    half.refuse_others(("check_grad_overflow",))
    warnings += fp16.not_modelled({"fp16_master_weights_and_grads": False})
    fp16.refuse_others(FP16_HARMLESS)
    types = top.table("data_types")
    format_ = types.word("grad_accum_dtype", FORMATS)
    if format_ not in (None, AUTO):
        found["gradient_format"] = Setting(format_, types.place("grad_accum_dtype"))
    types.refuse_others(())


def _zero(zero: Table, found: dict[str, Setting], warnings: list[str]) -> None:
    for key, why in REMOVED.items():
        if zero.raw(key) is not None:
            raise ConfigError(f"{zero.place(key)}: {why}")
    stage = zero.count("stage", least=0)
    if isinstance(stage, int) and stage > 3:
        raise zero.error("stage", "0, 1, 2 or 3", stage)
    if isinstance(stage, int):
        found["strategy"] = Setting(f"zero{stage}", zero.place("stage"))
    else:
        found["strategy"] = Setting("zero0", f"{DEFAULT}: no zero_optimization.stage", written=False)
    number = stage if isinstance(stage, int) else 0
    _sizes(zero, number, found)
    warnings += _plus(zero, number, found)
    overlap = zero.switch("overlap_comm")
    if isinstance(overlap, bool):
        found["overlap_communication"] = Setting(overlap, zero.place("overlap_comm"))
    else:
        # zero/config.py ``overlap_comm_valid``.
        found["overlap_communication"] = Setting(number == 3, f"{DEFAULT} for stage {number}", written=False)
    _offload(zero, number, found, warnings)
    warnings += zero.not_modelled(ZERO_UNMODELLED)
    zero.refuse_others(ZERO_HARMLESS)


def _sizes(zero: Table, stage: int, found: dict[str, Setting]) -> None:
    usual = ZeroSettings()
    for name, keys in SIZES.items():
        least = 1 if name in ("reduce_bucket", "max_live_parameters", "sub_group") else 0
        read = {key: value for key in keys if (value := zero.count(key, least)) is not None}
        if stage != 3 and name in STAGE3_SIZES:
            continue
        if not read or (AUTO in read.values() and name not in WIDTH_SIZES):
            found[name] = Setting(getattr(usual, name), DEFAULT, written=False)
            continue
        key, value = next(iter(read.items()))
        found[name] = Setting(value, zero.place(key))


def _plus(zero: Table, stage: int, found: dict[str, Setting]) -> Iterator[str]:
    """The parts of ZeRO++ that are on; of stages below 3 DeepSpeed reads none."""
    for name, key in ZERO_PLUS.items():
        # zero/config.py takes 0 for a partition, too; stage3.py has no second copy unless it is above 1.
        value = zero.count(key, least=0) if name == "hpz_partition" else zero.switch(key)
        if value in (None, AUTO, False) or (name == "hpz_partition" and value in (0, 1)):
            continue
        if stage != 3:
            yield f"{zero.place(key)} takes part in stage 3 alone; stage {stage} passes over it"
            continue
        found[name] = Setting(value, zero.place(key))
        found["strategy"] = Setting("zero3++", zero.place(key))


def _offload(zero: Table, stage: int, found: dict[str, Setting], warnings: list[str]) -> None:
    """Who lives on the host or on NVMe; parameters only where the optimizer does as well."""
    devices: dict[str, tuple[str, str]] = {}
    for part, key, old in (
        ("optimizer", "offload_optimizer", "cpu_offload"),
        ("params", "offload_param", "cpu_offload_param"),
    ):
        block = zero.table(key)
        device = block.word("device", {"none": "none", "cpu": "cpu", "nvme": "nvme"})
        place = block.place("device")
        if zero.switch(old) is True and device is None:
            device, place = "cpu", zero.place(old)
        if device in ("cpu", "nvme"):
            devices[part] = (device, place)
            warnings += block.not_modelled(OFFLOAD_UNMODELLED)
            _held(block, OFFLOAD_SIZES[key], found)
        block.refuse_others((*OFFLOAD_UNMODELLED, *OFFLOAD_HARMLESS, *OFFLOAD_SIZES[key], "pin_memory", "nvme_path"))
    if "params" in devices and stage != 3:
        warnings.append(f"{devices.pop('params')[1]} takes part in stage 3 alone; stage {stage} passes over it")
    if "optimizer" in devices and stage == 0:
        warnings.append(f"{devices.pop('optimizer')[1]} takes part in stages 1 to 3; stage 0 passes over it")
    if "params" in devices and "optimizer" not in devices:
        raise ConfigError(
            f"{devices['params'][1]} without offload_optimizer is not modelled; offload the optimizer too"
        )
    kept = {device for device, _ in devices.values()}
    if len(kept) > 1:
        said = " and ".join(f"{place} {device}" for device, place in devices.values())
        raise ConfigError(f"{said}: different places for optimizer and parameters are not modelled; take one for both")
    if stage in (1, 2) and "nvme" in kept:
        warnings.append(
            f"{devices['optimizer'][1]} nvme: stage {stage} keeps the optimizer in host memory, as with cpu"
        )
        kept = {"cpu"}
    if devices:
        place = devices["params" if "params" in devices else "optimizer"][1]
        found["offload"] = Setting("optimizer+params" if "params" in devices else "optimizer", place)
        found["offload_to"] = Setting(kept.pop(), place)
    else:
        found["offload"] = Setting("none", DEFAULT, written=False)


def _held(block: Table, sizes: Mapping[str, str], found: dict[str, Setting]) -> None:
    """How what is offloaded is held."""
    pins, path = block.switch("pin_memory"), block.raw("nvme_path")
    if isinstance(pins, bool):
        found["pins"] = Setting(pins, block.place("pin_memory"))
    if isinstance(path, str) and path != AUTO:
        found["nvme_path"] = Setting(path, block.place("nvme_path"))
    for key, name in sizes.items():
        value = block.count(key, least=0)
        if isinstance(value, int):
            found[name] = Setting(value, block.place(key))


def _aio(block: Table, found: dict[str, Setting]) -> None:
    for key, name in AIO_SIZES.items():
        value = block.count(key)
        if isinstance(value, int):
            found[name] = Setting(value, block.place(key))
    block.refuse_others(AIO_HARMLESS)


def _optimizer(top: Table, found: dict[str, Setting]) -> Iterator[str]:
    """The optimizer that DeepSpeed builds itself; without the block, the training program brings its own."""
    block = top.table("optimizer")
    kind = block.word("type")
    parameters = block.table("params")
    if kind not in (None, AUTO):
        if kind.casefold() not in FUSED_TYPES:
            yield f"{block.place('type')} {kind} is not modelled; what follows assumes fused AdamW"
        foreach = parameters.switch("torch_adam") is True and parameters.switch("fused") is not True
        found["optimizer"] = Setting("adamw-foreach" if foreach else "adamw-fused", block.place("type"))
    block.refuse_others(("legacy_fusion",))
