"""A plan for accelerate's launcher: how many processes, and which strategy wraps the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from advisor.catalog.trainers import older_than, versions_of
from advisor.launch.deepspeed import deepspeed_json
from advisor.launch.run_script import ALLOCATOR_SETTING, run_script
from advisor.launch.training import Launch, LaunchFile, Training
from advisor.specs.hardware import Cluster
from advisor.specs.job import FORMAT_BYTES, Job
from advisor.specs.model import ModelSpec
from advisor.specs.plan import Plan, Strategy

LAYER_CLASSES = {
    "bloom": "BloomBlock",
    "deepseek_v2": "DeepseekV2DecoderLayer",
    "deepseek_v3": "DeepseekV3DecoderLayer",
    "falcon": "FalconDecoderLayer",
    "gemma": "GemmaDecoderLayer",
    "gemma2": "Gemma2DecoderLayer",
    "gemma3": "Gemma3DecoderLayer",
    "gemma3_text": "Gemma3DecoderLayer",
    "gpt2": "GPT2Block",
    "gpt_neox": "GPTNeoXLayer",
    "gpt_oss": "GptOssDecoderLayer",
    "llama": "LlamaDecoderLayer",
    "llama4": "Llama4TextDecoderLayer",
    "llama4_text": "Llama4TextDecoderLayer",
    "mistral": "MistralDecoderLayer",
    "mixtral": "MixtralDecoderLayer",
    "olmo2": "Olmo2DecoderLayer",
    "opt": "OPTDecoderLayer",
    "phi3": "Phi3DecoderLayer",
    "qwen2": "Qwen2DecoderLayer",
    "qwen2_moe": "Qwen2MoeDecoderLayer",
    "qwen3": "Qwen3DecoderLayer",
    "qwen3_moe": "Qwen3MoeDecoderLayer",
    "smollm3": "SmolLM3DecoderLayer",
    "starcoder2": "Starcoder2DecoderLayer",
}
"""The class of one transformer layer in transformers 5.23, by ``model_type``: each layer becomes one FSDP unit.

