"""How train.py saves its progress and goes on from it: weights, optimizer, random numbers, place in the data."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

PREFIX = "checkpoint-"
PROGRESS = "progress.json"


def save_checkpoint(accelerator: Accelerator, arguments: argparse.Namespace, step: int) -> None:
    """Write checkpoint-STEP into --output, and then take the earlier ones away.

    It bears its name only once it is whole: a run that is killed on the way leaves the one before.
    """
    whole = arguments.output / f"{PREFIX}{step}"
    unfinished = arguments.output / f"unfinished-{whole.name}"
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(unfinished)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (unfinished / PROGRESS).write_text(json.dumps({"step": step} | continued(accelerator, arguments), indent=2))
        if whole.exists():
            shutil.rmtree(whole)
        unfinished.replace(whole)
        for earlier in checkpoints(arguments.output):
            if steps_of(earlier) < step:
                shutil.rmtree(earlier)
        print(f"saved {whole}", flush=True)


def resume(accelerator: Accelerator, arguments: argparse.Namespace, optimizer: Any) -> int:
    """Load what --resume names, if anything, and return how many optimizer steps it has done."""
    if arguments.resume is None:
        return 0
    if arguments.resume == "auto":
        folder = max(checkpoints(arguments.output), key=steps_of, default=None)
        if folder is None:
            return 0
    else:
        folder = Path(arguments.resume)
    try:
        progress = json.loads((folder / PROGRESS).read_text())
    except FileNotFoundError:
        raise SystemExit(f"{folder} is no whole checkpoint of train.py: it has no {PROGRESS}") from None
    for name, value in continued(accelerator, arguments).items():
        if progress[name] != value:
            raise SystemExit(f"{folder} was saved with {name} {progress[name]}, this run has {value}: make them equal")
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        make_state(optimizer.optimizer)
    accelerator.load_state(str(folder))
    if accelerator.is_main_process:
        print(f"resumed from {folder}", flush=True)
    return int(progress["step"])


def make_state(optimizer: torch.optim.Optimizer) -> None:
    """Let *optimizer* make its state by a step that changes no weight.

    accelerate 1.15 loads FSDP1's into what is there (utils/fsdp_utils.py ``load_fsdp_optimizer``): into a new
    optimizer, nothing, and without a word.
    """
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # each step of the training sets it
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def continued(accelerator: Accelerator, arguments: argparse.Namespace) -> dict[str, object]:
    """What has to be as it was, for the shards to fit and for the data to go on where they stopped."""
    return {
        "distributed_type": accelerator.distributed_type.value,
        "processes": accelerator.num_processes,
        "micro_batch": arguments.micro_batch,
        "accumulation_steps": arguments.accumulation_steps,
        "sequence_length": arguments.sequence_length,
        "dataset": arguments.dataset,
        "seed": arguments.seed,
    }


def checkpoints(output: Path) -> list[Path]:
    return [path for path in output.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]


def steps_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(PREFIX))
