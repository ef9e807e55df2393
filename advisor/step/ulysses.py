"""Attention of ranks that share a sequence by its heads: Ulysses as DeepSpeed runs it for transformers' models.

Between attentions each rank has some tokens of a sequence; within, all tokens of some heads. An all-to-all each takes
queries, keys and values there and the output back (Jacobs et al., arXiv:2309.14509), and needs its tensor sorted by
rank, before or after (deepspeed 0.19.8, runtime/sequence_parallel/ulysses_sp.py ``UlyssesSPAttentionHF``). Key-value
heads are repeated where there are fewer than ranks. Backward needs the kernel's own inputs and output alone: an
all-to-all saves nothing.

Left out: NCCL's flat buffer for the gathered positions, 8 bytes a token.
"""

from __future__ import annotations

from dataclasses import replace

from advisor.specs.job import AttentionKernel
from advisor.specs.model import Attention
from advisor.step.attention_kernels import attend
from advisor.step.operators import copy
from advisor.step.tape import Gradients, Tape, Tensor
from advisor.step.weights import Weights

POSITION_BYTES = 8
"""Positions are int64."""
HEADS, OUTPUT = "heads for tokens", "tokens for heads"


def attend_by_heads(
    tape: Tape, query: Tensor, key: Tensor, value: Tensor, spec: Attention, weights: Weights, kernel: AttentionKernel
) -> Tensor:
    """Attention over all tokens of the sequences of which *tape* has a part. The output lies token by token."""
    ranks, length = tape.cut.ranks, tape.sequence_length
    positions = [tape.new(ranks * length, POSITION_BYTES)]
    tape.send("positions", "all-gather", positions[0].size_bytes, "sequence")
    positions.append(tape.new(ranks * length, POSITION_BYTES))
    here = local_heads(spec, ranks)
    counts = here.heads, here.key_value_heads, here.key_value_heads
    repeats = here.key_value_heads * ranks // spec.key_value_heads
    held = [_to_heads(tape, query, counts[0], 1)]
    held += [_to_heads(tape, each, counts[1], repeats) for each in (key, value)]
    for place, count in enumerate(counts):
        if not _lies_alike(tape, count):
            held[place] = copy(tape, held[place])
    tape.sequence_length = ranks * length
    output = attend(tape, held[0], held[1], held[2], here, weights, kernel)
    tape.sequence_length = length
    return _to_tokens(tape, output)


def local_heads(spec: Attention, ranks: int) -> Attention:
    """What a rank attends to: all tokens with its share of the heads, without a mask."""
    heads = spec.heads // ranks
    return replace(
        spec,
        heads=heads,
        key_value_heads=max(1, spec.key_value_heads // ranks),
        # Its queries are laid out head by head, and so is what flash returns.
        rotates_by_head=heads > 1,
    )


def _lies_alike(tape: Tape, heads: int) -> bool:
    """Whether tokens first and heads first is the same: of one head of one sequence."""
    return tape.alone and heads == 1


def _to_heads(tape: Tape, x: Tensor, heads: int, repeats: int) -> Tensor:
    """*x*, each head *repeats* times, sorted by the rank that it goes to and exchanged: all tokens of *heads* heads."""
    repeated = _repeated(tape, x, repeats)
    by_rank = tape.like(repeated)
    tape.work(repeated, by_rank)

    def in_order(tape: Tape, gradient: Tensor) -> Gradients:
        found = tape.like(gradient)
        tape.work(gradient, found)
        return (found,)

    tape.attach(by_rank, [repeated], in_order, saves="nothing")
    del repeated
    return _exchanged(tape, by_rank, HEADS, sorts=not _lies_alike(tape, heads))


def _repeated(tape: Tape, x: Tensor, times: int) -> Tensor:
    """Every head once for each of the ranks that attend with it."""
    if times == 1:
        return x
    output = tape.new(x.numel * times, x.element_bytes)
    tape.work(x, output)
    numel, element_bytes = x.numel, x.element_bytes

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        summed = tape.new(numel, element_bytes)
        tape.work(gradient, summed)
        return (summed,)

    return tape.attach(output, [x], backward, saves="nothing")


def _to_tokens(tape: Tape, x: Tensor) -> Tensor:
    """*x*, whose tokens come first in each of several sequences, exchanged and sorted by the rank of each head."""
    by_rank = x if tape.alone else copy(tape, x)
    exchanged = _exchanged(tape, by_rank, OUTPUT)
    output = copy(tape, exchanged)
    del exchanged, by_rank
    # Tokens come first here too, and are sorted by sequence for the projection.
    return output if tape.alone else copy(tape, output)


def _exchanged(tape: Tape, x: Tensor, what: str, *, sorts: bool = True) -> Tensor:
    """An all-to-all. Where it *sorts*, the gradient that arrives is brought into the order of ranks first."""
    output = tape.like(x)
    tape.send(what, "all-to-all", x.size_bytes, "sequence")

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        by_rank = gradient
        if sorts:
            by_rank = tape.like(gradient)
            tape.work(gradient, by_rank)
        found = tape.like(by_rank)
        tape.send(f"gradients, {what}", "all-to-all", by_rank.size_bytes, "sequence")
        return (found,)

    return tape.attach(output, [x], backward, saves="nothing")
