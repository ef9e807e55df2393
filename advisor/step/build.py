"""Puts a step together: the model's recordings laid end to end, with the strategy's own at every turn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advisor.errors import SpecError
from advisor.specs.job import Job
from advisor.specs.model import AnyLayer, Layer, ModelSpec
from advisor.specs.plan import Checkpointing, Count, Plan, Strategy
from advisor.step.adapters import refuse_unmodelled
from advisor.step.laying import laid_for
from advisor.step.masks import Shared, shared_by
from advisor.step.program import (
    NOTHING,
    Amount,
    Block,
    Category,
    Node,
    Sequence,
    fold,
    hold,
    phase,
    release,
    repeat,
    then,
    without,
)
from advisor.step.recording import FORMULAS, STREAM, HeadRecording, Mode, Recording, Source
from advisor.step.scheme import MicroStep, Nodes, Part, Scheme
from advisor.step.schemes import scheme_of
from advisor.step.tape import Event

MASKS = "attention masks"
BIAS_GRADIENT = "position bias gradient"

EMBEDDED = "embeddings"


@dataclass(frozen=True, slots=True, eq=False)
class StepProgram:
    """One rank's optimizer step, after the states it runs on were made."""

    init: Node
    step: Node
    host: Node
    """What one rank holds in host memory; no phases."""
    host_once: Node
    """What only one rank of a machine holds there besides."""
    rank: Count = 0
    """Whose step it is."""
    contenders: int = 0
    """How many ranks stand side by side in a first axis; 0 where it is one, and no axis."""
    nvme: Node = NOTHING
    """What one rank keeps on its machine's NVMe; no phases."""
    tensor_sizes: Mapping[str, Callable[[], Iterable[int]]] = field(default_factory=dict)
    """Sizes of the tensors that are taken together under a label, for a single plan; one where nobody says."""
    streams: Mapping[str, str] = field(default_factory=dict)
    """CUDA streams, other than the one that computes, from whose memory a label is taken."""
    groups_products: bool = False
    """Whether products of several experts run side by side, on streams with workspaces of their own."""
    product_threads: int = 2
    """Threads of the process that run products: forward, and backward where there is one."""
    slowest: Node = NOTHING
    """The step of the pipeline stage that computes most, at whose pace the others go; nothing without a pipeline."""
    slowest_excess: float = 1.0
    """Forward products of that stage over those of a stage on average, whole scores matrices under a causal mask."""

    @property
    def pace(self) -> Node:
        """The step whose passes all ranks wait for."""
        return self.step if self.slowest is NOTHING else self.slowest

    @property
    def device(self) -> Node:
        return then(self.init, self.step)

    @property
    def device_without_scratch(self) -> Node:
        """The same where kernels take no scratch: what a trace or a run without a GPU can be compared with."""
        return without(self.device, "workspace")


def build(model: ModelSpec, job: Job, plan: Plan, rank: int | None = None, source: Source = FORMULAS) -> StepProgram:
    """The program of *rank*, or of the rank that holds most. The plan's counts may be arrays.

    *source* says what the parts of *model* do.
    """
    if rank is not None:
        most = int(np.min(np.asarray(plan.gpus)))
        if not 0 <= rank < most:
            raise SpecError(f"rank must be 0 to {most - 1} of {most} GPUs, got {rank}")
    if plan.strategy is Strategy.MEGATRON:
        return _megatron_program(model, job, plan, rank)
    if rank is not None:
        return _program(scheme_of(model, job, plan, rank, source))
    several = build_contenders(model, job, plan, source)
    if not several.contenders:
        return several
    ranks = np.asarray(several.rank)
    chosen = np.take_along_axis(ranks, fullest(several), axis=0)[0]
    return _program(scheme_of(model, job, plan, chosen if chosen.ndim else int(chosen), source))


def _megatron_program(model: ModelSpec, job: Job, plan: Plan, rank: int | None) -> StepProgram:
    from advisor.step.megatron import rank_step  # of use to no other plan

    refuse_unmodelled(job, plan)
    found = rank_step(model, job, plan, rank)
    piped = bool(np.all(np.asarray(plan.pipeline_parallel) > 1))
    return StepProgram(
        init=phase("init", found.states),
        step=found.step,
        host=NOTHING,
        host_once=NOTHING,
        rank=found.rank,
        groups_products=plan.megatron.groups_experts and found.has_experts,
        slowest=found.slowest if piped else NOTHING,
        slowest_excess=found.slowest_excess,
    )


