"""Attention of ranks that share a sequence by its tokens: torch's context parallelism around its flash kernel.

Each rank has a piece of the first half of a sequence and one of the second, so that all have as much to do. It attends
to its own tokens first, and then to those of one rank after the other: to the first half of their keys and values, or
with the second half of its own queries. What comes out is merged in fp32 by the log-sum-exp (torch 2.13,
distributed/tensor/experimental/_context_parallel/_attention.py ``_templated_ring_attention`` and its backward; Liu et
al., arXiv:2310.01889). Keys and values are gathered at once, or sent on by and by while the kernel runs, and once more
in backward, where their gradients travel with them in fp32.

Ranks differ by a few per cent of what attention takes in passing; the rank in the middle is recorded, which takes steps
of both kinds. Left out: inputs of messages that NCCL holds on to until they are waited for.
"""

from __future__ import annotations

from dataclasses import replace

from advisor.specs.model import Attention
from advisor.step.attention_kernels import flash_scratch
from advisor.step.operators import copy
from advisor.step.program import Matmul
from advisor.step.tape import Gradients, Product, Tape, Tensor

WIDE = 4
"""Bytes per element of what is summed over steps."""
KEYS_AND_VALUES, THEIR_GRADIENTS = "keys and values", "gradients of keys and values"


