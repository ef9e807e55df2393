"""A plan as the files that launch it, and their way onto the disk."""

from __future__ import annotations

import datetime
import os
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from advisor.catalog.legality import refusal_of_optimizer
from advisor.catalog.trainers import profile_of, refusal_of_plan, versions_of
from advisor.cost.estimate import plan_of
from advisor.errors import SpecError, WriteError
from advisor.launch.accelerate import FSDP_REFUSES
from advisor.launch.prediction import prediction_file
from advisor.launch.targets import IMAGES, TARGETS, Target
from advisor.launch.trainers.programs import program_of
from advisor.launch.trainers.words import attention_kernel, holds_no_weights
from advisor.launch.training import Launch, LaunchFile, Task, Training
from advisor.specs.hardware import Cluster
from advisor.specs.job import Job
from advisor.specs.model import ModelSpec
from advisor.specs.plan import Plan, Strategy
from advisor.specs.question import Input, Origin
from advisor.version import __version__

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from advisor.cost.estimate import PlanWords
    from advisor.cost.results import Estimate

WRITTEN_FOR = "torch 2.13, transformers 5.23, accelerate 1.15 and deepspeed 0.19.8"
"""Where the names in the files were read; the oldest versions that know them are those of the extra ``run``."""

_DATE_LINE = re.compile(rb"^# Date: [0-9-]{10}\.\n", re.MULTILINE)

__all__ = ["Launch", "LaunchFile", "launch_files", "launch_of", "render", "write"]


def launch_files(
    model: str,
    *,
    strategy: str | None = None,
    target: Target | None = None,
    image: str | None = None,
    **words: Unpack[PlanWords],
) -> Launch:
    """The files and the command that train *model* by the plan that the words of :func:`advisor.estimate` describe.

    *target* is what starts it, by default what starts the job's trainer usually; *image* the container where one is
    started.
    """
    question, plan = plan_of(model, strategy=strategy, **words)
    return render(
        question.model,
        question.job,
        plan,
        question.cluster,
        weights_from=question.weights_from,
        inputs=question.inputs,
        target=target,
        image=image,
    )


def launch_of(
    estimate: Estimate,
    target: Target | None = None,
    more_arguments: Sequence[str] = (),
    *,
    image: str | None = None,
    date: datetime.date | None = None,
    keep_auto: bool = False,
) -> Launch:
    """The files and the command by which *target* trains what was priced."""
    return render(
        estimate.model,
        estimate.job,
        estimate.plan,
        estimate.cluster,
        weights_from=next((str(each.value) for each in estimate.inputs if each.name == "model"), None),
        inputs=estimate.inputs,
        target=target,
        image=image,
        date=date,
        prediction=prediction_file(estimate),
        keep_auto=keep_auto,
        more_arguments=more_arguments,
    )


