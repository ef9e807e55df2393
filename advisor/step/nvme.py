"""ZeRO's stage 3 with the optimizer, and the weights where the plan says so, on NVMe (ZeRO-Infinity, arXiv:2104.07857).

deepspeed 0.19.8, runtime/zero/stage3.py and runtime/swap_tensor (optimizer_utils.py, partitioned_optimizer_swapper.py,
partitioned_param_swapper.py). Whatever is too small for asynchronous reading and writing stays in memory. Left out:
``pipeline_read`` and ``pipeline_write``; that prefetching stops at a weight still on the NVMe, so that fewer weights
are gathered ahead.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import NamedTuple

from advisor.errors import SpecError
from advisor.specs.model import ModelSpec
from advisor.specs.plan import OffloadSettings, ZeroSettings
from advisor.step.flat_partition import Reduction, by_count
from advisor.step.offload import ROUNDED, pinned, rounded
from advisor.step.offload_three import OffloadedZeroThree
from advisor.step.program import Amount, Block, Copy, hold, release, scratch
from advisor.step.scheme import MicroStep, Nodes, Part
from advisor.step.states import MOMENTS
from advisor.step.zero_three import shares, sub_groups

LEAST_BYTES = 2**20
"""``MIN_AIO_BYTES``: nothing smaller is swapped."""
ALIGNED_BYTES = 1024
"""``AIO_ALIGNED_BYTES``: what each thread reads or writes is a multiple of it."""
SWAPPED = 1 + MOMENTS
"""Tensors of a sub-group that are read and written in a step: master weights and moments."""


def alignment(settings: OffloadSettings, element_bytes: int) -> int:
    """Elements of which files hold a multiple."""
    return ALIGNED_BYTES * settings.threads // element_bytes


def aligned(elements: int, to: int) -> int:
    return -(-elements // to) * to


class OptimizerFiles(NamedTuple):
    """What of one rank's optimizer is on the NVMe. Bytes."""

    states: int
    """Master weights and moments."""
    gradients: int
    """Of tensors large enough; the others' gradients stay on the GPU until the step."""
    pool: int
    """Locked host memory through which all goes."""
    made: int
    """Moments of the largest sub-group, in host memory in the first step before they are written."""
    kept: int
    """Elements of the sub-groups too small to be swapped."""
    kept_rounding: int
    """What pinning their gradients takes beyond them."""


class WeightFiles(NamedTuple):
    """What of one rank's weights is on the NVMe. Bytes."""

    files: int
    """All tensors large enough are written once."""
    read: int
    """Those that are read whenever they are gathered, and written in the step."""
    pool: int
    written_through: int
    """Locked host memory for the weights of a sub-group on their way out."""
    flat: int
    """Pinned host memory for the weights that may stay in it, filled or not."""
    alone: int
    """Weights too small for the NVMe that no sub-group's memory holds."""
    alone_rounding: int
    freed: int
    """Pinned blocks of small weights that have moved; torch keeps them."""


@lru_cache(maxsize=256)
def optimizer_files(
    sizes: tuple[int, ...], ranks: int, sub_group: int, state_bytes: int, settings: OffloadSettings
) -> OptimizerFiles:
    """The optimizer of tensors of *sizes* elements, cut over *ranks*."""
    parts, to = shares(sizes, ranks), alignment(settings, state_bytes)
    least = max(LEAST_BYTES, settings.block_bytes)
    groups = sub_groups(parts, sub_group)
    totals = [sum(parts[number] for number in group) for group in groups]
    swapped = [total * state_bytes >= least for total in totals]
    out = [total for total, swaps in zip(totals, swapped, strict=True) if swaps]
    stay = [total * state_bytes for total, swaps in zip(totals, swapped, strict=True) if not swaps]
    parts_out = [parts[number] for group, swaps in zip(groups, swapped, strict=True) if swaps for number in group]
    return OptimizerFiles(
        states=SWAPPED * state_bytes * sum(aligned(total, to) for total in out),
        gradients=state_bytes * sum(_whole(part, to, state_bytes, least) for part in parts_out),
        pool=settings.optimizer_buffers * aligned(max(totals), to) * state_bytes,
        made=MOMENTS * state_bytes * max(out, default=0),
        kept=sum(stay) // state_bytes,
        kept_rounding=int(sum(pinned(size) - size for size in stay)) if settings.pins else 0,
    )


