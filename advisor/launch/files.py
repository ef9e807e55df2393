"""A plan as the files that launch it, and their way onto the disk."""

from __future__ import annotations

import os
import shlex
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from advisor.cost.estimate import plan_of
from advisor.errors import SpecError, WriteError
from advisor.launch.accelerate import FSDP_REFUSES, accelerate_yaml
from advisor.launch.deepspeed import deepspeed_json
from advisor.launch.run_script import (
    ALLOCATOR_SETTING,
    attention_kernel,
    holds_no_weights,
    run_script,
    train_arguments,
)
from advisor.specs.hardware import Cluster
from advisor.specs.job import Job
from advisor.specs.model import ModelSpec
from advisor.specs.plan import Plan
from advisor.specs.question import Input
from advisor.version import __version__

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from advisor.cost.estimate import PlanWords


@dataclass(frozen=True, eq=False)
class LaunchFile:
    """A file by name and whole text, which is put together when it is first read."""

    name: str
    put_together: Callable[[], str] = field(repr=False)

    @cached_property
    def text(self) -> str:
        return self.put_together()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LaunchFile) and (self.name, self.text) == (other.name, other.text)

    def __hash__(self) -> int:
        return hash((self.name, self.text))


@dataclass(frozen=True, slots=True)
class Launch:
    """What starts a plan: the files, and the command to give in their folder."""

    command: tuple[str, ...]
    environment: Mapping[str, str] = field(hash=False)
    files: tuple[LaunchFile, ...]

    def shell(self) -> str:
        """The command as one line to paste into a shell."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*settings, shlex.join(self.command)])


def launch_files(model: str, *, strategy: str | None = None, **words: Unpack[PlanWords]) -> Launch:
    """The files and the command that train *model* by the plan that the words of :func:`advisor.estimate` describe."""
    question, plan = plan_of(model, strategy=strategy, **words)
    return render(
        question.model,
        question.job,
        plan,
        question.cluster,
        weights_from=question.weights_from,
        inputs=question.inputs,
    )


def render(
    model: ModelSpec,
    job: Job,
    plan: Plan,
    cluster: Cluster,
    *,
    weights_from: str | None = None,
    inputs: Sequence[Input] = (),
) -> Launch:
    """The files and the command that train *model* by *plan*.

    *weights_from* is what transformers loads: a Hub id, a folder, or a config.json, which holds no weights and so
    starts from random ones; by default the model's name. The assumed ones of *inputs* are named in the files' headers.
    """
    weights_from = model.name if weights_from is None else weights_from
    _refuse_what_cannot_start(model, job, plan, cluster, weights_from)
    arguments = train_arguments(model, job, plan, weights_from)
    comments = _comments(model, job, plan, cluster, weights_from, inputs)
    files = [LaunchFile("accelerate.yaml", partial(accelerate_yaml, model, job, plan, cluster, comments))]
    if plan.strategy.zero_stage:
        files.append(LaunchFile("ds_config.json", partial(deepspeed_json, job, plan)))
    files.append(LaunchFile("train.py", partial(Path(__file__).with_name("train.py").read_text, encoding="utf-8")))
    files.append(LaunchFile("run.sh", partial(run_script, plan, cluster, arguments, comments)))
    # run.sh asks each machine for what only that machine knows: its rank, and its cores for an optimizer on the CPU.
    if cluster.nodes > 1 or plan.offload.optimizer:
        return Launch(("bash", "run.sh"), {}, tuple(files))
    command = ("accelerate", "launch", "--config_file", "accelerate.yaml", "train.py", *arguments)
    return Launch(command, dict([ALLOCATOR_SETTING]), tuple(files))


def _refuse_what_cannot_start(model: ModelSpec, job: Job, plan: Plan, cluster: Cluster, weights_from: str) -> None:
    if int(plan.gpus) != cluster.gpus:
        raise SpecError(f"the plan uses {plan.gpus} GPUs, but the cluster has {cluster.gpus}: plan for all of them")
    if job.precision == "bf16" and not cluster.gpu.has_bf16:
        raise SpecError(f"{cluster.gpu.name} has no bf16, so this job would not start on it; give --precision fp16")
    if plan.strategy.is_fsdp and model.family in FSDP_REFUSES:
        raise SpecError(
            f"accelerate's FSDP cannot shard {model.family} models with their tied parameters; use ddp or zero2"
        )
    try:
        encoded = weights_from.encode()
    except UnicodeEncodeError:
        encoded = b"\0"
    if b"\0" in encoded or not encoded:
        raise SpecError(f"the model {weights_from!r} cannot be written on a command line; rename its folder")


def _comments(
    model: ModelSpec, job: Job, plan: Plan, cluster: Cluster, weights_from: str, inputs: Sequence[Input]
) -> tuple[str, ...]:
    """The header of the files: what this is, and what was assumed."""
    machines = f" in {cluster.nodes} machines" if cluster.nodes > 1 else ""
    lines = [
        f"{model.name}, {plan.strategy.title} on {cluster.gpus} x {cluster.gpu.name}{machines}. "
        f"Written by advisor {__version__}.",
        f"Batch: {plan.gpus} GPUs x micro-batch {plan.micro_batch} x {plan.accumulation_steps} accumulation steps = "
        f"{plan.global_batch} sequences of {job.sequence_length} tokens per optimizer step.",
        f"Precision {job.precision} over {job.parameter_format} weights, {job.optimizer}, "
        f"{attention_kernel(model, job)} attention, {job.loss} loss, checkpointing {plan.checkpointing.value}, "
        f"offload {plan.offload.value}.",
    ]
    if job.loss == "fused":
        lines.append("The fused loss is Liger's: pip install liger-kernel.")
    if job.attention == "flash" and not model.eager_only:
        lines.append("The flash attention is Dao's: pip install flash-attn.")
    if holds_no_weights(weights_from):
        lines.append("The model is a configuration without weights: training starts from random ones.")
    assumed = [f"{each.name} {each.value}" for each in inputs if each.origin == "assumed"]
    if assumed:
        lines.append(f"Assumed: {', '.join(assumed)}.")
    return tuple(part for line in lines for part in textwrap.wrap(_one_line(line), 116, subsequent_indent="  "))


def _one_line(text: str) -> str:
    """*text* with whatever could end a comment, line breaks of any alphabet included, as escapes."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def write(launch: Launch, folder: str | os.PathLike[str], force: bool = False) -> tuple[Path, ...]:
    """Write the files of *launch* into *folder*, which is created if need be: all of them, or none.

    Existing files stay as they are unless *force* is given.
    """
    target = Path(folder)
    with _explained(target):
        _refuse_what_is_in_the_way(launch, target, force)
        with _created(target):
            return _place(launch, target, force)


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
        if os.path.lexists(path) and not force:
            raise WriteError(f"{path} exists; give --force to overwrite it, or another folder")


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


def _place(launch: Launch, target: Path, force: bool) -> tuple[Path, ...]:
    """Write every file under another name first, and rename them only when all are whole."""
    staged: dict[Path, Path] = {}
    placed: list[Path] = []
    try:
        for file in launch.files:
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
    return tuple(placed)


def _write_new(path: Path, text: str) -> None:
    mode = 0o777 if text.startswith("#!") else 0o666  # less the user's umask
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="utf-8", newline="\n") as stream:
        stream.write(text)
