"""Constants come back out of runs that were made up with them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from advisor.catalog.calibrations import find_calibration
from advisor.catalog.gpus import find_gpu
from advisor.catalog.request import usual_cluster
from advisor.cost.compute import rates
from advisor.cost.kernels import product_seconds
from advisor.cost.schedule import step_time
from advisor.specs.calibration import Calibration
from advisor.specs.job import Job
from advisor.specs.plan import Plan, Strategy
from advisor.step.build import build
from advisor.step.program import Matmul
from advisor.validation.accuracy import Case, predicted_on
from advisor.validation.conformal import least_count
from advisor.validation.fitting import Fit, errors, from_records, operations, residuals, share_of_peak
from advisor.validation.measured import Measured, PhaseMeasured
from advisor.validation.outcome import Outcome
from advisor.validation.rates import Kind, Rate
from advisor.validation.record import Execution, Record

GPU = find_gpu("H200")
CLUSTER = usual_cluster(GPU, 1)
USUAL = find_calibration()
CONFIG = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}
GIB = 2**30
KERNELS = [f"{kernel}, default" for kernel in ("sdpa", "flash", "memory-efficient")]


def ran(gpus: int, length: int, truth: Calibration, outside_bytes: int, slower: float = 1.0) -> Record:
    """A run that takes *slower* times what *truth* predicts, with so many bytes outside torch's allocator."""
    strategy = Strategy.DDP if gpus == 1 else Strategy.FSDP
    plan = Plan(strategy=strategy, gpus=gpus, micro_batch=1)
    case = Case("made up", CONFIG, Job(sequence_length=length, global_batch=gpus), plan, rank=0)
    step = build(case.model, case.job, plan, 0).step
    seconds = slower * step_time(step, case.job, plan, replace(CLUSTER, gpus=gpus), truth).at(0).step_s
    true = dict(predicted_on("H200", case.model, case.job, plan, 0))
    true["device used"] = true["peak reserved"] + outside_bytes
    phase = PhaseMeasured(peak_allocated_bytes=1, end_allocated_bytes=1, peak_reserved_bytes=1, seconds=seconds / 3)
    rank = Measured(
        device="NVIDIA H200",
        states_bytes=1,
        forward=phase,
        backward=phase,
        step=phase,
        step_s=(seconds,) * 3,
        tokens_per_step=length,
        host_peak_bytes=1,
    )
    execution = Execution(
        id=str(length),
        started="2026-01-02T03:04:05+00:00",
        outcome=Outcome("ran"),
        launcher="torchrun",
        device="NVIDIA H200",
        steps=5,
        seconds=9.0,
        ranks=(rank,) * gpus,
    )
    return Record("made up", case, true, {}, execution)


def fitted(records: list[Record]) -> dict[str, Fit]:
    return {each.constant: each for each in from_records(records, GPU, CLUSTER, USUAL)}


def test_the_share_of_the_peak_and_the_context_come_out_as_they_went_in() -> None:
    truth = replace(USUAL, matmul_efficiency={"default": 0.6, "9.0": 0.5})
    found = fitted([ran(1, length, truth, GIB // 2) for length in (512, 1024, 2048, 4096)])

    assert found["matmul_efficiency"].value == {GPU.name: pytest.approx(0.5, abs=0.001)}
    assert found["matmul_efficiency"].mean_error == pytest.approx(0, abs=1e-4)
    assert found["matmul_efficiency"].mean_error_before > 0.05
    assert found["context_bytes"].value == GIB // 2
    assert set(found) == {"matmul_efficiency", "context_bytes"}


def test_runs_of_several_ranks_say_what_the_communicator_takes_and_how_much_hides() -> None:
    truth = replace(USUAL, overlap_share=0.4)
    alone = [ran(1, length, truth, GIB // 2) for length in (512, 1024, 2048)]
    several = [ran(4, length, truth, GIB // 2 + 3 * GIB) for length in (512, 1024, 2048)]
    found = fitted([*alone, *several])

    assert found["communicator_bytes"].value == 3 * GIB
    assert found["overlap_share"].value == pytest.approx(0.4, abs=0.01)


def test_the_error_left_out_is_that_of_a_run_that_the_others_foretell() -> None:
    odd = [ran(1, 1024, USUAL, GIB), ran(1, 2048, USUAL, GIB), ran(1, 4096, USUAL, GIB, slower=1.2)]
    found = fitted(odd)["matmul_efficiency"]

    assert found.max_error == pytest.approx(1 - 1 / 1.2, abs=0.005)
    assert found.runs == 3


def test_two_runs_fit_nothing_and_a_rank_that_is_alone_of_several_has_no_time() -> None:
    assert fitted([ran(1, 512, USUAL, GIB), ran(1, 1024, USUAL, GIB)]) == {}
    record = ran(4, 512, USUAL, GIB)
    assert record.execution
    emulated = replace(record, execution=replace(record.execution, ranks=record.execution.ranks[:1]))
    assert fitted([emulated] * 3) == {}


def test_residuals_are_kept_by_likeness() -> None:
    records = [ran(1, 512, USUAL, GIB, slower=1.5), ran(4, 512, USUAL, GIB)]
    found = residuals(records, CLUSTER, USUAL)

    assert found["time_ranges"] == {"ddp, 9.0": [pytest.approx(1.5)], "fsdp, 9.0": [pytest.approx(1.0)]}
    assert found["memory_ranges"].keys() == found["time_ranges"].keys()
    assert least_count() == 19


def rate(kind: Kind, seconds: float, **sizes: int) -> Rate:
    return Rate(kind=kind, sizes={**sizes, "number_format": "bf16"}, seconds=seconds, least_s=seconds)


def test_products_give_the_share_that_they_were_made_with() -> None:
    at = rates(GPU, "bf16", replace(USUAL, matmul_efficiency={"default": 0.6}))
    shapes = [(8192, 8192, 4096), (4096, 11008, 4096), (128, 4096, 4096)]
    found = [rate("product", float(product_seconds(Matmul(m, n, k), at)), m=m, n=n, k=k) for m, n, k in shapes]
    timed = operations(GPU, "product", found)

    assert timed is not None
    assert share_of_peak(timed, USUAL) == pytest.approx(0.6)
    assert errors(timed, 0.6, USUAL).max() < 1e-9
    assert operations(GPU, "attention forward", found) is None


@pytest.mark.parametrize(("kind", "share"), [("attention forward", 0.7), ("attention backward", 0.45)])
def test_attention_gives_the_share_of_each_direction(kind: Kind, share: float) -> None:
    at = rates(GPU, "bf16", replace(USUAL, attention_efficiency=dict.fromkeys(KERNELS, (0.7, 0.45))))
    backward, products = (True, 5) if kind == "attention backward" else (False, 2)

    def measured(length: int) -> Rate:
        product = Matmul(length, length, 128, 64, "attention", 0.5, fused="sdpa", backward=backward)
        seconds = products * float(product_seconds(product, at)) + at.kernel_floor_s
        return rate(kind, seconds, batch=2, length=length, heads=32, key_value_heads=8, head_dim=128)

    timed = operations(GPU, kind, [measured(2048), measured(8192)])

    assert timed is not None
    assert share_of_peak(timed, USUAL) == pytest.approx(share)
    assert errors(timed, share, USUAL).max() < 1e-9
    assert share_of_peak(timed.at(np.array([False, True])), USUAL) == pytest.approx(share)
