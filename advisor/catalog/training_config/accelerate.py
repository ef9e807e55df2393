"""accelerate's YAML, each key as accelerate 1.15 resolves it.

commands/config/config_args.py ``ClusterConfig``, commands/launch.py ``_validate_launch_command``, utils/dataclasses.py
``DeepSpeedPlugin`` and ``FullyShardedDataParallelPlugin``. Without a DeepSpeed JSON the plugin makes one of stage,
offload and little else, so that every bucket has DeepSpeed's default size, whatever the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, get_args

from advisor.catalog.training_config.deepspeed import from_deepspeed
from advisor.catalog.training_config.settings import AUTO, Setting, Settings, Table
from advisor.errors import ConfigError
from advisor.specs.cuts import KeyValueExchange

DEFAULT = "accelerate's default"

KINDS = {"NO": "ddp", "MULTI_GPU": "ddp", "FSDP": "fsdp", "DEEPSPEED": "zero"}
"""``distributed_type`` that this package models."""

PRECISIONS = {"no": "fp32", "bf16": "bf16", "fp16": "fp16", "fp8": "fp8"}

NOT_BESIDE_JSON = (
    "gradient_accumulation_steps",
    "gradient_clipping",
    "zero_stage",
    "offload_optimizer_device",
    "offload_param_device",
    "offload_param_nvme_path",
    "offload_optimizer_nvme_path",
    "zero3_save_16bit_model",
)
"""Keys that accelerate refuses beside ``deepspeed_config_file`` (``DeepSpeedPlugin._deepspeed_config_checks``)."""

TOP_HARMLESS = (
    "compute_environment",
    "debug",
    "enable_cpu_affinity",
    "machine_rank",
    "main_process_ip",
    "main_process_port",
    "main_training_function",
    "num_cpu_threads_per_process",
    "gpu_ids",
    "rdzv_backend",
    "same_network",
    "downcast_bf16",
    "tpu_env",
    "tpu_name",
    "tpu_use_cluster",
    "tpu_use_sudo",
    "tpu_vm",
    "tpu_zone",
    "command_file",
    "commands",
    "ipex_config",
    "mpirun_config",
)
TOP_UNMODELLED: dict[str, Any] = {"parallelism_config": None, "megatron_lm_config": None, "fp8_config": None}

DEEPSPEED_HARMLESS = (
    "zero3_init_flag",
    "deepspeed_multinode_launcher",
    "deepspeed_hostfile",
    "deepspeed_exclusion_filter",
    "deepspeed_inclusion_filter",
    "deepspeed_moe_layer_cls_names",
)

SHARDING = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2")
"""torch's ``ShardingStrategy``, counted from 1 (``FSDP_SHARDING_STRATEGY``)."""

FSDP_UNMODELLED: dict[str, Any] = {
    "fsdp_offload_params": False,
    "fsdp_cpu_ram_efficient_loading": True,
    "fsdp_activation_checkpointing_offload": False,
    "fsdp_forward_prefetch": False,
}
FSDP_HARMLESS = (
    "fsdp_transformer_layer_cls_to_wrap",
    "fsdp_transformer_cls_names_to_wrap",
    "fsdp_min_num_params",
    "fsdp_state_dict_type",
    "fsdp_sync_module_states",
    "fsdp_use_orig_params",
)

JsonReader = Callable[[str], tuple[str, Any]]
"""A path as it stands in a file to a name for messages and what the JSON holds."""


