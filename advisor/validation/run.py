"""Starts a short real run of one plan on this machine's CPU, through the launcher that a user would call.

Each rank is a process of its own, gloo carries the collectives, and :mod:`advisor.validation.worker` counts what the
rank holds. An exit code proves nothing here: a run counts only if every rank reports, sees all the others, ran the
classes that the plan means, and kept a finite loss.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from advisor.catalog.request import resolve
from advisor.errors import RunError
from advisor.launch.accelerate import accelerate_yaml
from advisor.launch.deepspeed import deepspeed_json
from advisor.specs.job import Job
from advisor.specs.plan import Plan, Strategy
from advisor.validation.record import from_plain, plain

if TYPE_CHECKING:
    from advisor.validation.trace import Trace

Launcher = Literal["deepspeed", "torchrun", "accelerate"]

WORKER = "advisor.validation.worker"
LAST_LINES = 8
"""Lines of a failed run's output that its error repeats."""
GRACE_S = 5.0
"""What processes are given to end by themselves before they are killed."""
RAISED = re.compile(r"(\[\w+\]: ?)*[\w.]*(Error|Exception): ")
"""How the last line of a traceback begins, with the rank before it or not."""
MARK = "ADVISOR_RUN"
"""Environment variable by which a run's processes are found, wherever a launcher put them."""


def launcher_of(plan: Plan) -> Launcher:
    """The plain launcher of *plan*'s framework."""
    return "deepspeed" if plan.strategy.zero_stage is not None else "torchrun"


def run(
    config: Mapping[str, Any], job: Job, plan: Plan, launcher: Launcher | None = None, timeout_s: float = 120.0
) -> tuple[Trace, ...]:
    """What every rank of *plan* held in the last of three optimizer steps, rank 0 first.

    *config* is a transformers configuration of a causal model small enough for this machine. Raises RunError, with
    the last lines of the output, where the run fails, takes longer than *timeout_s*, or is not the run that was asked
    for. No process of it is left behind.
    """
    from advisor.validation.trace import Trace

    launcher = launcher or launcher_of(plan)
    with tempfile.TemporaryDirectory(prefix="advisor-run-") as name:
        folder = Path(name)
        _write_inputs(folder, config, job, plan, launcher, timeout_s)
        output = _finish(_command(folder, plan, launcher), timeout_s)
        records = _records(folder, plan, output)
    check_ran(records, job, plan)
    return tuple(from_plain(Trace, record["trace"]) for record in records)


def _write_inputs(
    folder: Path, config: Mapping[str, Any], job: Job, plan: Plan, launcher: Launcher, timeout_s: float
) -> None:
    (folder / "config.json").write_text(json.dumps(dict(config)))
    request = {"job": plain(job), "plan": plain(plan), "launcher": launcher, "timeout_s": timeout_s}
    (folder / "request.json").write_text(json.dumps(request))
    if plan.strategy.zero_stage is not None:
        (folder / "ds_config.json").write_text(deepspeed_json(job, plan))
    if launcher == "accelerate":
        # Of the machine only the number of its GPUs is written into the file.
        question = resolve(str(folder / "config.json"), gpus=int(plan.gpus), gpu="A100-80GB")
        (folder / "accelerate.yaml").write_text(accelerate_yaml(question.model, job, plan, question.cluster, ()))


def _command(folder: Path, plan: Plan, launcher: Launcher) -> list[str]:
    """The launcher's own program, and what its documentation gives it."""
    ranks, port, yaml = str(plan.gpus), _free_port(), str(folder / "accelerate.yaml")
    starts = {
        "deepspeed": f"deepspeed.launcher.runner --num_gpus {ranks} --master_port {port} --no_local_rank --module",
        "torchrun": f"torch.distributed.run --standalone --nproc-per-node {ranks} -m",
        "accelerate": f"accelerate.commands.accelerate_cli launch --config_file {yaml} --main_process_port {port} -m",
    }
    return [sys.executable, "-m", *starts[launcher].split(" "), WORKER, str(folder)]


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def on_cpu() -> dict[str, str]:
    """The caller's environment, with DeepSpeed on the CPU, and this very package first on the path."""
    here = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH", "")]))
    return os.environ | {"PYTHONPATH": path, "DS_ACCELERATOR": "cpu"}


