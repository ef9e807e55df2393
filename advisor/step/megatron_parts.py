"""What a rank of Megatron does with one micro-batch in each part of a model, laid out once for every schedule.

How many stages, micro-batches and data-parallel ranks there are changes nothing here: plans that differ in these alone
share the blocks, and whatever was read of them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Literal

import numpy as np

from advisor.specs.job import Job
from advisor.specs.model import Layer, ModelSpec, Parameter
from advisor.specs.plan import Checkpointing, Plan
from advisor.step.laying import Events, Laid
from advisor.step.megatron_exchanges import Exchanges
from advisor.step.megatron_recording import megatron_mode, source_of
from advisor.step.program import Amount, Block, Category, Node, Sequence, hold, release, then
from advisor.step.recording import (
    GRADIENT_NUMBER,
    GRADIENT_STREAM,
    STREAM,
    STREAM_NUMBER,
    HeadRecording,
    Recording,
)
from advisor.step.states import FP32_BYTES
from advisor.step.tape import Event

PART_NUMBERS = 1_000_000
"""More than a part has tensors. With micro-batches in flight, those of different parts must not share a number."""
EMBEDDING, HEAD, FIRST_LAYER = 0, 1, 2
"""Numbers of parts."""

PASSED: dict[str, tuple[Category, int]] = {
    STREAM: ("activations", STREAM_NUMBER),
    GRADIENT_STREAM: ("temporaries", GRADIENT_NUMBER),
}
"""What goes from stage to stage, with its number."""


class Parts:
    """Embedding, layers and head on a rank of *plan*, for micro-batches of *batch* sequences."""

    def __init__(self, job: Job, plan: Plan, width: int, batch: Amount) -> None:
        self.job, self.plan, self.width, self.batch = job, plan, width, batch
        self.mode, self.source = megatron_mode(job, plan), source_of(plan)
        self._exchanges = Exchanges(job, plan, width, self.mode.sequence_length)
        self._laid = Laid(batch, compiled=False)
        # Recordings are kept beside what was made of them, so that no others take their identity.
        self._layers: dict[int, tuple[Recording, Sequence, Sequence]] = {}
        self._passing: dict[tuple[str, str], Sequence] = {}
        self._ends: dict[int, tuple[Recording | HeadRecording, tuple[Sequence, ...]]] = {}

    @property
    def sum_bytes(self) -> int:
        """Bytes per element of gradients' sums."""
        return FP32_BYTES if self.job.precision == "bf16" else self.job.compute_bytes

    def lay(self, events: Events) -> Sequence:
        """*events* of one sequence, for a micro-batch."""
        return self._laid.whole(events)

    def inputs(self, ends: ModelSpec) -> tuple[list[Node], list[Node]]:
        """What a chunk with these *ends* takes before it runs forwards, and how it gives that back."""
        found = [
            (each.label, each.category, each.size_bytes * self.batch) for each in self.source.inputs(ends, self.mode)
        ]
        return [hold(*each) for each in found], [release(*each) for each in found]

    def embedding(self, ends: ModelSpec) -> tuple[Sequence, ...]:
        """Forwards and backwards."""
        found = self.source.embedding(ends, self.mode, self._checkpointed)
        return self._end(found, (found.forward, found.backward), EMBEDDING)

    def head(self, ends: ModelSpec) -> tuple[Sequence, ...]:
        """Forwards up to the logits, the loss, its backward and that of the logits."""
        found = self.source.head(ends, self.mode, self._checkpointed)
        return self._end(found, (found.forward, found.loss, found.loss_backward, found.backward), HEAD)

    def layer(self, layer: Layer) -> tuple[Sequence, Sequence]:
        """Forwards and backwards, with what is sent meanwhile."""
        selective = self.plan.checkpointing is Checkpointing.SELECTIVE
        found = self.source.layer(layer, self.width, self.mode, self._checkpointed, selective)
        if id(found) not in self._layers:
            part = FIRST_LAYER + len(self._layers)
            forward, backward = (self.lay(_apart(events, part)) for events in (found.forward, found.backward))
            forward = then(forward, *self._exchanges.layer_forward(layer))
            backward = then(backward, *self._exchanges.layer_backward(layer), self.sums(layer.parameters))
            self._layers[id(found)] = found, forward, backward
        return self._layers[id(found)][1:]

    def left_bytes(self, layer: Layer) -> int:
        """Per sequence of what the modules of a layer refer to until they run again."""
        return self.source.left_bytes(layer, self.width, self.mode)

    def sums(self, parameters: tuple[Parameter, ...]) -> Block:
        """Gradients are added to their sums: a product reads and writes the sum, or a kernel of its own does."""
        fused = self.plan.megatron.fuses_gradient_sums
        each = 2 * self.sum_bytes + self.job.compute_bytes * (not fused)
        numel = sum(parameter.numel for parameter in parameters)
        return Block(
            "sums of gradients", "temporaries", moved_bytes=each * numel, kernels=0 if fused else len(parameters)
        )

    def passing(self, kind: Literal["take", "give"], label: str) -> Sequence:
        """What goes from one stage to the next arrives (``take``) or is dropped after it was sent (``give``)."""
        if (kind, label) not in self._passing:
            numel = self.mode.sequence_length * self.width // self.source.cut.stream_parts
            category, number = PASSED[label]
            event = Event(kind, label, category, numel * self.job.compute_bytes, True, number)
            self._passing[kind, label] = self.lay((event,))
        return self._passing[kind, label]

    def _end(self, recording: Recording | HeadRecording, passes: tuple[Events, ...], part: int) -> tuple[Sequence, ...]:
        if id(recording) not in self._ends:
            self._ends[id(recording)] = recording, tuple(self.lay(_apart(events, part)) for events in passes)
        return self._ends[id(recording)][1]

    @property
    def _checkpointed(self) -> bool:
        return self.plan.checkpointing is not Checkpointing.NONE


def parts_of(job: Job, plan: Plan, width: int) -> Parts:
    """The parts of a model of *width* under *plan*, whose micro-batches may be many side by side."""
    sizes = np.asarray(plan.micro_batch)
    alike = replace(
        plan,
        gpus=int(np.asarray(plan.gpus).flat[0]),
        micro_batch=1,
        accumulation_steps=1,
        pipeline_parallel=1,
        virtual_stages=1,
        megatron=replace(plan.megatron, distributed_optimizer=True, overlaps_weights=True),
    )
    return _parts(job, alike, width, sizes.shape, tuple(sizes.reshape(-1).tolist()))


@lru_cache(maxsize=32)
def _parts(job: Job, plan: Plan, width: int, shape: tuple[int, ...], sizes: tuple[int, ...]) -> Parts:
    batch = np.array(sizes, dtype=np.int64).reshape(shape) if shape else sizes[0]
    return Parts(job, replace(plan, micro_batch=batch), width, batch)


def _apart(events: Events, part: int) -> Events:
    """*events* with numbers of their part, and without handing over gradients, as their sums are there already."""
    return tuple(
        event if event.storage < 0 else event._replace(storage=event.storage + part * PART_NUMBERS)
        for event in events
        if event.kind != "gradient"
    )