def from_accelerate(file: str, held: Any, json_at: JsonReader, places: Mapping[str, str] | None = None) -> Settings:
    """What accelerate makes of the mapping *held* of a YAML *file*."""
    top = Table(file, held, places=places)
    found: dict[str, Setting] = {}
    warnings: list[str] = []
    kind = top.word("distributed_type", KINDS | {"MULTI_CPU": "", "XLA": "", "TP": "", "MEGATRON_LM": ""})
    if kind == "":
        raise ConfigError(
            f"{top.place('distributed_type')} {held['distributed_type']} is not modelled; known: {', '.join(KINDS)}"
        )
    if top.switch("use_cpu") is True:
        raise ConfigError(f"{top.place('use_cpu')} is true, which no GPU's memory depends on; plan for a run on GPUs")
    _counts(top, found)
    precision = top.word("mixed_precision", PRECISIONS)
    if precision == "fp8":
        warnings.append(f"{top.place('mixed_precision')} fp8 is not modelled; what follows assumes bf16")
        precision = "bf16"
    deepspeed, fsdp = top.table("deepspeed_config"), top.table("fsdp_config")
    settings = Settings()
    if kind == "zero":
        settings = _deepspeed(deepspeed, json_at, precision, top)
        warnings += _cuts(top.table("parallelism_config"), found, ("sp",))
    elif kind == "fsdp":
        warnings += _fsdp(fsdp, found, int(found["nodes"].value) if "nodes" in found else 1)
        warnings += _cuts(top.table("parallelism_config"), found, ("cp",))
        _replicas(top.table("parallelism_config"), found)
    elif kind == "ddp":
        found["strategy"] = Setting("ddp", top.place("distributed_type"))
    if precision is not None:
        found["precision"] = Setting(precision, top.place("mixed_precision"))
    elif kind != "zero":
        found["precision"] = Setting("fp32", f"{DEFAULT}: mixed_precision no", written=False)
    warnings += top.not_modelled(TOP_UNMODELLED)
    dynamo = top.table("dynamo_config")
    warnings += dynamo.not_modelled({"dynamo_backend": "NO"})
    top.refuse_others(TOP_HARMLESS)
    return Settings(found, tuple(warnings)).beside(settings)


def _counts(top: Table, found: dict[str, Setting]) -> None:
    for name, key in (("gpus", "num_processes"), ("nodes", "num_machines")):
        # accelerate writes -1 where the command line has to say it.
        value = top.count(key, least=-1)
        if isinstance(value, int) and value != -1:
            if value < 1:
                raise top.error(key, "a whole number of at least 1", value)
            found[name] = Setting(value, top.place(key))


def _deepspeed(block: Table, json_at: JsonReader, precision: str | None, top: Table) -> Settings:
    """The JSON that the block names, or the one that ``DeepSpeedPlugin`` makes of the block."""
    path = block.word("deepspeed_config_file")
    if path not in (None, "none"):
        beside = [block.place(key) for key in NOT_BESIDE_JSON if block.raw(key) is not None]
        if precision is not None:
            beside.append(top.place("mixed_precision"))
        if beside:
            raise ConfigError(
                f"{beside[0]} stands beside {block.place('deepspeed_config_file')} {path}, which accelerate refuses; "
                "say it in the JSON"
            )
        block.refuse_others(DEEPSPEED_HARMLESS)
        return from_deepspeed(*json_at(str(path)))
    stage = block.count("zero_stage", least=0)
    made: dict[str, Any] = {
        "zero_optimization": {
            "stage": 2 if stage is None else stage,
            "offload_optimizer": {"device": block.raw("offload_optimizer_device") or "none"},
            "offload_param": {"device": block.raw("offload_param_device") or "none"},
        },
        "gradient_accumulation_steps": block.count("gradient_accumulation_steps"),
    }
    if precision == "bf16" or precision == "fp16":
        made[precision] = {"enabled": True}
    places = {
        "zero_optimization.stage": block.place("zero_stage"),
        "zero_optimization.offload_optimizer.device": block.place("offload_optimizer_device"),
        "zero_optimization.offload_param.device": block.place("offload_param_device"),
        "gradient_accumulation_steps": block.place("gradient_accumulation_steps"),
        "bf16.enabled": top.place("mixed_precision"),
        "fp16.enabled": top.place("mixed_precision"),
    }
    if stage is None:
        places["zero_optimization.stage"] = f"{DEFAULT}: zero_stage 2"
    for key in NOT_BESIDE_JSON:
        block.raw(key)
    block.refuse_others(DEEPSPEED_HARMLESS)
    return from_deepspeed(block.file, {key: value for key, value in made.items() if value is not None}, places)


