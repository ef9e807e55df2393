"""Measures what one rank holds in each phase of a training step, and how long it takes.

The loop tells a :class:`Meter` when steps and phases begin and end::

    meter.begin_step(ids)
    with meter.phase("forward"):
        ...
    meter.end_step()

:class:`CpuMeter` counts the bytes of live storages, :class:`CudaMeter` reads the counters of torch's allocator and
events of the device. Neither makes the device wait within a step. Needs the extra ``run``; this module imports torch.
"""

from __future__ import annotations

import gc
import resource
import statistics
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.distributed import is_initialized
from torch.distributed.device_mesh import DeviceMesh

from advisor.tracing.counter import StorageCounter, resizes_counted
from advisor.validation.measured import Measured, PhaseMeasured
from advisor.validation.optimizers import leave_out_host_tensors

PhaseName = Literal["forward", "backward", "step"]

CUDA_BLOCK_BYTES = 512
"""To a multiple of which CUDA's caching allocator rounds every tensor."""


@dataclass(slots=True)
class _Phase:
    """One phase of one micro-step; marks are whatever the meter's clock says."""

    peak_bytes: int
    end_bytes: int
    reserved_bytes: int | None
    began: Any
    ended: Any


@dataclass(slots=True)
class _Step:
    """One optimizer step."""

    states_bytes: int
    began: Any
    ended: Any = None
    used_bytes: int | None = None
    phases: dict[PhaseName, list[_Phase]] = field(default_factory=dict)


class Meter(ABC):
    """What a rank measures. Made before the model, used as a context manager around all that is to be measured."""

    device: torch.device

    def __init__(self) -> None:
        self._steps: list[_Step] = []
        self._contexts = ExitStack()

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *error: object) -> None:
        self._contexts.close()

    def begin_step(self, ids: torch.Tensor) -> None:
        """The optimizer step that trains on *ids* begins."""
        self._steps.append(_Step(self.live_bytes - self._size_of(ids), began=self._mark()))

    def end_step(self) -> None:
        """It has ended; a GPU is waited for, as a loop that prints its loss does."""
        step = self._steps[-1]
        step.ended = self._mark()
        self._wait()
        step.used_bytes = self._used_bytes()

    @contextmanager
    def phase(self, name: PhaseName) -> Iterator[None]:
        """One phase of one micro-step."""
        self._start_peak()
        began = self._mark()
        yield
        found = _Phase(self.peak_bytes, self.live_bytes, self._reserved_peak_bytes(), began, self._mark())
        self._steps[-1].phases.setdefault(name, []).append(found)

    def forget(self) -> None:
        """Drop the steps so far, which were the warm-up."""
        self._steps.clear()

    def measured(self, tokens_per_step: int) -> Measured:
        """What the steps since then say."""
        steps = self._steps
        used = [step.used_bytes for step in steps if step.used_bytes is not None]
        return Measured(
            device=self._device_name(),
            states_bytes=max(step.states_bytes for step in steps),
            forward=self._over_steps("forward"),
            backward=self._over_steps("backward"),
            step=self._over_steps("step"),
            step_s=tuple(self._seconds(step.began, step.ended) for step in steps),
            tokens_per_step=tokens_per_step,
            host_peak_bytes=host_peak_bytes(),
            device_used_bytes=max(used, default=None),
            **self._of_device(),
        )

    def _over_steps(self, name: PhaseName) -> PhaseMeasured:
        parts = [step.phases[name] for step in self._steps]
        every = [phase for phases in parts for phase in phases]
        reserved = [phase.reserved_bytes for phase in every if phase.reserved_bytes is not None]
        return PhaseMeasured(
            peak_allocated_bytes=max(phase.peak_bytes for phase in every),
            end_allocated_bytes=max(phases[-1].end_bytes for phases in parts),
            peak_reserved_bytes=max(reserved, default=None),
            seconds=statistics.median(
                sum(self._seconds(phase.began, phase.ended) for phase in phases) for phases in parts
            ),
        )

    @property
    @abstractmethod
    def live_bytes(self) -> int:
        """Held by tensors now."""

    @property
    @abstractmethod
    def peak_bytes(self) -> int:
        """The most since the phase began."""

    @abstractmethod
    def value_of(self, loss: torch.Tensor) -> Any:
        """*loss* as something that ``float`` reads after the step, and that takes nothing on the device."""

    @abstractmethod
    def leave_out_host_tensors(self, optimizer: Any) -> None:
        """Take out of the count what a GPU run keeps in host memory, such as Adam's step counters."""

    @abstractmethod
    def built(self) -> None:
        """The model and its engine are there; a GPU gets back what only building them took."""

    @abstractmethod
    def _size_of(self, tensor: torch.Tensor) -> int: ...

    @abstractmethod
    def _start_peak(self) -> None: ...

    @abstractmethod
    def _mark(self) -> Any:
        """A moment, for :meth:`_seconds`."""

    @abstractmethod
    def _seconds(self, began: Any, ended: Any) -> float: ...

    @abstractmethod
    def _wait(self) -> None: ...

    @abstractmethod
    def _device_name(self) -> str: ...

    def _reserved_peak_bytes(self) -> int | None:
        return None

    def _used_bytes(self) -> int | None:
        return None

    def _of_device(self) -> dict[str, Any]:
        """Fields of :class:`Measured` that only a GPU has."""
        return {}


