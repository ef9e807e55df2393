"""Runs a training program in a rank that accelerate takes for a GPU's, on the CPU: ``cpu_ranks.py PROGRAM ARGUMENT…``.

accelerate alone would start separate single-process jobs on a machine without GPUs, and exit 0 all the same.
"""

from __future__ import annotations

import os
import runpy
import sys

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType


def choose_gloo(self: PartialState, *_: object, **__: object) -> tuple[str, DistributedType]:
    return "gloo", DistributedType.MULTI_GPU


def wait(self: PartialState) -> None:
    torch.distributed.barrier()  # gloo refuses the device that accelerate would name


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    os.environ["ACCELERATE_BYPASS_DEVICE_MAP"] = "true"  # else DDP is given a CUDA device
    PartialState._prepare_backend = choose_gloo
    PartialState.wait_for_everyone = wait
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed.comm.torch

        deepspeed.comm.torch.build_shm_op = lambda: None  # compiles for half a minute, and gloo does without
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
    # gloo's threads can outlive the group and abort the interpreter on its way out.
    sys.stdout.flush()
    os._exit(0)
