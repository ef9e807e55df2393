"""What Megatron's ranks send each other in a step, by the group they send it in.

Payloads are of a whole micro-batch. Tensor parallelism adds up partial sums after each of a layer's two branches, and
their gradients before them (Shoeybi et al., arXiv:1909.08053, section 3); with sequence parallelism each all-reduce is
an all-gather and a reduce-scatter, and backward gathers the inputs of products once more (arXiv:2205.05198, section
4.2.2). What backward sends while it computes gradients of weights does not stop it. Left out: maxima and sums of the
loss over tensor-parallel ranks, some bytes a token.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from advisor.specs.job import Job
from advisor.specs.model import Layer, Run
from advisor.specs.plan import Checkpointing, Plan
from advisor.step.program import Amount, Block, Collective, CollectiveKind, Node

BRANCHES = 2
"""Attention and feed-forward of a layer."""
LEAST_BUCKET, BUCKET_PER_RANK = 40_000_000, 1_000_000
"""Elements of a bucket of the flat buffers (megatron-core 0.16.1, distributed_data_parallel.py)."""


class Exchanges:
    """The transfers of one rank of *plan*, whose *tokens* of a sequence are *width* wide."""

    def __init__(self, job: Job, plan: Plan, width: int, tokens: int) -> None:
        self.job, self.plan, self.tokens = job, plan, tokens
        self.stream_bytes: Amount = tokens * width * job.compute_bytes * plan.micro_batch

    def embedding(self) -> Iterator[Node]:
        """Rows that every rank has a part of, or the gathered gradient of what each kept of them."""
        yield from self._tensor(1, waits=True, pairs=("reduce-scatter",))

    def head_forward(self) -> Iterator[Node]:
        if self.plan.cuts_sequence:
            yield from self._tensor(1, waits=True, pairs=("all-gather",))

    def head_backward(self) -> Iterator[Node]:
        yield from self._tensor(1, waits=False, pairs=("all-gather", "reduce-scatter"))

    def layer_forward(self, run: Run) -> Iterator[Node]:
        yield from self._tensor(BRANCHES, waits=True, pairs=("all-gather", "reduce-scatter"))
        yield from self._ring(run, 1)

    def layer_backward(self, run: Run) -> Iterator[Node]:
        """Keys and values go round once more, with their gradients; what is computed again is sent again."""
        if self.plan.checkpointing is Checkpointing.FULL:
            yield from self.layer_forward(run)
        elif self.plan.checkpointing is Checkpointing.SELECTIVE:
            yield from self._ring(run, 1)
        if self.plan.cuts_sequence:
            yield from self._tensor(BRANCHES, waits=True, pairs=("all-gather",))
        yield from self._tensor(BRANCHES, waits=False, pairs=("all-gather", "reduce-scatter"))
        yield from self._ring(run, 2)

    def between_stages(self, what: str) -> Iterator[Node]:
        """The stream, or its gradient, goes on to the neighbouring stage."""
        if self.plan.pipeline_parallel > 1:
            parts = self.plan.tensor_parallel if self.plan.cuts_sequence else 1
            yield _sent(Collective(what, "send-receive", self.stream_bytes / parts, 1, waits=True, group="pipeline"))

    def weights(self, size_bytes: int) -> Node:
        """Every rank gets what the others have updated."""
        messages = self._buckets(size_bytes // self.job.compute_bytes) if self.plan.megatron.overlaps_weights else 1
        waits = not self.plan.megatron.overlaps_weights
        return _sent(Collective("weights", "all-gather", size_bytes, messages, waits))

    def gradients(self, size_bytes: int, numel: int) -> Node:
        overlaps = self.plan.megatron.overlaps_gradients
        kind: CollectiveKind = "reduce-scatter" if self.plan.megatron.distributed_optimizer else "all-reduce"
        return _sent(Collective("gradients", kind, size_bytes, self._buckets(numel) if overlaps else 1, not overlaps))

    def shared_embedding(self, size_bytes: int) -> Node:
        """The first and the last stage add up their gradients of one matrix; of two ranks each sends all it has."""
        return _sent(Collective("gradient of the embedding", "send-receive", size_bytes, 1, True, "pipeline"))

    def _buckets(self, numel: int) -> Amount:
        most: Amount = np.maximum(LEAST_BUCKET, self.plan.group("data").size * BUCKET_PER_RANK)
        return 1 + numel // most

    def _tensor(self, messages: int, *, waits: bool, pairs: tuple[CollectiveKind, ...]) -> Iterator[Node]:
        """All-reduces of the stream over tensor-parallel ranks, or *pairs* of kinds where the sequence is cut."""
        if self.plan.tensor_parallel == 1:
            return
        kinds: tuple[CollectiveKind, ...] = pairs if self.plan.cuts_sequence else ("all-reduce",)
        for kind in kinds:
            yield _sent(Collective("sums of a layer", kind, messages * self.stream_bytes, messages, waits, "tensor"))

    def _ring(self, run: Run, rounds: int) -> Iterator[Node]:
        """Keys and values of local tokens go from rank to rank while attention computes."""
        steps = self.plan.context_parallel - 1
        if not steps:
            return
        (layer,) = run.layers
        assert isinstance(layer, Layer)
        each = 2 * self.tokens * layer.attention.key_value_width * self.job.compute_bytes * self.plan.micro_batch
        yield _sent(
            Collective("keys and values", "send-receive", rounds * steps * each, rounds * steps, False, "context")
        )


def _sent(collective: Collective) -> Block:
    return Block(collective.what, "temporaries", transfers=(collective,))