class CpuMeter(Meter):
    """Live bytes of storages by :class:`StorageCounter`, and the wall clock."""

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device("cpu")
        self.counter = StorageCounter()

    def __enter__(self) -> Meter:
        self._contexts.enter_context(self.counter)
        self._contexts.enter_context(resizes_counted(self.counter))
        return self

    @contextmanager
    def phase(self, name: PhaseName) -> Iterator[None]:
        with super().phase(name):
            self.counter.in_backward = name == "backward"
            yield
            self.counter.in_backward = False

    @property
    def live_bytes(self) -> int:
        return self.counter.live_bytes

    @property
    def peak_bytes(self) -> int:
        return self.counter.peak_bytes

    def built(self) -> None:
        """A GPU run keeps the numbers of a mesh's ranks in host memory; accelerate makes a mesh for every unit."""
        if is_initialized():
            meshes = [each for each in gc.get_objects() if type(each) is DeviceMesh]
            self.counter.leave_out(mesh.mesh for mesh in meshes)

    def value_of(self, loss: torch.Tensor) -> float:
        return float(loss.item())

    def leave_out_host_tensors(self, optimizer: Any) -> None:
        leave_out_host_tensors(self.counter, optimizer)

    def _size_of(self, tensor: torch.Tensor) -> int:
        return tensor.untyped_storage().nbytes()

    def _start_peak(self) -> None:
        self.counter.start_peak()

    def _mark(self) -> float:
        return time.perf_counter()

    def _seconds(self, began: float, ended: float) -> float:
        return ended - began

    def _wait(self) -> None:
        """A CPU is done when a call returns."""

    def _device_name(self) -> str:
        return "cpu"


class CudaMeter(Meter):
    """Counters of torch's caching allocator, which lie on the host; events of the device; the driver's own count."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        torch.cuda.set_device(device)
        torch.zeros(1, device=device)  # makes the context
        torch.cuda.empty_cache()
        self._before_bytes = self._used_bytes()

    @property
    def live_bytes(self) -> int:
        return int(torch.cuda.memory_allocated(self.device))

    @property
    def peak_bytes(self) -> int:
        return int(torch.cuda.max_memory_allocated(self.device))

    def built(self) -> None:
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()

    def value_of(self, loss: torch.Tensor) -> torch.Tensor:
        return loss.detach().to("cpu", non_blocking=True)

    def leave_out_host_tensors(self, optimizer: Any) -> None:
        """They are where they are."""

    def _size_of(self, tensor: torch.Tensor) -> int:
        return -(-tensor.untyped_storage().nbytes() // CUDA_BLOCK_BYTES) * CUDA_BLOCK_BYTES

    def _start_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def _mark(self) -> Any:
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _seconds(self, began: Any, ended: Any) -> float:
        return float(began.elapsed_time(ended)) / 1000

    def _wait(self) -> None:
        torch.cuda.synchronize(self.device)

    def _device_name(self) -> str:
        return str(torch.cuda.get_device_name(self.device))

    def _reserved_peak_bytes(self) -> int:
        return int(torch.cuda.max_memory_reserved(self.device))

    def _used_bytes(self) -> int:
        free, total = torch.cuda.mem_get_info(self.device)
        return int(total - free)

    def _of_device(self) -> dict[str, Any]:
        return {
            "device_used_before_bytes": self._before_bytes,
            "capacity_bytes": int(torch.cuda.get_device_properties(self.device).total_memory),
            "cache_releases": int(torch.cuda.memory_stats(self.device)["num_alloc_retries"]),
        }


def meter_of(device: torch.device) -> Meter:
    """The meter for *device*."""
    return CudaMeter(device) if device.type == "cuda" else CpuMeter()


def host_peak_bytes() -> int:
    """Most resident memory of this process so far (getrusage(2): KiB on Linux, bytes on macOS)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
