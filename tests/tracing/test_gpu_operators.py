"""A GPU's operators on a CPU's fake tensors."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from advisor.tracing.gpu_operators import gpu_operators, scaled_dot_product_attention  # noqa: E402

BATCH, LENGTH, HEAD = 2, 48, 64


def heads(count: int, dtype: Any, head_dim: int = HEAD) -> Any:
    return torch.zeros(BATCH, LENGTH, count, head_dim, dtype=dtype, requires_grad=True).transpose(1, 2)


def test_half_formats_without_a_mask_run_flash() -> None:
    with FakeTensorMode():
        query, shared = heads(8, torch.bfloat16), heads(2, torch.bfloat16)
        whole = scaled_dot_product_attention(query, query, query, is_causal=True)
        grouped = scaled_dot_product_attention(query, shared, shared, is_causal=True, enable_gqa=True)

    assert "FlashAttention" in str(whole.grad_fn)
    assert "FlashAttention" in str(grouped.grad_fn)


def test_a_mask_fp32_or_two_head_dimensions_run_the_memory_efficient_kernel() -> None:
    with FakeTensorMode():
        half, single, narrow = heads(8, torch.bfloat16), heads(8, torch.float32), heads(8, torch.bfloat16, 32)
        mask = torch.ones(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool)
        outputs = [
            scaled_dot_product_attention(half, half, half, mask),
            scaled_dot_product_attention(single, single, single),
            scaled_dot_product_attention(half, half, narrow),
        ]

    assert all("EfficientAttention" in str(output.grad_fn) for output in outputs)
    assert outputs[2].shape == (BATCH, 8, LENGTH, 32)


def test_shared_heads_in_fp32_run_as_a_scores_matrix() -> None:
    with FakeTensorMode():
        query, shared = heads(8, torch.float32), heads(2, torch.float32)
        output = scaled_dot_product_attention(query, shared, shared, is_causal=True, enable_gqa=True)

    assert "Attention" not in str(output.grad_fn)
    assert output.shape == query.shape


def test_the_scores_matrix_is_what_torch_computes() -> None:
    query, shared = (torch.randn(BATCH, count, 8, 16) for count in (4, 2))

    ours = scaled_dot_product_attention(query, shared, shared, is_causal=True, enable_gqa=True)

    torchs = torch.nn.functional.scaled_dot_product_attention(query, shared, shared, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(ours, torchs)


# ATen/autocast_mode.h: CUDA's lists differ from a CPU's.
def test_autocast_runs_norms_powers_and_sums_in_fp32_as_on_a_gpu() -> None:
    x = torch.ones(2, 8, dtype=torch.bfloat16)
    with gpu_operators(), torch.autocast("cpu", dtype=torch.bfloat16):
        formats = {torch.nn.functional.layer_norm(x, (8,)).dtype, x.pow(3.0).dtype, x.sum().dtype, x.softmax(-1).dtype}

    assert formats == {torch.float32}
    assert x.pow(3.0).dtype is torch.bfloat16


def test_operators_are_what_they_were_afterwards() -> None:
    before = (torch.Tensor.pow, torch.nn.functional.scaled_dot_product_attention)
    with gpu_operators():
        assert torch.Tensor.pow is not before[0]
    assert (torch.Tensor.pow, torch.nn.functional.scaled_dot_product_attention) == before
