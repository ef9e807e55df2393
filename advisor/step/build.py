"""Puts a step together: the model's recordings laid end to end, with the strategy's own at every turn."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from advisor.errors import SpecError
from advisor.specs.job import Job
from advisor.specs.model import Layer, ModelSpec
from advisor.specs.plan import Checkpointing, Plan, Strategy
from advisor.step.ddp import DataParallel
from advisor.step.fsdp import FullyShardedDataParallel
from advisor.step.offload import OffloadedZeroOneTwo, OffloadedZeroThree
from advisor.step.program import Amount, Block, Category, Matmul, Node, Sequence, hold, phase, release, repeat, then
from advisor.step.recording import Mode, Recording, mode_of, record_embedding, record_head, record_layer
from advisor.step.scheme import MicroStep, Part, Scheme
from advisor.step.tape import Event, Product, Work
from advisor.step.zero import ZeroOneTwo, ZeroThree


@dataclass(frozen=True, slots=True, eq=False)
class StepProgram:
    """One rank's optimizer step, after the states it runs on were made."""

    init: Node
    step: Node
    host: Node
    """What one rank holds in host memory; no phases."""
    host_once: Node
    """What only one rank of a machine holds there besides."""
    worst_rank: int = 0

    @property
    def device(self) -> Node:
        return then(self.init, self.step)


def build(model: ModelSpec, job: Job, plan: Plan) -> StepProgram:
    """The program of the rank that holds most. The plan's counts may be arrays."""
    scheme = scheme_of(model, job, plan)
    walk = _Walk(scheme)
    steps = np.asarray(plan.accumulation_steps)
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
        host_once=then(*scheme.host_once()),
    )


def scheme_of(model: ModelSpec, job: Job, plan: Plan) -> Scheme:
    """The strategy's part in the step."""
    if plan.strategy is Strategy.DDP:
        return DataParallel(model, job, plan)
    if plan.strategy.is_fsdp:
        return FullyShardedDataParallel(model, job, plan)
    if plan.strategy is Strategy.ZERO3:
        kind = OffloadedZeroThree if plan.offload.optimizer else ZeroThree
        return kind(model, job, plan)
    return (OffloadedZeroOneTwo if plan.offload.optimizer else ZeroOneTwo)(model, job, plan)


