"""A step of Megatron-LM on one rank: tensor, pipeline, context and data parallel, with the distributed optimizer.

megatron-core 0.16.1: weights in the compute format and the sums of their gradients lie in two flat buffers
(distributed/param_and_grad_buffer.py), gradients in fp32 for bf16 and in fp16 for fp16 (Megatron-LM,
training/arguments.py); the optimizer holds fp32 weights and two moments, cut over the data-parallel ranks if it is
distributed (docs, dist_optimizer: 6 + 12/d bytes a parameter in bf16, else 18). Experts that are spread over ranks lie
in buffers of their own, and d is then of the ranks that hold the same ones. Left out: padding of buffers beyond 64
elements a tensor, all-reduces of norms' gradients, what overlapped sends between stages keep a little longer, and what
dispatchers hold of the last micro-batch's routing where it was kept for backward, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from math import prod
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from advisor.errors import SpecError
from advisor.specs.job import Job
from advisor.specs.model import Layer, ModelSpec, Parameter
from advisor.specs.plan import Checkpointing, Count, GroupName, Plan
from advisor.step.flop import flop
from advisor.step.megatron_exchanges import Exchanges
from advisor.step.megatron_parts import Parts, parts_of
from advisor.step.megatron_shard import (
    OUTPUT_LAYER,
    WORD_EMBEDDINGS,
    Chunk,
    Place,
    Stage,
    is_of_expert,
    place_of,
    stage_of,
)
from advisor.step.pipeline import Passes, between_ends, schedule
from advisor.step.program import (
    Amount,
    Block,
    Node,
    fold,
    hold,
    phase,
    released,
    repeat,
    scratch,
    then,
    total,
)
from advisor.step.recording import GRADIENT_STREAM, STREAM
from advisor.step.states import ADAM_MOVES, FP32_BYTES, MOMENTS

ALIGNED = 64
"""Elements, to a multiple of which each tensor begins in the flat buffers of the distributed optimizer."""
SCORES_BUFFER = "buffer for gathered activations and scores"


class Buffers(NamedTuple):
    """The flat buffers of weights that the ranks of one group share."""

    group: GroupName
    numel: Count


class StageStep(NamedTuple):
    """What a rank of one pipeline stage holds between steps, and its step."""

    number: Count
    states: Node
    step: Node
    exists: bool | NDArray[np.bool_] = True
    """Whether the pipeline, of each of many plans, has the stage; what is laid out for others means nothing."""


class RankStep(NamedTuple):
    """What one rank holds between steps, and its step."""

    rank: int
    states: Node
    step: Node
    slowest: Node
    """The step of the pipeline stage that computes most, at whose pace the others go."""
    has_experts: bool
    slowest_excess: float = 1.0
    """Forward products of that stage over those of a stage on average, whole scores matrices under a causal mask."""


def rank_step(model: ModelSpec, job: Job, plan: Plan, rank: int | None = None) -> RankStep:
    """The step of *rank*, or of the first rank of the stage that holds most.

    Ranks of one stage are alike. Raises SpecError where several plans of a pipeline are asked for at once.
    """
    if np.all(np.asarray(plan.pipeline_parallel) == 1):
        alone = _Layout(model, job, plan, 0, "only")
        return RankStep(rank or 0, alone.states, alone.step, alone.step, alone.has_experts)
    if plan.shape:
        raise SpecError(f"{plan.title} is laid out for one plan at a time: its stages take turns at being the fullest")
    ranks, last = int(plan.gpus) // int(plan.pipeline_parallel), int(plan.pipeline_parallel) - 1
    numbers = sorted({0, 1, last})
    asked = [rank // ranks] if rank is not None else numbers
    laid = {number: _Layout(model, job, plan, number, place_of(plan, number)) for number in {*numbers, *asked}}
    peaks = {number: fold(then(laid[number].states, laid[number].step)).peak_bytes for number in asked}
    number = max(peaks, key=lambda each: peaks[each])
    slowest = max((laid[each] for each in numbers), key=lambda layout: flop(layout.step).done)
    first, between, closing = (laid[each].forward_flop for each in (0, 1, last))
    average = (first + closing + (last - 1) * between) / (last + 1)
    chosen, named = laid[number], number * ranks if rank is None else rank
    excess = float(slowest.forward_flop / average)
    return RankStep(named, chosen.states, chosen.step, slowest.step, chosen.has_experts, excess)


def stage_steps(model: ModelSpec, job: Job, plans: Sequence[Plan]) -> list[tuple[StageStep, ...]]:
    """For each of *plans*, which differ in the optimizer alone, the steps of the stages that it is about.

    One of these is the fullest, and one the slowest, of each plan that a plan stands for. Of the stages between the
    first and the last, the first has most micro-batches in flight.
    """
    found: list[list[StageStep]] = [[] for _ in plans]
    for number, place, exists in _contending(plans[0].pipeline_parallel):
        like = None
        for plan, steps in zip(plans, found, strict=True):
            like = _Layout(model, job, plan, number, place, like)
            steps.append(StageStep(number, like.states, like.step, exists))
    return [tuple(steps) for steps in found]


def _contending(stages: Count) -> Iterator[tuple[Count, Place, bool | NDArray[np.bool_]]]:
    """Numbers and places of stages, and which pipelines have them."""
    if np.all(np.asarray(stages) == 1):
        yield 0, "only", True
        return
    longer = np.asarray(stages) > 2
    yield 0, "first", True
    if longer.any():
        yield np.where(longer, 1, 0), "between", longer
    yield stages - 1, "last", True


class _Layout:
    """Lays out the step of a rank of one pipeline stage, with what another has *like* it but for the optimizer."""

    def __init__(
        self, model: ModelSpec, job: Job, plan: Plan, number: Count, place: Place, like: _Layout | None = None
    ) -> None:
        self.job, self.plan, self.number, self.like = job, plan, number, like
        self.stage: Stage = like.stage if like else stage_of(model, job, plan, number, place)
        self.width = model.hidden_size
        self.parts: Parts = like.parts if like else parts_of(job, plan, self.width)
        self.exchanges = Exchanges(job, plan, self.width, self.parts.mode.sequence_length)
        self.states, self.step = then(*self._states()), self._step()

    @property
    def forward_flop(self) -> Amount:
        """Work of the products of one micro-batch forwards, with whole scores matrices under a causal mask."""
        return total(
            flop(node).whole * chunk.several for node, chunk in zip(self.passes.forward, self.stage.chunks, strict=True)
        )

    @property
    def has_experts(self) -> bool:
        return any(is_of_expert(parameter) for parameter, _ in self.stage.counted())

    @cached_property
    def _buffers(self) -> tuple[Buffers, ...]:
        """The weights that all data-parallel ranks share, and the experts that some of them do."""
        step = ALIGNED if self._distributed else 1
        numels: dict[GroupName, Count] = {}
        for parameter, times in self.stage.counted():
            spread = self.plan.expert_parallel > 1 and is_of_expert(parameter)
            group: GroupName = "expert-data" if spread else "data"
            numels[group] = numels.get(group, 0) + -(-parameter.numel // step) * step * times
        return tuple(Buffers(group, numel) for group, numel in numels.items())

    @property
    def _buffer_numel(self) -> Count:
        return sum((each.numel for each in self._buffers), 0)

    @property
    def _distributed(self) -> bool:
        return self.plan.megatron.distributed_optimizer

    @property
    def _share(self) -> Amount:
        """Elements that the optimizer updates on this rank."""
        instances = self.plan.megatron.optimizer_instances
        shares = (-(-each.numel * instances // self.plan.group(each.group).size) for each in self._buffers)
        return total(shares) if self._distributed else self._buffer_numel

    def _states(self) -> Iterator[Node]:
        numel, held = self._buffer_numel, ", rank's share" if self._distributed else ""
        yield hold("weights", "parameters", numel * self.job.compute_bytes)
        yield hold("sums of gradients", "gradients", numel * self.parts.sum_bytes)
        yield hold(f"fp32 weights{held}", "optimizer", self._share * FP32_BYTES)
        yield hold(f"Adam moments{held}", "optimizer", MOMENTS * self._share * FP32_BYTES)
        if self.plan.megatron.fuses_gradient_sums:
            # Products that add gradients to their sums hand a tensor of the same shape to autograd, one for each shape
            # (TransformerEngine, pytorch/module/base.py get_dummy_wgrad).
            placeholders = {parameter.shape[-2:] for parameter, _ in self.stage.counted() if _cut(parameter)}
            numel = sum(prod(shape) for shape in placeholders)
            yield hold("placeholders of gradients", "buffers", numel * self.job.compute_bytes)
        yield hold(SCORES_BUFFER, "buffers", self._global_buffer_bytes)
        turned = self._of_layers(lambda layer: layer.attention.latent.rotary_head_dim if layer.attention.latent else 0)
        if np.any(np.asarray(turned) > 0):
            # Cosines and sines of the whole sequence, in every layer (YarnRotaryEmbedding.get_cached_cos_sin).
            table = 2 * self.job.sequence_length * self.job.compute_bytes
            yield hold("tables of rotary positions", "buffers", turned * table)
        if self.plan.checkpointing is Checkpointing.FULL:
            left = self._of_layers(self.parts.left_bytes)
            yield hold("routing of the last micro-batch", "buffers", left * self.plan.micro_batch)

    def _of_layers(self, amount: Callable[[Layer], int]) -> Count:
        """The sum of *amount* over the layers of the stage."""
        counts = (
            amount(layer) * repeats * chunk.several for chunk in self.stage.chunks for layer, repeats in chunk.runs
        )
        return sum(counts, 0)

    @property
    def _global_buffer_bytes(self) -> Amount:
        """What is never given back of gathered inputs of the output layer or of experts, or of scores
        (``GlobalMemoryBuffer``)."""
        length = self.parts.mode.sequence_length
        whole = length * self.width
        together = self.plan.expert_ranks if self.plan.megatron.token_dispatcher == "allgather" else 1
        routed = whole * together // self.parts.source.cut.stream_parts * (together > 1)
        gathered = max(whole * (self.plan.cuts_sequence and self.stage.last), routed)
        heads = max(layer.attention.heads for chunk in self.stage.chunks for layer, _ in chunk.runs)
        scores = heads * length**2 * (self.parts.mode.attention == "eager")
        return max(gathered, scores) * self.job.compute_bytes * self.plan.micro_batch

    def _step(self) -> Node:
        gathers = self._gather() if self.plan.megatron.overlaps_weights else ()
        first = self.stage.chunks[0]
        deferred = tuple(self._deferred())
        passes = self.passes._replace(
            first_forward=self._forward(first, *gathers, *deferred),
            last_backward=then(self._backward(first, *self._reduce()), *map(released, deferred)),
        )
        return then(schedule(passes, self.plan, self.number, self.inner), phase("step", *self._update()))

    @cached_property
    def passes(self) -> Passes:
        """All but the first and the last of a step, which exchange gradients and weights meanwhile."""
        if self.like:
            return self.like.passes
        chunks = self.stage.chunks
        forward = tuple(self._forward(chunk) for chunk in chunks)
        backward = tuple(self._backward(chunk) for chunk in chunks)
        return Passes(forward, backward, forward[0], backward[0], tuple(chunk.several for chunk in chunks))

    @cached_property
    def inner(self) -> Node:
        """Those passes in their order."""
        return self.like.inner if self.like else between_ends(self.passes, self.plan, self.number)

    def _deferred(self) -> Iterator[Block]:
        """What the last stage keeps of micro-batches for the gradient of the output matrix: its input, and the gradient
        of the logits (tensor_parallel/layers.py ``LinearWithGradAccumulationAndAsyncCommunication``). Those of the last
        micro-batch are still being computed when most is held."""
        if not (self.plan.megatron.deferred_micro_batches and self.stage.last):
            return
        several = np.minimum(self.plan.megatron.deferred_micro_batches, self.plan.accumulation_steps - 1)
        rows = self.stage.chunks[-1].ends.vocabulary_size + self.width // self.parts.source.cut.stream_parts
        each = self.parts.mode.sequence_length * rows * self.job.compute_bytes * self.plan.micro_batch
        yield hold("deferred gradient of the output matrix", "logits", several * each)

    def _forward(self, chunk: Chunk, *beside: Node) -> Node:
        """One micro-batch forwards through *chunk*, with *beside* going on at the same time."""
        taken, given = self.parts.inputs(chunk.ends)
        steps: list[Node] = [*beside, *taken]
        if chunk.ends.embedding:
            steps += [self.parts.embedding(chunk.ends)[0], *self.exchanges.embedding()]
        else:
            steps.append(self.parts.passing("take", STREAM))
        steps += [repeat(self.parts.layer(layer)[0], repeats) for layer, repeats in chunk.runs]
        if chunk.ends.head:
            logits, loss, _, _ = self.parts.head(chunk.ends)
            steps += [logits, *self.exchanges.head_forward()]
            return then(phase("forward", *steps), phase("loss", loss, *given))
        # What was sent on is freed, but for the graph that made it (schedules.py deallocate_output_tensor).
        sent = (
            *self.exchanges.between_stages("activations"),
            self.parts.passing("give", STREAM),
        )
        return phase("forward", *steps, *sent, *given)

    def _backward(self, chunk: Chunk, *beside: Node) -> Node:
        """The same backwards."""
        steps: list[Node] = [*beside]
        tied = None
        if chunk.ends.head:
            _, _, of_loss, of_logits = self.parts.head(chunk.ends)
            steps += [of_loss, of_logits, *self.exchanges.head_backward(), self.parts.sums(chunk.ends.head)]
            if chunk.ends.tied_embeddings and not self.plan.megatron.fuses_gradient_sums:
                size_bytes = chunk.ends.embedding[0].numel * self.job.compute_bytes
                tied = hold("tied output gradient", "gradients", size_bytes)
                steps.append(tied)
        else:
            steps.append(self.parts.passing("take", GRADIENT_STREAM))
        steps += [repeat(self.parts.layer(layer)[1], repeats) for layer, repeats in reversed(chunk.runs)]
        if chunk.ends.embedding:
            steps += [*self.exchanges.embedding(), self.parts.embedding(chunk.ends)[1]]
            steps.append(self.parts.sums(chunk.ends.embedding))
            if tied:
                steps.append(released(tied))
        else:
            steps += self.exchanges.between_stages("gradients of activations")
            steps.append(self.parts.passing("give", GRADIENT_STREAM))
        return phase("backward", *steps)

    def _gather(self) -> Iterator[Node]:
        if self._distributed:
            for each in self._buffers:
                yield self.exchanges.weights(each.numel * self.job.compute_bytes, each.group)

    def _reduce(self) -> Iterator[Node]:
        for each in self._buffers:
            yield from self.exchanges.gradients(each.numel * self.parts.sum_bytes, each.numel, each.group)
        if self.stage.shares_embedding:
            (rows,) = (each for each, _ in self.stage.counted() if each.name in (WORD_EMBEDDINGS, OUTPUT_LAYER))
            yield self.exchanges.shared_embedding(rows.numel * self.parts.sum_bytes)

    def _update(self) -> Iterator[Node]:
        share = self._share
        if self.parts.sum_bytes != FP32_BYTES:
            yield scratch("fp32 gradients", share * FP32_BYTES)
        moved = share * (ADAM_MOVES * FP32_BYTES + self.job.compute_bytes)
        yield Block("Adam update", "optimizer", moved_bytes=moved, kernels=1)
        if not self.plan.megatron.overlaps_weights:
            yield from self._gather()


def _cut(parameter: Parameter) -> bool:
    """Whether it is the matrix of a product, or those of several."""
    return len(parameter.shape) >= 2 and (".linear_" in parameter.name or parameter.name == OUTPUT_LAYER)
