"""Measures memory and time of real training steps on one GPU, for records that predictions are held against.

    python benchmarks/gpu_campaign.py --dry-run                        # the runs, with what is predicted of each
    python benchmarks/gpu_campaign.py --out profiles/measured/gpu      # on a machine with a GPU; at most 9 minutes
    PYTHONPATH=.:wheels python benchmarks/gpu_campaign.py --out DIR    # where advisor and DeepSpeed are not installed
    python benchmarks/gpu_campaign.py --tiny --out DIR --only zero2x8  # small twins on a CPU: the same path

``benchmarks/cases/gpu.py`` has the runs, in order of worth. Each is a process of its own that ends when its time is
over; the next ones import their frameworks meanwhile. How every run ended is added to ``records.jsonl`` in the folder,
and a campaign that is started again goes on with what is not there. Last come the rates of single operations, into
``rates.json``. ``python benchmarks/accuracy.py --gpu DIR`` holds the records against the present model.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click
from cases.gpu import GpuCase, cases

from advisor.catalog.calibrations import find_calibration
from advisor.catalog.detect import detect
from advisor.catalog.gpus import find_gpu
from advisor.catalog.request import usual_cluster
from advisor.cost.memory import memory
from advisor.cost.schedule import step_time
from advisor.errors import RunError
from advisor.launch.run_script import ALLOCATOR_SETTING
from advisor.step.build import build
from advisor.validation import rates
from advisor.validation.accuracy import measured_bytes, without_dropout
from advisor.validation.measured import STEPS, Measured
from advisor.validation.outcome import Outcome, outcome_of
from advisor.validation.processes import Ended
from advisor.validation.record import Execution, Record, from_plain
from advisor.validation.run import check_ran, on_cpu, with_this_package
from advisor.validation.store import append, own
from advisor.validation.twin import twin_of

BUDGET_S = 530.0
"""Less than nine minutes by what the last process needs to end."""
RATES_S = 45.0
START_S = 3.0
"""From a request to the first step of a small model; frameworks are imported before."""
ENGINE_S = 1.5
"""More where a framework wraps the model."""
BUILD_S_PER_PARAMETER = 6e-10
TIMES_LONGER = 4
"""A run may take so many times what is expected, and at least LEAST_TIMEOUT_S."""
LEAST_TIMEOUT_S = 40.0
AHEAD = 3
"""Processes that import while one runs, on a machine of ENOUGH_CORES."""
ENOUGH_CORES = 8
TINY_PARAMETERS = 200_000
USUAL_GPU = "H200"
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Expected:
    """What is predicted of a run."""

    peak_bytes: int
    used_bytes: int
    seconds: float
    """Of the whole process, once its frameworks are there."""

    @property
    def timeout_s(self) -> float:
        return max(LEAST_TIMEOUT_S, TIMES_LONGER * self.seconds)


def expected(one: GpuCase, gpu: str) -> Expected:
    """By the step program, and by constants for what is no step."""
    case, plan = one.case, one.case.plan
    cluster, calibration = usual_cluster(find_gpu(gpu), int(plan.gpus)), find_calibration()
    program = build(without_dropout(case.model), case.job, plan, case.rank)
    held = memory(program, plan, cluster, calibration)
    time_ = step_time(program.step, case.job, plan, cluster, calibration).at(0)
    # Emulated collectives take no time, nor does DeepSpeed's Adam for the CPU, which is left out there.
    step_s = time_.compute_s if one.emulated else time_.step_s
    seconds = START_S + one.steps * step_s + case.model.parameter_count * BUILD_S_PER_PARAMETER
    seconds += ENGINE_S * (plan.strategy.zero_stage is not None or plan.strategy.is_fsdp)
    return Expected(held.peak_allocated_bytes, held.device_used_bytes, seconds)


def tiny(one: GpuCase) -> GpuCase:
    """A small twin of the same run, for a CPU."""
    case = one.case
    twin = twin_of(case.config, case.model, TINY_PARAMETERS)
    plan = twin.plan(case.plan, int(case.plan.gpus))
    twins = replace(case, name=twin.model.name, config=twin.config, job=twin.job(case.job, plan), plan=plan, rank=0)
    return replace(one, case=twins, steps=STEPS)


class Waiting:
    """A process that has imported its frameworks, or is about to, and waits for the run that it is to make."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        from advisor.validation.emulate import command

        self.process = subprocess.Popen(
            command(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=dict(environment),
            text=True,
            errors="replace",
            start_new_session=True,
        )

    def run(self, line: str, timeout_s: float) -> tuple[Ended, dict[str, Any]]:
        """How the run that *line* requests ended, and what its process answered, if it did."""
        started, code = time.monotonic(), None
        try:
            printed, said = self.process.communicate(line + "\n", timeout=timeout_s)
            code = self.process.returncode
        except subprocess.TimeoutExpired:
            self.end()
            printed, said = self.process.communicate()
        answers = [text for text in printed.splitlines() if text.startswith("{")]
        return Ended(code, False, said, time.monotonic() - started), json.loads(answers[-1]) if answers else {}

    def end(self) -> None:
        """End it with all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def started_ahead(environment: Mapping[str, str], count: int) -> Iterator[deque[Waiting]]:
    """*count* processes that wait; those that still do in the end are ended."""
    waiting = deque(Waiting(environment) for _ in range(count))
    try:
        yield waiting
    finally:
        for each in waiting:
            each.end()


def record_of(
    one: GpuCase, device: str, started: datetime, ended: Ended, answer: Mapping[str, Any], timeout_s: float
) -> Record:
    """What is kept of a run, however it ended."""
    outcome, ranks, true = outcome_of(ended, timeout_s), (), {}
    if "out_of_memory" in answer:
        outcome = Outcome("out-of-memory", (answer["out_of_memory"].splitlines()[0],))
    elif "measured" in answer:
        try:
            case = one.case
            check_ran([answer], case.job, case.plan, one.emulated, case.model.parameter_count)
            outcome, ranks = Outcome("ran"), (from_plain(Measured, answer["measured"]),)
            true = measured_bytes(ranks[0])
        except RunError as error:
            outcome = Outcome("other-run", (str(error),))
    elif outcome.ran:
        outcome = Outcome("crashed", ("it ended without an answer",))
    if one.emulated:  # which has no communicator, nor its buffers
        true = {counter: size for counter, size in true.items() if counter != "device used"}
    execution = Execution(
        id=one.id,
        started=started.isoformat(timespec="seconds"),
        outcome=outcome,
        launcher="emulated",
        device=device,
        steps=one.steps,
        seconds=round(ended.seconds, 3),
        ranks=ranks,
    )
    return Record(truth_of(one, device), one.case, true, answer.get("versions", {}), execution)


def truth_of(one: GpuCase, device: str) -> str:
    """The group under which the accuracy is given."""
    framework = one.case.plan.framework_title
    if one.emulated:
        return f"One rank of 4 to 64 emulated on {device}, {framework}"
    return f"{device} alone" + ("" if framework == "DDP" else f", {framework}")


def told(record: Record, predicted: Expected) -> str:
    """One line on a run that has ended."""
    assert record.execution
    line = f"{record.execution.id:64} {record.outcome.kind:13}"
    if not record.true:
        why = record.outcome.last_lines[-1] if record.outcome.last_lines else ""
        return f"{line} {predicted.peak_bytes / GIB:9.3f}  {why[:90]}"
    beside, rank = record.comparison(), record.execution.ranks[0]
    step = f"{1000 * rank.median_step_s:8.1f}" if int(record.case.plan.gpus) == 1 else "       -"
    sizes = " ".join(f"{each['peak'] / GIB:9.3f}" for each in (beside.predicted, beside.true))
    return f"{line} {sizes} {100 * beside.error():+8.2f} % {step}"


def campaign(todo: Sequence[GpuCase], gpu: str, device: str, out: Path, budget_s: float) -> bool:
    """Run *todo* as far as the time reaches; whether all were."""
    from advisor.validation.emulate import request

    path, began, on_gpu = out / "records.jsonl", time.monotonic(), device != "cpu"
    environment = dict([ALLOCATOR_SETTING, ("DS_ACCELERATOR", "cuda"), ("HF_HUB_OFFLINE", "1")]) | with_this_package()
    if not on_gpu:
        environment = on_cpu() | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    ahead = AHEAD if (os.cpu_count() or 1) >= ENOUGH_CORES else 0
    ended_ladders: set[str] = set()
    print(f"{'peak allocated in GiB':64} {'outcome':13} predicted  measured      error  ms/step", flush=True)
    with started_ahead(environment, min(ahead, len(todo))) as waiting:
        for number, one in enumerate(todo):
            case, predicted = one.case, expected(one, gpu)
            left_s = budget_s - (time.monotonic() - began)
            if left_s < predicted.seconds:
                print(f"no time for {len(todo) - number} more; start it again to go on", flush=True)
                return False
            if one.ladder in ended_ladders:
                continue
            if number + len(waiting) < len(todo):
                waiting.append(Waiting(environment))
            line = request(case.config, case.job, case.plan, case.rank or 0, "cuda" if on_gpu else "cpu", one.steps)
            limit, started = min(predicted.timeout_s, left_s), datetime.now(timezone.utc)
            process = waiting.popleft()
            try:
                ended, answer = process.run(line, limit)
            finally:
                process.end()
            record = record_of(one, device, started, ended, answer, limit)
            append(record, path)
            if record.outcome.kind == "out-of-memory" and one.ladder:
                ended_ladders.add(one.ladder)
            print(told(record, predicted), flush=True)
    return True


def measured_before(out: Path) -> dict[str, Record]:
    """What the folder has by the id of the run, the last of each."""
    return {each.execution.id: each for each in own(out / "records.jsonl")[0] if each.execution}


def listed(todo: Sequence[GpuCase], gpu: str) -> None:
    """Print what is predicted of each run, and the seconds of all."""
    capacity, total_s = find_gpu(gpu).memory_bytes, RATES_S
    print(f"{'':64} {'peak GiB':>9} {'used GiB':>9} {'of all':>7} {'seconds':>8}")
    for one in todo:
        predicted = expected(one, gpu)
        total_s += predicted.seconds
        print(
            f"{one.id:64} {predicted.peak_bytes / GIB:9.2f} {predicted.used_bytes / GIB:9.2f} "
            f"{100 * predicted.used_bytes / capacity:5.0f} % {predicted.seconds:8.1f}"
        )
    print(f"{len(todo)} runs and the rates: {total_s:.0f} s expected, on a {find_gpu(gpu).name}")


def measure_rates(device_name: str, small: bool, path: Path) -> None:
    """Rates of what training steps of the campaign do, in this process."""
    import torch
    from cases.rates import measured

    found = measured(torch.device("cuda" if device_name != "cpu" else "cpu"), small)
    rates.write(path, device_name, found)
    print(*rates.lines(found), sep="\n", flush=True)


@click.command()
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder for the records and the rates.")
@click.option("--dry-run", is_flag=True, help="List the runs with what is predicted of them; run none.")
@click.option("--tiny", "small", is_flag=True, help="Run small twins on this machine's CPU.")
@click.option("--only", multiple=True, help="Runs whose id has this in it.  [repeatable]")
@click.option("--gpu", help="Whose memory the ladders climb.  [default: the one found, else H200]")
@click.option("--budget", default=BUDGET_S, show_default=True, help="Seconds for all.")
@click.option("--retry", is_flag=True, help="Again those that crashed or took too long.")
@click.option("--rates", "rates_only", is_flag=True, help="Measure the rates alone.")
def main(
    out: Path | None,
    dry_run: bool,
    small: bool,
    only: tuple[str, ...],
    gpu: str | None,
    budget: float,
    retry: bool,
    rates_only: bool,
) -> None:
    """Memory and time of real training steps on one GPU."""
    machine = None if small else detect()
    device = find_gpu(machine.gpu_names[0]).name if machine else "cpu"
    gpu = gpu or (device if machine else USUAL_GPU)
    wanted = [one for one in cases(gpu) if not only or any(part.casefold() in one.id for part in only)]
    if dry_run:
        listed(wanted, gpu)
        return
    if out is None:
        raise click.UsageError("give --out FOLDER for the records, or --dry-run")
    if device == "cpu" and not small:
        raise click.ClickException("NVML finds no GPU here; --tiny runs small twins on the CPU")
    out.mkdir(parents=True, exist_ok=True)
    if rates_only:
        measure_rates(device, small, out / "rates.json")
        return
    began = time.monotonic()
    known = measured_before(out)
    again = ("crashed", "killed", "timeout", "other-run") if retry else ()
    todo = [one for one in wanted if one.id not in known or known[one.id].outcome.kind in again]
    todo = [tiny(one) for one in todo] if small else todo
    rates_there = (out / "rates.json").is_file()
    finished = campaign(todo, gpu, device, out, budget - (0 if rates_there else RATES_S))
    if not rates_there:
        left_s = budget - (time.monotonic() - began)
        rest = [sys.executable, __file__, "--rates", "--out", str(out), *(["--tiny"] if small else [])]
        try:
            finished &= subprocess.run(rest, env=with_this_package(), timeout=left_s).returncode == 0
        except subprocess.TimeoutExpired:
            finished = False
    print(f"{len(measured_before(out))} runs in {out}, {time.monotonic() - began:.0f} s")
    sys.exit(0 if finished else 1)


if __name__ == "__main__":
    main()
