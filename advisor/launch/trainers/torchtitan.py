"""torchtitan with its TOML. Names: torchtitan 0.2.2, config/job_config.py."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from advisor.catalog.trainers import Versions, older_than, trainer_profiles
from advisor.errors import SpecError
from advisor.launch.deepspeed import ADAMW, GRADIENT_CLIPPING
from advisor.launch.run_script import header
from advisor.launch.training import Beside, LaunchFile, Program, Task
from advisor.specs.plan import Checkpointing, Strategy

CONFIGURATION = "torchtitan.toml"
WITHOUT_FILE = "0.3.0"
"""From here on a configuration is a Python function of torchtitan's own, which no file replaces."""

IMPLEMENTATIONS = {"adamw-fused": "fused", "adamw-foreach": "foreach", "adamw-loop": "for-loop"}
FORMATS = {"fp32": "float32", "bf16": "bfloat16"}


def program(task: Task, versions: Versions, more_arguments: Sequence[str]) -> Program:
    """``torchtitan/train.py``, which torchrun starts."""
    if not older_than(versions["torchtitan"], WITHOUT_FILE):
        raise SpecError(
            f"torchtitan {versions['torchtitan']} reads no configuration file; pip install 'torchtitan<{WITHOUT_FILE}'"
        )
    models = trainer_profiles()["torchtitan"].models
    if task.model.name not in models:
        raise SpecError(f"torchtitan has no {task.model.name}; it has {', '.join(models)}")
    name, flavor = models[task.model.name].split(" ")
    settings = _settings(task, name, flavor)
    return Program(
        script="torchtitan.train",
        is_module=True,
        arguments=(Beside(CONFIGURATION, "--job.config_file="), *more_arguments),
        files=(LaunchFile(CONFIGURATION, partial(_text, task, settings)),),
        usage="more options of torchtitan, such as --training.steps=1000",
        install=f"torchtitan=={versions['torchtitan']}",
        notes=(
            "It reads the tokenizer from assets/hf: download it there, or give -- --model.hf_assets_path=FOLDER.",
            "It trains on c4 unless told otherwise: give -- --training.dataset=NAME.",
        ),
        own_parallelism=True,
    )


def _settings(task: Task, name: str, flavor: str) -> dict[str, dict[str, Any]]:
    job, plan, gpus = task.job, task.plan, int(task.plan.gpus)
    shards = {Strategy.DDP: 1, Strategy.HSDP: int(plan.shard_ranks)}.get(plan.strategy, gpus)
    return {
        "job": {"dump_folder": "output"},
        "model": {"name": name, "flavor": flavor, "hf_assets_path": f"assets/hf/{task.model.name}"},
        "optimizer": {
            "name": "AdamW",
            "lr": ADAMW["lr"],
            "beta1": ADAMW["betas"][0],
            "beta2": ADAMW["betas"][1],
            "eps": ADAMW["eps"],
            "weight_decay": ADAMW["weight_decay"],
            "implementation": IMPLEMENTATIONS[job.optimizer],
        },
        "training": {
            "dataset": "c4",
            "local_batch_size": int(plan.micro_batch),
            "global_batch_size": int(plan.global_batch),
            "seq_len": job.sequence_length,
            "max_norm": GRADIENT_CLIPPING,
            "enable_cpu_offload": False,
            "dtype": FORMATS[job.parameter_format],
            "mixed_precision_param": FORMATS[job.precision],
            "mixed_precision_reduce": "float32",
        },
        "parallelism": {
            "data_parallel_replicate_degree": gpus // shards,
            "data_parallel_shard_degree": shards,
            "fsdp_reshard_after_forward": "never" if plan.strategy is Strategy.FSDP_GRAD_OP else "always",
            "tensor_parallel_degree": 1,
            "pipeline_parallel_degree": 1,
            "context_parallel_degree": 1,
        },
        "activation_checkpoint": {"mode": "full" if plan.checkpointing is Checkpointing.FULL else "none"},
        "compile": {"enable": False},
    }


def _text(task: Task, settings: Mapping[str, Mapping[str, Any]]) -> str:
    tables = (
        f"[{table}]\n" + "".join(f"{key} = {_value(value)}\n" for key, value in held.items())
        for table, held in settings.items()
    )
    return header(task.comments) + "\n" + "\n".join(tables)


def _value(value: str | float | bool) -> str:
    """As TOML 1.0 writes it: JSON's strings, but for the one control character that JSON leaves as it is."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