def render(
    model: ModelSpec,
    job: Job,
    plan: Plan,
    cluster: Cluster,
    *,
    weights_from: str | None = None,
    inputs: Sequence[Input] = (),
    target: Target | None = None,
    image: str | None = None,
    date: datetime.date | None = None,
    prediction: LaunchFile | None = None,
    keep_auto: bool = False,
    more_arguments: Sequence[str] = (),
) -> Launch:
    """The files and the command by which *target* trains *model* by *plan*.

    *weights_from* is what transformers loads: a Hub id, a folder, or a config.json, which holds no weights and so
    starts from random ones; by default the model's name. The files' headers name *inputs*, and *date* where it is
    given. *image* is the container that a target of :data:`advisor.launch.targets.IMAGES` starts. *keep_auto* leaves
    ``auto`` in DeepSpeed's JSON for transformers' Trainer to fill in. train.py is given *more_arguments* after the
    plan's own. Raises SpecError where *target* does not start such a plan.
    """
    if target is not None and target not in TARGETS:
        raise SpecError(f"the target must be one of {', '.join(TARGETS)}, got {target!r}")
    weights_from = model.name if weights_from is None else weights_from
    _refuse_what_cannot_start(model, job, plan, cluster, weights_from)
    _refuse_what_no_command_line_holds("model", weights_from, "rename its folder")
    for argument in more_arguments:
        _refuse_what_no_command_line_holds("argument", argument, "leave it out")
    versions, _ = versions_of(job.trainer)
    target = target or ("torchrun" if profile_of(job.trainer, versions).launcher == "torchrun" else "accelerate")
    if image is not None:
        _refuse_what_no_command_line_holds("image", image, "give another")
        if target not in IMAGES:
            raise SpecError(f"{target} starts no container; --image is for {', '.join(IMAGES)}")
    elif assumed_image := IMAGES.get(target):
        image, inputs = assumed_image, (*inputs, Input("image", assumed_image, "assumed"))
    comments = _comments(model, job, plan, cluster, weights_from, inputs, date)
    task = Task(model, job, plan, cluster, weights_from, comments, prediction, keep_auto)
    program = program_of(task, versions, more_arguments)
    if keep_auto and (plan.strategy.zero_stage is None or program.own_parallelism or not program.fills_auto):
        raise SpecError(
            f"{job.trainer} with {plan.strategy.title} completes no DeepSpeed JSON; auto can stay for zero1, zero2 or "
            f"zero3 with a trainer built on transformers' Trainer, such as --trainer hf"
        )
    if program.own_parallelism and target in ("accelerate", "deepspeed"):
        raise SpecError(f"{job.trainer} spreads the model itself; take the target torchrun or slurm, not {target}")
    launch = import_module(f"advisor.launch.{TARGETS[target]}").launch(Training(task, program, image))
    assert isinstance(launch, Launch)
    return replace(launch, notes=program.notes, keeps_log=program.keeps_log)


def _refuse_what_cannot_start(model: ModelSpec, job: Job, plan: Plan, cluster: Cluster, weights_from: str) -> None:
    if plan.strategy is Strategy.MEGATRON and job.trainer != "megatron":
        raise SpecError(f"{plan.title} is not run by the script that advisor writes; give --trainer megatron")
    if job.method == "qlora" and holds_no_weights(weights_from):
        raise SpecError("--method qlora brings loaded weights to four bits, and a config.json has none: give a folder")
    if int(plan.gpus) != cluster.gpus:
        raise SpecError(f"the plan uses {plan.gpus} GPUs, but the cluster has {cluster.gpus}: plan for all of them")
    if job.precision == "bf16" and not cluster.gpu.has_bf16:
        raise SpecError(f"{cluster.gpu.name} has no bf16, so this job would not start on it; give --precision fp16")
    unfit = refusal_of_optimizer(job, plan.strategy, plan.offload, plan.fsdp.version)
    if reason := unfit or refusal_of_plan(job, plan):
        raise SpecError(reason)
    if plan.strategy.is_fsdp and model.family in FSDP_REFUSES:
        raise SpecError(
            f"accelerate's FSDP cannot shard {model.family} models with their tied parameters; use ddp or zero2"
        )


def _refuse_what_no_command_line_holds(what: str, word: str, remedy: str) -> None:
    try:
        encoded = word.encode()
    except UnicodeEncodeError:
        encoded = b"\0"
    if b"\0" in encoded or not encoded:
        raise SpecError(f"the {what} {word!r} cannot be written on a command line; {remedy}")


