"""The optimizer of a run or a trace: the one that train.py makes, and nothing counted that a GPU would not hold.

This module imports torch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from advisor.launch.train_optimizers import BLOCKWISE, make_optimizer
from advisor.specs.job import Job
from advisor.tracing.counter import StorageCounter

LEARNING_RATE = 1e-3
UPDATES = ("optimizer_update_32bit", "optimizer_update_8bit_blockwise")
"""bitsandbytes' kernels (0.50.2, functional.py)."""


def optimizer_of(model: Any, job: Job) -> Any:
    """The job's optimizer over the weights of *model* that are trained."""
    load_packages(job)
    if job.optimizer in BLOCKWISE:
        leave_out_kernels()
    optimizer = make_optimizer(job.optimizer, model, learning_rate=LEARNING_RATE, galore_rank=job.galore_rank)
    for group in optimizer.param_groups:
        if "update_proj_gap" in group:
            group["update_proj_gap"] = 1  # every step is one of those that take most
    return optimizer


def load_packages(job: Job) -> None:
    """Import what the optimizer comes from, so that no tensor of a package's own is counted, or without numbers."""
    with _disable_current_modes():
        make_optimizer(job.optimizer, torch.nn.Linear(1, 1), learning_rate=LEARNING_RATE)


def traced_optimizer(model: Any, job: Job, counter: StorageCounter) -> Any:
    """The same over fake tensors; of bitsandbytes' tables, which it makes of numbers, with real ones."""
    if job.optimizer not in BLOCKWISE:
        return optimizer_of(model, job)
    with _disable_current_modes():
        optimizer = optimizer_of(model, job)
    counter.include(optimizer.name2qmap.values())
    return optimizer


def leave_out_kernels() -> None:
    """Count nothing that bitsandbytes' kernels take on a CPU: a GPU's work in place (backends/cuda/ops.py)."""
    import bitsandbytes.functional as functional

    for name in UPDATES:
        kernel = getattr(functional, name)
        if not hasattr(kernel, "__wrapped__"):
            setattr(functional, name, _uncounted(kernel))


def _uncounted(kernel: Callable[..., None]) -> Callable[..., None]:
    @wraps(kernel)
    def run(*arguments: Any, **words: Any) -> None:
        if arguments[1].device.type != "cpu":
            kernel(*arguments, **words)
            return
        with _disable_current_modes():
            kernel(*arguments, **words)

    return run


def leave_out_host_tensors(counter: StorageCounter, optimizer: Any) -> None:
    """Take out of the count what a GPU run keeps on the host: step counters but for a fused AdamW's, unused tables."""
    if not optimizer.defaults.get("fused", True):
        steps = (state.get("step") for state in optimizer.state.values())
        counter.leave_out(step for step in steps if isinstance(step, torch.Tensor))
    tables = getattr(optimizer, "name2qmap", {})
    states = optimizer.state.values()
    used = {id(table) for state in states for name in ("qmap1", "qmap2") if (table := state.get(name)) is not None}
    counter.leave_out(table for table in tables.values() if id(table) not in used)
