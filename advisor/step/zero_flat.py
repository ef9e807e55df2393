"""DeepSpeed ZeRO stages 1 and 2 without offload (deepspeed 0.19.8, runtime/zero/stage_1_and_2.py).

Every rank has one flat buffer of weights; its optimizer states are cut over the ranks. What a rank holds depends on
which tensors its partition touches, so a step is laid out for one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cached_property

import numpy as np

from advisor.specs.model import Parameter
from advisor.specs.plan import Checkpointing
from advisor.step.arrival import Arrival, Source, arrival, where
from advisor.step.flat_partition import (
    Reduction,
    Shares,
    all_reduces,
    by_count,
    copied,
    flat_shard,
    gathered_from,
    reductions,
    shares,
    starts,
    undominated,
)
from advisor.step.optimizers.rule import Given, flat
from advisor.step.program import Amount, Block, Collective, Node, hold, release, released, scratch
from advisor.step.scheme import MicroStep, Nodes, Part
from advisor.step.zero import NORM_BYTES, Zero


class ZeroFlat(Zero):
    """What the two stages share."""

    @cached_property
    def shard(self) -> Amount:
        return flat_shard(self.model.trained_count, self.plan.gpus)

    @cached_property
    def given(self) -> Given:
        return flat(self.shard, self.state_bytes, ", rank's share")

    @property
    def buckets(self) -> int:
        return 2 if self.plan.zero.overlap_communication else 1

    @property
    def tensor_sizes(self) -> Mapping[str, Callable[[], Iterable[int]]]:
        return {"gradient buckets": lambda: self.buckets * [self.bucket_bytes]}

    @property
    def streams(self) -> Mapping[str, str]:
        """``reduction_stream``."""
        return {"flat copy of a bucket": "reduce"} if self.plan.zero.overlap_communication else {}

    @cached_property
    def registered(self) -> tuple[int, ...]:
        """Numbers of the trained tensors in the order in which they stand in the flat buffer."""
        model, count = self.model, len(self.model.trained)
        if model.frozen_count:
            return tuple(range(count))
        layers, head = len(model.embedding), count - len(model.head)
        early = range(head, head + model.early_head)
        return (*range(layers), *early, *range(layers, head), *range(head + model.early_head, count))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        numbered = self.model.trained
        return tuple(numbered[tensor].numel for tensor in self.registered)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each tensor begins in the flat buffer."""
        return starts(self.sizes)

    @cached_property
    def reductions(self) -> tuple[Reduction, ...]:
        return reductions(self.sizes, self.arrival.tensors, self.plan.zero.reduce_bucket)

    @cached_property
    def arrival(self) -> Arrival:
        """In which order gradients come to the bucket: as their tensors are registered (``reduce_gradients``)."""
        return Arrival(tuple(range(len(self.sizes))), ())

    def _of_rank(self, name: str) -> Amount:
        """A field of :class:`Shares`, for this rank."""

        def table(ranks: int) -> np.ndarray:
            return np.asarray(getattr(self._shares(ranks), name))

        return gathered_from(table, self.plan.gpus, self.rank)

    def _shares(self, ranks: int) -> Shares:
        if ranks not in self._known_shares:
            self._known_shares[ranks] = shares(self.sizes, self.reductions, ranks)
        return self._known_shares[ranks]

    @cached_property
    def _known_shares(self) -> dict[int, Shares]:
        return {}

    @property
    def keeps_gradients(self) -> bool:
        """Whether reduced gradients stay on the device as they are until the step."""
        return True

    @cached_property
    def owned_bytes(self) -> Amount:
        """Gradients that this rank keeps for its partition once they are reduced."""
        return self._of_rank("held") * self.job.compute_bytes if self.keeps_gradients else 0

    @cached_property
    def padding_bytes(self) -> Amount:
        """The last rank's gradient is filled up with zeros."""
        return self._of_rank("padding") * self.job.compute_bytes if self.keeps_gradients else 0

    def contenders(self, ranks: int) -> np.ndarray:
        """The ranks of *ranks* that can be the fullest.

        Ranks differ in when they begin to keep gradients, in how many they keep, in the padding, in the largest slice
        that the norm copies, and in whether the flat gradient is a copy. More of any of these never takes less, so
        a rank that another equals or exceeds in all of them need not be looked at.
        """
        found, half = self._shares(ranks), self.job.compute_bytes
        kept = found.held * half
        filled = kept + found.padding * half
        flat = (found.pieces > 1) * int(np.max(np.asarray(flat_shard(self.model.trained_count, ranks)))) * half
        norm = filled + found.largest_slice * NORM_BYTES
        return undominated(np.stack([-found.first_reduction, kept, filled, norm, filled + flat], axis=1))

    def states(self) -> Nodes:
        shard, whole = self.shard, self.shard * self.plan.gpus
        return (
            hold("frozen weights", "parameters", self.frozen_bytes),
            # Flattened into one buffer while the model's own tensors are still there.
            Block("weights", "parameters", whole * self.job.compute_bytes, 2 * whole * self.job.compute_bytes),
            hold("master weights, rank's share", "optimizer", shard * self.master_bytes),
            scratch("first zero gradient", shard * self.state_bytes),
            *self.kept(),
        )

    @cached_property
    def reducing(self) -> dict[Reduction, Nodes]:
        """What each reduction takes: the bucket is reduced, and this rank copies out what is its own."""
        first = self._of_rank("first_reduction")
        return {
            reduction: (
                self.all_reduce(reduction, self._copied_bytes(reduction)),
                hold("gradients of the rank's partition", "gradients", self.owned_bytes * (first == number)),
            )
            for number, reduction in enumerate(self.reductions)
        }

    def _copied_bytes(self, reduction: Reduction) -> Amount:
        """The flat copy of what is sent at once, and the cast of it where it is sent in another format."""
        bucket, half, cast = self.plan.zero.reduce_bucket, self.job.compute_bytes, self.reduced_bytes

        def most(ranks: int) -> int:
            found = all_reduces(self.sizes, reduction, bucket, ranks)
            if cast == half:
                return half * copied(found)
            return max(each.elements * (half * (each.slices > 1) + cast) for each in found)

        return by_count(most, self.plan.gpus)

    def _owns(self, reduction: Reduction) -> Amount:
        """1 where this rank's partition touches the one tensor of *reduction*, else 0."""
        start = self.starts[reduction.tensors[0]]
        end = start + self.sizes[reduction.tensors[0]]
        low = self.rank * self.shard
        return 1 * ((start < low + self.shard) & (end > low))

    def bypasses(self, tensor: int) -> bool:
        """Whether *tensor* is too large for the bucket."""
        return self.sizes[tensor] > self.plan.zero.reduce_bucket

    def all_reduce(self, reduction: Reduction, copied_bytes: Amount) -> Block:
        """The bucket is sent, of which *copied_bytes* are copied meanwhile.

        ``reduce_scatter`` with ``use_multi_rank_bucket_allreduce`` (both defaults) is an all-reduce.
        """
        payload = sum(self.sizes[tensor] for tensor in reduction.tensors) * self.reduced_bytes
        waits = not self.plan.zero.overlap_communication
        reduce = Collective("gradients", "all-reduce", payload, 1, waits)
        return replace(scratch("flat copy of a bucket", copied_bytes), moved_bytes=4 * payload, transfers=(reduce,))

    def update(self) -> Nodes:
        shard, half, size = self.shard, self.job.compute_bytes, self.state_bytes
        # A flat gradient of one piece is that piece itself, and in the optimizer's own format it is not cast either.
        copies = 1 * (self._of_rank("pieces") > 1)
        casts = size != half
        flat = hold("flat gradient, rank's share", "gradients", half * shard * copies)
        cast = hold("optimizer's gradient, rank's share", "gradients", size * shard)
        return (
            scratch("gradient norm in fp64", self._of_rank("largest_slice") * NORM_BYTES),
            flat,
            *((cast, released(flat)) if casts else ()),
            *self._pieces_released(1 if casts else copies),
            *self.optimizer.update(self.given),
            *self._pieces_released(0 if casts else 1 - copies),
            released(cast if casts else flat),
            self.gather_updated(),
        )

    def _pieces_released(self, share: Amount) -> Nodes:
        return (
            release("gradients of the rank's partition", "gradients", self.owned_bytes * share),
            release("padding of the partition", "gradients", self.padding_bytes * share),
        )


