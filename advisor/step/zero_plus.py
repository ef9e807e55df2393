"""ZeRO++ (arXiv:2306.10209) in DeepSpeed's stage 3 (deepspeed 0.19.8, runtime/zero/partition_parameters.py).

- hpZ: when a weight is freed for the first time since the optimizer's step, a second copy of it is cut over the ranks
  of a machine (``_partition_param_sec``). Every later gather of the weight, in backward and in further micro-steps,
  goes round these alone, until the step drops all such copies (stage3.py ``invalidate_secondary_tensor``).
- qwZ: a gather sends int8 and one fp32 scale for each group of weights (``CUDAQuantizer``), and dequantises all that it
  gathered into fp16 before each weight gets its own format (``AllGatherCoalescedHandle.wait``).
- qgZ: between machines, a gradient goes as int4 through an all-to-all inside each machine and then one across
  (runtime/comm/coalesced_collectives.py ``all_to_all_quant_reduce``). Within one machine it changes nothing.

Left out: groups smaller than :data:`MOST_IN_GROUP` where a shard does not divide evenly, and the memory of scales.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from advisor.specs.job import Job
from advisor.specs.model import ModelSpec, Parameter
from advisor.specs.plan import Plan, ZeroSettings
from advisor.step.flat_partition import Reduction, by_count
from advisor.step.gathering import Buffers
from advisor.step.program import Amount, Block, Collective, hold, release, scratch
from advisor.step.scheme import MicroStep, Nodes, Part, Scheme
from advisor.step.states import FP32_BYTES
from advisor.step.zero_three import FLAT_COPY, ZeroThree

MOST_IN_GROUP = 8000
"""``target_group_size``: weights that share a scale."""
SHARD_MULTIPLE = 8
"""A rank's share that is quantised has to be a multiple of it, or ``CUDAQuantizer.quantize`` fails."""
INT8_BYTES, FP16_BYTES = 1, 2
INT4_BYTES = 0.5
COPY = "second copy of weights"
EXCHANGED = "quantised gradients"


def all_parts(settings: ZeroSettings, model: ModelSpec, job: Job, gpus: int, machine_gpus: int) -> ZeroSettings:
    """*settings* with those parts of ZeRO++ that DeepSpeed computes rightly, a second copy in each machine."""
    return replace(
        settings,
        hpz_partition=machine_gpus,
        quantized_weights=_uneven(model, gpus) is None,
        quantized_gradients=job.precision == "fp16",
        machine_gpus=machine_gpus,
    )


def refusal(model: ModelSpec, job: Job, plan: Plan) -> str | None:
    """Why DeepSpeed's ZeRO++ cannot train *model* by *plan*, or None.

    The kernel for gradients reads whatever it is given as fp16 (ops/csrc/quantization/pt_binding.cpp
    ``ds_swizzle_quant``), and that for weights, to which they are cast first, refuses uneven shares.
    """
    if job.method != "full" and plan.zero.is_plus:
        return "frozen weights under ZeRO++ are not modelled"
    if plan.zero.quantized_gradients and job.precision != "fp16":
        return (
            f"DeepSpeed 0.19.8 quantises gradients in {job.precision} as if they were fp16, and trains on other "
            "numbers; switch zero_quantized_gradients off, or take fp16"
        )
    ranks = int(np.max(plan.gpus))
    if not plan.zero.quantized_weights or (uneven := _uneven(model, ranks)) is None:
        return None
    return (
        f"DeepSpeed 0.19.8 quantises shares of a multiple of {SHARD_MULTIPLE} elements, and {uneven.name} has "
        f"{uneven.numel:,} over {ranks} GPUs: {-(-uneven.numel // ranks):,} each; switch zero_quantized_weights off"
    )


