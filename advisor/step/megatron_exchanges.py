"""What Megatron's ranks send each other in a step, by the group they send it in.

Payloads are of a whole micro-batch. Tensor parallelism adds up partial sums after each of a layer's two branches, and
their gradients before them (Shoeybi et al., arXiv:1909.08053, section 3); with sequence parallelism each all-reduce is
an all-gather and a reduce-scatter, and backward gathers the inputs of products once more (arXiv:2205.05198, section
4.2.2). What backward sends while it computes gradients of weights does not stop it. Left out: maxima and sums of the
loss over tensor-parallel ranks, some bytes a token; that several instances of the optimizer reduce gradients in two
rounds; and the counts of tokens that go to each expert.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from advisor.specs.job import Job
from advisor.specs.model import Experts, Layer
from advisor.specs.plan import Checkpointing, Count, GroupName, Plan
from advisor.step.megatron_router import router_bytes
from advisor.step.program import Amount, Block, Collective, CollectiveKind, Node

LEAST_BUCKET, BUCKET_PER_RANK = 40_000_000, 1_000_000
"""Elements of a bucket of the flat buffers (megatron-core 0.16.1, distributed_data_parallel.py)."""


class Exchanges:
    """The transfers of one rank of *plan*, whose *tokens* of a sequence are *width* wide."""

    def __init__(self, job: Job, plan: Plan, width: int, tokens: int) -> None:
        self.job, self.plan, self.width, self.tokens = job, plan, width, tokens
        self.stream_bytes: Amount = tokens * width * job.compute_bytes * plan.micro_batch

    def embedding(self) -> Iterator[Node]:
        """Rows that every rank has a part of, or the gathered gradient of what each kept of them."""
        yield from self._tensor("reduce-scatter", [self.width], waits=True)

    def head_forward(self) -> Iterator[Node]:
        if self.plan.cuts_sequence:
            yield from self._tensor("all-gather", [self.width], waits=True)

    def head_backward(self) -> Iterator[Node]:
        if self.plan.cuts_sequence:
            yield from self._tensor("all-gather", [self.width], waits=False)
        yield from self._tensor("reduce-scatter", [self.width], waits=False)

    def layer_forward(self, layer: Layer) -> Iterator[Node]:
        if self.plan.cuts_sequence:
            yield from self._tensor("all-gather", self._gathered(layer), waits=True)
        yield from self._tensor("reduce-scatter", self._summed(layer), waits=True)
        yield from self._context(layer, backward=False)
        yield from self._experts(layer, backward=False)

    def layer_backward(self, layer: Layer) -> Iterator[Node]:
        """Keys and values go round once more, with their gradients; what is computed again is sent again."""
        if self.plan.checkpointing is Checkpointing.FULL:
            yield from self.layer_forward(layer)
        elif self.plan.checkpointing is Checkpointing.SELECTIVE:
            yield from self._context(layer, backward=False)
        if self.plan.cuts_sequence:
            yield from self._tensor("all-gather", self._gathered(layer), waits=True)
            yield from self._tensor("all-gather", self._summed(layer), waits=False)
        yield from self._tensor("reduce-scatter", self._gathered(layer), waits=False)
        yield from self._context(layer, backward=True)
        yield from self._experts(layer, backward=True)

    def between_stages(self, what: str) -> Iterator[Node]:
        """The stream, or its gradient, goes on to the neighbouring stage."""
        if np.all(np.asarray(self.plan.pipeline_parallel) > 1):
            parts = self.plan.tensor_parallel if self.plan.cuts_sequence else 1
            yield _sent(Collective(what, "send-receive", self.stream_bytes / parts, 1, waits=True, group="pipeline"))

    def weights(self, size_bytes: Count, group: GroupName) -> Node:
        """Every rank gets what the others have updated."""
        overlaps = self.plan.megatron.overlaps_weights
        messages = self._buckets(size_bytes // self.job.compute_bytes, group) if overlaps else 1
        return _sent(Collective("weights", "all-gather", size_bytes, messages, not overlaps, group))

    def gradients(self, size_bytes: Count, numel: Count, group: GroupName) -> Iterator[Node]:
        """Sums over all ranks, of which each gets what it updates; several instances of the optimizer add them up."""
        overlaps = self.plan.megatron.overlaps_gradients
        messages = self._buckets(numel, group) if overlaps else 1
        kind: CollectiveKind = "reduce-scatter" if self.plan.megatron.distributed_optimizer else "all-reduce"
        yield _sent(Collective("gradients", kind, size_bytes, messages, not overlaps, group))

    def shared_embedding(self, size_bytes: int) -> Node:
        """The first and the last stage add up their gradients of one matrix; of two ranks each sends all it has."""
        return _sent(Collective("gradient of the embedding", "send-receive", size_bytes, 1, True, "pipeline"))

    def _buckets(self, numel: Count, group: GroupName) -> Amount:
        most: Amount = np.maximum(LEAST_BUCKET, self.plan.group(group).size * BUCKET_PER_RANK)
        return 1 + numel // most

    def _gathered(self, layer: Layer) -> list[int]:
        """Widths of what the layer's products read whole: the stream, or the low-rank rows of latent attention."""
        latent, widths = layer.attention.latent, [self.width]
        if latent:
            widths = [latent.query_rank or self.width, latent.key_value_rank, latent.rotary_head_dim]
        return widths + self._blocks(layer)

    def _summed(self, layer: Layer) -> list[int]:
        """Widths of what they return in parts."""
        return [self.width, *self._blocks(layer)]

    def _blocks(self, layer: Layer) -> list[int]:
        """The width of a dense block or of a shared expert; what goes to experts goes otherwise."""
        forward = layer.feed_forward
        return [] if isinstance(forward, Experts) and not forward.shared else [self.width]

    def _tensor(self, kind: CollectiveKind, widths: list[int], *, waits: bool) -> Iterator[Node]:
        """Rows of these *widths* over tensor-parallel ranks; sums are all-reduced unless the sequence is cut."""
        if self.plan.tensor_parallel == 1 or not widths:
            return
        chosen = kind if self.plan.cuts_sequence else "all-reduce"
        yield _sent(Collective("sums of a layer", chosen, self._rows_bytes(sum(widths)), len(widths), waits, "tensor"))

    def _rows_bytes(self, width: int) -> Amount:
        """Of all local tokens."""
        return self.tokens * width * self.job.compute_bytes * self.plan.micro_batch

    def _context(self, layer: Layer, *, backward: bool) -> Iterator[Node]:
        """Keys and values of local tokens go from rank to rank while attention computes, backwards with their
        gradients; or queries, keys, values and outputs are exchanged, backwards with the outputs once more."""
        steps, spec = self.plan.context_parallel - 1, layer.attention
        if not steps:
            return
        values = spec.key_value_heads * spec.value_head_dim
        if self.plan.megatron.context_exchange == "a2a":
            outputs = spec.heads * spec.value_head_dim * (2 if backward else 1)
            payload = self._rows_bytes(spec.query_width + spec.key_value_width + values + outputs)
            yield _sent(Collective("heads", "all-to-all", payload, 5 if backward else 4, True, "context"))
            return
        rounds = 2 if backward else 1
        payload = rounds * steps * self._rows_bytes(spec.key_value_width + values)
        yield _sent(Collective("keys and values", "send-receive", payload, rounds * steps, False, "context"))

    def _experts(self, layer: Layer, *, backward: bool) -> Iterator[Node]:
        """Tokens and their scores go to the ranks of their experts, outputs come back; gradients likewise.

        As many tokens as go come, all experts being used alike (megatron_experts.py).
        """
        experts = layer.feed_forward
        if not isinstance(experts, Experts):
            return
        parts = self.plan.tensor_parallel if self.plan.cuts_sequence else 1
        stream = self._rows_bytes(self.width) / parts
        score = stream / (self.width * self.job.compute_bytes) * router_bytes(experts, self.job.compute_bytes)
        slices = self.plan.expert_tensor_parallel
        # What is gathered forwards is added up backwards, and the other way round.
        kinds: tuple[CollectiveKind, CollectiveKind] = ("all-gather", "reduce-scatter")
        into, out = reversed(kinds) if backward else kinds
        if self.plan.megatron.token_dispatcher == "allgather":
            if self.plan.expert_ranks > 1:
                together, marks = self.plan.expert_ranks, stream / (self.width * self.job.compute_bytes)
                tables = (score + marks * (not backward)) * experts.count
                yield self._to_experts(into, (stream + tables) * together, 2 if backward else 3, "expert-ranks")
                yield self._to_experts(out, stream * together, 1, "expert-ranks")
            return
        if self.plan.expert_parallel > 1:
            yield self._to_experts("all-to-all", (2 * stream + score) * experts.active, 3, "expert")
        if slices > 1:
            wide = stream * router_bytes(experts, self.job.compute_bytes) / self.job.compute_bytes
            yield self._to_experts(into, (stream + score) * experts.active * slices, 2, "expert-tensor")
            yield self._to_experts(out, wide * experts.active * slices, 1, "expert-tensor")

    def _to_experts(self, kind: CollectiveKind, payload_bytes: Amount, messages: int, group: GroupName) -> Node:
        return _sent(Collective("tokens of experts", kind, payload_bytes, messages, True, group))


def _sent(collective: Collective) -> Block:
    return Block(collective.what, "temporaries", transfers=(collective,))
