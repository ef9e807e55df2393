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

from collections.abc import Iterable, Iterator
from functools import cached_property
from math import prod
from typing import Literal, NamedTuple

from advisor.errors import SpecError
from advisor.specs.job import Job
from advisor.specs.model import ModelSpec, Parameter, Run
from advisor.specs.plan import Checkpointing, GroupName, Plan
from advisor.step.laying import Events, Laid
from advisor.step.megatron_exchanges import Exchanges
from advisor.step.megatron_recording import megatron_mode, source_of
from advisor.step.megatron_shard import OUTPUT_LAYER, WORD_EMBEDDINGS, Stage, stage_of
from advisor.step.pipeline import Passes, schedule
from advisor.step.program import (
    Amount,
    Block,
    Category,
    Node,
    blocks,
    fold,
    hold,
    phase,
    release,
    released,
    repeat,
    scratch,
    then,
    total,
)
from advisor.step.recording import GRADIENT_NUMBER, GRADIENT_STREAM, STREAM, STREAM_NUMBER, Recording
from advisor.step.states import ADAM_MOVES, FP32_BYTES, MOMENTS
from advisor.step.tape import Event

ALIGNED = 64
"""Elements, to a multiple of which each tensor begins in the flat buffers of the distributed optimizer."""
PART_NUMBERS = 1_000_000
"""More than a part has tensors. With micro-batches in flight, those of different parts must not share a number."""
SCORES_BUFFER = "buffer for gathered activations and scores"