def _comments(
    model: ModelSpec,
    job: Job,
    plan: Plan,
    cluster: Cluster,
    weights_from: str,
    inputs: Sequence[Input],
    date: datetime.date | None,
) -> tuple[str, ...]:
    """The header of the files: what this is, when and for what it was written, and where each input came from."""
    machines = f" in {cluster.nodes} machines" if cluster.nodes > 1 else ""
    lines = [
        f"{model.name}, {plan.title} on {cluster.gpus} x {cluster.gpu.name}{machines}. "
        f"Written by advisor {__version__}.",
        f"Batch: {plan.gpus} GPUs x micro-batch {plan.micro_batch} x {plan.accumulation_steps} accumulation steps = "
        f"{plan.global_batch} sequences of {job.sequence_length} tokens per optimizer step.",
        f"Precision {job.precision} over {job.parameter_format} weights, {job.optimizer}, "
        f"{attention_kernel(model, job)} attention, {job.loss} loss, checkpointing {plan.checkpointing.value}, "
        f"offload {plan.offload.value}.",
    ]
    if job.loss == "fused":
        lines.append("The fused loss is Liger's: pip install liger-kernel.")
    if job.method != "full":
        packages = "peft bitsandbytes" if job.method == "qlora" else "peft"
        lines.append(f"Adapters of rank {job.lora_rank} are trained, by peft: pip install {packages}.")
    if job.attention == "flash" and not model.eager_only:
        lines.append("The flash attention is Dao's: pip install flash-attn.")
    if holds_no_weights(weights_from):
        lines.append("The model is a configuration without weights: training starts from random ones.")
    lines.append(f"Names and keys as in {WRITTEN_FOR}.")
    for origin, title in _ORIGINS.items():
        values = [f"{each.name} {each.value}" for each in inputs if each.origin == origin]
        if values:
            lines.append(f"{title}: {', '.join(values)}.")
    if date:
        lines.append(f"Date: {date.isoformat()}.")
    return tuple(part for line in lines for part in textwrap.wrap(_one_line(line), 116, subsequent_indent="  "))


_ORIGINS: dict[Origin, str] = {
    "given": "Given",
    "found": "Found on the machine that wrote this",
    "file": "Read from the given configuration",
    "default": "Default of the framework that the configuration is for",
    "assumed": "Assumed",
}


def _one_line(text: str) -> str:
    """*text* with whatever could end a comment, line breaks of any alphabet included, as escapes."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def write(launch: Launch, folder: str | os.PathLike[str], force: bool = False) -> tuple[Path, ...]:
    """Write the files of *launch* into *folder*, which is created if need be: all of them, or none.

    Existing files stay as they are unless *force* is given; without it, those of other content are refused.
    """
    target = Path(folder)
    with _explained(target):
        _refuse_what_is_in_the_way(launch, target, force)
        with _created(target):
            _place([file for file in launch.files if force or not _holds(target, file)], target, force)
    return tuple(target / file.name for file in launch.files)


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise WriteError(f"cannot write {_one_line(str(target))}: {reason}; give another folder") from error


def _refuse_what_is_in_the_way(launch: Launch, target: Path, force: bool) -> None:
    if target.exists() and not target.is_dir():
        raise WriteError(f"{target} is a file, not a folder; give another folder")
    for file in launch.files:
        path = target / file.name
        if path.is_dir():
            raise WriteError(f"{path} is a folder, where a file of that name would stand; give another folder")
        if os.path.lexists(path) and not force and not _holds(target, file):
            raise WriteError(f"{path} exists; give --force to overwrite it, or another folder")


def _holds(target: Path, file: LaunchFile) -> bool:
    """Whether the very *file* lies in *target* already, be it written on another day."""
    path = target / file.name
    return path.is_file() and _DATE_LINE.sub(b"", path.read_bytes()) == _DATE_LINE.sub(b"", file.text.encode())


@contextmanager
def _created(target: Path) -> Iterator[None]:
    """*target* with its missing parents; on an error those that were missing go again."""
    missing = [path for path in (target, *target.parents) if not path.exists()]
    try:
        target.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in missing:
            if path.is_dir():
                path.rmdir()
        raise


def _place(files: Sequence[LaunchFile], target: Path, force: bool) -> None:
    """Write every file under another name first, and rename them only when all are whole."""
    staged: dict[Path, Path] = {}
    placed: list[Path] = []
    try:
        for file in files:
            destination = target / file.name
            staged[destination] = target / f".{file.name}.{os.urandom(8).hex()}"
            _write_new(staged[destination], file.text)
        for destination, source in staged.items():
            source.replace(destination)
            placed.append(destination)
    except BaseException:
        # What was replaced under force cannot come back; what was new goes again.
        for leftover in (*staged.values(), *([] if force else placed)):
            leftover.unlink(missing_ok=True)
        raise


def _write_new(path: Path, text: str) -> None:
    mode = 0o777 if text.startswith("#!") else 0o666  # less the user's umask
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="utf-8", newline="\n") as stream:
        stream.write(text)