def _fsdp(block: Table, found: dict[str, Setting], nodes: int) -> Iterator[str]:
    """Version, sharding and what else the plugin resolves. Keys may lack their prefix, which accelerate adds."""
    held = {key if str(key).startswith("fsdp") else f"fsdp_{key}": value for key, value in block.held.items()}
    block = Table(block.file, held, block.path, block.places)
    version = block.count("fsdp_version")
    if version in (None, AUTO):
        version = 1
        found["fsdp_version"] = Setting(1, f"{DEFAULT}: fsdp_version 1", written=False)
    elif version in (1, 2):
        found["fsdp_version"] = Setting(version, block.place("fsdp_version"))
    else:
        raise block.error("fsdp_version", "1 or 2", version)
    yield from _sharding(block, found, int(version), nodes)
    wrap = block.word(
        "fsdp_auto_wrap_policy", {each: each for each in ("TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", "NO_WRAP")}
    )
    if wrap != "TRANSFORMER_BASED_WRAP":
        said = wrap or "absent, which means NO_WRAP,"
        place = block.place("fsdp_auto_wrap_policy")
        yield f"{place} {said} is not modelled; what follows assumes TRANSFORMER_BASED_WRAP"
    prefetch = block.raw("fsdp_backward_prefetch") or block.raw("fsdp_backward_prefetch_policy")
    if version == 1 and prefetch is not None and str(prefetch).upper() not in ("NO_PREFETCH", "3"):
        yield f"{block.place('fsdp_backward_prefetch')} {prefetch} is not modelled; what follows assumes NO_PREFETCH"
    if block.switch("fsdp_activation_checkpointing") is True:
        found["checkpointing"] = Setting("full", block.place("fsdp_activation_checkpointing"))
    yield from block.not_modelled(FSDP_UNMODELLED)
    block.refuse_others(FSDP_HARMLESS)


def _cuts(block: Table, found: dict[str, Setting], known: tuple[str, ...]) -> Iterator[str]:
    """How many ranks share a sequence, of *known* ways; DeepSpeed takes the copies of the model from the others."""
    for name in known:
        size = block.count(f"parallelism_config_{name}_size")
        if isinstance(size, int) and size > 1:
            found[name] = Setting(size, block.place(f"parallelism_config_{name}_size"))
    strategy = block.word("parallelism_config_cp_comm_strategy", {each: each for each in get_args(KeyValueExchange)})
    if strategy is not None and "cp" in found:
        found["cp_exchange"] = Setting(strategy, block.place("parallelism_config_cp_comm_strategy"))
    others = {"tp", "cp", "sp"} - set(known)
    yield from block.not_modelled({f"parallelism_config_{name}_size": 1 for name in sorted(others)})


def _replicas(block: Table, found: dict[str, Setting]) -> None:
    """HSDP's mesh: groups of ranks that cut the states, and how many of those hold the same."""
    replicas, shard = (block.count(f"parallelism_config_dp_{name}_size") for name in ("replicate", "shard"))
    if replicas in (None, 1):
        return
    place = block.place("parallelism_config_dp_replicate_size")
    if found["strategy"].value != "fsdp" or found["fsdp_version"].value != 2:
        raise ConfigError(f"{place} {replicas} is modelled for FSDP version 2 with full shards alone")
    found["strategy"] = Setting("hsdp", place)
    found["shard_ranks"] = Setting(shard or 1, block.place("parallelism_config_dp_shard_size"))


def _sharding(block: Table, found: dict[str, Setting], version: int, nodes: int) -> Iterator[str]:
    """What stays gathered between forward and backward: a switch in version 2, a name or number in version 1."""
    if version == 2:
        block.raw("fsdp_sharding_strategy")  # version 2 passes over it
        reshards = block.switch("fsdp_reshard_after_forward")
        if reshards in (None, AUTO):
            found["strategy"] = Setting("fsdp", f"{DEFAULT}: fsdp_reshard_after_forward true", written=False)
        else:
            place = block.place("fsdp_reshard_after_forward")
            found["strategy"] = Setting("fsdp" if reshards else "fsdp-grad-op", place)
        return
    numbered = {str(number): name for number, name in enumerate(SHARDING, 1)} | {name: name for name in SHARDING}
    key = "fsdp_sharding_strategy"
    name = block.word(key, numbered)
    other = block.raw("fsdp_reshard_after_forward")
    if name in (None, AUTO) and other is not None:
        key = "fsdp_reshard_after_forward"
        name = block.word(key, numbered)
    if name in (None, AUTO):
        found["strategy"] = Setting("fsdp", f"{DEFAULT}: fsdp_sharding_strategy FULL_SHARD", written=False)
        return
    if name == "NO_SHARD" or (name.startswith("HYBRID") and nodes > 1):
        raise ConfigError(f"{block.place(key)} {name} is not modelled; known: FULL_SHARD, SHARD_GRAD_OP")
    if name.startswith("HYBRID"):
        yield f"{block.place(key)} {name} in one machine shards over all of its GPUs, and is taken so"
    found["strategy"] = Setting(
        "fsdp-grad-op" if name in ("SHARD_GRAD_OP", "HYBRID_SHARD_ZERO2") else "fsdp", block.place(key)
    )