class Buffers(NamedTuple):
    """The flat buffers of weights that the ranks of one group share."""

    group: GroupName
    numel: int


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
    if plan.pipeline_parallel == 1:
        alone = _StageStep(model, job, plan, 0)
        return RankStep(rank or 0, alone.states, alone.step, alone.step, bool(alone.stage.expert_parameters))
    if not all(isinstance(count, int) for count in (plan.gpus, plan.micro_batch, plan.accumulation_steps)):
        raise SpecError(f"{plan.title} is laid out for one plan at a time: its stages take turns at being the fullest")
    ranks = int(plan.gpus) // plan.pipeline_parallel
    # Of the stages between the first and the last, the first has most micro-batches in flight.
    numbers = {0, 1, plan.pipeline_parallel - 1}
    asked = {rank // ranks} if rank is not None else numbers
    stages = {number: _StageStep(model, job, plan, number) for number in sorted(numbers | asked)}
    peaks = {number: fold(then(stages[number].states, stages[number].step)).peak_bytes for number in sorted(asked)}
    number = max(peaks, key=lambda each: peaks[each])
    slowest = max((stages[each] for each in sorted(numbers)), key=lambda stage: stage.flop)
    first, between, last = (stages[each].forward_flop for each in (0, 1, plan.pipeline_parallel - 1))
    average = (first + last + (plan.pipeline_parallel - 2) * between) / plan.pipeline_parallel
    chosen, named = stages[number], number * ranks if rank is None else rank
    mixed = bool(chosen.stage.expert_parameters)
    return RankStep(named, chosen.states, chosen.step, slowest.step, mixed, slowest.forward_flop / average)


class _StageStep:
    """Lays out the step of a rank of one pipeline stage."""

    def __init__(self, model: ModelSpec, job: Job, plan: Plan, number: int) -> None:
        self.job, self.plan, self.number = job, plan, number
        self.stage: Stage = stage_of(model, job, plan, number)
        self.width = model.hidden_size
        self.mode, self.source = megatron_mode(job, plan), source_of(plan)
        self.laid = Laid(plan.micro_batch, compiled=False)
        self.exchanges = Exchanges(job, plan, self.width, self.mode.sequence_length)
        self.numbered: dict[int, Recording] = {}
        """By the identity of a layer."""
        self.states, self.step = then(*self._states()), self._step()

    @cached_property
    def flop(self) -> float:
        """Work of the products of a step."""
        return float(total(matmul.flop * runs for _, block, runs in blocks(self.step) for matmul in block.matmuls))

    @property
    def forward_flop(self) -> float:
        """The same of one micro-batch forwards, with whole scores matrices under a causal mask."""
        nodes = (self._forward(chunk) for chunk in self.stage.chunks)
        return float(
            total(
                matmul.flop / matmul.flop_share * runs
                for node in nodes
                for _, block, runs in blocks(node)
                for matmul in block.matmuls
            )
        )

    @cached_property
    def _buffers(self) -> tuple[Buffers, ...]:
        """The weights that all data-parallel ranks share, and the experts that some of them do."""
        spread = self.stage.expert_parameters if self.plan.expert_parallel > 1 else ()
        apart = {each.name for each in spread}
        shared = tuple(each for each in self.stage.parameters if each.name not in apart)
        parts: tuple[tuple[GroupName, tuple[Parameter, ...]], ...] = (("data", shared), ("expert-data", spread))
        return tuple(Buffers(group, self._laid_out(those)) for group, those in parts if those)

    def _laid_out(self, parameters: Iterable[Parameter]) -> int:
        """Elements of the flat buffer of *parameters*."""
        sizes = [parameter.numel for parameter in parameters]
        return sum(-(-size // ALIGNED) * ALIGNED for size in sizes) if self._distributed else sum(sizes)

    @property
    def _buffer_numel(self) -> int:
        return sum(each.numel for each in self._buffers)

    @property
    def _distributed(self) -> bool:
        return self.plan.megatron.distributed_optimizer

    @property
    def _share(self) -> Amount:
        """Elements that the optimizer updates on this rank."""
        instances = self.plan.megatron.optimizer_instances
        shares = (-(-each.numel * instances // self.plan.group(each.group).size) for each in self._buffers)
        return total(shares) if self._distributed else self._buffer_numel

    @property
    def _sum_bytes(self) -> int:
        """Bytes per element of gradients' sums."""
        return FP32_BYTES if self.job.precision == "bf16" else self.job.compute_bytes

    def _states(self) -> Iterator[Node]:
        numel, held = self._buffer_numel, ", rank's share" if self._distributed else ""
        yield hold("weights", "parameters", numel * self.job.compute_bytes)
        yield hold("sums of gradients", "gradients", numel * self._sum_bytes)
        yield hold(f"fp32 weights{held}", "optimizer", self._share * FP32_BYTES)
        yield hold(f"Adam moments{held}", "optimizer", MOMENTS * self._share * FP32_BYTES)
        if self.plan.megatron.fuses_gradient_sums:
            # Products that add gradients to their sums hand a tensor of the same shape to autograd, one for each shape
            # (TransformerEngine, pytorch/module/base.py get_dummy_wgrad).
            placeholders = {parameter.shape[-2:] for parameter in self.stage.parameters if _cut(parameter)}
            numel = sum(prod(shape) for shape in placeholders)
            yield hold("placeholders of gradients", "buffers", numel * self.job.compute_bytes)
        yield hold(SCORES_BUFFER, "buffers", self._global_buffer_bytes)
        layers = [layer for chunk in self.stage.chunks for layer in chunk.described_layers]
        turned = sum(layer.attention.latent.rotary_head_dim for layer in layers if layer.attention.latent)
        if turned:
            # Cosines and sines of the whole sequence, in every layer (YarnRotaryEmbedding.get_cached_cos_sin).
            table = 2 * self.job.sequence_length * self.job.compute_bytes
            yield hold("tables of rotary positions", "buffers", turned * table)
        if self.plan.checkpointing is Checkpointing.FULL:
            left = sum(self.source.left_bytes(layer, self.width, self.mode) for layer in layers)
            yield hold("routing of the last micro-batch", "buffers", left * self.plan.micro_batch)

    @property
    def _global_buffer_bytes(self) -> Amount:
        """What is never given back of gathered inputs of the output layer or of experts, or of scores
        (``GlobalMemoryBuffer``)."""
        gathers = self.plan.cuts_sequence and self.stage.last
        whole = self.mode.sequence_length * self.width
        together = self.plan.expert_ranks if self.plan.megatron.token_dispatcher == "allgather" else 1
        routed = whole * together // self.source.cut.stream_parts * (together > 1)
        gathered = max(whole * gathers, routed)
        heads = max(layer.attention.heads for chunk in self.stage.chunks for layer in chunk.described_layers)
        scores = heads * self.mode.sequence_length**2 * (self.mode.attention == "eager")
        return max(gathered, scores) * self.job.compute_bytes * self.plan.micro_batch

    def _step(self) -> Node:
        chunks = self.stage.chunks
        gathers = self._gather() if self.plan.megatron.overlaps_weights else ()
        passes = Passes(
            tuple(self._forward(chunk) for chunk in chunks),
            tuple(self._backward(chunk) for chunk in chunks),
            self._forward(chunks[0], *gathers),
            self._backward(chunks[0], *self._reduce()),
        )
        return then(schedule(passes, self.plan, self.number), phase("step", *self._update()))

    def _forward(self, chunk: ModelSpec, *beside: Node) -> Node:
        """One micro-batch forwards through *chunk*, with *beside* going on at the same time."""
        opens, closes = bool(chunk.embedding), bool(chunk.head)
        inputs = [
            (each.label, each.category, each.size_bytes * self.plan.micro_batch)
            for each in self.source.inputs(chunk, self.mode)
        ]
        steps: list[Node] = [*beside, *(hold(*each) for each in inputs)]
        if opens:
            steps += [self._lay(self._embedding(chunk).forward), *self.exchanges.embedding()]
        else:
            steps.append(self._passing("take", STREAM, STREAM_NUMBER))
        for run in chunk.runs:
            body = then(self._lay(self._layer(run).forward), *self.exchanges.layer_forward(run))
            steps.append(repeat(body, run.repeats))
        given = [release(*each) for each in inputs]
        if closes:
            head = self._head(chunk)
            steps += [self._lay(head[0]), *self.exchanges.head_forward()]
            return then(phase("forward", *steps), phase("loss", self._lay(head[1]), *given))
        # What was sent on is freed, but for the graph that made it (schedules.py deallocate_output_tensor).
        sent = (
            *self.exchanges.between_stages("activations"),
            self._passing("give", STREAM, STREAM_NUMBER),
        )
        return phase("forward", *steps, *sent, *given)

    def _backward(self, chunk: ModelSpec, *beside: Node) -> Node:
        """The same backwards."""
        steps: list[Node] = [*beside]
        tied = None
        if chunk.head:
            head = self._head(chunk)
            steps += [self._lay(head[2]), self._lay(head[3]), *self.exchanges.head_backward(), self._sums(chunk.head)]
            if chunk.tied_embeddings and not self.plan.megatron.fuses_gradient_sums:
                tied = hold("tied output gradient", "gradients", chunk.embedding[0].numel * self.job.compute_bytes)
                steps.append(tied)
        else:
            steps.append(self._passing("take", GRADIENT_STREAM, GRADIENT_NUMBER))
        for run in reversed(chunk.runs):
            layer = self._layer(run)
            exchanged = self.exchanges.layer_backward(run)
            body = then(self._lay(layer.backward), *exchanged, self._sums(run.layers[0].parameters))
            steps.append(repeat(body, run.repeats))
        if chunk.embedding:
            steps += [*self.exchanges.embedding(), self._lay(self._embedding(chunk).backward)]
            steps.append(self._sums(chunk.embedding))
            if tied:
                steps.append(released(tied))
        else:
            steps += self.exchanges.between_stages("gradients of activations")
            steps.append(self._passing("give", GRADIENT_STREAM, GRADIENT_NUMBER))
        return phase("backward", *steps)

    def _passing(self, kind: Literal["take", "give"], label: str, number: int) -> Node:
        """What goes from one stage to the next arrives (``take``) or is dropped after it was sent (``give``)."""
        numel = self.mode.sequence_length * self.width // self.source.cut.stream_parts
        category: Category = "activations" if number == STREAM_NUMBER else "temporaries"
        return self._lay((Event(kind, label, category, numel * self.job.compute_bytes, True, number),))

    def _sums(self, parameters: tuple[Parameter, ...]) -> Block:
        """Gradients are added to their sums: a product reads and writes the sum, or a kernel of its own does."""
        fused = self.plan.megatron.fuses_gradient_sums
        each = 2 * self._sum_bytes + self.job.compute_bytes * (not fused)
        numel = sum(parameter.numel for parameter in parameters)
        return Block(
            "sums of gradients", "temporaries", moved_bytes=each * numel, kernels=0 if fused else len(parameters)
        )

    def _gather(self) -> Iterator[Node]:
        if self._distributed:
            for each in self._buffers:
                yield self.exchanges.weights(each.numel * self.job.compute_bytes, each.group)

    def _reduce(self) -> Iterator[Node]:
        for each in self._buffers:
            yield from self.exchanges.gradients(each.numel * self._sum_bytes, each.numel, each.group)
        if self.stage.shares_embedding:
            (rows,) = (each for each in self.stage.parameters if each.name in (WORD_EMBEDDINGS, OUTPUT_LAYER))
            yield self.exchanges.shared_embedding(rows.numel * self._sum_bytes)

    def _update(self) -> Iterator[Node]:
        share = self._share
        if self._sum_bytes != FP32_BYTES:
            yield scratch("fp32 gradients", share * FP32_BYTES)
        moved = share * (ADAM_MOVES * FP32_BYTES + self.job.compute_bytes)
        yield Block("Adam update", "optimizer", moved_bytes=moved, kernels=1)
        if not self.plan.megatron.overlaps_weights:
            yield from self._gather()

    def _embedding(self, chunk: ModelSpec) -> Recording:
        found = self.source.embedding(chunk, self.mode, self._checkpointed)
        return self._apart(found, 0, id(chunk.embedding))

    def _layer(self, run: Run) -> Recording:
        (layer,) = run.layers
        selective = self.plan.checkpointing is Checkpointing.SELECTIVE
        found = self.source.layer(layer, self.width, self.mode, self._checkpointed, selective)
        return self._apart(found, 2 + len(self.numbered), id(layer))

    def _head(self, chunk: ModelSpec) -> tuple[Events, Events, Events, Events]:
        found = self.source.head(chunk, self.mode, self._checkpointed)
        forward = self._apart(Recording(found.forward, found.backward), 1, id(chunk.head))
        loss = self._apart(Recording(found.loss, found.loss_backward), 1, id(chunk))
        return forward.forward, loss.forward, loss.backward, forward.backward

    @property
    def _checkpointed(self) -> bool:
        return self.plan.checkpointing is not Checkpointing.NONE

    def _apart(self, recording: Recording, part: int, key: int) -> Recording:
        """*recording* with numbers of its own, and without handing over gradients, as their sums are there already."""
        if key not in self.numbered:
            forward, backward = (
                tuple(
                    event if event.storage < 0 else event._replace(storage=event.storage + part * PART_NUMBERS)
                    for event in events
                    if event.kind != "gradient"
                )
                for events in (recording.forward, recording.backward)
            )
            self.numbered[key] = Recording(forward, backward)
        return self.numbered[key]

    def _lay(self, events: Events) -> Node:
        return self.laid.whole(events)


def _cut(parameter: Parameter) -> bool:
    """Whether it is the matrix of a product, or those of several."""
    return len(parameter.shape) >= 2 and (".linear_" in parameter.name or parameter.name == OUTPUT_LAYER)
