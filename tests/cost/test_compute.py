"""Compute time: products by work, the rest by bytes, and never faster than kernels can be launched."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.cost.compute import Work, busy_seconds, compute_seconds, gpu_seconds, kernels, rates, work
from advisor.errors import SpecError
from advisor.step.program import Block, Matmul, phase, repeat, then

from .machines import CALIBRATION, GPU

AT = rates(GPU, "bf16", CALIBRATION)
LINEAR = Block("linear", "activations", matmuls=(Matmul(1000, 2000, 500),), moved_bytes=8e6, kernels=1)
ATTENTION = Block("attention", "activations", matmuls=(Matmul(100, 100, 50, 4, "attention", 0.5),), kernels=3)

amounts = st.floats(0, 1e15)


def test_rates_are_shares_of_the_gpus_peaks() -> None:
    assert (AT.linear_flop_per_s, AT.attention_flop_per_s, AT.moved_bytes_per_s) == (200e12, 100e12, 1e12)


# torch.get_float32_matmul_precision() is "highest" unless changed, so fp32 products do not use tf32.
def test_fp32_runs_at_the_plain_fp32_rate() -> None:
    assert rates(GPU, "fp32", CALIBRATION).linear_flop_per_s == 10e12


def test_a_format_that_the_gpu_lacks_is_refused_with_what_it_has() -> None:
    without_bf16 = replace(GPU, peak_flop_per_s={"fp16": 65e12, "fp32": 8e12})

    with pytest.raises(SpecError, match="round has no known bf16 rate; choose --precision among: fp16, fp32"):
        rates(without_bf16, "bf16", CALIBRATION)


def test_work_counts_every_run_of_every_block() -> None:
    done = work(phase("forward", repeat(then(LINEAR, LINEAR), 3), ATTENTION))

    assert done.linear_flop == 6 * 2 * 1000 * 2000 * 500
    assert done.attention_flop == 4 * 100 * 100 * 50
    assert done.whole_flop == done.linear_flop + 2 * done.attention_flop
    assert done.moved_bytes == 48e6
    assert done.kernels == 9


def test_what_happens_before_training_is_not_work_of_a_step() -> None:
    assert work(phase("init", LINEAR)) == Work(0, 0, 0, 0, 0)


def test_products_and_moved_bytes_add_up() -> None:
    done = Work(linear_flop=200e12, attention_flop=50e12, whole_flop=300e12, moved_bytes=0.25e12, kernels=10)

    assert gpu_seconds(done, AT) == pytest.approx(1 + 0.5 + 0.25)


def test_many_small_kernels_take_as_long_as_launching_them() -> None:
    small = repeat(Block("small", "activations", moved_bytes=200, kernels=1), 5000)

    assert kernels(small) == 5000
    assert compute_seconds(small, AT) == pytest.approx(5000 * 1e-5)
    assert busy_seconds(small, AT) == pytest.approx(5000 * 200 / 1e12)


def test_a_repeat_is_busy_as_often_as_it_repeats() -> None:
    once, three_times = busy_seconds(LINEAR, AT), busy_seconds(repeat(LINEAR, np.array([3, 5])), AT)

    assert list(np.asarray(three_times) / once) == pytest.approx([3, 5])


@given(amounts, amounts, amounts, st.floats(1, 100))
def test_a_faster_gpu_is_never_slower(linear: float, attention: float, moved: float, times: float) -> None:
    done = Work(linear, attention, linear + attention, moved, 0)
    peaks = {name: rate * times for name, rate in GPU.peak_flop_per_s.items()}
    faster = replace(GPU, peak_flop_per_s=peaks, memory_bandwidth_bytes_per_s=2e12 * times)

    assert gpu_seconds(done, rates(faster, "bf16", CALIBRATION)) <= gpu_seconds(done, AT)


@given(st.integers(1, 8192), st.integers(1, 8192), st.integers(1, 8192))
def test_a_product_never_exceeds_its_share_of_the_peak_and_larger_ones_come_closer(m: int, n: int, k: int) -> None:
    def rate(scale: int) -> float:
        rows, columns, inner = scale * m, scale * n, scale * k
        moved = 2 * (rows * inner + inner * columns + rows * columns)
        flop = 2 * rows * columns * inner
        return flop / float(gpu_seconds(Work(flop, 0, flop, moved, 0), AT))

    assert rate(1) <= rate(2) * (1 + 1e-12)
    assert rate(2) <= AT.linear_flop_per_s * (1 + 1e-12)
