"""How far predictions are from the records of a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from advisor.validation.accuracy import predicted_on, predicted_step_s
from advisor.validation.measured import Measured, PhaseMeasured
from advisor.validation.outcome import Outcome
from advisor.validation.record import Execution, Record, write

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import accuracy
from cases.gpu import GpuCase, gpu_case

DEVICE = "NVIDIA H200"


def record(one: GpuCase, bytes_share: float = 1.0, time_share: float = 1.0) -> Record:
    """A run that held, and took, so many times what is predicted of it."""
    case = one.case
    predicted = predicted_on(DEVICE, case.model, case.job, case.plan, case.rank)
    true = {counter: round(size * bytes_share) for counter, size in predicted.items()}
    if one.emulated:
        del true["device used"]
    phase = PhaseMeasured(
        peak_allocated_bytes=true["peak"], end_allocated_bytes=0, peak_reserved_bytes=true["peak reserved"], seconds=1.0
    )
    step_s = time_share * predicted_step_s(DEVICE, case.model, case.job, case.plan)
    rank = Measured(
        device=DEVICE,
        states_bytes=true["between steps"],
        forward=phase,
        backward=phase,
        step=phase,
        step_s=[step_s],
        tokens_per_step=1,
        host_peak_bytes=1,
    )
    run = Execution(
        id=one.id,
        started="2026-11-21T12:00:00+00:00",
        outcome=Outcome("ran"),
        launcher="emulated",
        device=DEVICE,
        steps=7,
        seconds=5.0,
        ranks=(rank,),
    )
    return Record("emulated" if one.emulated else "alone", case, true, {}, run)


def out_of_memory(one: GpuCase) -> Record:
    run = Execution(
        id=one.id,
        started="2026-11-21T12:00:00+00:00",
        outcome=Outcome("out-of-memory", ("CUDA out of memory",)),
        launcher="emulated",
        device=DEVICE,
        steps=7,
        seconds=5.0,
    )
    return Record("alone", one.case, {}, {}, run)


def test_records_of_a_gpu_are_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact, fuller = gpu_case("gpt2-medium"), gpu_case("gpt2-medium", micro_batch=2)
    rank, full = gpu_case("gpt2-medium", "fsdp", 8), gpu_case("gpt2-medium", micro_batch=4)
    monkeypatch.setattr(accuracy, "RECORDED", tmp_path / "none")
    write(
        tmp_path / "records.jsonl",
        [record(exact), record(fuller, 1.25, 2.0), record(rank, 1.0, 9.0), out_of_memory(full)],
    )

    printed = CliRunner().invoke(accuracy.main, ["--gpu", str(tmp_path)]).output

    alone = printed.partition("alone: n 2\n")[2].partition("emulated: n 1\n")[0]
    for counter in ("peak", "peak reserved", "device used"):
        assert f"  {counter:18}  mean 10.000 %  max 20.000 %" in alone
    assert "device used" not in printed.partition("emulated: n 1\n")[2].partition(DEVICE)[0]
    assert f"{DEVICE}, step time: n 2  mean 25.0 %  max 50.0 %" in printed
    assert f"worst step time: {fuller.case.title}, -50.0 %" in printed
    assert f"{DEVICE}, predicted to fit: 4, out of memory 1" in printed
    assert f"ran out of memory: {full.case.title}" in printed


def test_without_records_of_a_gpu_nothing_is_said_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "RECORDED", tmp_path)

    assert "step time" not in CliRunner().invoke(accuracy.main, ["--gpu", str(tmp_path)]).output