def _program(scheme: Scheme) -> StepProgram:
    walk = _Walk(scheme)
    steps = np.asarray(scheme.plan.accumulation_steps)
    # Gradients start empty in the first micro-step of several, or in the only one.
    several = (steps > 1).astype(np.int64)
    micro_steps: list[Node] = [walk.micro_step(MicroStep(first=1 - several, last=True))]
    if np.any(steps > 2):
        middle = walk.micro_step(MicroStep(first=0, last=False))
        micro_steps.insert(0, repeat(middle, np.maximum(steps - 2, 0)))
    if np.any(several):
        micro_steps.insert(0, repeat(walk.micro_step(MicroStep(first=1, last=False)), several))
    return StepProgram(
        init=phase("init", *scheme.states(), hold("tables of the model", "buffers", scheme.tables_bytes)),
        step=then(*micro_steps, phase("step", *scheme.update())),
        host=then(*scheme.host()),
        nvme=then(*scheme.nvme()),
        host_once=then(*scheme.host_once()),
        rank=scheme.rank,
        tensor_sizes=scheme.tensor_sizes,
        streams=scheme.streams,
    )


def build_contenders(model: ModelSpec, job: Job, plan: Plan, source: Source = FORMULAS) -> StepProgram:
    """The program of all ranks that can be the one that holds most: side by side in a first axis, if several can be.

    Stages of a pipeline do not stand side by side: of these it is the fullest alone.
    """
    if plan.strategy is Strategy.MEGATRON:
        return _megatron_program(model, job, plan, None)
    # Contenders stand in front of all the axes that the plan's counts have together.
    gpus = np.reshape(plan.gpus, (1,) * (len(plan.shape) - np.ndim(plan.gpus)) + np.shape(plan.gpus))
    counts, where = np.unique(gpus, return_inverse=True)
    scheme = scheme_of(model, job, plan, source=source)
    contenders = [scheme.contenders(int(count)) for count in counts]
    width = max(len(each) for each in contenders)
    # One row for each contender, the last repeated where a count has fewer than another.
    rows = np.stack([np.pad(each, (0, width - len(each)), mode="edge") for each in contenders], axis=1)
    ranks = rows[:, where.reshape(gpus.shape)]
    if width > 1:
        return replace(_program(scheme_of(model, job, plan, ranks, source)), contenders=width)
    return _program(scheme_of(model, job, plan, ranks[0] if np.ndim(plan.gpus) else int(ranks.item()), source))


def fullest(program: StepProgram) -> NDArray[Any]:
    """Where in the first axis of a program of contenders the first one stands whose peak is highest, for each plan."""
    peaks: NDArray[Any] = np.asarray(fold(program.device).peak_bytes)
    peaks = np.broadcast_to(peaks, np.broadcast_shapes(peaks.shape, np.shape(program.rank)))
    place: NDArray[Any] = np.argmax(peaks, axis=0, keepdims=True)
    return place


