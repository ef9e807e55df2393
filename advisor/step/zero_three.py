"""DeepSpeed ZeRO stage 3 without offload (deepspeed 0.19.8, runtime/zero/stage3.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial

import numpy as np

from advisor.specs.model import Parameter
from advisor.specs.plan import Checkpointing
from advisor.step.arrival import Arrival, Source, Where, arrival, where
from advisor.step.flat_partition import Reduction, by_count, reductions
from advisor.step.gathering import PLAIN, Buffers
from advisor.step.optimizers.rule import Given, flat
from advisor.step.passage import Move, Passage, block_of_experts, passage, reduced
from advisor.step.program import Amount, Block, Collective, hold, release, released, scratch
from advisor.step.recording import Mode
from advisor.step.scheme import SCALES, MicroStep, Nodes, Part
from advisor.step.states import tensor_shards
from advisor.step.zero import NORM_BYTES, Zero

FLAT_COPY = "flat copy of a bucket"


def shares(sizes: Sequence[int], ranks: int) -> tuple[int, ...]:
    """Elements of one rank's share of each tensor."""
    return tuple(-(-size // ranks) for size in sizes)


def sub_groups(parts: Sequence[int], size: int) -> tuple[tuple[int, ...], ...]:
    """Numbers of the tensors that the optimizer updates together (``_create_fp16_sub_groups``).

    *parts* are a rank's shares; a sub-group is closed by the tensor with which it reaches *size* elements.
    """
    if size >= sum(parts):
        return (tuple(range(len(parts))),)
    found: list[tuple[int, ...]] = []
    group: list[int] = []
    held = 0
    for number, part in enumerate(parts):
        group.append(number)
        held += part
        if held >= size or number == len(parts) - 1:
            found.append(tuple(group))
            group, held = [], 0
    return tuple(found)


class ZeroThree(Zero):
    """Stage 3: weights too are cut, tensor by tensor, and gathered for use."""

    @cached_property
    def mode(self) -> Mode:
        """DeepSpeed's own product saves all that it is given (zero/linear.py ``LinearFunctionForZeroStage3``)."""
        return replace(super().mode, keeps_inputs=self.model.frozen_count > 0)

    @cached_property
    def shard(self) -> Amount:
        return tensor_shards(tuple(self.model.parameters()), self.plan.gpus)

    @cached_property
    def trained_shard(self) -> Amount:
        """Of the weights that are trained."""
        return tensor_shards(self.model.trained, self.plan.gpus)

    @cached_property
    def small(self) -> tuple[Parameter, ...]:
        """The tensors that every rank keeps whole."""
        threshold = self.plan.zero.persistence_threshold
        return tuple(each for each in self.model.parameters() if each.stored_numel <= threshold)

    @cached_property
    def persistent(self) -> Amount:
        """Elements of the small tensors, each padded to the ranks."""
        return tensor_shards(self.small, self.plan.gpus) * self.plan.gpus

    @cached_property
    def passage(self) -> Passage:
        """How the window of gathered weights moves through a micro-step."""
        # Plans laid out together are not taken to accumulate: with the settings that are searched it is all the same.
        steps = self.plan.accumulation_steps
        accumulates = not np.ndim(steps) and bool(steps > 1)
        zero, source = self.plan.zero, self.source
        return passage(self.model, self.mode, self.checkpointed, zero, accumulates, source, self.buffers)

    @property
    def buffers(self) -> Buffers:
        """What an element takes while it is gathered."""
        return PLAIN

    @property
    def checkpointed(self) -> bool:
        return self.plan.checkpointing is not Checkpointing.NONE

    @cached_property
    def gathers(self) -> int:
        """Gathers of the whole model in a micro-step: one where it stays whole from forward to backward."""
        whole = sum(each.stored_numel for each in self.model.parameters())
        cut = whole - sum(each.stored_numel for each in self.small)
        return 1 if self.passage.most >= cut else 2

    @cached_property
    def arrival(self) -> Arrival:
        """In which order gradients come to the bucket."""
        return reduced(self.model, self.mode, self.checkpointed, self.source)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Elements of the trained tensors."""
        return tuple(parameter.numel for parameter in self.model.trained)

    @property
    def bucket_bytes(self) -> int:
        """In the format that is sent (stage3.py ``setup_buckets``)."""
        return self.plan.zero.reduce_bucket * self.reduced_bytes

    @cached_property
    def reductions(self) -> tuple[Reduction, ...]:
        return reductions(self.sizes, self.arrival.tensors, self.plan.zero.reduce_bucket)

    def over_ranks(self, amounts: str) -> Amount:
        """What the method called *amounts* says of each of the plan's numbers of GPUs."""
        return by_count(getattr(self, amounts), self.plan.gpus)

    def parts(self, ranks: int) -> tuple[int, ...]:
        return shares(self.sizes, ranks)

    def groups(self, ranks: int) -> tuple[tuple[int, ...], ...]:
        return sub_groups(self.parts(ranks), self.plan.zero.sub_group)

    def largest_group(self, ranks: int) -> int:
        """Elements of the largest sub-group of a rank."""
        parts = self.parts(ranks)
        return max(sum(parts[number] for number in group) for group in self.groups(ranks))

    @cached_property
    def given(self) -> Given:
        """A tensor of each sub-group."""
        counts = range(max(len(self.groups(int(ranks))) for ranks in np.unique(np.asarray(self.plan.gpus))))
        parts = [by_count(partial(self._group_size, number), self.plan.gpus) for number in counts]
        return flat(self.trained_shard, self.state_bytes, ", rank's share", parts)

    def _group_size(self, number: int, ranks: int) -> int:
        """Elements of a sub-group of a rank; 0 where there are not so many."""
        parts, groups = self.parts(ranks), self.groups(ranks)
        return sum(parts[each] for each in groups[number]) if number < len(groups) else 0

    @property
    def micro_steps_differ(self) -> bool:
        return False

    @cached_property
    def reduced_before(self) -> dict[Source, Reduction]:
        """The gradients that find the bucket full, and what is reduced before they enter."""
        sources = self.arrival.sources
        return {sources[reduction.place]: reduction for reduction in self.reductions[:-1]}

    @cached_property
    def layers_apart(self) -> frozenset[int]:
        """Those in which the window moves otherwise than usual, a bucket is reduced, or a gradient waits beside it."""
        special = {source[0] for source in self.reduced_before}
        for tensor, source in zip(self.arrival.tensors, self.arrival.sources, strict=True):
            if self.sizes[tensor] > self.plan.zero.reduce_bucket:
                special.add(source[0])
        return self.passage.unusual | {each for each in special if isinstance(each, int)}

    @property
    def streams(self) -> Mapping[str, str]:
        """``__allgather_stream`` and ``reduce_and_partition_stream``."""
        if not self.plan.zero.overlap_communication:
            return {}
        return {"gathered weights": "all-gather", FLAT_COPY: "reduce"}

    def states(self) -> Nodes:
        shard, half = self.trained_shard, self.job.compute_bytes
        return (
            scratch("weights before they are cut", self.uncut_bytes, "parameters"),
            hold("weights, rank's share", "parameters", self.shard * half),
            hold(SCALES, "parameters", self.model.scale_bytes),
            hold("small weights kept whole", "parameters", self.persistent * half),
            hold("gradients, rank's share", "gradients", shard * half),
            hold("gradient bucket", "buffers", self.bucket_bytes),
            hold("master weights, rank's share", "optimizer", shard * self.master_bytes),
            scratch("first zero gradient", self.over_ranks("largest_group") * self.state_bytes),
            *self.optimizer.kept(self.given),
            # A norm in fp64, and one byte that tells of overflow.
            hold("gradient norm and overflow flag", "buffers", NORM_BYTES + 1),
        )

    def before_forward(self, part: Part) -> Nodes:
        return (self._gather(part), self._gathered(self.passage.forward[self._like(part)].entering))

    def after_forward(self, part: Part) -> Nodes:
        stay = self.passage.forward[self._like(part)]
        return (self._gathered(stay.leaving), *(self._kept(each) for each in stay.kept))

    def end_forward(self) -> Nodes:
        return (self._gathered(self.passage.forward["head"].leaving),)

    def before_backward(self, part: Part, micro: MicroStep) -> Nodes:
        first = (self._gathered(self.passage.first),) if part.kind == "head" else ()
        return (*first, self._gather_again(part)) if self.gathers == 2 else first

    def _like(self, part: Part) -> Where:
        """Where *part* stands, or one of the layers that it stands for."""
        at = where(part)
        return self.usual[id(part.of_layer)] if at is None else at

    @cached_property
    def usual(self) -> dict[int, Where]:
        """For each kind of layer, by identity, one that fares as most of them do."""
        return {id(layer): self.passage.usual[number] for number, layer in enumerate(self.model.layers)}

    def _kept(self, parameter: Parameter) -> Block:
        """What a view of a weight keeps of it until the view has been used in backward."""
        return hold("gathered weights seen by backward", "parameters", parameter.stored_numel * self.job.compute_bytes)

    def _gathered(self, move: Move) -> Block:
        half = self.job.compute_bytes
        net_bytes, peak_bytes = int(move.net * half), int(max(move.peak, move.net, 0) * half)
        return Block("gathered weights", "parameters", net_bytes, peak_bytes, "buffers")

    def ahead(self, part: Part) -> float:
        """How much of the part before is still to come when the prefetching of *part* begins, at most all of it."""
        return min(1.0, self.plan.zero.prefetch_bucket / max(part.numel, 1))

    def _gather(self, part: Part) -> Block:
        payload = part.numel * self.job.compute_bytes
        at_once = self.plan.zero.prefetch_bucket
        messages = max(1, part.numel // at_once) if at_once else len(part.parameters)
        gather = Collective("weights", "all-gather", payload, messages, waits=True, ahead=self.ahead(part))
        return Block("gather of weights", "temporaries", moved_bytes=payload, transfers=(gather,))

    def _gather_again(self, part: Part) -> Block:
        """For backward."""
        return self._gather(part)

    def gradient(self, part: Part, parameter: Parameter, size_bytes: int, micro: MicroStep) -> Nodes:
        block = self._blocks.get(id(part.layer), ())
        if parameter in block:
            handed_over = self._of_experts(part, parameter, size_bytes, block, micro)
        elif self._stops(part, parameter):
            handed_over = (hold("gradients", "gradients", size_bytes), *self._enters(part, parameter, micro))
        else:
            handed_over = self._passing(size_bytes, self._changes[self._like(part), parameter])
        # A gradient is made before what its product saved is dropped.
        stay = self.passage.forward[self._like(part)]
        if parameter not in stay.kept:
            return handed_over
        return (handed_over[0], released(self._kept(parameter)), *handed_over[1:])

    def _of_experts(
        self, part: Part, parameter: Parameter, size_bytes: int, block: tuple[Parameter, ...], micro: MicroStep
    ) -> Nodes:
        """Gradients of a block of experts wait for the last of them (stage3.py ``reduce_leaf_module_grads``)."""
        held = hold("gradients", "gradients", size_bytes)
        if parameter != self._last[id(part.layer)]:
            return (held,)
        return (held, *(node for each in block for node in self._enters(part, each, micro)))

    @cached_property
    def _blocks(self) -> dict[int, tuple[Parameter, ...]]:
        """Of each layer, by identity, what waits until its block of experts is done."""
        kinds = (layer for run in self.model.runs for layer in run.layers)
        return {
            id(layer): tuple(each for each in block_of_experts(self.model, layer) if each.trained) for layer in kinds
        }

    @cached_property
    def _last(self) -> dict[int, Parameter]:
        """By a layer's identity, the parameter of its block of experts whose gradient backward makes last."""
        found: dict[int, Parameter] = {}
        for at, parameter in arrival(self.model, self.mode, self.checkpointed, self.source).sources:
            if isinstance(at, int) and parameter in self._blocks[id(layer := self.model.layers[at])]:
                found[id(layer)] = parameter
        return found

    def _stops(self, part: Part, parameter: Parameter) -> bool:
        """Whether a gradient waits beside the bucket, or finds it full."""
        full = (at := where(part)) is not None and (at, parameter) in self.reduced_before
        return full or parameter.numel > self.plan.zero.reduce_bucket

    def _enters(self, part: Part, parameter: Parameter, micro: MicroStep) -> Nodes:
        """A gradient that is held moves into the bucket, which is reduced first where it is full."""
        at = where(part)
        reduction = self.reduced_before.get((at, parameter)) if at is not None else None
        waits = parameter.numel > self.plan.zero.reduce_bucket
        return (
            *(self._reduce(reduction, micro) if reduction else ()),
            release("gradients", "gradients", 0 if waits else parameter.numel * self.job.compute_bytes),
            self._gathered(self._changes[self._like(part), parameter]),
        )

    def _passing(self, size_bytes: int, move: Move) -> Nodes:
        """A gradient that moves into the bucket; the same nodes wherever the same happens."""
        if (size_bytes, move) not in self._passed:
            self._passed[size_bytes, move] = (scratch("gradients", size_bytes, "gradients"), self._gathered(move))
        return self._passed[size_bytes, move]

    @cached_property
    def _passed(self) -> dict[tuple[int, Move], Nodes]:
        return {}

    @cached_property
    def _changes(self) -> dict[Source, Move]:
        """The window's change after each gradient."""
        found: dict[Source, Move] = {}
        after = {part: iter(changes) for part, changes in self.passage.after.items()}
        for source in self.arrival.sources:
            found[source] = next(after[source[0]])
        return found

    def _reduce(self, reduction: Reduction, micro: MicroStep) -> Nodes:
        """Gradients are put together for reduce-scatter, padded to the ranks, and dropped.

        comm/coalesced_collectives.py ``reduce_scatter_coalesced``: one tensor that needs no padding is not copied.
        Where they are sent in another format, the bucket has that, one that waits beside it is cast to it, and the
        rank's share is cast back (stage3.py ``__avg_scatter_grads``).
        """
        sizes = [self.sizes[tensor] for tensor in reduction.tensors]
        padded = sum(-(-size // self.plan.gpus) * self.plan.gpus for size in sizes)
        copies = 1 * (len(sizes) > 1 or padded != sizes[0])
        alone = sizes[0] > self.plan.zero.reduce_bucket
        half, sent = self.job.compute_bytes, self.reduced_bytes
        casts = (sizes[0] * sent * alone + padded // self.plan.gpus * half) * (sent != half)
        reduce = Collective("gradients", "reduce-scatter", padded * sent, 1, waits=False)
        return (
            replace(
                scratch(FLAT_COPY, padded * sent * copies + casts),
                moved_bytes=4 * padded * sent,
                transfers=(reduce,),
            ),
            release("gradients", "gradients", sizes[0] * half if alone else 0),
        )

    def after_backward(self, part: Part, micro: MicroStep) -> Nodes:
        kept = (self._output_matrix,) if part.kind == "head" and self.job.loss == "fused" else ()
        # Views of frozen weights go with no gradient of theirs.
        seen = self.passage.forward[self._like(part)].kept
        return (*kept, *(released(self._kept(each)) for each in seen if not each.trained))

    @property
    def _output_matrix(self) -> Block:
        """Gathered again for the whole of backward: the fused loss reads it outside its module.

        So it belongs to the outermost module, whose backward has no end (partition_parameters.py
        ``_inject_parameters``, parameter_offload.py).
        """
        matrix = self.model.embedding[0] if self.model.tied_embeddings else self.model.head[-1]
        return hold("output matrix for the fused loss", "parameters", matrix.numel * self.job.compute_bytes)

    def end_backward(self, micro: MicroStep) -> Nodes:
        kept = (released(self._output_matrix),) if self.job.loss == "fused" else ()
        # What no module's own backward has released goes last (runtime/engine.py ``_backward_epilogue``).
        return (*self._reduce(self.reductions[-1], micro), self._gathered(self.passage.last), *kept)

    def update(self) -> Nodes:
        half = self.job.compute_bytes
        piece = self.over_ranks("largest_group")
        largest = -(-max(self.sizes) // self.plan.gpus)
        payload = self.persistent * half
        gather = Collective("small weights", "all-gather", payload, 1, waits=True)
        small = hold("small weights kept whole", "parameters", payload)
        joined = hold("flat gradient of a sub-group", "gradients", half * piece)
        cast = hold("optimizer's gradient of a sub-group", "gradients", self.state_bytes * piece)
        casts = self.state_bytes != half
        return (
            # All weights are cut, the small ones too, until the optimizer has made new ones.
            released(small),
            scratch("gradient norm in fp64", NORM_BYTES * largest),
            joined,
            *((cast, released(joined)) if casts else ()),
            # Sub-groups are updated one by one.
            scratch(f"{self.optimizer.name} temporaries", self.optimizer.temporaries(flat(piece, self.state_bytes))),
            *self.optimizer.moving(self.given),
            released(cast if casts else joined),
            Block("all-gather of small weights", "temporaries", transfers=(gather,)),
            small,
        )

    def host_once(self) -> Nodes:
        """transformers' ZeRO-3 loading: rank 0 reads the whole checkpoint and sends it to the others."""
        whole = self.model.parameter_count * self.job.compute_bytes
        return (scratch("weights while loading", whole, "parameters"),)
