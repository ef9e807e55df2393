"""What a rank measures while it trains."""

from __future__ import annotations

import contextlib
import json
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("accelerate")

import torch

from advisor.errors import SpecError
from advisor.validation.engines import Engine
from advisor.validation.loop import trace_of, train
from advisor.validation.measured import Measured
from advisor.validation.meter import CpuMeter, CudaMeter, Meter
from advisor.validation.record import from_plain, plain

TOKENS, WIDTH, VOCABULARY, MICRO_STEPS = 64, 32, 100, 2
WEIGHTS_BYTES = 2 * VOCABULARY * WIDTH * 4


def small_engine() -> Engine:
    """A matrix looked up and a matrix multiplied, by AdamW in fp32."""
    model = torch.nn.Sequential(torch.nn.Embedding(VOCABULARY, WIDTH), torch.nn.Linear(WIDTH, VOCABULARY, bias=False))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def update(last: bool) -> None:
        if last:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return Engine(
        model,
        optimizer,
        forward=lambda ids, labels: torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), labels.flatten()),
        backward=lambda loss: loss.backward(),  # type: ignore[no-untyped-call]
        update=update,
        micro_step=lambda last: contextlib.nullcontext(),
    )


def run(meter: Meter, steps: int, told: list[int]) -> tuple[Measured, list[float], Engine]:
    with meter:
        engine = small_engine()
        meter.built()
        ids = torch.zeros(1, TOKENS, dtype=torch.long)
        measured, losses = train(meter, engine, ids, MICRO_STEPS, steps, told.append)
    return measured, losses, engine


def test_steps_after_the_warm_up_are_measured() -> None:
    told: list[int] = []

    measured, losses, _ = run(CpuMeter(), 5, told)

    assert len(measured.step_s) == 3
    assert told == [0, 1, 2, 3, 4, 5]
    assert len(losses) == 5 * MICRO_STEPS
    assert measured.tokens_per_step == TOKENS * MICRO_STEPS
    assert measured.tokens_per_s == pytest.approx(TOKENS * MICRO_STEPS / measured.median_step_s)
    assert sum(phase.seconds for phase in measured.phases) <= max(measured.step_s) * len(measured.phases)
    assert 2**20 < measured.host_peak_bytes < 2**40


def test_bytes_of_a_phase_are_those_of_its_tensors() -> None:
    measured, _, engine = run(CpuMeter(), 3, [])

    step_counters = 2 * 4
    gradients_bytes, batch_bytes = WEIGHTS_BYTES, TOKENS * 8
    assert measured.states_bytes == 3 * WEIGHTS_BYTES + step_counters
    assert measured.step.peak_allocated_bytes == measured.states_bytes + gradients_bytes + batch_bytes
    assert measured.peak_allocated_bytes == trace_of(measured, engine).peak_bytes
    assert measured.peak_reserved_bytes is None
    assert measured.device_used_bytes is None


def test_more_steps_hold_no_more() -> None:
    few, many = (trace_of(*(run(CpuMeter(), steps, [])[::2])) for steps in (3, 6))

    assert few == many


def test_what_was_measured_is_read_back() -> None:
    measured, _, _ = run(CpuMeter(), 3, [])

    found = from_plain(Measured, json.loads(json.dumps(plain(measured))))

    assert plain(found) == json.loads(json.dumps(plain(measured)))
    assert found.forward == measured.forward


def test_a_run_that_is_all_warm_up_is_refused() -> None:
    with pytest.raises(SpecError, match="of 2 steps none is left after 2 of warm-up"):
        run(CpuMeter(), 2, [])


class Device:
    """A GPU whose counters grow by what each phase is said to take."""

    def __init__(self) -> None:
        self.milliseconds = 0.0
        self.allocated = self.peak = 1000
        self.synchronized = 0

    def event(self, enable_timing: bool) -> Any:
        event = SimpleNamespace(at=0.0)
        event.elapsed_time = lambda later: later.at - event.at
        event.record = lambda: setattr(event, "at", self.milliseconds)
        return event

    def take(self, size_bytes: int) -> None:
        self.allocated += size_bytes
        self.peak = max(self.peak, self.allocated)
        self.milliseconds += 2

    def reset(self, device: Any) -> None:
        self.peak = self.allocated

    def synchronize(self, device: Any) -> None:
        self.synchronized += 1


def test_a_gpu_is_read_by_its_counters_and_events(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Device()
    for name, answer in {
        "set_device": lambda device: None,
        "empty_cache": lambda: None,
        "Event": gpu.event,
        "memory_allocated": lambda device: gpu.allocated,
        "max_memory_allocated": lambda device: gpu.peak,
        "max_memory_reserved": lambda device: gpu.peak + 500,
        "reset_peak_memory_stats": gpu.reset,
        "synchronize": gpu.synchronize,
        "mem_get_info": lambda device: (10_000 - gpu.allocated, 10_000),
        "get_device_name": lambda device: "a GPU",
        "get_device_properties": lambda device: SimpleNamespace(total_memory=10_000),
        "memory_stats": lambda device: {"num_alloc_retries": 1},
    }.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    meter = CudaMeter(torch.device("cuda", 0))

    for _ in range(2):
        meter.begin_step(torch.empty(3, dtype=torch.long))
        with meter.phase("forward"):
            gpu.take(2000)
        with meter.phase("backward"):
            gpu.take(700)
            gpu.take(-2700)
        with meter.phase("step"):
            gpu.take(0)
        meter.end_step()
    measured = meter.measured(3)

    assert measured.device == "a GPU"
    assert measured.states_bytes == 1000 - 512
    assert [phase.peak_allocated_bytes for phase in measured.phases] == [3000, 3700, 1000]
    assert [phase.end_allocated_bytes for phase in measured.phases] == [3000, 1000, 1000]
    assert measured.peak_reserved_bytes == 4200
    assert measured.device_used_bytes == 1000
    assert measured.device_used_before_bytes == 1000
    assert measured.cache_releases == 1
    assert [phase.seconds for phase in measured.phases] == pytest.approx([0.002, 0.004, 0.002])
    assert list(measured.step_s) == pytest.approx([0.008, 0.008])
    assert gpu.synchronized == 2, "once a step"