class ZeroOne(ZeroFlat):
    """Stage 1: every gradient stays to the last micro-step, and is reduced when backward is done."""

    def first_gradient(self, micro: MicroStep) -> Nodes:
        # Taken in the first micro-step, it stays until the last has been reduced.
        return (hold("gradient buckets", "buffers", self.buckets * self.bucket_bytes * micro.first),)

    def gradient(self, part: Part, parameter: Parameter, size_bytes: int, micro: MicroStep) -> Nodes:
        return (Block("gradients", "gradients", size_bytes * micro.first, size_bytes, "gradients"),)

    def end_backward(self, micro: MicroStep) -> Nodes:
        return tuple(self._reduce_all()) if micro.last else ()

    def _reduce_all(self) -> list[Node]:
        """Gradients move into the bucket, which frees their own memory, and a rank's own are copied out of it."""
        half = self.job.compute_bytes
        nodes: list[Node] = []
        left: Amount = self.model.trained_count * half
        for reduction in self.reductions:
            elements = sum(self.sizes[tensor] for tensor in reduction.tensors)
            alone = self.bypasses(reduction.tensors[0])
            moved = release("gradients", "gradients", elements * half * (self._owns(reduction) if alone else 1))
            nodes += [*self.reducing[reduction], moved] if alone else [moved, *self.reducing[reduction]]
            left = left + moved.net_bytes
        return [
            *nodes,
            hold("padding of the partition", "gradients", self.padding_bytes),
            release("gradients", "gradients", left),
            release("gradient buckets", "buffers", self.buckets * self.bucket_bytes),
        ]


