"""Times collectives over the ranks of this machine, as one of them.

    torchrun --nproc-per-node N -m advisor.validation.collectives FILE

NCCL between GPUs, gloo between processes on a CPU. Rank 0 writes one rate for every collective and size into FILE.
Needs the extra ``run``; this module imports torch.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as distributed

from advisor.cost.collectives import sent_bytes
from advisor.step.program import CollectiveKind
from advisor.validation.rates import SAMPLES, Rate, sample, write

GPU_SIZES_BYTES = tuple(2**power for power in range(12, 30, 2))
CPU_SIZES_BYTES = tuple(2**power for power in range(12, 26, 3))
CALLS = 5
"""In a sample; a number of its own that every rank knows."""


def measured(device: torch.device) -> Iterator[Rate]:
    """Every collective at every size, each rank holding the whole tensor's share of it."""
    ranks = distributed.get_world_size()
    for size_bytes in GPU_SIZES_BYTES if device.type == "cuda" else CPU_SIZES_BYTES:
        whole = torch.zeros(size_bytes // 4 // ranks * ranks, device=device)
        share = torch.zeros(whole.numel() // ranks, device=device)
        for kind, call in _calls(whole, share):
            distributed.barrier()
            sample(call, device, 1)
            samples = [sample(call, device, CALLS) for _ in range(SAMPLES)]
            yield Rate(
                kind=kind,  # type: ignore[arg-type]
                sizes={"size_bytes": 4 * whole.numel(), "ranks": ranks},
                seconds=statistics.median(samples),
                least_s=min(samples),
                moved_bytes=float(sent_bytes(kind, 4 * whole.numel(), ranks)),
            )


def _calls(whole: torch.Tensor, share: torch.Tensor) -> Iterator[tuple[CollectiveKind, Callable[[], object]]]:
    yield "all-reduce", lambda: distributed.all_reduce(whole)
    yield "all-gather", lambda: distributed.all_gather_into_tensor(whole, share)
    yield "reduce-scatter", lambda: distributed.reduce_scatter_tensor(share, whole)


def main() -> None:
    on_gpus = torch.cuda.is_available()
    distributed.init_process_group("nccl" if on_gpus else "gloo")
    rank = distributed.get_rank()
    device = torch.device("cuda", rank) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    found = list(measured(device))
    if rank == 0:
        write(Path(sys.argv[1]), "cuda" if on_gpus else "cpu", found)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
