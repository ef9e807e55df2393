"""DeepSpeed's asynchronous reading and writing in plain Python, for machines without libaio.

The swappers of deepspeed 0.19.8 (runtime/swap_tensor) get from here what ``AsyncIOBuilder().load()`` would give them:
the same files of the same sizes, read and written at once. What it counts is what an NVMe would see.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch


class Handle:
    """``aio_handle`` (csrc/aio/py_lib/deepspeed_py_io_handle.cpp), as far as the swappers use it."""

    locked: set[int]
    read_bytes = written_bytes = 0

    def __init__(self, **settings: Any) -> None:
        self.pending = 0

    def async_pread(self, buffer: torch.Tensor, path: str, offset: int) -> int:
        data = _bytes_of(buffer)
        data[:] = np.fromfile(path, dtype=np.uint8, count=data.size)
        Handle.read_bytes += data.size
        self.pending += 1
        return 0

    def async_pwrite(self, buffer: torch.Tensor, path: str, offset: int) -> int:
        data = _bytes_of(buffer)
        data.tofile(path)
        Handle.written_bytes += data.size
        self.pending += 1
        return 0

    def wait(self) -> int:
        done, self.pending = self.pending, 0
        return done

    def new_cpu_locked_tensor(self, elements: int, example: torch.Tensor) -> torch.Tensor:
        made = torch.empty(int(elements), dtype=example.dtype)
        Handle.locked.add(made.untyped_storage().data_ptr())
        return made

    def free_cpu_locked_tensor(self, tensor: torch.Tensor) -> None:
        Handle.locked.discard(tensor.untyped_storage().data_ptr())

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in Handle.locked


def _bytes_of(buffer: torch.Tensor) -> Any:
    return buffer.detach().view(torch.uint8).numpy()


@contextmanager
def plain_files() -> Iterator[type[Handle]]:
    """Let DeepSpeed's swappers read and write through :class:`Handle`, whose counts start at 0."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    Handle.locked, Handle.read_bytes, Handle.written_bytes = set(), 0, 0
    original = AsyncIOBuilder.load
    AsyncIOBuilder.load = lambda self, verbose=True: SimpleNamespace(aio_handle=Handle)
    try:
        yield Handle
    finally:
        AsyncIOBuilder.load = original


def file_bytes(folder: str) -> int:
    """Bytes of all files under *folder*."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
