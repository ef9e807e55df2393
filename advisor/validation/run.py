"""Starts a short real run of one plan on this machine, through a launcher and the files that a user would call it with.

Each rank is a process of its own, in which :mod:`advisor.validation.worker` stands in for the training program. On a
CPU gloo carries the collectives. An exit code proves nothing: a run counts only if every rank reports, sees all the
others, ran the classes that the plan means, and kept a finite loss.
"""

from __future__ import annotations

import json
import math
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from advisor.catalog.request import DEFAULT_GPU, resolve
from advisor.errors import RunError, WriteError
from advisor.launch.deepspeed import deepspeed_json
from advisor.launch.files import LaunchFile, render, write
from advisor.launch.run_script import ALLOCATOR_SETTING
from advisor.specs.job import Job
from advisor.specs.plan import Plan, Strategy
from advisor.validation.measured import STEPS, Measured
from advisor.validation.outcome import Outcome, last_lines, outcome_of
from advisor.validation.processes import finish
from advisor.validation.record import from_plain, plain

if TYPE_CHECKING:
    from advisor.validation.trace import Trace

Launcher = Literal["deepspeed", "torchrun", "accelerate", "emulated"]
"""``emulated`` launches nothing: one process is one rank, and the others are not there."""
Device = Literal["cpu", "cuda"]

WORKER = "advisor.validation.worker"
EMULATED = "advisor.validation.emulate"


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """A run to make."""

    config: Mapping[str, Any]
    """A transformers configuration of a causal model."""
    job: Job
    plan: Plan
    launcher: Launcher
    device: Device = "cpu"
    rank: int = 0
    """Which rank an emulated run is."""
    gpu: str | None = None
    """Name of the GPU for which the files are written; of it only the number goes into them."""
    steps: int = STEPS
    timeout_s: float = 120.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """A run that was made, however it ended."""

    outcome: Outcome
    seconds: float
    files: tuple[LaunchFile, ...]
    """What the launcher was given."""
    ranks: tuple[Mapping[str, Any], ...] = ()
    """What each rank wrote; none unless the run ended well."""
    measured: tuple[Measured, ...] = ()
    """What each rank measured."""


def launcher_of(plan: Plan) -> Launcher:
    """The plain launcher of *plan*'s framework."""
    return "deepspeed" if plan.strategy.zero_stage is not None else "torchrun"


def run(
    config: Mapping[str, Any], job: Job, plan: Plan, launcher: Launcher | None = None, timeout_s: float = 120.0
) -> tuple[Trace, ...]:
    """What every rank of *plan* held in the last of three optimizer steps on this machine's CPU, rank 0 first.

    *config* is a transformers configuration of a causal model small enough for this machine. Raises RunError, with
    the last lines of the output, where the run fails, takes longer than *timeout_s*, or is not the run that was asked
    for. No process of it is left behind.
    """
    from advisor.validation.trace import Trace

    launcher = launcher or launcher_of(plan)
    finished = start(Ask(config=config, job=job, plan=plan, launcher=launcher, timeout_s=timeout_s))
    if finished.outcome.kind == "interrupted":
        raise KeyboardInterrupt
    if not finished.outcome.ran:
        *lines, how = finished.outcome.last_lines
        said = f"; its last lines: {' | '.join(lines)}" if lines else ", without a word"
        raise RunError(f"the run {how}{said}")
    return tuple(from_plain(Trace, rank["trace"]) for rank in finished.ranks)


def start(ask: Ask, look: Callable[[float, int], None] = lambda elapsed_s, step: None) -> Finished:
    """Make the run that is asked for. However it ends is an outcome; no process of it is left behind.

    *look* is called a few times a second with the time that has passed and the optimizer steps that rank 0 has made.
    """
    with tempfile.TemporaryDirectory(prefix="advisor-run-") as name:
        folder = Path(name)
        files = _write_inputs(folder, ask)
        ended = finish(
            _command(folder, ask),
            _environment(ask),
            folder,
            ask.timeout_s,
            lambda elapsed_s: look(elapsed_s, _step(folder, ask.rank)),
        )
        outcome = outcome_of(ended, ask.timeout_s)
        finished = Finished(outcome=outcome, seconds=ended.seconds, files=files)
        if not outcome.ran:
            return finished
        try:
            ranks = _ranks(folder, ask)
            asked = json.loads((folder / "request.json").read_text())
            check_ran(ranks, ask.job, ask.plan, ask.launcher == "emulated", asked["parameters"])
        except RunError as error:
            return replace(finished, outcome=Outcome("other-run", (*last_lines(ended.output), str(error))))
    return replace(finished, ranks=ranks, measured=tuple(from_plain(Measured, each["measured"]) for each in ranks))


def _write_inputs(folder: Path, ask: Ask) -> tuple[LaunchFile, ...]:
    """The files that a user gets, and beside them what the worker reads; the former are returned."""
    try:
        return _written(folder, ask)
    except OSError as error:
        raise WriteError(f"cannot write a run's files to {folder}: {error.strerror}; free it, or set TMPDIR") from error


