"""The campaign on one GPU: what it would run there, and the same path on a CPU."""

from __future__ import annotations

import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from advisor.validation.processes import Ended
from advisor.validation.record import Record, read

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu_campaign
from cases import rates
from cases.gpu import GpuCase, cases, gpu_case
from gpu_campaign import campaign, expected, main, record_of

GPU = "H200"
STRATEGIES = {"ddp", "fsdp", "fsdp-grad-op", "zero0", "zero1", "zero2", "zero3"}
PHASE = {"peak_allocated_bytes": 20, "end_allocated_bytes": 15, "peak_reserved_bytes": 30, "seconds": 1.0}
MEASURED = {
    "device": "NVIDIA H200",
    "states_bytes": 10,
    "forward": PHASE,
    "backward": PHASE,
    "step": PHASE,
    "step_s": [3.0, 4.0],
    "tokens_per_step": 128,
    "host_peak_bytes": 40,
    "device_used_bytes": 50,
}
ANSWER = {
    "ranks": 1,
    "engine": "Qwen2ForCausalLM",
    "optimizer": "AdamW",
    "losses": [2.0],
    "trace": {"parameters": 494_032_768},
    "measured": MEASURED,
}


def test_the_campaign_covers_what_it_is_for_in_nine_minutes() -> None:
    every = cases(GPU)
    plans, jobs = [one.case.plan for one in every], [one.case.job for one in every]

    assert len({one.id for one in every}) == len(every)
    assert {int(plan.gpus) for plan in plans} == {1, 4, 8, 64}
    assert {plan.strategy.value for plan in plans} == STRATEGIES
    assert {plan.offload.value for plan in plans} == {"none", "optimizer", "optimizer+params"}
    assert {job.sequence_length for job in jobs} >= {512, 2048, 16384}
    assert {int(plan.micro_batch) for plan in plans} >= {1, 2, 4, 8, 16}
    assert {one.case.model.family for one in every} == {"qwen2", "llama", "gpt2", "qwen3_moe"}
    assert gpu_campaign.RATES_S + sum(expected(one, GPU).seconds for one in every) <= 540
    for ladder in {one.ladder for one in every} - {""}:
        used = [expected(one, GPU).used_bytes / 2**30 for one in every if one.ladder == ladder]
        assert used == sorted(used)
        assert used[0] < 140 < used[-1]


def test_small_twins_run_and_are_not_run_again(tmp_path: Path) -> None:
    for package in ("torch", "accelerate", "deepspeed"):
        pytest.importorskip(package)
    (tmp_path / "rates.json").touch()
    arguments = ["--tiny", "--out", str(tmp_path), "--only", "1.5b.fsdpx64", "--only", "1b.zero2x4"]

    first = CliRunner().invoke(main, arguments)
    found = list(read(tmp_path / "records.jsonl"))
    second = CliRunner().invoke(main, arguments)

    assert (first.exit_code, second.exit_code) == (0, 0), first.output
    assert [record.outcome.kind for record in found] == ["ran", "ran"]
    for record in found:
        assert abs(record.comparison().error()) < 0.001
    assert len(list(read(tmp_path / "records.jsonl"))) == 2


def recorded(one: GpuCase, ended: Ended, answer: dict[str, Any]) -> Record:
    return record_of(one, "NVIDIA H200", datetime.now(timezone.utc), ended, answer, 60)


WELL = Ended(0, False, "", 5.0)


def test_a_run_is_recorded_however_it_ended() -> None:
    alone, rank = gpu_case("Qwen2.5-0.5B"), gpu_case("Qwen2.5-0.5B", "ddp", 8)
    among_many = ANSWER | {"engine": "DistributedDataParallel"}

    ran, emulated = recorded(alone, WELL, ANSWER), recorded(rank, WELL, among_many)
    assert ran.true["peak"] == 20
    assert ran.true["device used"] == 50
    assert "device used" not in emulated.true, "there is no communicator"
    assert (ran.truth, emulated.truth) == ("NVIDIA H200 alone", "One rank of 4 to 64 emulated on NVIDIA H200, DDP")

    for kind, ended, answer in (
        ("out-of-memory", WELL, {"out_of_memory": "CUDA out of memory. Tried to allocate 2.00 GiB.\nMore."}),
        ("other-run", WELL, ANSWER | {"losses": [float("nan")]}),
        ("other-run", WELL, among_many | {"optimizer": "SGD", "engine": "Qwen2ForCausalLM"}),
        ("other-run", WELL, ANSWER | {"trace": {"parameters": 7}}),
        ("timeout", Ended(None, False, "", 60.0), {}),
        ("killed", Ended(-9, False, "", 3.0), {}),
        ("crashed", Ended(1, False, "KeyError: 'none'", 3.0), {}),
        ("crashed", WELL, {}),
    ):
        record = recorded(alone, ended, answer)
        assert record.outcome.kind == kind
        assert not record.true


def test_a_ladder_ends_where_memory_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, ended = [], []

    class Full:
        """A process on a GPU that is always full."""

        def __init__(self, environment: object) -> None:
            started.append(self)

        def run(self, line: str, timeout_s: float) -> tuple[Ended, dict[str, Any]]:
            return WELL, {"out_of_memory": "CUDA out of memory"}

        def end(self) -> None:
            ended.append(self)

    monkeypatch.setattr(gpu_campaign, "Waiting", Full)
    monkeypatch.setattr(gpu_campaign.os, "cpu_count", lambda: 16)
    rungs = [gpu_case("gpt2-medium", ladder="up", micro_batch=count) for count in (1, 2, 4)]
    other = gpu_case("gpt2-medium", micro_batch=8)

    assert campaign([*rungs, other], GPU, "NVIDIA H200", tmp_path, budget_s=60)

    ids = [record.execution.id for record in read(tmp_path / "records.jsonl") if record.execution]
    assert ids == [rungs[0].id, other.id]
    assert len(started) == 4, "as many as there are runs, and no more ahead"
    assert set(ended) == set(started)


def test_a_campaign_stops_when_its_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_campaign.os, "cpu_count", lambda: 1)

    assert not campaign([gpu_case("gpt2-medium")], GPU, "NVIDIA H200", tmp_path, budget_s=1)

    assert not list(tmp_path.iterdir())


def test_rates_are_measured_as_far_as_the_time_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    import torch

    def kinds() -> set[str]:
        return {rate.kind for rate in rates.measured(torch.device("cpu"), small=True)}

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert kinds() == {"product", "copy", "adamw", "attention forward", "attention backward"}

        monkeypatch.setattr(rates, "BUDGET_S", -1.0)
        assert kinds() == set()
    finally:
        torch.set_num_threads(threads)
