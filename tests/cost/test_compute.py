"""Compute time of whole stretches: products, the other bytes, and kernels that take their time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.cost.compute import Work, load, rates, work
from advisor.cost.kernels import Rates, product_seconds
from advisor.errors import SpecError
from advisor.step.program import Amount, Block, Matmul, Node, phase, repeat, then

from .machines import CALIBRATION, GPU

AT = rates(GPU, "bf16", CALIBRATION)
PRODUCT = Matmul(1024, 2048, 500)
LINEAR = Block("linear", "activations", matmuls=(PRODUCT,), moved_bytes=PRODUCT.operand_bytes, kernels=1)
SCORES = Matmul(128, 128, 64, 4, "attention", 0.5, fused="sdpa")
ATTENTION = Block("attention", "activations", matmuls=(SCORES, SCORES), kernels=3)
MOVING = Block("moving", "activations", moved_bytes=8e6, kernels=2)


def busy_seconds(node: Node, at: Rates) -> Amount:
    return load(node, at).busy_s


def test_rates_are_shares_of_the_gpus_peaks() -> None:
    assert (AT.linear_flop_per_s, AT.moved_bytes_per_s) == (200e12, 1e12)
    assert AT.attention_flop_per_s["flash"] == (100e12, 100e12)


# torch.get_float32_matmul_precision() is "highest" unless changed, so fp32 products do not use tf32.
def test_fp32_runs_at_the_plain_fp32_rate_also_within_a_bf16_job() -> None:
    assert rates(GPU, "fp32", CALIBRATION).linear_flop_per_s == 10e12
    assert AT.single_flop_per_s == 10e12


def test_a_format_that_the_gpu_lacks_is_refused_with_what_it_has() -> None:
    without_bf16 = replace(GPU, peak_flop_per_s={"fp16": 65e12, "fp32": 8e12})

    with pytest.raises(SpecError, match="round has no known bf16 rate; choose --precision among: fp16, fp32"):
        rates(without_bf16, "bf16", CALIBRATION)


def test_work_counts_every_run_of_every_block() -> None:
    done = work(phase("forward", repeat(then(LINEAR, LINEAR), 3), ATTENTION))

    assert done.linear_flop == 6 * 2 * 1024 * 2048 * 500
    assert done.attention_flop == 2 * 4 * 128 * 128 * 64
    assert done.whole_flop == done.linear_flop + 2 * done.attention_flop
    assert done.moved_bytes == 6 * PRODUCT.operand_bytes
    assert done.kernels == 9


def test_what_happens_before_training_is_not_work_of_a_step() -> None:
    assert work(phase("init", LINEAR)) == Work(0, 0, 0, 0, 0)
    assert busy_seconds(phase("init", LINEAR), AT) == 0


def test_products_and_what_other_kernels_move_add_up() -> None:
    together = replace(LINEAR, moved_bytes=PRODUCT.operand_bytes + 8e6, kernels=2)

    assert busy_seconds(together, AT) == pytest.approx(product_seconds(PRODUCT, AT) + 8e6 / 1e12)
    assert busy_seconds(then(LINEAR, MOVING), AT) == pytest.approx(product_seconds(PRODUCT, AT) + 8e6 / 1e12)


def test_every_kernel_takes_its_least_time() -> None:
    at = AT._replace(kernel_floor_s=2e-6, product_floor_s=5e-6)

    assert busy_seconds(MOVING, at) == pytest.approx(8e-6 + 2 * 2e-6)
    assert busy_seconds(LINEAR, at) == pytest.approx(busy_seconds(LINEAR, AT) + 5e-6)
    assert busy_seconds(ATTENTION, at) == pytest.approx(busy_seconds(ATTENTION, AT) + 3 * 2e-6)


def test_launching_kernels_is_counted_and_not_in_what_keeps_the_gpu_busy() -> None:
    small = repeat(Block("small", "activations", moved_bytes=200, kernels=1), 5000)

    assert load(small, AT).kernels == 5000
    assert busy_seconds(small, AT) == pytest.approx(5000 * 200 / 1e12)


def test_a_repeat_is_busy_as_often_as_it_repeats() -> None:
    once, several = busy_seconds(LINEAR, AT), busy_seconds(repeat(LINEAR, np.array([3, 5])), AT)

    assert list(np.asarray(several) / once) == pytest.approx([3, 5])


def test_a_stretch_read_for_another_gpu_is_read_anew() -> None:
    stretch = then(LINEAR, MOVING)
    twice_as_fast = AT._replace(linear_flop_per_s=400e12, moved_bytes_per_s=2e12)

    assert busy_seconds(stretch, AT) == pytest.approx(2 * busy_seconds(stretch, twice_as_fast))
    assert busy_seconds(stretch, AT) == pytest.approx(busy_seconds(then(LINEAR, MOVING), AT))


@given(
    st.integers(1, 8192),
    st.integers(1, 8192),
    st.integers(1, 8192),
    st.floats(0, 1e12),
    st.floats(1, 100),
    st.booleans(),
)
def test_a_faster_gpu_is_never_slower(m: int, n: int, k: int, moved: float, times: float, attends: bool) -> None:
    product = Matmul(m, m, k, 8, "attention", fused="sdpa") if attends else Matmul(m, n, k)
    block = Block("any", "activations", matmuls=(product,), moved_bytes=moved, kernels=2)
    peaks = {name: rate * times for name, rate in GPU.peak_flop_per_s.items()}
    quicker, wider = replace(GPU, peak_flop_per_s=peaks), replace(GPU, memory_bandwidth_bytes_per_s=2e12 * times)

    for faster in (quicker, wider):
        assert busy_seconds(block, rates(faster, "bf16", CALIBRATION)) <= busy_seconds(block, AT) * (1 + 1e-12)
