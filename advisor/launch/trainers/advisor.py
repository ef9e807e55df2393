"""train.py of this package, the same for every plan: transformers with whatever accelerate wraps the model in."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from advisor.catalog.trainers import Versions
from advisor.launch.trainers.words import attention_kernel, holds_no_weights, packages_beside
from advisor.launch.training import Beside, LaunchFile, Program, Task
from advisor.specs.job import Job
from advisor.specs.model import ModelSpec
from advisor.specs.plan import Plan

FILES = ("train.py", "train_data.py", "train_optimizers.py", "train_checkpoint.py")
"""train.py and what it imports."""


def program(task: Task, versions: Versions, more_arguments: Sequence[str]) -> Program:
    """train.py with the plan in its arguments, and *more_arguments* after them."""
    return Program(
        script=Beside("train.py"),
        arguments=(*train_arguments(task.model, task.job, task.plan, task.weights_from), *more_arguments),
        files=(*map(_file, FILES), *([task.prediction] if task.prediction else [])),
        fills_auto=False,
        keeps_log=True,
        usage="more arguments of train.py, such as --dataset=FILE --steps=1000 --output=FOLDER --resume=auto",
        install=f"torch transformers accelerate deepspeed{packages_beside(task.job)}",
    )


def _file(name: str) -> LaunchFile:
    return LaunchFile(name, partial((Path(__file__).parents[1] / name).read_text, "utf-8"))


def train_arguments(model: ModelSpec, job: Job, plan: Plan, weights_from: str) -> tuple[str, ...]:
    """What train.py is given, each argument as one word, so that no value can be taken for a flag."""
    halves = plan.strategy.zero_stage is not None or job.method == "qlora"
    built_in = job.precision if halves else job.model_format
    flags = {
        "model": weights_from,
        "objective": model.objective,
        # DeepSpeed keeps fp32 masters beside weights in the format that it computes in, and four bits are made of that
        # format; DDP and FSDP hold the trained weights themselves.
        "weights": built_in,
        "attention": attention_kernel(model, job),
        **({"loss": job.loss} if job.loss != "full" else {}),
        **_adapters(job),
        "checkpointing": plan.checkpointing.value,
        "sequence-length": job.sequence_length,
        "micro-batch": int(plan.micro_batch),
        "accumulation-steps": int(plan.accumulation_steps),
        "optimizer": job.optimizer,
        **({"galore-rank": job.galore_rank} if job.optimizer == "galore" else {}),
    }
    arguments = tuple(f"--{name}={value}" for name, value in flags.items())
    switches = {"--compile": job.compile, "--padded": job.padded, "--random-weights": holds_no_weights(weights_from)}
    return (*arguments, *(name for name, on in switches.items() if on))


def _adapters(job: Job) -> dict[str, object]:
    """The flags of ``--method``; nothing where every weight is trained."""
    if job.method == "full":
        return {}
    return {
        "method": job.method,
        "lora-rank": job.lora_rank,
        **({"lora-targets": ",".join(job.lora_targets)} if job.lora_targets else {}),
        **({"lora-dropout": job.lora_dropout} if job.lora_dropout else {}),
        **({"lora-weights": "as-model"} if job.parameter_format != "fp32" else {}),
    }