class _Walk:
    """Lays out micro-steps of one plan."""

    def __init__(self, scheme: Scheme) -> None:
        self.scheme, self.model, self.plan = scheme, scheme.model, scheme.plan
        self.batch: Amount = scheme.plan.micro_batch
        self.mode: Mode = replace(scheme.mode, alone=self._alone())
        self.checkpointed = scheme.plan.checkpointing is not Checkpointing.NONE
        self.embedding = Part("embedding", self.model.embedding)
        self.head = Part("head", self.model.head)
        self.shared = self._shared()
        self.recorded: dict[int, Recording] = {}
        """By the identity of a layer of the model."""
        self.laid = laid_for(self.model, scheme.source, self.batch, scheme.job.compile)
        self.pieces: dict[tuple[int, int], tuple[Sequence, Nodes]] = {}
        self.joined: dict[tuple[tuple[int, int], ...], Sequence] = {}
        self.runs_backward: dict[tuple[int, MicroStep | None], Sequence] = {}
        self.stretches_backward: dict[tuple[int, int, MicroStep | None], Node] = {}
        self.forward: dict[int, tuple[Scheme, Sequence]] = {}
        """By the identity of the scheme that a forward pass is laid out with."""
        self.loss = self._loss()

    def _alone(self) -> bool:
        """Whether the micro-batch is one sequence, of a model to which that makes a difference."""
        heads = [layer.attention for run in self.model.runs for layer in run.layers if isinstance(layer, Layer)]
        matters = self.plan.sequence_ranks > 1 or any(
            each.broadcast_heads or each.fused_projection or each.latent for each in heads
        )
        return matters and isinstance(self.batch, int) and self.batch == 1

    def _shared(self) -> dict[int, Shared]:
        """What the layers of each stack share, by the index of the run that opens the stack."""
        starts = [0] if self._decoder_run is None else [0, self._decoder_run]
        ends = [*starts[1:], len(self.model.runs)]
        stacks = {}
        for start, end in zip(starts, ends, strict=True):
            layers = [layer for run in self.model.runs[start:end] for layer in run.layers if isinstance(layer, Layer)]
            stacks[start] = shared_by(layers, self.mode, self.batch, self.checkpointed)
        return stacks

    def _stack_closed_by(self, index: int) -> Shared | None:
        """The stack whose last run *index* is."""
        if index + 1 not in (*self.shared, len(self.model.runs)):
            return None
        return self.shared[max(start for start in self.shared if start <= index)]

    def micro_step(self, micro: MicroStep) -> Sequence:
        scheme = self.scheme.in_forward(micro)
        if id(scheme) not in self.forward:
            self.forward[id(scheme)] = scheme, self._forward(scheme)
        return then(self.forward[id(scheme)][1], self.loss, self._backward(micro))

    def _forward(self, scheme: Scheme) -> Sequence:
        steps: list[Node] = [*scheme.begin_forward(), *self._inputs(hold)]
        steps += self._forward_part(scheme, self.embedding, self._record_embedding().forward)
        steps.append(hold(EMBEDDED, "activations", self._embedded_bytes))
        for index, stretches in enumerate(self.stretches):
            if index == self._decoder_run:
                steps += self._between_encoder_and_decoder()
            if index in self.shared:
                steps.append(hold(MASKS, "activations", self.shared[index].made_bytes))
            for parts, times in stretches:
                body = [node for part in parts for node in self._forward_layer(scheme, part)]
                steps.append(repeat(then(*body), times))
            stack = self._stack_closed_by(index)
            if stack is not None:
                steps.append(release(MASKS, "activations", stack.made_bytes - stack.kept_bytes))
        steps += scheme.before_forward(self.head)
        steps.append(self.laid.whole(self._record_head().forward))
        return phase("forward", *steps, release(EMBEDDED, "activations", self._embedded_bytes))

    def _loss(self) -> Sequence:
        kept = sum(run.repeats * self._record(layer).kept_copy_bytes for run in self.model.runs for layer in run.layers)
        return phase(
            "loss",
            self.laid.whole(self._record_head().loss),
            *([release("autocast weight copies", "buffers", kept)] if kept else []),
            *self.scheme.end_forward(),
        )

    def _backward(self, micro: MicroStep) -> Sequence:
        scheme, model = self.scheme, self.model
        steps: list[Node] = [*scheme.before_backward(self.head, micro)]
        head = self._record_head()
        steps.append(self.laid.whole(head.loss_backward))
        steps += scheme.logits_gradient(micro)
        steps += self._lay_backward(self.head, head.backward, micro)
        steps += scheme.after_backward(self.head, micro)
        for index in range(len(model.runs) - 1, -1, -1):
            stack = self._stack_closed_by(index)
            if stack is not None:
                steps.append(hold(BIAS_GRADIENT, "temporaries", stack.gradient_bytes))
            steps.append(self._backward_run(index, micro))
            if index in self.shared:
                steps.append(release(BIAS_GRADIENT, "temporaries", self.shared[index].gradient_bytes))
                steps.append(release(MASKS, "activations", self.shared[index].kept_bytes))
            if index == self._decoder_run:
                steps += self._between_decoder_and_encoder(micro)
        steps += scheme.before_backward(self.embedding, micro)
        steps += self._lay_backward(self.embedding, self._record_embedding().backward, micro)
        steps += scheme.after_backward(self.embedding, micro)
        return phase("backward", *steps, *self._inputs(release), *scheme.end_backward(micro))

    def _backward_run(self, index: int, micro: MicroStep) -> Sequence:
        """The layers of one of the model's runs; the same node for every micro-step where that is all the same."""
        scheme = self.scheme
        apart = any(part.number in self.apart for parts, _ in self.stretches[index] for part in parts)
        differs = scheme.micro_steps_differ or (scheme.layers_apart_differ and apart)
        key = (index, micro if differs else None)
        if key not in self.runs_backward:
            steps = [self._backward_stretch(index, place, micro) for place in range(len(self.stretches[index]))]
            self.runs_backward[key] = then(*reversed(steps))
        return self.runs_backward[key]

    def _backward_stretch(self, index: int, place: int, micro: MicroStep) -> Node:
        """Layers that follow one another; the same node for every micro-step in which they fare alike."""
        scheme, (parts, times) = self.scheme, self.stretches[index][place]
        apart = any(part.number in self.apart for part in parts)
        differs = scheme.micro_steps_differ or (scheme.layers_apart_differ and apart)
        key = (index, place, micro if differs else None)
        if key not in self.stretches_backward:
            body = [node for part in reversed(parts) for node in self._backward_layer(part, micro)]
            self.stretches_backward[key] = repeat(then(*body), times)
        return self.stretches_backward[key]

    @property
    def opens_last(self) -> bool:
        """Whether the last layer hands over the first gradient of a backward pass, as the head is frozen."""
        return not any(each.trained for each in self.model.head)

    @cached_property
    def apart(self) -> frozenset[int]:
        """Numbers of the layers that do not stand together with their neighbours."""
        last = {len(self.model.layers) - 1} if self.opens_last else set()
        return self.scheme.layers_apart | last

    @cached_property
    def stretches(self) -> list[list[tuple[tuple[Part, ...], int]]]:
        """For each of the model's runs: layers and how often they follow one another, those apart by themselves."""
        apart, number = self.apart, 0
        found: list[list[tuple[tuple[Part, ...], int]]] = []
        for run in self.model.runs:
            stretches: list[tuple[tuple[Part, ...], int]] = []
            joins = False
            for _ in range(run.repeats):
                parts = tuple(
                    Part("layer", layer.parameters, layer, each) for each, layer in enumerate(run.layers, number)
                )
                alike = apart.isdisjoint(range(number, number + len(parts)))
                number += len(parts)
                if joins and alike:
                    stretches[-1] = (stretches[-1][0], stretches[-1][1] + 1)
                else:
                    stretches.append((parts, 1))
                joins = alike
            found.append(stretches)
        return found

    def _record(self, layer: AnyLayer) -> Recording:
        if id(layer) not in self.recorded:
            selective = self.plan.checkpointing is Checkpointing.SELECTIVE
            found = self.scheme.source.layer(layer, self.model.hidden_size, self.mode, self.checkpointed, selective)
            self.recorded[id(layer)] = found
        return self.recorded[id(layer)]

    def _record_embedding(self) -> Recording:
        return self.scheme.source.embedding(self.model, self.mode, self.checkpointed)

    def _record_head(self) -> HeadRecording:
        return self.scheme.source.head(self.model, self.mode, self.checkpointed)

    def _forward_part(self, scheme: Scheme, part: Part, events: tuple[Event, ...]) -> list[Node]:
        return [*scheme.before_forward(part), self.laid.whole(events), *scheme.after_forward(part)]

    def _forward_layer(self, scheme: Scheme, part: Part) -> list[Node]:
        return self._forward_part(scheme, part, self._record(part.of_layer).forward)

    def _backward_layer(self, part: Part, micro: MicroStep) -> list[Node]:
        return [
            *self.scheme.before_backward(part, micro),
            *self._lay_backward(part, self._record(part.of_layer).backward, micro),
            *self.scheme.after_backward(part, micro),
        ]

    def _lay_backward(self, part: Part, events: tuple[Event, ...], micro: MicroStep) -> list[Node]:
        """Lay *events*, handing gradients to the scheme. A tied matrix's is handed over once both are summed."""
        last = part.number is not None and part.number == len(self.model.layers) - 1
        opens = last if self.opens_last else part.kind == "head"
        ends, closes = part.kind == "head", part.kind == "embedding"
        pieces: list[tuple[Sequence, Nodes]] = []
        opened = False
        tied = self.model.embedding[0] if self.model.tied_embeddings else None
        for stretch, event in self.laid.cut(events):
            if event is None or event.parameter is None:
                pieces.append((stretch, ()))
                continue
            parameter = event.parameter
            if ends and parameter == tied:
                pieces.append((stretch, (hold("tied output gradient", "gradients", event.size_bytes),)))
                continue
            before: list[Node] = []
            if opens and not opened:
                before += self.scheme.first_gradient(micro)
                opened = True
            if closes and parameter == tied:
                before.append(release("tied output gradient", "gradients", event.size_bytes))
            handed = self.scheme.gradient(part, parameter, event.size_bytes, micro)
            pieces.append((stretch, (*before, *handed) if before else handed))
        return self._joined(pieces)

    def _joined(self, pieces: list[tuple[Sequence, Nodes]]) -> list[Node]:
        """*pieces* one after another, those that stood elsewhere before as one node, which readings then know."""
        nodes: list[Node] = []
        for again, run in groupby(pieces, lambda piece: (id(piece[0]), id(piece[1])) in self.pieces):
            found = list(run)
            if not again:
                nodes += [node for stretch, handed in found for node in (stretch, *handed)]
                # The pieces are kept, so that no other object takes their identity.
                self.pieces |= {(id(piece[0]), id(piece[1])): piece for piece in found}
                continue
            key = tuple((id(stretch), id(handed)) for stretch, handed in found)
            if key not in self.joined:
                self.joined[key] = then(*(node for stretch, handed in found for node in (stretch, *handed)))
            nodes.append(self.joined[key])
        return nodes

    def _inputs(self, act: Callable[[str, Category, Amount], Block]) -> list[Node]:
        """What is there before the first operation, and to the end of backward."""
        return [
            act(each.label, each.category, each.size_bytes * (self.batch if each.scales else 1))
            for each in self.scheme.source.inputs(self.model, self.mode)
        ]

    @property
    def _decoder_run(self) -> int | None:
        """Index of the run at which a sequence-to-sequence model's decoder starts."""
        if not self.model.decoder_start:
            return None
        passed = 0
        for index, run in enumerate(self.model.runs):
            if passed == self.model.decoder_start:
                return index
            passed += run.repeats * len(run.layers)
        raise SpecError(f"decoder_start {self.model.decoder_start} is not where a run of layers starts")

    @cached_property
    def _embedded_bytes(self) -> Amount:
        """What the base model's variables keep of the embeddings until it returns, beyond what is kept for backward.

        The residual stream itself where the first layer lets it go; what it was summed from where there are several.
        """
        if not self.model.described_layers:
            return 0
        tables = sum(len(parameter.shape) == 2 for parameter in self.model.embedding)
        if tables > 1:
            # What a frozen embedding gave is a leaf of the graph where its gradient is asked for, and so kept by it.
            kept = self.checkpointed and not self.model.embedding[0].trained
            return (tables - kept) * self._stream_bytes()
        first = () if self.checkpointed else self._record(self.model.layers[0]).forward
        return self._stream_bytes() * any(event.kind == "give" and event.label == STREAM for event in first)

    def _stream_bytes(self) -> Amount:
        return self.mode.sequence_length * self.model.hidden_size * self.mode.stream_bytes * self.batch

    def _between_encoder_and_decoder(self) -> list[Node]:
        """The encoder's stream stays for every cross-attention; the decoder's own begins."""
        return [hold("encoder output", "activations", self._stream_bytes())]

    def _between_decoder_and_encoder(self, micro: MicroStep) -> list[Node]:
        """The encoder's output has served; its gradient is the one that goes on."""
        return [release("encoder output", "activations", self._stream_bytes())]
