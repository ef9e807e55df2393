"""Single kernels: products by their shape, and fused attention by its sequences."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.catalog.calibrations import find_calibration
from advisor.catalog.gpus import find_gpu
from advisor.cost.compute import rates
from advisor.cost.kernels import product_seconds
from advisor.step.program import Matmul

H100 = rates(find_gpu("H100"), "bf16", find_calibration())
sizes = st.integers(1, 20_000)


def seconds(product: Matmul) -> float:
    return float(product_seconds(product, H100))


def scores(length: int, heads: int = 64, head_dim: int = 128, share: float = 1.0, *, backward: bool = False) -> Matmul:
    return Matmul(length, length, head_dim, heads, "attention", share, fused="sdpa", backward=backward)


@given(sizes, sizes, sizes, st.integers(1, 64), st.integers(0, 3), st.integers(1, 500))
def test_a_larger_product_never_takes_less_time(m: int, n: int, k: int, count: int, which: int, more: int) -> None:
    grown = [m, n, k, count]
    grown[which] += more

    assert seconds(Matmul(*grown)) >= seconds(Matmul(m, n, k, count))


@given(sizes, sizes, sizes, st.integers(1, 64))
def test_no_product_exceeds_the_share_of_the_peak_or_the_memory_bandwidth(m: int, n: int, k: int, count: int) -> None:
    product = Matmul(m, n, k, count)

    assert product.flop / seconds(product) <= H100.linear_flop_per_s
    assert product.operand_bytes / seconds(product) <= find_gpu("H100").memory_bandwidth_bytes_per_s


@given(st.integers(1, 64), st.integers(1, 40), sizes)
def test_results_are_computed_in_granules_and_granules_in_waves(rows: int, columns: int, k: int) -> None:
    at = H100._replace(operand_bytes_per_s=float("inf"), copied_bytes_per_s=float("inf"), multiprocessors=100)
    last, filled = Matmul(64, 64 * columns, k), Matmul(64, 64 * 100 * -(-columns // 100), k)

    assert product_seconds(replace(last, m=rows), at) == product_seconds(last, at)
    assert product_seconds(last, at) == pytest.approx(product_seconds(filled, at))


def test_without_known_multiprocessors_granules_fill_the_gpu_evenly() -> None:
    at = H100._replace(operand_bytes_per_s=float("inf"), copied_bytes_per_s=float("inf"), multiprocessors=None)
    one, many = (product_seconds(Matmul(64, 64 * count, 4096), at) - at.product_floor_s for count in (1, 133))

    assert many == pytest.approx(133 * one)


def test_a_product_in_fp32_within_a_bf16_job_runs_at_the_fp32_rate() -> None:
    large = Matmul(8192, 8192, 8192)
    wide = replace(large, element_bytes=4)

    assert large.flop / seconds(large) > 600e12
    assert wide.flop / seconds(wide) == pytest.approx(0.76 * 67e12, rel=0.02)


@given(st.integers(128, 60_000), st.integers(1, 128))
def test_longer_sequences_and_more_heads_come_closer_to_the_peak(length: int, heads: int) -> None:
    def rate(product: Matmul) -> float:
        return float(product.flop) / seconds(product)

    once = scores(length, heads)
    assert rate(once) <= rate(scores(2 * length, heads)) * (1 + 1e-12)
    assert rate(once) <= rate(scores(length, 2 * heads)) * (1 + 1e-12)
    assert rate(once) <= H100.attention_flop_per_s["sdpa"][0] * (1 + 1e-12)


def test_a_causal_mask_saves_nearly_half_of_a_long_sequence_and_less_of_a_short_one() -> None:
    short, long = (seconds(scores(length, share=0.5)) / seconds(scores(length)) for length in (512, 65_536))

    assert 0.5 < long < 0.51
    assert short > 0.6


def test_narrow_heads_and_gradients_run_at_lower_rates() -> None:
    wide, narrow, gradient = scores(8192), scores(8192, head_dim=64), scores(8192, backward=True)

    assert seconds(narrow) > 0.55 * seconds(wide)
    assert seconds(gradient) > seconds(wide)


# Shah et al., arXiv:2407.08608, figure 5: cuDNN, head dimension 128, no mask, 16 heads, 16,384 tokens, on an H100.
@pytest.mark.parametrize(("length", "published_tflops"), [(4096, 609), (8192, 600), (16384, 595)])
def test_cudnn_forward_on_long_sequences_is_near_what_was_published(length: int, published_tflops: float) -> None:
    product = scores(length, heads=16 * 16384 // length)

    assert product.flop / seconds(product) / 1e12 == pytest.approx(published_tflops, rel=0.08)


# linkedin/Liger-Kernel 6159461, benchmark/swiglu_speed/nvidia_h100_80gb_hbm3: Llama's feed-forward block, forward,
# 32,768 tokens, to which nothing is fitted: 14.4 ms, of which activation and gate move 3.6 GB in 1.4 ms.
def test_products_of_a_feed_forward_block_are_near_what_was_published() -> None:
    up, down = Matmul(32768, 11008, 4096), Matmul(32768, 4096, 11008)

    assert 2 * seconds(up) + seconds(down) == pytest.approx(13e-3, rel=0.05)


@given(st.lists(sizes, min_size=2, max_size=4), sizes, sizes)
def test_products_of_many_plans_are_priced_side_by_side(rows: list[int], n: int, k: int) -> None:
    together = product_seconds(Matmul(np.array(rows), n, k), H100)

    assert list(np.asarray(together)) == pytest.approx([seconds(Matmul(m, n, k)) for m in rows])
