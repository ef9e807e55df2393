"""Products with weights held in few bits, where a model generates: what each takes beside its result.

Four bits and int8 are bitsandbytes 0.50.2's (backends/cuda/ops.py), fp8 transformers 5.23's
(integrations/finegrained_fp8.py). Left out: between 5 and 1,536 tokens bitsandbytes may choose a kernel that needs no
matrix out of four bits, by the GPU and the shape; the columns that LLM.int8 finds to hold outliers, whose products are
computed again in the format of the model; that fp16 needs no copy for it.
"""

from __future__ import annotations

from dataclasses import replace

from advisor.specs.model import SCALED
from advisor.step.program import Matmul
from advisor.step.tape import Product, Tape, Tensor, Weight

FEW_TOKENS = 4
"""Up to so many are multiplied with the four bits as they are (``_GEMM_4BIT_CUSTOM_FLOOR_M``)."""
OUT_OF_FEW_BITS = "weight out of four bits"
FP32_BYTES, INT32_BYTES, FP16_BYTES, INT8_BYTES, BOOL_BYTES = 4, 4, 2, 1, 1


def product_out_of_bits(tape: Tape, x: Tensor, weight: Weight) -> Tensor:
    """*x* times *weight*, which is held in four bits, in int8 or in fp8."""
    outside, inside = weight.shape
    tokens, held = x.numel // inside, weight.parameter.held
    stored_bytes = weight.parameter.held_bytes(tape.compute_bytes, tape.compute_bytes)
    product = Product(Matmul(tokens, outside, inside, element_bytes=tape.compute_bytes, matrix_bytes=stored_bytes), "m")
    if held == "int8":
        return _by_int8(tape, x, tokens, product, stored_bytes)
    scratch: list[Tensor] = []
    assert tape.caching is not None
    if held != "fp8" and tokens * tape.caching.sequences > FEW_TOKENS:
        if held == "four bits":
            scratch.append(_out_of_bits(tape, -(-weight.parameter.numel // SCALED), FP32_BYTES))
        scratch.append(_out_of_bits(tape, weight.parameter.numel, tape.compute_bytes))
        tape.work(scratch[-1], fixed_moved_bytes=stored_bytes)
        product = Product(replace(product.matmul, matrix_bytes=None), "m")
        stored_bytes = scratch[-1].size_bytes
    output = tape.new(tokens * outside, tape.compute_bytes)
    tape.work(x, output, matmuls=(product,), fixed_moved_bytes=stored_bytes)
    scratch.clear()
    return output


def _out_of_bits(tape: Tape, numel: int, element_bytes: int) -> Tensor:
    return tape.new(numel, element_bytes, scales=False, label=OUT_OF_FEW_BITS)


def _by_int8(tape: Tape, x: Tensor, tokens: int, product: Product, stored_bytes: int) -> Tensor:
    """Rows of *x* in int8, sums of products in int32, and these out of both scales in fp16."""
    outside = int(product.matmul.n)
    half = tape.like(x, FP16_BYTES)
    scales = tape.new(tokens, FP32_BYTES)
    codes = tape.like(x, INT8_BYTES)
    magnitudes = tape.like(half)
    outliers = tape.like(half, BOOL_BYTES)
    tape.work(x, half, magnitudes, outliers, half, codes, kernels=5)
    del magnitudes, outliers, half
    sums = tape.new(tokens * outside, INT32_BYTES)
    tape.work(codes, sums, matmuls=(product,), fixed_moved_bytes=stored_bytes)
    scaled = tape.new(tokens * outside, FP16_BYTES)
    tape.work(sums, scales, scaled)
    output = tape.new(tokens * outside, x.element_bytes)
    tape.work(scaled, output)
    del sums, scales, codes, scaled
    return output