The same names stand in the models' ``_no_split_modules``, some of which list vision layers besides.
"""

FSDP_REFUSES = frozenset({"bert", "roberta", "t5"})
"""Families that accelerate 1.15 cannot shard: it gives the embeddings a group of their own, and torch 2.13 refuses a
parameter that another group shares (BERT's output bias, T5's embedding of both stacks)."""

WHOLE_IN_EVERY_PROCESS = frozenset({"deepseek_v3"})
"""Families whose weights accelerate 1.15 cannot send out from the first process, because their state holds a buffer
that FSDP does not shard (the routers' score correction)."""

SEPARATE_EXPERTS = {
    "deepseek_v2": "DeepseekV2MoE",
    "deepseek_v3": "DeepseekV3MoE",
    "mixtral": "MixtralSparseMoeBlock",
    "qwen2_moe": "Qwen2MoeSparseMoeBlock",
    "qwen3_moe": "Qwen3MoeSparseMoeBlock",
}
"""What holds the experts, each a module of its own, in transformers before 5.0 (read in 4.52.3 and 4.57.1).

A rank skips an expert that none of its tokens go to, and under ZeRO-3 the others wait for it for ever, unless DeepSpeed
gathers all of them at once. Since 5.0 the experts of a layer are one module's weights.
"""


def launch(training: Training) -> Launch:
    """``accelerate launch`` with its YAML; by way of run.sh where it has to ask the machine."""
    plan, cluster = training.plan, training.cluster
    files = [file for each in _written_for(training) for file in _configuration(training, each)]
    files += [*training.program.files, LaunchFile("run.sh", partial(_run_script, training))]
    # run.sh asks each machine for what only that machine knows: its rank, and its cores for an optimizer on the CPU.
    if cluster.nodes > 1 or plan.offload.optimizer:
        return Launch(("bash", "run.sh"), {}, tuple(files))
    return Launch(_command(training), dict([ALLOCATOR_SETTING]), tuple(files))


def _written_for(training: Training) -> tuple[Plan, ...]:
    """The plan, and those that the program wants a configuration for besides."""
    others = (each for each in training.program.alternatives if each.strategy is not training.plan.strategy)
    return (training.plan, *others)


def _configuration(training: Training, plan: Plan) -> Iterator[LaunchFile]:
    yaml, json = _names(training, plan)
    model, job, cluster, comments = training.model, training.job, training.cluster, training.comments
    if plan is not training.plan:
        comments = (f"The same training by {plan.title}, instead of:", *comments)
    yield LaunchFile(yaml, partial(accelerate_yaml, model, job, plan, cluster, comments, json))
    if plan.strategy.zero_stage is not None:
        yield LaunchFile(json, partial(deepspeed_json, job, plan, training.task.keep_auto))


def _names(training: Training, plan: Plan) -> tuple[str, str]:
    """Of accelerate's YAML and DeepSpeed's JSON."""
    if training.program.alternatives:
        return f"{plan.strategy.value}.yaml", f"{plan.strategy.value}.json"
    return "accelerate.yaml", "ds_config.json"


def _command(training: Training) -> tuple[str, ...]:
    """What to type on one machine: the program's own command, where that is one around accelerate."""
    program, own = training.program, training.program.own_command
    yaml, _ = _names(training, training.plan)
    if own and own.launcher == "accelerate":
        return (*own.words, *map(str, program.arguments), *own.before_options, own.config_flag, yaml)
    return ("accelerate", "launch", "--config_file", yaml, *program.module_flag, *map(str, program.words))


def _run_script(training: Training) -> str:
    yaml, json = _names(training, training.plan)
    words = [f'--config_file "$here/{yaml}"']
    if training.plan.strategy.zero_stage is not None:
        words.append(f'--deepspeed_config_file "$here/{json}"')
    if training.cluster.nodes > 1:
        words += [
            '--machine_rank "$NODE_RANK"',
            '--main_process_ip "$MAIN_ADDRESS"',
            '--main_process_port "$MAIN_PORT"',
        ]
    return run_script(training, "accelerate launch", [*words, *training.program.module_flag])


def accelerate_environment(model: ModelSpec, job: Job, plan: Plan) -> dict[str, str]:
    """What ``accelerate launch`` sets for its processes, for launchers that start train.py without it.

    Names: accelerate 1.15, utils/launch.py ``prepare_multi_gpu_env`` and ``prepare_deepspeed_cmd_env``. Paths are
    relative to the folder of the files.
    """
    if plan.strategy.zero_stage is not None:
        experts = _gathered_at_once(model, job, plan)
        return {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds_config.json",
            "ACCELERATE_DEEPSPEED_ZERO3_INIT": _word(plan.strategy.zero_stage == 3),
            **({"ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES": experts} if experts else {}),
            **_mesh_environment(job, plan),
        }
    environment = {"ACCELERATE_MIXED_PRECISION": mixed_precision(job)}
    if plan.strategy.is_fsdp:
        environment["ACCELERATE_USE_FSDP"] = "true"
        for key, value in _fsdp(model, plan).items():
            environment[key.replace("transformer_layer_cls", "transformer_cls").upper()] = _word(value)
    return environment | _mesh_environment(job, plan)


def _mesh_environment(job: Job, plan: Plan) -> dict[str, str]:
    mesh = _mesh(job, plan)
    named = {key.upper(): str(value) for key, value in mesh.items()}
    return {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", **named} if mesh else {}


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def accelerate_yaml(
    model: ModelSpec, job: Job, plan: Plan, cluster: Cluster, comments: Sequence[str], json: str = "ds_config.json"
) -> str:
    """The text of ``accelerate.yaml``, with DeepSpeed's settings in the file *json* beside it.

    Keys: accelerate 1.15, commands/config/config_args.py and commands/launch.py.
    """
    import yaml

    settings: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": _distributed_type(plan),
        "num_machines": cluster.nodes,
        "num_processes": int(plan.gpus),
        "machine_rank": 0,
        "gpu_ids": "all",
        "use_cpu": False,
    }
    if cluster.nodes > 1:
        settings |= {"main_process_port": 29500, "rdzv_backend": "static", "same_network": True}
        comments = [*comments, "run.sh passes machine_rank and the address of machine 0 on each machine."]
    if plan.strategy.zero_stage is not None:
        # mixed_precision must not stand beside a DeepSpeed JSON: accelerate refuses the pair.
        settings["deepspeed_config"] = _deepspeed(plan, cluster, json)
        if experts := _gathered_at_once(model, job, plan):
            settings["deepspeed_config"]["deepspeed_moe_layer_cls_names"] = experts
    else:
        settings["mixed_precision"] = mixed_precision(job)
    if plan.strategy.is_fsdp:
        settings["fsdp_config"] = _fsdp(model, plan)
    if mesh := _mesh(job, plan):
        settings["parallelism_config"] = mesh
    header = "".join(f"# {line}\n" for line in (*comments, *_loading(model, job, plan, cluster)))
    return header + yaml.safe_dump(settings, sort_keys=False)


def _loading(model: ModelSpec, job: Job, plan: Plan, cluster: Cluster) -> list[str]:
    """What of the file keeps the processes of a machine from each loading the whole model, or that nothing does."""
    processes = cluster.gpus_per_node
    if processes == 1 or not (plan.strategy.zero_stage == 3 or plan.strategy.is_fsdp):
        return []
    held = job.precision if plan.strategy.zero_stage == 3 else job.parameter_format
    copy_gib, host_gib = model.parameter_count * FORMAT_BYTES[held] / 2**30, cluster.host_memory_bytes / 2**30
    copies = f"{processes} x {copy_gib:,.1f} = {processes * copy_gib:,.1f} GiB of {host_gib:,.0f} GiB host memory"
    if plan.strategy.zero_stage == 3:
        return [f"zero3_init_flag splits weights while they load, instead of {copies}."]
    if model.family in WHOLE_IN_EVERY_PROCESS:
        return [f"Every process of a machine loads all weights: {copies}."]
    return [f"fsdp_cpu_ram_efficient_loading has one process load weights, instead of {copies}."]


def _distributed_type(plan: Plan) -> str:
    if plan.strategy.zero_stage is not None:
        return "DEEPSPEED"
    if plan.strategy.is_fsdp:
        return "FSDP"
    return "MULTI_GPU" if int(plan.gpus) > 1 else "NO"


def mixed_precision(job: Job) -> str:
    """Autocast over fp32 weights; nothing to mix where weights and matrix products share a format."""
    return "no" if job.precision == job.parameter_format else job.precision


def _deepspeed(plan: Plan, cluster: Cluster, json: str) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "deepspeed_config_file": json,
        # Split the weights while the model is built, so that no process ever holds all of them.
        "zero3_init_flag": plan.strategy.zero_stage == 3,
    }
    if cluster.nodes > 1:
        # run.sh starts the processes of its own machine; the default launcher would reach the others by pdsh and ssh.
        settings["deepspeed_multinode_launcher"] = "standard"
    return settings