class ZeroTwo(ZeroFlat):
    """Stage 2: gradients are reduced as they come; of each micro-step, those of the rank's partition are kept."""

    @cached_property
    def arrival(self) -> Arrival:
        """In the order of backward."""
        checkpointed = self.plan.checkpointing is not Checkpointing.NONE
        found = arrival(self.model, self.mode, checkpointed, self.source)
        place = {tensor: number for number, tensor in enumerate(self.registered)}
        return Arrival(tuple(place[tensor] for tensor in found.tensors), found.sources)

    @property
    def micro_steps_differ(self) -> bool:
        return False

    @cached_property
    def reduced_before(self) -> dict[Source, Reduction]:
        """The gradients that find the bucket full, and what is reduced before they enter."""
        return {self.arrival.sources[reduction.place]: reduction for reduction in self.reductions[:-1]}

    @cached_property
    def layers_apart(self) -> frozenset[int]:
        """Those in which a bucket is reduced, or a gradient waits that does not fit into one."""
        special = [source[0] for source in self.reduced_before]
        arrived = zip(self.arrival.tensors, self.arrival.sources, strict=True)
        special += [source[0] for tensor, source in arrived if self.bypasses(tensor)]
        return frozenset(each for each in special if isinstance(each, int))

    def first_gradient(self, micro: MicroStep) -> Nodes:
        return (hold("gradient buckets", "buffers", self.buckets * self.bucket_bytes),)

    def _passing(self, size_bytes: int) -> Nodes:
        """A gradient that moves into the bucket; the same nodes wherever one of its size does."""
        if size_bytes not in self._passed:
            self._passed[size_bytes] = (scratch("gradients", size_bytes, "gradients"),)
        return self._passed[size_bytes]

    @cached_property
    def _passed(self) -> dict[int, Nodes]:
        return {}

    def gradient(self, part: Part, parameter: Parameter, size_bytes: int, micro: MicroStep) -> Nodes:
        at = where(part)
        reduction = self.reduced_before.get((at, parameter)) if at is not None else None
        waits = parameter.numel > self.plan.zero.reduce_bucket
        if reduction is None and not waits:
            return self._passing(size_bytes)
        return (
            hold("gradients", "gradients", size_bytes),
            *(self.reduce(reduction, micro) if reduction else ()),
            release("gradients", "gradients", 0 if waits else size_bytes),
        )

    def reduce(self, reduction: Reduction, micro: MicroStep) -> Nodes:
        """The bucket, or a gradient that waited beside it, is reduced and dropped."""
        alone = self.bypasses(reduction.tensors[0])
        waited = self.sizes[reduction.tensors[0]] * self.job.compute_bytes if alone else 0
        return (*self.reducing[reduction], release("gradients", "gradients", waited))

    def end_backward(self, micro: MicroStep) -> Nodes:
        padding = self.padding_bytes if micro.last else 0
        again = 1 - micro.first
        return (
            *self.reduce(self.reductions[-1], micro),
            hold("padding of the partition", "gradients", padding),
            release("gradient buckets", "buffers", self.buckets * self.bucket_bytes),
            # A later micro-step adds its own copy to the one that stays.
            release("gradients of the rank's partition", "gradients", self.owned_bytes * again),
        )
