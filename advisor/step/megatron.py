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

from collections.abc import Callable, Iterator
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
from advisor.step.megatron_parts import parts_of
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
from advisor.step.pipeline import Passes, schedule
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


def stage_steps(model: ModelSpec, job: Job, plan: Plan) -> tuple[StageStep, ...]:
    """The steps of the stages one of which is the fullest, and one the slowest, in each of the plans of *plan*.

    Of the stages between the first and the last, the first has most micro-batches in flight.
    """
    stages = plan.pipeline_parallel
    if np.all(np.asarray(stages) == 1):
        alone = _Layout(model, job, plan, 0, "only")
        return (StageStep(0, alone.states, alone.step),)
    longer = np.asarray(stages) > 2
    contending: tuple[tuple[Count, Place, bool | NDArray[np.bool_]], ...] = (
        (0, "first", True),
        (np.where(longer, 1, 0), "between", longer),
        (stages - 1, "last", True),
    )
    found = []
    for number, place, exists in contending:
        layout = _Layout(model, job, plan, number, place)
        found.append(StageStep(number, layout.states, layout.step, exists))
    return tuple(found)


class _Layout:
    """Lays out the step of a rank of one pipeline stage."""

    def __init__(self, model: ModelSpec, job: Job, plan: Plan, number: Count, place: Place) -> None:
        self.job, self.plan, self.number = job, plan, number
        self.stage: Stage = stage_of(model, job, plan, number, place)
        self.width = model.hidden_size
        self.parts = parts_of(job, plan, self.width)
        self.exchanges = Exchanges(job, plan, self.width, self.parts.mode.sequence_length)
        self.states, self.step = then(*self._states()), self._step()

    @cached_property
    def _forwards(self) -> tuple[Node, ...]:
        return tuple(self._forward(chunk) for chunk in self.stage.chunks)

    @property
    def forward_flop(self) -> Amount:
        """Work of the products of one micro-batch forwards, with whole scores matrices under a causal mask."""
        return total(
            flop(node).whole * chunk.several for node, chunk in zip(self._forwards, self.stage.chunks, strict=True)
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
        chunks = self.stage.chunks
        gathers = self._gather() if self.plan.megatron.overlaps_weights else ()
        deferred = tuple(self._deferred())
        passes = Passes(
            self._forwards,
            tuple(self._backward(chunk) for chunk in chunks),
            self._forward(chunks[0], *gathers, *deferred),
            then(self._backward(chunks[0], *self._reduce()), *map(released, deferred)),
            tuple(chunk.several for chunk in chunks),
        )
        return then(schedule(passes, self.plan, self.number), phase("step", *self._update()))

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
