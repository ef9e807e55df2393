"""PyTorch FSDP2 as accelerate 1.15 sets it up (torch 2.13, distributed/fsdp/_fully_shard; utils/fsdp_utils.py).

Parameters are gathered in groups: each layer; the embedding matrix; the tail of final norm and output matrix, which
stays whole once gathered, with the embedding matrix where it is tied; and the rest, such as position tables, which
the root keeps whole from the start of forward to the end of backward. Every tensor is cut by rows and padded to equal
cuts, so that gathered weights and reduced gradients are padded too, and no rank holds more than the first.

Weights are held in the parameter format (under mixed precision accelerate upcasts them to fp32), gathered and reduced
in the half format. There is no autocast. Left out: the caching allocator's late frees across streams.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property

from advisor.specs.model import AnyLayer, Parameter
from advisor.specs.plan import Strategy
from advisor.step.program import Amount, Block, Collective, hold, release
from advisor.step.scheme import MicroStep, Nodes, Part
from advisor.step.sharded import Sharded
from advisor.step.states import row_shards

Group = tuple[Parameter, ...]
"""Parameters that are gathered and reduced together."""

WEIGHTS = "weights"
"""What gathers carry."""
REPLICA_SUMS = "gradients summed over replicas"
NORM_IN_ROOT = frozenset({"llama4", "llama4_text"})
"""Families whose final norm accelerate does not find: their ``base_model_prefix`` names no module of theirs."""


class FullyShardedDataParallel(Sharded):
    """``reshard_after_forward`` true is full shard; false keeps gathered weights to backward (grad-op)."""

    @cached_property
    def tail(self) -> Group:
        """The group that stays whole once gathered."""
        norm = tuple(each for each in self.model.head if not self._is_left_over(each))
        return (*norm, self.model.embedding[0]) if self.model.tied_embeddings else norm

    @cached_property
    def root(self) -> Group:
        """What no other group takes."""
        return (*self.model.embedding[1:], *(each for each in self.model.head if self._is_left_over(each)))

    def _is_left_over(self, parameter: Parameter) -> bool:
        """Whether *parameter* is of a final norm that is no direct child of the base model (``_find_final_norm``).

        peft's wrapper has a ``model`` of its own, which is the whole of what it wraps.
        """
        if parameter.name.startswith("lm_head"):
            return False
        if self.model.frozen_count and parameter.name.startswith("model."):
            return True
        return self.model.family in NORM_IN_ROOT or parameter.name.count(".") > 2

    @cached_property
    def first(self) -> Group:
        """The group of the embedding matrix."""
        return self.tail if self.model.tied_embeddings else self.model.embedding[:1]

    def _name(self, part: Part) -> str:
        if part.kind != "layer" and self.model.tied_embeddings:
            return "embedding and head"
        return part.kind

    def _layer(self, number: int) -> AnyLayer | None:
        return self.model.layers[number] if 0 <= number < len(self.model.layers) else None

    def _group(self, part: Part) -> Group:
        return part.parameters if part.kind == "layer" else self.first if part.kind == "embedding" else self.tail

    def _gathered_before(self, part: Part) -> Group:
        """The group that forward gathers before *part*'s."""
        if part.kind == "embedding":
            return self.root
        number = len(self.model.layers) if part.number is None else part.number
        before = self._layer(number - 1)
        return before.parameters if before else self.first

    def _reduced_before(self, part: Part) -> Group:
        """The group that backward reduces before *part*'s, other than the root's."""
        if part.kind == "head":
            return ()
        behind = self._layer(0 if part.number is None else part.number + 1)
        if behind:
            return behind.parameters
        return () if self.model.tied_embeddings else self.tail

    @cached_property
    def layers_apart(self) -> frozenset[int]:
        """The first layer, the last, and those whose neighbours are not of the size that their pattern has there."""
        apart, start = {0, len(self.model.layers) - 1}, 0
        for run in self.model.runs:
            end = start + run.repeats * len(run.layers)
            if _differ(self._layer(start - 1), run.layers[-1]):
                apart.add(start)
            if _differ(self._layer(end), run.layers[0]):
                apart.add(end - 1)
            start = end
        return frozenset(apart)

    @property
    def streams(self) -> Mapping[str, str]:
        """``all_gather_copy_in_stream`` and ``reduce_scatter_stream``; copies out of the first are in neither.

        _fsdp_collectives.py ``foreach_all_gather``, ``foreach_reduce``.
        """
        return {"gather buffer": "all-gather", "gradients, rank's share": "reduce-scatter"}

    @cached_property
    def shard(self) -> Amount:
        return row_shards(tuple(self.model.parameters()), self.plan.shard_ranks)

    @cached_property
    def frozen_shard(self) -> Amount:
        return row_shards(self.model.frozen, self.plan.shard_ranks)

    def _share(self, group: Group) -> Amount:
        """Elements of *group* on one rank."""
        if group not in self._shares:
            self._shares[group] = row_shards(group, self.plan.shard_ranks)
        return self._shares[group]

    @cached_property
    def _shares(self) -> dict[Group, Amount]:
        return {}

    def _whole(self, group: Group) -> Amount:
        """Bytes of *group* when gathered or reduced, padding included."""
        return self._share(group) * self.plan.shard_ranks * self.job.compute_bytes

    def begin_forward(self) -> Nodes:
        return self._gather_in_forward(self.root, (), "root") if self.root else ()

    def before_forward(self, part: Part) -> Nodes:
        if part.kind == "head" and self.model.tied_embeddings:
            return ()
        return self._gather_in_forward(self._group(part), self._gathered_before(part), self._name(part))

    def _gather_in_forward(self, group: Group, before: Group, name: str) -> Nodes:
        """Gather, and copy out beside the buffer of the group before; the own buffer lives on in its place."""
        return (
            self._gather(group),
            hold(f"gathered {name}", "parameters", self._whole(group)),
            release("gather buffer", "buffers", self._whole(before)),
        )

    def after_forward(self, part: Part) -> Nodes:
        stays = part.kind == "embedding" and self.model.tied_embeddings
        if stays or not self.reshards:
            return ()
        return (release(f"gathered {self._name(part)}", "parameters", self._whole(self._group(part))),)

    def end_forward(self) -> Nodes:
        last = self.model.layers[-1].parameters if self.model.tied_embeddings else self.tail
        return (release("gather buffer", "buffers", self._whole(last)),)

    def logits_gradient(self, micro: MicroStep) -> Nodes:
        """The tail is whole, and the last layer's gather is sent ahead."""
        return (self._send_ahead(self.model.layers[-1].parameters),) if self.reshards else ()

    def before_backward(self, part: Part, micro: MicroStep) -> Nodes:
        if not self.reshards or part.kind == "head" or (part.kind == "embedding" and self.model.tied_embeddings):
            return ()
        group = self._group(part)
        copied = (
            replace(hold(f"gathered {self._name(part)}", "parameters", self._whole(group)), awaits=WEIGHTS),
            release("gather buffer", "buffers", self._whole(group)),
        )
        ahead = self._gathered_before(part)
        sends = part.kind == "layer" and (part.number != 0 or not self.model.tied_embeddings)
        return (*copied, self._send_ahead(ahead)) if sends else copied

    def gradient(self, part: Part, parameter: Parameter, size_bytes: int, micro: MicroStep) -> Nodes:
        kept = 1 if self.plan.fsdp.syncs_each_micro_batch else micro.first
        return (Block("unsharded gradients", "gradients", size_bytes * kept, size_bytes, "gradients"),)

    def after_backward(self, part: Part, micro: MicroStep) -> Nodes:
        if part.kind == "head" and self.model.tied_embeddings:
            return ()
        before = self._reduced_before(part)
        if part.kind != "embedding":
            return self._finish(self._group(part), before, self._name(part), micro)
        if not self.root:
            return self._finish(self.first, before, self._name(part), micro)
        return (
            *self._finish(self.root, before, "root", micro),
            *self._finish(self.first, self.root, self._name(part), micro),
        )

    def _finish(self, group: Group, before: Group, name: str, micro: MicroStep) -> Nodes:
        """Free a group's weights and, where gradients are reduced, its gradients.

        They are copied into one buffer, which takes the place of the one of the group *before* and lives until the
        next is reduced; the rank's share comes out of it and is cast to the format of the shards. All that while a
        loop variable keeps the gradient of the last parameter (_fsdp_collectives.py ``foreach_reduce``).
        """
        freed = release(f"gathered {name}", "parameters", self._whole(group))
        group = _trained(group)
        if not self.reduces(micro) or not group:
            return (freed,)
        size = self._whole(group)
        last = group[-1].numel * self.job.compute_bytes
        others = sum(parameter.numel for parameter in group[:-1]) * self.job.compute_bytes
        return (
            freed,
            release("reduce-scatter input", "buffers", self._whole(_trained(before))),
            hold("reduce-scatter input", "buffers", size),
            release("unsharded gradients", "gradients", others),
            self.reduced(self._share(group), size, micro),
            *self._summed_over_replicas(self._share(group)),
            release("unsharded gradients", "gradients", last),
        )

    def _summed_over_replicas(self, share: Amount) -> Nodes:
        """HSDP: the reduced share is summed in place over the groups that hold the same.

        It stays until backward is over, also where its gradient is a cast of it (_fsdp_param_group.py
        ``AllReduceState``).
        """
        if self.plan.strategy is not Strategy.HSDP:
            return ()
        size = share * self.job.compute_bytes
        reduce = Collective("gradients", "all-reduce", size, 1, waits=False, group="replica")
        return (replace(hold(REPLICA_SUMS, "buffers", size * self.casts), moved_bytes=2 * size, transfers=(reduce,)),)

    def end_backward(self, micro: MicroStep) -> Nodes:
        if not self.reduces(micro):
            return ()
        last = _trained(self.first) or _trained(self.model.layers[0].parameters)
        ended = release("reduce-scatter input", "buffers", self._whole(last))
        if self.plan.strategy is not Strategy.HSDP:
            return (ended,)
        return ended, release(REPLICA_SUMS, "buffers", self.updated * self.job.compute_bytes * self.casts)

    def sizes(self) -> Iterator[Amount]:
        return (self._share((parameter,)) for parameter in self.model.trained)

    def held_sizes(self) -> Iterator[Amount]:
        formats = {True: self.job.parameter_bytes, False: self.built_bytes}
        return (self._share((each,)) * formats[each.trained] for each in self.model.parameters())

    def _gather(self, group: Group) -> Block:
        """The rank's share, cast where formats differ, is copied into the buffer and gathered in place.

        In forward that begins as soon as the buffer of the group before has been copied out.
        """
        size, cast = self._whole(group), self._share(_trained(group)) * self.job.compute_bytes * self.casts
        gather = Collective(WEIGHTS, "all-gather", size, 1, waits=True, group="shard", ahead=1)
        return Block("gather buffer", "buffers", size, size + cast, moved_bytes=2 * size, transfers=(gather,))

    def _send_ahead(self, group: Group) -> Block:
        """The same in backward, which asks for the group while the one before it is at work."""
        gather = self._gather(group)
        return replace(gather, transfers=tuple(each._replace(waits=False, ahead=0) for each in gather.transfers))


def _trained(group: Group) -> Group:
    return tuple(parameter for parameter in group if parameter.trained)


def _differ(neighbour: AnyLayer | None, expected: AnyLayer) -> bool:
    return neighbour is not None and neighbour.parameters != expected.parameters
