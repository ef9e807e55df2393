"""Counts the bytes of live storages while real torch code runs, on fake tensors as on real ones.

What a CPU cannot show is not in the count: kernel scratch, the allocator's rounding, NCCL, the CUDA context.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from advisor.step.program import Category

WAIT = torch.ops._c10d_functional.wait_tensor.default
"""Of a collective; what comes out lies where the collective wrote."""


@dataclass(eq=False, slots=True)
class Storage:
    """One piece of memory that tensors share."""

    size_bytes: int
    shape: tuple[int, ...]
    """Of the tensor that it was made for."""
    is_backward: bool
    """Whether a gradient function made it, and not modelling code."""
    category: Category | None = None


class StorageCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of live storages, and keeps a log of every change since :meth:`forget_log`.

    A dispatch mode keeps autograd from summing two gradients of one tensor in place, which real runs do; the
    counter does it in its stead.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages: dict[int, Storage] = {}
        self.log: list[tuple[Storage, int]] = []
        """Each change: which storage, and by how many bytes."""
        self.on_host: set[int] = set()
        self.live_bytes = 0
        self.peak_bytes = 0
        self.in_backward = False
        self.pauses = False
        """Whether what is made now is not counted."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(each, DTensor) for each in types) and func.name().startswith("aten::_scaled_dot_product"):
            return NotImplemented  # first it is to run on its shards, whose operations come here
        if func is WAIT:
            return args[0]  # a fake tensor's would be another tensor
        if self.in_backward and _sums_two_gradients(func, args, kwargs):
            return torch.ops.aten.add_.Tensor(*args)
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor)
        return output

    def _count(self, tensor: torch.Tensor) -> None:
        """Take note of *tensor*'s storage. Meta tensors have none."""
        if self.pauses or tensor.device.type == "meta":
            return
        storage = _storage_of(tensor)
        key = storage._cdata
        if key not in self.storages:
            self.storages[key] = Storage(0, tuple(tensor.shape), self.in_backward and not torch.is_grad_enabled())
            weakref.finalize(storage, self._forget, key)
        self.resized(storage)

    def include(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count *tensors* that were made before."""
        for tensor in tensors:
            self._count(tensor)

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Take note of a storage's size, which FSDP changes to free gathered weights."""
        held = self.storages.get(storage._cdata)
        if held and storage._cdata not in self.on_host and held.size_bytes != storage.nbytes():
            if not storage.nbytes():
                held.category = "parameters"  # which FSDP empties until it gathers them again
            self._change(held, storage.nbytes() - held.size_bytes)

    def leave_out(self, tensors: Iterable[torch.Tensor]) -> None:
        """Take *tensors* out of the count: a GPU run keeps them in host memory."""
        for tensor in tensors:
            key = _storage_of(tensor)._cdata
            held = self.storages.get(key)
            if held and key not in self.on_host:
                self._change(held, -held.size_bytes)
                self.on_host.add(key)

    def _change(self, held: Storage, more_bytes: int) -> None:
        held.size_bytes += more_bytes
        self.log.append((held, more_bytes))
        self.live_bytes += more_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _forget(self, key: int) -> None:
        held = self.storages.pop(key)
        self.on_host.discard(key)
        if held.size_bytes:
            self._change(held, -held.size_bytes)

    @contextmanager
    def phase(self) -> Iterator[None]:
        """Start a new peak."""
        self.start_peak()
        yield

    def start_peak(self) -> None:
        self.peak_bytes = self.live_bytes

    def forget_log(self) -> None:
        """Start a new log with what is held now."""
        self.log = [(held, held.size_bytes) for held in self.storages.values()]

    def mark(self, tensors: Iterable[torch.Tensor], category: Category) -> None:
        """Say what the storages of *tensors* are."""
        for tensor in tensors:
            held = self.storages.get(_storage_of(tensor)._cdata)
            if held:
                held.category = category

    def mark_rest(self, name: Callable[[Storage], Category]) -> None:
        """Say what everything that lives now and has no category is."""
        for held in self.storages.values():
            if held.category is None:
                held.category = name(held)

    def ledger(self, name: Callable[[Storage], Category]) -> tuple[tuple[Category, int], ...]:
        """Bytes by category at the first highest moment of the log. *name* tells what has no category."""
        held_bytes: Counter[Storage] = Counter()
        live = highest = 0
        last = -1
        for index, (_, more_bytes) in enumerate(self.log):
            live += more_bytes
            if live > highest:
                highest, last = live, index
        for held, more_bytes in self.log[: last + 1]:
            held_bytes[held] += more_bytes
        found: Counter[Category] = Counter()
        for held, size_bytes in held_bytes.items():
            found[held.category or name(held)] += size_bytes
        return tuple((category, size) for category, size in found.most_common() if size)


def _storage_of(tensor: torch.Tensor) -> torch.UntypedStorage:
    """*tensor*'s memory; a distributed tensor's is its local shard's."""
    return getattr(tensor, "_local_tensor", tensor).untyped_storage()


def _sums_two_gradients(func: Any, args: Any, kwargs: Any) -> bool:
    return (
        func is torch.ops.aten.add.Tensor
        and not torch.is_grad_enabled()
        and not kwargs
        and len(args) == 2
        and all(isinstance(each, torch.Tensor) for each in args)
        and args[0].shape == args[1].shape
        and args[0].dtype == args[1].dtype
    )


@contextmanager
def resizes_counted(counter: StorageCounter) -> Iterator[None]:
    """Let *counter* know when a storage changes its size."""
    original = torch.UntypedStorage.resize_

    def resize(storage: torch.UntypedStorage, size: int) -> Any:
        result = original(storage, size)
        counter.resized(storage)
        return result

    setattr(torch.UntypedStorage, "resize_", resize)  # noqa: B010 - mypy refuses the plain assignment
    try:
        yield
    finally:
        setattr(torch.UntypedStorage, "resize_", original)  # noqa: B010