def _uneven(model: ModelSpec, ranks: int) -> Parameter | None:
    """A parameter whose shares cannot be quantised. In the first step of all, small ones are gathered like others."""
    return next((each for each in model.parameters() if -(-each.numel // ranks) % SHARD_MULTIPLE), None)


@dataclass(frozen=True, eq=False)
class ZeroPlusPlus(ZeroThree):
    """Stage 3 with a second copy of the weights, quantised gathers, quantised reductions, or several of these."""

    first: Amount = 1
    """Of a forward pass: 1 in the first micro-step, before there are second copies, else 0."""
    forwards: dict[int, Scheme] = field(default_factory=dict, init=False, repr=False)

    @property
    def keeps_copy(self) -> bool:
        return self.plan.zero.hpz_partition > 1

    @property
    def casts(self) -> bool:
        """Whether the model's weights are not in the fp16 that the quantiser reads and writes."""
        return self.job.precision != "fp16"

    @property
    def micro_steps_differ(self) -> bool:
        return self.keeps_copy

    @property
    def buffers(self) -> Buffers:
        """Weights that have second copies are gathered apart from those that have none yet.

        partitioned_param_coordinator.py ``__all_gather_params_``. Later micro-steps, in which all have them, are taken
        to gather as the first does.
        """
        if not self.plan.zero.quantized_weights:
            return Buffers(apart=self.keeps_copy)
        half = FP16_BYTES / self.job.compute_bytes
        arrives = INT8_BYTES / self.job.compute_bytes
        return Buffers(arrives, opened=half, cast=half * self.casts, copied=True, apart=self.keeps_copy)

    def in_forward(self, micro: MicroStep) -> Scheme:
        if not self.keeps_copy:
            return self
        if not np.ndim(micro.first):
            return self.forwards.setdefault(int(micro.first), replace(self, first=micro.first))
        return replace(self, first=micro.first)

    def copied(self, parameters: Iterable[Parameter]) -> Amount:
        """Elements of this rank's share of second copies, each weight padded to all ranks first."""
        ranks = self.plan.gpus
        aligned = sum((-(-each.numel // ranks) * ranks for each in parameters), 0)
        return aligned // self.plan.zero.hpz_partition

    @cached_property
    def copied_while_running(self) -> Amount:
        """Elements of all second copies that a first micro-step makes."""
        passage = self.passage
        moves = [stay.leaving for stay in passage.forward.values()]
        moves += [move for found in passage.after.values() for move in found]
        return self.copied(each for move in (*moves, passage.last) for each in move.freed)

    @property
    def all_copied(self) -> Amount:
        return self.copied(self.parameters) if self.keeps_copy else 0

    def _copies(self, parameters: tuple[Parameter, ...], first: Amount) -> Nodes:
        """Of weights that are freed. A copy is zeroed, then filled."""
        if not parameters:
            return ()
        size_bytes = self.copied(parameters) * self.job.compute_bytes * first
        return (replace(hold(COPY, "parameters", size_bytes), moved_bytes=3 * size_bytes, kernels=2 * len(parameters)),)

    def states(self) -> Nodes:
        """As the model is cut there are second copies, too, which the first step drops."""
        size_bytes = self.all_copied * self.job.compute_bytes
        return (hold(COPY, "parameters", size_bytes), *super().states(), release(COPY, "parameters", size_bytes))

    def after_forward(self, part: Part) -> Nodes:
        freed = self.passage.forward[self._like(part)].leaving.freed
        return (*super().after_forward(part), *self._copies(freed, self.first))

    def before_backward(self, part: Part, micro: MicroStep) -> Nodes:
        freed = self.passage.forward["head"].leaving.freed if part.kind == "head" else ()
        return (*self._copies(freed, micro.first), *super().before_backward(part, micro))

    def gradient(self, part: Part, parameter: Parameter, size_bytes: int, micro: MicroStep) -> Nodes:
        handed_over = super().gradient(part, parameter, size_bytes, micro)
        if parameter in self._blocks.get(id(part.layer), ()) or self._stops(part, parameter):
            return handed_over
        copies = self._copied_after(part, parameter, micro)
        return (*handed_over, *copies) if copies else handed_over

    def _enters(self, part: Part, parameter: Parameter, micro: MicroStep) -> Nodes:
        return (*super()._enters(part, parameter, micro), *self._copied_after(part, parameter, micro))

    def _copied_after(self, part: Part, parameter: Parameter, micro: MicroStep) -> Nodes:
        return self._copies(self._changes[self._like(part), parameter].freed, micro.first)

    def end_backward(self, micro: MicroStep) -> Nodes:
        return (*super().end_backward(micro), *self._copies(self.passage.last.freed, micro.first))

    def update(self) -> Nodes:
        """Small weights, cut for the optimizer, get second copies of which nothing is read."""
        if not self.keeps_copy:
            return super().update()
        half = self.job.compute_bytes
        small = hold(COPY, "parameters", (self.all_copied - self.copied_while_running) * half)
        return (small, *super().update(), release(COPY, "parameters", self.all_copied * half))

    def _gather(self, part: Part) -> Block:
        return self._shared_out(super()._gather(part), self.first if self.keeps_copy else 1)

    def _gather_again(self, part: Part) -> Block:
        return self._shared_out(super()._gather(part), 0 if self.keeps_copy else 1)

    def _shared_out(self, gather: Block, over_all: Amount) -> Block:
        """*gather* over all ranks where *over_all* is 1, over those of a second copy where it is 0."""
        (weights,) = gather.transfers
        assert isinstance(weights, Collective)
        if self.plan.zero.quantized_weights:
            elements = weights.payload_bytes / self.job.compute_bytes
            share = over_all / self.plan.gpus + (1 - over_all) / self.plan.zero.hpz_partition
            gather = self._quantised(gather, elements, elements * share)
            scales_bytes = FP32_BYTES * np.ceil(elements / MOST_IN_GROUP)
            weights = weights._replace(
                payload_bytes=INT8_BYTES * elements + scales_bytes, messages=2 * weights.messages
            )
        far, near = (_times(weights, times) for times in (over_all, 1 - over_all))
        near = near._replace(what="weights from second copies", group="secondary")
        return replace(gather, transfers=tuple(each for each in (far, near) if np.any(each.payload_bytes)))

    def _quantised(self, gather: Block, elements: Amount, own: Amount) -> Block:
        """*gather* with the kernels that quantise this rank's *own* elements and dequantise all *elements*."""
        cast_bytes = (self.job.compute_bytes + FP16_BYTES) * self.casts
        moved_bytes = (FP16_BYTES + INT8_BYTES + cast_bytes) * (own + elements)
        return replace(gather, moved_bytes=gather.moved_bytes + moved_bytes, kernels=2 + 2 * self.casts)

    @property
    def streams(self) -> Mapping[str, str]:
        found = super().streams
        if not found or not self.exchanges:
            return found
        return {EXCHANGED if label == FLAT_COPY else label: stream for label, stream in found.items()}

    @property
    def exchanges(self) -> bool:
        """Whether gradients are quantised: within one machine they are not."""
        zero = self.plan.zero
        return zero.quantized_gradients and bool(np.all(np.asarray(self.plan.gpus) > zero.machine_gpus))

    def _reduce(self, reduction: Reduction, micro: MicroStep) -> Nodes:
        flat, *others = super()._reduce(reduction, micro)
        if not self.exchanges:
            return (flat, *others)
        tensors = tuple(self.parameters[tensor] for tensor in reduction.tensors)
        plan, machine = self.plan, self.plan.zero.machine_gpus

        def of_quantised(number: Callable[[Parameter, int], int]) -> Amount:
            """The sum of what *number* says of each tensor that is quantised over some ranks."""
            return by_count(lambda ranks: sum(number(each, ranks) for each in tensors if fits(each, ranks)), plan.gpus)

        elements, count = of_quantised(lambda each, _: each.numel), of_quantised(lambda *_: 1)
        groups = of_quantised(scales)
        padded = sum(-(-each.numel // plan.gpus) * plan.gpus for each in tensors) - elements
        inside_bytes = INT4_BYTES * elements + FP32_BYTES * groups
        passed = (
            Collective("gradients within machines", "all-to-all", inside_bytes, 2 * count, False, "machine"),
            Collective(
                "gradients between machines", "all-to-all", inside_bytes / machine, 2 * count, False, "machines"
            ),
            Collective("gradients", "reduce-scatter", padded * FP16_BYTES, len(tensors) - count, waits=False),
        )
        exchange = replace(
            scratch(EXCHANGED, by_count(lambda ranks: exchange_bytes(tensors, ranks, machine), plan.gpus)),
            moved_bytes=4 * padded * FP16_BYTES + self._exchange_moves(elements),
            transfers=tuple(each for each in passed if np.any(each.payload_bytes)),
        )
        return (exchange, *others)

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        return tuple(self.model.parameters())

    def _exchange_moves(self, elements: Amount) -> Amount:
        """What the kernels of an exchange read and write: quantise, dequantise with the sum, dequantise, sum."""
        in_machine, own = elements / self.plan.zero.machine_gpus, elements / self.plan.gpus
        quantised = (FP16_BYTES + INT4_BYTES) * elements + INT4_BYTES * (elements + in_machine)
        return quantised + (INT4_BYTES + 2 * FP16_BYTES) * in_machine + FP16_BYTES * own


def fits(parameter: Parameter, ranks: int) -> bool:
    """Whether the gradient of *parameter* is quantised; else it is reduced by itself (``all_to_all_quant_reduce``)."""
    return len(parameter.shape) > 1 and parameter.numel % (2 * ranks) == 0


def scales(parameter: Parameter, ranks: int) -> int:
    """Groups of the gradient that share a scale, ``intra_quant_group``."""
    return max(*parameter.shape[:2], ranks)


def exchange_bytes(tensors: Iterable[Parameter], ranks: int, machine: int) -> int:
    """The most that the exchange of one gradient after another holds, without scales.

    Each buffer lives until the next gradient's takes its name; results stay.
    """
    buffers = [0, 0, 0, 0, 0]
    results = peak = 0
    for each in tensors:
        if not fits(each, ranks):
            padded = -(-each.numel // ranks) * ranks
            peak = max(peak, sum(buffers) + results + FP16_BYTES * padded * (padded != each.numel))
            continue
        # Swizzled, received in the machine, reduced there, received from the others, dequantised.
        half, reduced = each.numel // 2, each.numel // 2 // machine
        for place, size in enumerate((half, half, reduced, reduced, FP16_BYTES * each.numel // machine)):
            peak = max(peak, sum(buffers) + results + size)
            buffers[place] = size
        own = FP16_BYTES * each.numel // ranks
        peak = max(peak, sum(buffers) + results + 2 * own)
        results += own
    return peak


def _times(transfer: Collective, times: Amount) -> Collective:
    """*transfer* as often as that, once or not at all."""
    return transfer._replace(payload_bytes=transfer.payload_bytes * times, messages=transfer.messages * times)