def _written(folder: Path, ask: Ask) -> tuple[LaunchFile, ...]:
    job, plan = ask.job, ask.plan
    config = folder / "config.json"
    config.write_text(json.dumps(dict(ask.config)))
    request = {"job": plain(job), "plan": plain(plan), "launcher": ask.launcher, "timeout_s": ask.timeout_s}
    question = resolve(str(config), gpus=int(plan.gpus), gpu=ask.gpu or DEFAULT_GPU)
    parameters = question.model.parameter_count
    how = {"device": ask.device, "steps": ask.steps, "rank": ask.rank, "parameters": parameters}
    (folder / "request.json").write_text(json.dumps(request | how))
    launch = render(question.model, job, plan, question.cluster, weights_from=config.name)
    write(launch, folder)
    if plan.strategy is Strategy.ZERO0:  # accelerate runs DDP in its place, and so a user is given no such file
        (folder / "ds_config.json").write_text(deepspeed_json(job, plan))
    return launch.files


def _command(folder: Path, ask: Ask) -> list[str]:
    """The launcher's own program, and what its documentation gives it."""
    if ask.launcher == "emulated":
        return [sys.executable, "-m", EMULATED, str(folder)]
    ranks, port, yaml = str(ask.plan.gpus), _free_port(), str(folder / "accelerate.yaml")
    starts = {
        "deepspeed": f"deepspeed.launcher.runner --num_gpus {ranks} --master_port {port} --no_local_rank --module",
        "torchrun": f"torch.distributed.run --standalone --nproc-per-node {ranks} -m",
        "accelerate": f"accelerate.commands.accelerate_cli launch --config_file {yaml} --main_process_port {port} -m",
    }
    return [sys.executable, "-m", *starts[ask.launcher].split(" "), WORKER, str(folder)]


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def with_this_package() -> dict[str, str]:
    """The caller's environment, with this very package first on the path."""
    here = str(Path(__file__).parents[2])
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH", "")]))}


def on_cpu() -> dict[str, str]:
    """The same with DeepSpeed on the CPU."""
    return with_this_package() | {"DS_ACCELERATOR": "cpu"}


def _environment(ask: Ask) -> dict[str, str]:
    """On a CPU one thread a rank, and no GPU in sight; on GPUs what ``run.sh`` sets."""
    if ask.device == "cpu":
        return on_cpu() | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment = dict([ALLOCATOR_SETTING]) | with_this_package()
    if ask.plan.offload.optimizer:
        threads = (os.cpu_count() or 1) // int(ask.plan.gpus)
        environment.setdefault("OMP_NUM_THREADS", str(max(1, threads)))
    return environment


def _step(folder: Path, rank: int) -> int:
    """Optimizer steps that *rank* has made."""
    try:
        return int(json.loads((folder / f"progress{rank}.json").read_text())["step"])
    except (OSError, ValueError, KeyError, TypeError):  # it has not begun, or wrote something else
        return 0


def _ranks(folder: Path, ask: Ask) -> tuple[Mapping[str, Any], ...]:
    """What each rank wrote that there was."""
    found, plan = [], ask.plan
    for rank in [ask.rank] if ask.launcher == "emulated" else range(int(plan.gpus)):
        try:
            found.append(json.loads((folder / f"rank{rank}.json").read_text()))
        except OSError as error:
            raise RunError(f"rank {rank} of {plan.gpus} ended without a record") from error
        except ValueError as error:
            raise RunError(f"what rank {rank} of {plan.gpus} wrote is no JSON") from error
        try:
            from_plain(Measured, found[-1]["measured"])
        except (KeyError, TypeError) as error:
            raise RunError(f"rank {rank} of {plan.gpus} wrote no measurement: {error!r}") from error
    return tuple(found)


def check_ran(
    records: Sequence[Mapping[str, Any]],
    job: Job,
    plan: Plan,
    emulated: bool = False,
    parameters: int | None = None,
) -> None:
    """Refuse a run that was another than the one asked for. An *emulated* rank is alone, and its losses say nothing."""
    engine, optimizer = _classes(job, plan)
    for rank, record in enumerate(records):
        for what, found, expected in (
            ("ranks that answered", record["ranks"], 1 if emulated else int(plan.gpus)),
            ("class around the model", record["engine"], engine),
            ("optimizer", record["optimizer"], optimizer),
            ("parameters", record["trace"]["parameters"] if parameters else None, parameters),
        ):
            if expected is not None and found != expected:
                raise RunError(f"rank {rank} ran something else: {what} {found}, expected {expected}")
        # fp16 finds its loss scale by skipping; anywhere else Adam's moments would be missing.
        if job.precision != "fp16" and record.get("skipped_steps"):
            raise RunError(f"rank {rank} skipped {record['skipped_steps']} steps, whose gradients were not finite")
        if not emulated and not all(math.isfinite(loss) for loss in record["losses"]):
            raise RunError(f"rank {rank} lost its loss: {record['losses']}")


def _classes(job: Job, plan: Plan) -> tuple[str | None, str]:
    """What wraps the model, None for nothing, and what steps, by class.

    Source: deepspeed 0.19.8, engine.py ``_do_optimizer_sanity_check``.
    """
    if plan.strategy.is_fsdp:
        return "FSDPModule", "AdamW"
    if plan.strategy.zero_stage is None:
        return "DistributedDataParallel" if int(plan.gpus) > 1 else None, "AdamW"
    if plan.strategy is Strategy.ZERO0:
        return "DeepSpeedEngine", "AdamW" if job.precision == "fp32" else "FP16_UnfusedOptimizer"
    if plan.strategy is Strategy.ZERO1 and job.precision == "bf16" and plan.zero.gradient_format == "fp32":
        return "DeepSpeedEngine", "BF16_Optimizer"
    if plan.strategy.zero_stage == 3:
        return "DeepSpeedEngine", "DeepSpeedZeroOptimizer_Stage3"
    return "DeepSpeedEngine", "DeepSpeedZeroOptimizer"
