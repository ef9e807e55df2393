"""Megatron's router: which experts each token goes to, and with which weights.

megatron-core 0.16.1, transformer/moe/router.py ``TopKRouter`` and moe_utils.py ``topk_routing_with_score_function``.
Tables of all tokens by all experts come out, zero where an expert was not chosen. Left out: limits of experts' groups,
which backward needs nothing of, and jitter, z-loss and capacities, which are off.
"""

from __future__ import annotations

from advisor.specs.model import Experts
from advisor.step.operators import weight_gradient
from advisor.step.program import Matmul
from advisor.step.tape import Gradients, Product, Tape, Tensor, Weight

INDEX_BYTES, FP32_BYTES, COUNT_BYTES = 8, 4, 4


def route(tape: Tape, hidden: Tensor, spec: Experts, matrix: Weight, *, balances: bool) -> tuple[Tensor, Tensor]:
    """Weights of every expert for every token of *hidden*, and which are not zero, a byte each.

    Both tables stay until backward is done: the dispatcher refers to them. A loss that *balances* the experts keeps its
    own scores of all of them, in fp32.
    """
    element_bytes = router_bytes(spec, hidden.element_bytes)
    count, width = matrix.parameter.shape
    tokens = hidden.numel // width
    logits = tape.new(tokens * count, element_bytes)
    products = (Product(Matmul(tokens, count, width, element_bytes=element_bytes), "m"),)
    tape.work(hidden, logits, matmuls=products, fixed_moved_bytes=matrix.size_bytes)
    kept = [hidden, *_scores(tape, logits, tokens, spec)]
    if balances:
        kept.append(tape.new(logits.numel, FP32_BYTES))
        tape.work(logits, kept[-1], kernels=2)
    del logits
    marks = [tape.new(tokens * count, COUNT_BYTES) for _ in range(2)]
    weights, chosen = tape.new(tokens * count, element_bytes), tape.new(tokens * count, 1)
    tape.work(*marks, weights, chosen, kernels=4)
    del marks
    kept += [Tensor(each.numel, each.element_bytes, True, each.storage) for each in (weights, chosen)]

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        for_logits = tape.like(gradient)
        tape.work(gradient, *kept[1:], for_logits, kernels=3)
        if balances:
            wide = tape.like(gradient, FP32_BYTES)
            tape.work(wide, for_logits, for_logits, kernels=2)
            del wide
        for_hidden = tape.new(tokens * width, element_bytes)
        inputs = (Product(Matmul(tokens, width, count, element_bytes=element_bytes), "m"),)
        tape.work(for_logits, for_hidden, matmuls=inputs, fixed_moved_bytes=matrix.size_bytes)
        widened = tape.like(hidden, element_bytes) if element_bytes != hidden.element_bytes else hidden
        for_matrix = weight_gradient(tape, matrix.parameter, matrix.element_bytes)
        outputs = (Product(Matmul(count, width, tokens, element_bytes=element_bytes), "k"),)
        tape.work(for_logits, widened, for_matrix, matmuls=outputs)
        return for_hidden, for_matrix

    return tape.attach(weights, [hidden, matrix], backward, saves="outputs"), chosen


def router_bytes(spec: Experts, stream_bytes: int) -> int:
    """Of a score: the router computes in the format of its input, or in fp32 (``--moe-router-dtype``)."""
    return FP32_BYTES if spec.router_in_fp32 else stream_bytes


def _scores(tape: Tape, logits: Tensor, tokens: int, spec: Experts) -> list[Tensor]:
    """What is kept of scoring: where the chosen experts stood, and what softmax or sigmoid returned."""
    picked = tokens * spec.active
    if spec.scoring == "sigmoid":
        # All scores, those of the chosen ones, and the sums that these are divided by.
        kept = [tape.like(logits, FP32_BYTES), tape.new(picked, INDEX_BYTES)]
        kept += [tape.like(kept[1], logits.element_bytes), tape.new(tokens, logits.element_bytes)]
        tape.work(logits, *kept, kernels=5)
    elif spec.scores_add_up:
        # The softmax of the chosen ones alone.
        kept = [tape.new(picked, INDEX_BYTES), tape.new(picked, FP32_BYTES)]
        tape.work(logits, *kept, kernels=2)
    else:
        kept = [tape.like(logits, FP32_BYTES), tape.new(picked, INDEX_BYTES)]
        tape.work(logits, *kept, kernels=2)
    return kept