class _Walk:
    """Lays out micro-steps of one plan."""

    def __init__(self, scheme: Scheme) -> None:
        self.scheme, self.model, self.plan = scheme, scheme.model, scheme.plan
        self.mode: Mode = mode_of(scheme.job, scheme.parameter_bytes)
        self.batch: Amount = scheme.plan.micro_batch
        self.checkpointed = scheme.plan.checkpointing is Checkpointing.FULL
        self.embedding = Part("embedding", self.model.embedding)
        self.head = Part("head", self.model.head)
        self.laid: dict[int, list[tuple[Sequence, Event | None]]] = {}
        self.forward, self.loss = self._forward(), self._loss()

    def micro_step(self, micro: MicroStep) -> Sequence:
        return then(self.forward, self.loss, self._backward(micro))

    def _forward(self) -> Sequence:
        scheme = self.scheme
        steps: list[Node] = [*scheme.begin_forward(), *self._inputs(hold)]
        steps += self._forward_part(self.embedding, record_embedding(self.model, self.mode).forward)
        for index, stretches in enumerate(self.stretches):
            if index == self._decoder_run:
                steps += self._between_encoder_and_decoder()
            for parts, times in stretches:
                body = [node for part in parts for node in self._forward_layer(part)]
                steps.append(repeat(then(*body), times))
        steps += scheme.before_forward(self.head)
        steps += lay(record_head(self.model, self.mode).forward, self.batch)
        return phase("forward", *steps)

    def _loss(self) -> Sequence:
        kept = sum(run.repeats * self._record(layer).kept_copy_bytes for run in self.model.runs for layer in run.layers)
        return phase(
            "loss",
            *lay(record_head(self.model, self.mode).loss, self.batch),
            *([release("autocast weight copies", "buffers", kept)] if kept else []),
            *self.scheme.end_forward(),
        )

    def _backward(self, micro: MicroStep) -> Sequence:
        scheme, model = self.scheme, self.model
        steps: list[Node] = [*scheme.before_backward(self.head, micro)]
        steps += self._lay_backward(self.head, record_head(model, self.mode).backward, micro)
        steps += scheme.after_backward(self.head, micro)
        for index in range(len(model.runs) - 1, -1, -1):
            for parts, times in reversed(self.stretches[index]):
                body = [node for part in reversed(parts) for node in self._backward_layer(part, micro)]
                steps.append(repeat(then(*body), times))
            if index == self._decoder_run:
                steps += self._between_decoder_and_encoder(micro)
        steps += scheme.before_backward(self.embedding, micro)
        steps += self._lay_backward(self.embedding, record_embedding(model, self.mode).backward, micro)
        steps += scheme.after_backward(self.embedding, micro)
        return phase("backward", *steps, *self._inputs(release), *scheme.end_backward(micro))

    @cached_property
    def stretches(self) -> list[list[tuple[tuple[Part, ...], int]]]:
        """For each of the model's runs: layers and how often they follow one another, those apart by themselves."""
        apart, number = self.scheme.layers_apart, 0
        found: list[list[tuple[tuple[Part, ...], int]]] = []
        for run in self.model.runs:
            alike = tuple(Part("layer", layer.parameters, layer) for layer in run.layers)
            stretches: list[tuple[tuple[Part, ...], int]] = []
            waiting = 0
            for _ in range(run.repeats):
                numbers = range(number, number + len(alike))
                number += len(alike)
                if apart.isdisjoint(numbers):
                    waiting += 1
                    continue
                stretches.append((alike, waiting))
                numbered = zip(alike, numbers, strict=True)
                stretches.append((tuple(replace(part, number=each) for part, each in numbered), 1))
                waiting = 0
            found.append([*stretches, (alike, waiting)])
        return found

    def _record(self, layer: Layer) -> Recording:
        return record_layer(layer, self.model.hidden_size, self.mode, self.checkpointed)

    def _forward_part(self, part: Part, events: tuple[Event, ...]) -> list[Node]:
        scheme = self.scheme
        return [*scheme.before_forward(part), *lay(events, self.batch), *scheme.after_forward(part)]

    def _forward_layer(self, part: Part) -> list[Node]:
        return self._forward_part(part, self._record(part.of_layer).forward)

    def _backward_layer(self, part: Part, micro: MicroStep) -> list[Node]:
        return [
            *self.scheme.before_backward(part, micro),
            *self._lay_backward(part, self._record(part.of_layer).backward, micro),
            *self.scheme.after_backward(part, micro),
        ]

    def _lay_backward(self, part: Part, events: tuple[Event, ...], micro: MicroStep) -> list[Node]:
        """Lay *events*, handing gradients to the scheme. A tied matrix's is handed over once both are summed."""
        opens, closes = part.kind == "head", part.kind == "embedding"
        nodes: list[Node] = []
        opened = False
        tied = self.model.embedding[0] if self.model.tied_embeddings else None
        for stretch, event in self._stretches(events):
            nodes.append(stretch)
            if event is None or event.parameter is None:
                continue
            parameter = event.parameter
            if opens and parameter == tied:
                nodes.append(hold("tied output gradient", "gradients", event.size_bytes))
                continue
            if opens and not opened:
                nodes += self.scheme.first_gradient(micro)
                opened = True
            if closes and parameter == tied:
                nodes.append(release("tied output gradient", "gradients", event.size_bytes))
            nodes += self.scheme.gradient(part, parameter, event.size_bytes, micro)
        return nodes

    def _stretches(self, events: tuple[Event, ...]) -> list[tuple[Sequence, Event | None]]:
        """*events* laid between one handed-over gradient and the next; the same for every micro-step."""
        if id(events) not in self.laid:
            found: list[tuple[Sequence, Event | None]] = []
            start = 0
            for index, event in enumerate(events):
                if event.kind == "gradient":
                    found.append((then(*lay(events[start:index], self.batch)), event))
                    start = index + 1
            found.append((then(*lay(events[start:], self.batch)), None))
            self.laid[id(events)] = found
        return self.laid[id(events)]

    def _inputs(self, act: Callable[[str, Category, Amount], Block]) -> list[Node]:
        """Token ids, labels and shifted labels (int64), and the rotary tables that every layer reads."""
        length, layer = self.mode.sequence_length, self.model.layers[0]
        nodes: list[Node] = [act("token ids and labels", "activations", 3 * 8 * length * self.batch)]
        if layer.attention.rotary_dimensions:
            table_bytes = 2 * length * layer.attention.rotary_dimensions * self.mode.parameter_bytes
            nodes.append(act("rotary tables", "activations", table_bytes))
        return nodes

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

    def _stream_bytes(self) -> Amount:
        return self.mode.sequence_length * self.model.hidden_size * self.mode.stream_bytes * self.batch

    def _between_encoder_and_decoder(self) -> list[Node]:
        """The encoder's stream stays for every cross-attention; the decoder's own begins."""
        return [hold("encoder output", "activations", self._stream_bytes())]

    def _between_decoder_and_encoder(self, micro: MicroStep) -> list[Node]:
        """The encoder's output has served; its gradient is the one that goes on."""
        return [release("encoder output", "activations", self._stream_bytes())]


@dataclass(slots=True)
class _Draft:
    """Neighbouring events of one name, joined for one sequence (``then`` of program.py, in whole numbers)."""

    label: str
    category: Category
    scales: bool
    net_bytes: int = 0
    peak_bytes: int = 0
    works: list[Work] = field(default_factory=list)

    def add(self, event: Event) -> None:
        if event.kind == "take":
            self.net_bytes += event.size_bytes
            self.peak_bytes = max(self.peak_bytes, self.net_bytes)
        else:
            self.net_bytes -= event.size_bytes

    def block(self, batch: Amount) -> Block:
        times = batch if self.scales else 1
        products = [product for work in self.works for product in work.products]
        return Block(
            self.label,
            self.category,
            net_bytes=self.net_bytes * times,
            peak_bytes=self.peak_bytes * times,
            excess_category=self.category,
            matmuls=tuple(_grown(product, batch) for product in products),
            moved_bytes=sum(work.moved_bytes for work in self.works) * batch
            + sum(work.fixed_moved_bytes for work in self.works),
            kernels=sum(work.kernels for work in self.works),
        )


def lay(events: Iterable[Event], batch: Amount) -> list[Node]:
    """Blocks of *batch* sequences for the *events* of one; neighbours of one name become one block."""
    drafts: list[_Draft] = []
    for event in events:
        if event.kind == "work":
            if not drafts:
                drafts.append(_Draft(event.label, event.category, event.scales))
            drafts[-1].works.append(event.work)
            continue
        last = drafts[-1] if drafts else None
        if last is None or (last.label, last.category, last.scales) != (event.label, event.category, event.scales):
            last = _Draft(event.label, event.category, event.scales)
            drafts.append(last)
        last.add(event)
    return [draft.block(batch) for draft in drafts]


def _grown(product: Product, batch: Amount) -> Matmul:
    matmul = product.matmul
    if product.grows == "m":
        return replace(matmul, m=matmul.m * batch)
    if product.grows == "k":
        return replace(matmul, k=matmul.k * batch)
    return replace(matmul, count=matmul.count * batch)