def _whole(part: int, to: int, element_bytes: int, least: int) -> int:
    """Elements of a gradient of *part* that go to the NVMe (``_adjust_for_misaligned_lengths``)."""
    whole = part // to * to
    return whole if whole * element_bytes >= least else 0


@lru_cache(maxsize=256)
def weight_files(
    sizes: tuple[int, ...], ranks: int, sub_group: int, half_bytes: int, settings: OffloadSettings
) -> WeightFiles:
    """The weights of tensors of *sizes* elements, cut over *ranks*. Raises SpecError where one fits in no buffer."""
    parts, to = shares(sizes, ranks), alignment(settings, half_bytes)
    least = max(LEAST_BYTES, settings.block_bytes)
    large = [part * half_bytes >= least for part in parts]
    if max(parts) > settings.parameter_buffer and any(large):
        raise SpecError(
            f"a rank's share of the largest tensor is {max(sizes):,} elements / {ranks} GPUs = {max(parts):,}, but a "
            f"swap buffer holds {settings.parameter_buffer:,}; set offload_param.buffer_size to {max(parts)} or more"
        )
    flat = min(sum(parts), settings.max_in_host)
    read = offset = alone = alone_rounding = freed = 0
    outside = []
    for group in sub_groups(parts, sub_group):
        offset += sum(parts[number] for number in group)
        small = [parts[number] * half_bytes for number in group if not large[number]]
        if offset <= flat:
            freed += int(sum(pinned(size) for size in small))
            continue
        outside.append(group)
        read += half_bytes * sum(aligned(parts[number], to) for number in group if large[number])
        alone += sum(small)
        alone_rounding += int(sum(pinned(size) - size for size in small))
    largest = max(sub_groups(parts, sub_group), key=lambda group: sum(parts[number] for number in group))
    return WeightFiles(
        files=half_bytes * sum(aligned(part, to) for part, is_large in zip(parts, large, strict=True) if is_large),
        read=read,
        pool=settings.parameter_buffers * aligned(settings.parameter_buffer, to) * half_bytes,
        # ``reserve_partitioned_swap_space`` is given whole tensors where shares would do.
        written_through=half_bytes * sum(aligned(sizes[number], to) for number in largest) if outside else 0,
        flat=flat * half_bytes,
        alone=alone,
        alone_rounding=alone_rounding if settings.pins else 0,
        freed=freed if settings.pins else 0,
    )


def swap_buffers(model: ModelSpec, gpus: int, settings: OffloadSettings, zero: ZeroSettings) -> tuple[int, int]:
    """Elements and number of the buffers through which the weights of *model* come from the NVMe.

    A tensor has its buffer for as long as it is gathered (``remove_partition_and_release_buffers``), and DeepSpeed
    stops where there is none left. As many are needed as tensors follow one another in the widest window.
    """
    sizes = [parameter.numel for parameter in model.parameters()]
    parts = shares(sizes, gpus)
    if sum(parts) <= settings.max_in_host:
        return max(max(parts), settings.parameter_buffer), settings.parameter_buffers
    window = max(zero.max_live_parameters, zero.max_reuse_distance) + max(sizes)
    most = start = held = 0
    for end, size in enumerate(sizes):
        held += size
        while held > window:
            held -= sizes[start]
            start += 1
        most = max(most, end - start + 1)
    return max(parts), max(most, settings.parameter_buffers)