def _environment(mark: str) -> dict[str, str]:
    """One thread a rank, and no GPU in sight."""
    return on_cpu() | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", MARK: mark}


def _finish(command: list[str], timeout_s: float) -> str:
    """The output of *command* once it has ended well."""
    folder = Path(command[-1])
    with (folder / "output.txt").open("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=_environment(folder.name), cwd=folder
        )
        try:
            ended = f"ended with exit code {process.wait(timeout_s)}"
        except subprocess.TimeoutExpired:
            ended = f"did not end within {timeout_s:g} s"
        finally:
            _end(process, folder.name)
        output.seek(0)
        text = output.read()
    if ended != "ended with exit code 0":
        raise RunError(f"the run {ended}{_last(text)}")
    return text


def _end(launcher: subprocess.Popen[bytes], mark: str) -> None:
    """End every process that carries *mark*: torchrun's ranks have sessions of their own, and may outlive it."""
    import psutil

    def marked() -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == mark:
                    found.append(process)
        return found

    for process in marked():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    psutil.wait_procs(marked(), timeout=GRACE_S)
    for process in marked():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    launcher.wait()


def _last(output: str) -> str:
    """The last lines up to the last error that a rank raised: launchers add summaries of their own."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    raised = [index for index, line in enumerate(lines) if RAISED.match(line) and "ChildFailedError" not in line]
    lines = lines[: raised[-1] + 1] if raised else lines
    return "; its last lines: " + " | ".join(lines[-LAST_LINES:]) if lines else ", without a word"


def _records(folder: Path, plan: Plan, output: str) -> list[dict[str, Any]]:
    """What each rank wrote."""
    records = []
    for rank in range(int(plan.gpus)):
        path = folder / f"rank{rank}.json"
        if not path.is_file():
            raise RunError(f"rank {rank} of {plan.gpus} ended without a record{_last(output)}")
        records.append(json.loads(path.read_text()))
    return records


def check_ran(records: list[dict[str, Any]], job: Job, plan: Plan) -> None:
    """Refuse a run that was another than the one asked for."""
    engine, optimizer = _classes(job, plan)
    for rank, record in enumerate(records):
        for what, found, expected in (
            ("ranks that answered", record["ranks"], int(plan.gpus)),
            ("class around the model", record["engine"], engine),
            ("optimizer", record["optimizer"], optimizer),
        ):
            if found != expected:
                raise RunError(f"rank {rank} ran something else: {what} {found}, expected {expected}")
        if not all(math.isfinite(loss) for loss in record["losses"]):
            raise RunError(f"rank {rank} lost its loss: {record['losses']}")


def _classes(job: Job, plan: Plan) -> tuple[str, str]:
    """What wraps the model and what steps, by class (deepspeed 0.19.8, engine.py ``_do_optimizer_sanity_check``)."""
    if plan.strategy.is_fsdp:
        return "FSDPModule", "AdamW"
    if plan.strategy.zero_stage is None:
        return "DistributedDataParallel", "AdamW"
    if plan.strategy is Strategy.ZERO0:
        return "DeepSpeedEngine", "AdamW" if job.precision == "fp32" else "FP16_UnfusedOptimizer"
    if plan.strategy is Strategy.ZERO1 and job.precision == "bf16" and plan.zero.gradient_format == "fp32":
        return "DeepSpeedEngine", "BF16_Optimizer"
    if plan.strategy is Strategy.ZERO3:
        return "DeepSpeedEngine", "DeepSpeedZeroOptimizer_Stage3"
    return "DeepSpeedEngine", "DeepSpeedZeroOptimizer"
