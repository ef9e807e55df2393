"""What transformers' TrainingArguments are told, for every program that is built on transformers' Trainer.

Names and values: transformers 5.23, training_args.py and trainer.py; what older versions call them stands in
``profiles/trainers/flags.csv``. What DeepSpeed's JSON says besides has to be the same here, or the Trainer refuses the
pair (integrations/deepspeed.py ``trainer_config_process``).
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from advisor.catalog.optimizers import optimizer_profiles
from advisor.catalog.trainers import Versions, flag_name, gone
from advisor.errors import SpecError
from advisor.launch.accelerate import mixed_precision
from advisor.launch.deepspeed import ADAMW, GRADIENT_CLIPPING
from advisor.launch.trainers.words import holds_no_weights
from advisor.launch.training import Task
from advisor.specs.plan import Checkpointing

ATTENTION = {"sdpa": "sdpa", "flash": "flash_attention_2", "eager": "eager"}

FORMATS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

UPDATES: dict[str, float] = {
    "learning_rate": ADAMW["lr"],
    "weight_decay": ADAMW["weight_decay"],
    "adam_beta1": ADAMW["betas"][0],
    "adam_beta2": ADAMW["betas"][1],
    "adam_epsilon": ADAMW["eps"],
    "max_grad_norm": GRADIENT_CLIPPING,
}
"""What updates weights, as DeepSpeed's JSON says it too."""

LORA_ALPHA = 8
"""What adapters are scaled by over their rank, as train.py does unless it is told otherwise."""

FUSED_LOSS_ALONE = {
    "rope": False,
    "rms_norm": False,
    "swiglu": False,
    "cross_entropy": False,
    "fused_linear_cross_entropy": True,
}
"""``liger_kernel_config``: Liger's loss without its other kernels, which would compute the layers otherwise too."""


def training_arguments(task: Task, versions: Versions) -> dict[str, Any]:
    """Every argument that decides memory or speed, by its name in *versions*."""
    job, plan = task.job, task.plan
    checkpoints, computes_in = plan.checkpointing is Checkpointing.FULL, autocast(task)
    arguments: dict[str, Any] = {
        "per_device_train_batch_size": int(plan.micro_batch),
        "gradient_accumulation_steps": int(plan.accumulation_steps),
        "activation_checkpointing": checkpoints,
        **({"activation_checkpointing_kwargs": {"use_reentrant": False}} if checkpoints else {}),
        "bf16": computes_in == "bf16",
        "fp16": computes_in == "fp16",
        "optim": optimizer_profiles()[job.optimizer].optim,
        **UPDATES,
        "torch_compile": False,
        "auto_find_batch_size": False,
        # Else the Trainer lets DDP look for unused parameters in every backward pass.
        "ddp_find_unused_parameters": False,
        "use_liger_kernel": job.loss == "fused",
        **({"liger_kernel_config": FUSED_LOSS_ALONE} if job.loss == "fused" else {}),
        "eval_strategy": "no",
    }
    named = in_versions(arguments, versions)
    if job.loss == "fused" and "liger_kernel_config" not in named:
        raise SpecError(
            f"transformers {versions['transformers']} cannot take Liger's loss without its other kernels; "
            "give --loss full, or install transformers 4.53 or newer"
        )
    return named


def autocast(task: Task) -> str:
    """What the matrix products are cast to: as DeepSpeed's JSON says, else nothing where the weights are in it."""
    return task.job.precision if task.plan.strategy.zero_stage is not None else mixed_precision(task.job)


def built_in(task: Task) -> str:
    """The format that the weights are loaded in, as torch names it.

    DeepSpeed keeps fp32 masters beside weights in the format that it computes in, and four bits are made of that
    format; DDP and FSDP hold the trained weights themselves.
    """
    job = task.job
    halves = task.plan.strategy.zero_stage is not None or job.method == "qlora"
    return FORMATS[job.precision if halves else job.model_format]


def in_versions(arguments: Mapping[str, Any], versions: Versions) -> dict[str, Any]:
    """*arguments* by their names in *versions*, less those that do not exist there."""
    named = ((flag_name(name, versions), value) for name, value in arguments.items())
    return {name: value for name, value in named if name is not None}


def command_line(arguments: Mapping[str, Any]) -> tuple[str, ...]:
    """*arguments* as HfArgumentParser takes them, each as one word, so that no value can be taken for a flag.

    A list, which holds names of modules, follows its flag.
    """
    return tuple(word for name, value in arguments.items() for word in _words(name, value))


def _words(name: str, value: Any) -> tuple[str, ...]:
    return (f"--{name}", *value) if isinstance(value, list) else (f"--{name}={_text(value)}",)


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (dict, bool)) else str(value)


def refuse_a_bare_configuration(task: Task, program: str) -> None:
    if holds_no_weights(task.weights_from):
        raise SpecError(f"{program} loads weights, which {task.weights_from} has none of; give a Hub id or a folder")


def refuse_what_is_gone(words: Iterable[str], versions: Versions) -> None:
    """Raise SpecError for a flag among the user's own *words* that *versions* no longer have."""
    for word in words:
        name = word.partition("=")[0].lstrip("-").replace("-", "_")
        if word.startswith("--") and (change := gone(name, versions)):
            instead = f"give --{change.new}" if change.new else "leave it out"
            version = f"{change.package} {versions[change.package]}"
            raise SpecError(f"{shlex.quote(word)}: {version} has no --{name} since {change.until}; {instead}")