def _gathered_at_once(model: ModelSpec, job: Job, plan: Plan) -> str | None:
    """The class whose weights ZeRO-3 must not gather module by module, or None."""
    versions, _ = versions_of(job.trainer)
    separate = older_than(versions.get("transformers", "5.0.0"), "5.0.0")
    return SEPARATE_EXPERTS.get(model.family) if plan.strategy.zero_stage == 3 and separate else None


def _fsdp(model: ModelSpec, plan: Plan) -> dict[str, Any]:
    efficient_loading = model.family not in WHOLE_IN_EVERY_PROCESS
    settings: dict[str, Any] = {
        "fsdp_version": plan.fsdp.version,
        **(_version_one(plan, efficient_loading) if plan.fsdp.version == 1 else _version_two(plan)),
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_offload_params": False,
        # Only the first process reads the checkpoint; the others receive their shards from it.
        "fsdp_cpu_ram_efficient_loading": efficient_loading,
        "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        # train.py checkpoints activations itself, alike for every strategy.
        "fsdp_activation_checkpointing": False,
    }
    # For a family that is not in the table accelerate reads the model's own _no_split_modules.
    if model.family in LAYER_CLASSES:
        settings["fsdp_transformer_layer_cls_to_wrap"] = LAYER_CLASSES[model.family]
    return settings


def _mesh(job: Job, plan: Plan) -> dict[str, Any]:
    """How accelerate lays out ranks, where it is not told by the strategy (accelerate 1.15, parallelism_config.py).

    ``accelerate launch`` starts no process without the sizes that are 1. DeepSpeed cuts states over all ranks whatever
    stands here, and takes the replicas for copies that see different sequences.
    """
    if plan.strategy is not Strategy.HSDP and plan.sequence_ranks == 1:
        return {}
    shard = 1 if plan.strategy.zero_stage is not None else int(plan.shard_ranks) // plan.context_parallel
    mesh: dict[str, Any] = {
        "dp_replicate_size": int(plan.data_parallel) // shard,
        "dp_shard_size": shard,
        "tp_size": 1,
        "cp_size": plan.context_parallel,
        "sp_size": plan.ulysses_parallel,
    }
    if plan.context_parallel > 1:
        mesh |= {"cp_backend": "torch", "cp_comm_strategy": plan.fsdp.context_exchange}
    if plan.ulysses_parallel > 1:
        kernel = "flash_attention_2" if job.attention == "flash" else job.attention
        mesh |= {"sp_backend": "deepspeed", "sp_seq_length_is_variable": True, "sp_attn_implementation": kernel}
    return {f"parallelism_config_{key}": value for key, value in mesh.items()}


def _version_two(plan: Plan) -> dict[str, Any]:
    return {"fsdp_reshard_after_forward": plan.strategy is not Strategy.FSDP_GRAD_OP}


def _version_one(plan: Plan, efficient_loading: bool) -> dict[str, Any]:
    return {
        # Version 1 reads this one, though accelerate calls it deprecated (utils/dataclasses.py).
        "fsdp_sharding_strategy": "FULL_SHARD" if plan.strategy is Strategy.FSDP else "SHARD_GRAD_OP",
        "fsdp_backward_prefetch": "NO_PREFETCH",
        "fsdp_forward_prefetch": False,
        "fsdp_use_orig_params": True,
        # What the first process has read reaches the others.
        "fsdp_sync_module_states": efficient_loading,
    }
