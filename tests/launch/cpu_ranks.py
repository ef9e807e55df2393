"""Runs a training program in a rank that accelerate takes for a GPU's, on the CPU: ``cpu_ranks.py PROGRAM WORD…``."""

from __future__ import annotations

import contextlib
import os
import runpy
import sys
from pathlib import Path

import torch
from torch.distributed.fsdp._flat_param import FlatParamHandle

from advisor.validation.engines import leave_out_cpu_adam
from advisor.validation.worker import choose_gloo

if __name__ == "__main__":
    torch.set_num_threads(1)
    choose_gloo()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        leave_out_cpu_adam()
    if os.environ.get("FSDP_VERSION") == "1":
        # accelerate asks for a GPU to send what the first rank has read to: here each rank reads for itself.
        os.environ.update(FSDP_SYNC_MODULE_STATES="false", FSDP_CPU_RAM_EFFICIENT_LOADING="false")
        # Whole weights that are copied to the CPU are freed where they were, which is where they are.
        FlatParamHandle.to_cpu = contextlib.nullcontext  # type: ignore[method-assign]
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
    # gloo's threads can outlive the group and abort the interpreter on its way out.
    sys.stdout.flush()
    os._exit(0)