class _Ring:
    """One rank's way through the steps, each of which allocates what the code of the same name does."""

    def __init__(self, tape: Tape, spec: Attention, query: Tensor, key: Tensor) -> None:
        self.tape, self.spec, self.ranks = tape, spec, tape.cut.ranks
        self.place = (self.ranks - 1) // 2
        self.length, self.width = tape.sequence_length, query.element_bytes
        self.query_numel, self.key_numel = query.numel, key.numel
        self.at_once = tape.cut.exchange == "allgather"
        self.by_head = spec.rotates_by_head

    def kept_queries(self, step: int) -> int:
        """In how many parts the queries are cut at *step*, one of which attends."""
        return 2 if step > self.place else 1

    def kept_keys(self, step: int) -> int:
        return 2 if 0 < step <= self.place else 1

    def products(self, *, backward: bool) -> tuple[Product, ...]:
        """Of one step: half of the scores of a causal mask over a rank's own tokens, or of one over another's."""
        length, share = self.length, 0.5 if self.spec.causal else 1.0
        whole = Matmul(length, length, length, self.spec.heads, "attention", share, self.width, "sdpa", backward)
        scores = Product(replace(whole, k=self.spec.head_dim), "count")
        outputs = Product(replace(whole, n=self.spec.head_dim), "count")
        return (scores, scores, scores, outputs, outputs) if backward else (scores, outputs)

    def contiguous(self, x: Tensor, *, copies: bool) -> Tensor:
        """*x* head by head, without a gradient."""
        if not copies:
            return Tensor(x.numel, x.element_bytes, x.scales, x.storage)
        output = self.tape.like(x)
        self.tape.work(x, output)
        return output

    def send(self, held: Tensor | None, joined: Tensor) -> Tensor | None:
        """Keys and values go out: to all at once, and so only once, or to the next rank. Returns what arrives."""
        tape, size = self.tape, joined.size_bytes
        if self.at_once and held:
            return held
        arriving = tape.new(joined.numel * (self.ranks if self.at_once else 1), joined.element_bytes)
        if self.at_once:
            tape.send(KEYS_AND_VALUES, "all-gather", size * self.ranks, "context", waits=False)
        else:
            tape.send(KEYS_AND_VALUES, "send-receive", size, "context", waits=False)
        return arriving

    def part_of(self, buffer: Tensor | None, numel: int) -> Tensor:
        assert buffer is not None
        return Tensor(numel, buffer.element_bytes, True, buffer.storage)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp."""
        tape, numel = self.tape, self.key_numel
        key, value = self._laid_by_head(key, value)
        arriving: Tensor | None = None
        output: Tensor | None = None
        rows: Tensor | None = None
        merged: list[Tensor] = []
        for step in range(self.ranks):
            if step:
                tape.wait_for(KEYS_AND_VALUES)
                seen_key, seen_value = self.part_of(arriving, numel), self.part_of(arriving, numel)
            else:
                seen_key, seen_value = key, value
            if step < self.ranks - 1:
                joined = tape.new(2 * numel, self.width)
                tape.work(seen_key, seen_value, joined)
                arriving = self.send(arriving, joined)
                del joined
            key, value = seen_key, seen_value
            part = self.kept_queries(step)
            latest = tape.new(self.query_numel // part, self.width)
            latest_rows = tape.new(self.length * self.spec.heads // part, WIDE)
            tape.work(query, key, value, latest, matmuls=self.products(backward=False))
            output, rows = latest, latest_rows
            del latest, latest_rows
            self._merge(merged, output, rows, part)
        del output, rows
        found = tape.new(self.query_numel, self.width)
        tape.work(merged[0], found)
        return found, merged[1]

    def _laid_by_head(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        several = self.spec.key_value_heads > 1
        return (
            self.contiguous(key, copies=several and not self.by_head),
            self.contiguous(value, copies=several or self.spec.fused_projection),
        )

    def _merge(self, merged: list[Tensor], output: Tensor, rows: Tensor, part: int) -> None:
        """``_SDPAMerger.step``: *output* and *rows* of one of so many *part*s of the queries join those before."""
        tape = self.tape
        wide = tape.like(output, WIDE)
        tape.work(output, wide)
        if not merged:
            merged += [wide, rows]
            return
        weight = tape.like(rows)
        weight = tape.like(rows)
        difference = tape.like(wide)
        product = tape.like(wide)
        del weight, difference
        outputs = tape.like(wide)
        del product
        tape.work(*(outputs,) * 8, kernels=5)
        lower = tape.like(rows)
        lower = tape.like(rows)
        row_sums = tape.like(rows)
        del lower
        if part == 1:
            merged[1], merged[0] = row_sums, outputs
            return
        for place, new, numel in ((1, row_sums, self.length * self.spec.heads), (0, outputs, self.query_numel)):
            whole = tape.new(numel, WIDE)
            tape.work(new, whole, whole)
            merged[place] = whole
            del whole

    def backward(
        self, query: Tensor, key: Tensor, value: Tensor, saved: list[Tensor], gradient: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of queries, and of keys and values, which share their memory."""
        tape, numel = self.tape, self.key_numel
        strided = self.spec.key_value_heads > 1 and not self.by_head
        for_query = tape.like(query, WIDE)
        sums = [tape.like(key, WIDE), tape.like(value, WIDE)]
        key, value = self._laid_by_head(key, value)
        arriving: Tensor | None = None
        travelling: Tensor | None = None
        joined = sent = None
        latest: list[Tensor] = []
        rows: list[Tensor] = []
        for step in range(self.ranks):
            seen = [key, value]
            if step:
                tape.wait_for(KEYS_AND_VALUES)
                seen = [self.part_of(arriving, numel), self.part_of(arriving, numel)]
            if step < self.ranks - 1:
                joined = self._joined(seen, self.width)
                arriving = self.send(arriving, joined)
            if self.kept_queries(step) > 1:
                rows[:] = [tape.new(self.length * self.spec.heads // 2, WIDE)]
            key, value = seen
            del seen
            latest = self._kernel(query, key, value, saved, gradient, step, latest)
            if step:
                tape.wait_for(THEIR_GRADIENTS)
                assert travelling is not None
                sent = travelling
                sums = [self.part_of(travelling, numel), self.part_of(travelling, numel)]
                if self.kept_keys(step) > 1:
                    for place in range(2):
                        sums[place] = self._updated(sums[place])
            flat = [tape.like(each) for each in sums] if not step and strided else sums
            sent = self._joined(flat, WIDE)
            del flat
            travelling = tape.like(sent)
            tape.send(THEIR_GRADIENTS, "send-receive", sent.size_bytes, "context", waits=False)
            if self.kept_queries(step) > 1:
                for_query = self._updated(for_query)
        narrow = tape.like(for_query, self.width)
        tape.work(for_query, narrow)
        del for_query
        tape.wait_for(THEIR_GRADIENTS)
        assert travelling is not None
        both = tape.like(travelling, self.width)
        tape.work(travelling, both)
        return narrow, self.part_of(both, numel), self.part_of(both, numel)

    def _joined(self, parts: list[Tensor], element_bytes: int) -> Tensor:
        found = self.tape.new(2 * self.key_numel, element_bytes)
        self.tape.work(*parts, found)
        return found

    def _updated(self, summed: Tensor) -> Tensor:
        """``_partial_update``: a part of it is added to, and all of it copied."""
        whole = self.tape.like(summed)
        self.tape.work(summed, whole, kernels=2)
        return whole

    def _kernel(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        saved: list[Tensor],
        gradient: Tensor,
        step: int,
        before: list[Tensor],
    ) -> list[Tensor]:
        """The gradients of one step, those of the step *before* being there until they are."""
        tape = self.tape
        found = [tape.new(self.query_numel // self.kept_queries(step), self.width)]
        found += [tape.new(self.key_numel // self.kept_keys(step), self.width) for _ in range(2)]
        length = self.length // self.kept_queries(step)
        scratch = flash_scratch(tape, self.spec, length, expanded=self.key_numel < self.query_numel)
        products = self.products(backward=True)
        tape.work(query, key, value, *saved, gradient, *found, matmuls=products, kernels=3)
        del scratch
        before.clear()
        return found


def attend_in_ring(tape: Tape, query: Tensor, key: Tensor, value: Tensor, spec: Attention) -> Tensor:
    """Attention over all tokens of the sequences of which *tape* has a part. The output lies token by token."""
    ring = _Ring(tape, spec, query, key)
    output, rows = ring.forward(query, key, value)
    saved = [Tensor(output.numel, output.element_bytes, True, output.storage), rows]
    del rows

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        return ring.backward(query, key, value, saved, gradient)

    tape.attach(output, [query, key, value], backward)
    # Merging leaves the output head by head.
    return copy(tape, output)