class SwappedZeroThree(OffloadedZeroThree):
    """The NVMe in the place of host memory, which keeps buffers and whatever is small."""

    def _optimizer(self, name: str) -> Amount:
        """A field of :class:`OptimizerFiles` for each of the plan's numbers of GPUs."""
        sizes, settings = self.sizes, self.plan.offload_settings

        def of(ranks: int) -> int:
            files = optimizer_files(sizes, ranks, self.plan.zero.sub_group, self.state_bytes, settings)
            return int(getattr(files, name))

        return by_count(of, self.plan.gpus)

    def _weights(self, name: str) -> Amount:
        """A field of :class:`WeightFiles`; 0 where the weights stay on the GPU."""
        if not self.plan.offload.parameters:
            return 0
        sizes, settings, half = self.sizes, self.plan.offload_settings, self.job.compute_bytes

        def of(ranks: int) -> int:
            return int(getattr(weight_files(sizes, ranks, self.plan.zero.sub_group, half, settings), name))

        return by_count(of, self.plan.gpus)

    def nvme(self) -> Nodes:
        return (
            hold("master weights and moments", "optimizer", self._optimizer("states")),
            hold("optimizer's gradients", "gradients", self._optimizer("gradients")),
            hold("weights, rank's share", "parameters", self._weights("files")),
        )

    def host(self) -> Nodes:
        return (
            *super().host(),
            scratch("moments before they are first written", self._optimizer("made"), "optimizer"),
        )

    def host_optimizer(self) -> Nodes:
        kept = self._optimizer("kept") * self.state_bytes
        return (
            hold("master weights of small sub-groups", "optimizer", kept),
            hold("gradients of small sub-groups", "gradients", kept),
            hold(ROUNDED, "rounding", self._optimizer("kept_rounding")),
            hold("Adam moments of small sub-groups", "optimizer", MOMENTS * kept),
            hold("optimizer's swap buffers", "buffers", self._optimizer("pool")),
        )

    def host_weights(self) -> Nodes:
        if not self.plan.offload.parameters:
            return ()
        flat = self._weights("flat")
        # What weights that are elsewhere point at: one element.
        nowhere = self.job.compute_bytes
        return (
            hold("stand-in for absent weights", "buffers", nowhere),
            hold("weights' swap buffers", "buffers", self._weights("pool") + self._weights("written_through")),
            hold("weights that may stay in host memory", "parameters", flat),
            rounded(flat, pins=True),
            hold("weights too small for NVMe", "parameters", self._weights("alone")),
            hold(ROUNDED, "rounding", self._weights("alone_rounding")),
            hold("freed pinned blocks that torch keeps", "rounding", self._weights("freed")),
        )

    @cached_property
    def swapped_tensors(self) -> dict[int, frozenset[int]]:
        """By number of GPUs, the tensors whose sub-group is swapped."""
        return {}

    def _casts(self, reduction: Reduction, ranks: int) -> tuple[int, int]:
        """Bytes of the casts of *reduction*'s shares, all there at once, and of those that stay until the step.

        A share that is too small stays, and one whose end is: the rest of it is a view (``_swap_out_gradients``).
        """
        parts, settings, state = self.parts(ranks), self.plan.offload_settings, self.state_bytes
        least, to = max(LEAST_BYTES, settings.block_bytes), alignment(settings, state)
        if ranks not in self.swapped_tensors:
            groups = self.groups(ranks)
            large = [group for group in groups if sum(parts[number] for number in group) * state >= least]
            self.swapped_tensors[ranks] = frozenset(number for group in large for number in group)
        held = [parts[tensor] for tensor in reduction.tensors if tensor in self.swapped_tensors[ranks]]
        left = [part for part in held if part * state < least or part % to]
        return sum(held) * state, sum(left) * state

    def taken_in_last(self, reduction: Reduction) -> Nodes:
        all_of_them = by_count(lambda ranks: self._casts(reduction, ranks)[0], self.plan.gpus)
        stay = by_count(lambda ranks: self._casts(reduction, ranks)[1], self.plan.gpus)
        return (
            *super().taken_in_last(reduction),
            Block("gradients too small for NVMe", "gradients", stay, all_of_them, "gradients"),
        )

    def fetch(self, part: Part) -> Nodes:
        if not self.plan.offload.parameters:
            return ()
        share = self._weights("read") * (part.numel / self.model.parameter_count)
        read = Copy("weights", "nvme-to-host", share, waits=True, ahead=self.ahead(part))
        return (Block("weights from the NVMe", "temporaries", transfers=(read,)), *super().fetch(part))

    def end_backward(self, micro: MicroStep) -> Nodes:
        if not micro.last:
            return super().end_backward(micro)
        write = Copy("gradients", "host-to-nvme", self._optimizer("gradients"), waits=False)
        return (*super().end_backward(micro), Block("gradients to the NVMe", "temporaries", transfers=(write,)))

    def update(self) -> Nodes:
        states, gradients = self._optimizer("states"), self._optimizer("gradients")
        stay: Amount = 0
        for reduction in self.reductions:
            stay = stay + by_count(lambda ranks, each=reduction: self._casts(each, ranks)[1], self.plan.gpus)  # type: ignore[misc]
        moves = (
            Copy("optimizer states", "nvme-to-host", states + gradients, waits=True),
            Copy("optimizer states", "host-to-nvme", states, waits=True),
            Copy("updated weights", "host-to-nvme", self._weights("read"), waits=True),
        )
        return (
            Block("states from and to the NVMe", "temporaries", transfers=moves),
            *super().update(),
            release("gradients too small for NVMe", "gradients", stay),
        )
