"""One rank of a real run: builds the model, trains a few steps by the plan, and writes down what it measured.

    <launcher> -m advisor.validation.worker FOLDER

:mod:`advisor.validation.run` writes the folder and starts the launcher. ``request.json`` there says the job, the plan,
the launcher, ``timeout_s``, and where they are not the usual ones ``device`` (cpu) and ``steps`` (3, two of them the
warm-up). While it trains, the rank keeps ``progress<N>.json`` up to date: ``{"step": done, "steps": all}``. In the end
it leaves ``rank<N>.json``: who answered, what ran, the losses, the trace, and ``measured``, a
:class:`~advisor.validation.measured.Measured`. It needs the extra ``run``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed

from advisor.specs.job import Job
from advisor.specs.plan import Plan
from advisor.validation.engines import (
    Engine,
    built_model,
    by_deepspeed,
    by_torch,
    keep_own_part,
    leave_out_cpu_adam,
    use_collectives_of_torch,
)
from advisor.validation.loop import random_tokens, record_of, train
from advisor.validation.measured import STEPS
from advisor.validation.meter import meter_of
from advisor.validation.optimizers import optimizer_of
from advisor.validation.record import from_plain, write_whole

GLOO_THREAD_S = 0.003
"""Sleep in which a gloo thread gets its turn."""


def by_file(model: Any, job: Job, plan: Plan, folder: Path, device: torch.device) -> Engine:
    """DeepSpeed, with the JSON that lies in *folder*."""
    return by_deepspeed(model, job, plan, json.loads((folder / "ds_config.json").read_text()), device)


def by_plain_torch(model: Any, job: Job, plan: Plan, folder: Path, device: torch.device) -> Engine:
    """DDP or FSDP2 in a plain loop."""
    return by_torch(model, job, plan, device)


def by_accelerate(model: Any, job: Job, plan: Plan, folder: Path, device: torch.device) -> Engine:
    """``Accelerator.prepare`` with the YAML that a user gets, in the loop of the training program beside it."""
    if device.type == "cpu":
        choose_gloo()
    from accelerate import Accelerator

    accelerator = Accelerator(gradient_accumulation_steps=int(plan.accumulation_steps))
    wrapper, optimizer = accelerator.prepare(model, optimizer_of(model, job))

    def backward(loss: Any) -> None:
        """accelerate's own, less the update that it makes within DeepSpeed's (utils/deepspeed.py)."""
        if plan.strategy.zero_stage is None:
            accelerator.backward(loss)
            return
        wrapper.set_gradient_accumulation_boundary(is_boundary=accelerator.sync_gradients)
        wrapper.backward(loss)

    def update(last: bool) -> None:
        if plan.strategy.zero_stage is not None and last:
            wrapper.step()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Engine(
        wrapper,
        optimizer.optimizer,
        forward=lambda ids, labels: wrapper(input_ids=ids, labels=labels).loss,
        backward=backward,
        update=update,
        micro_step=lambda last: accelerator.accumulate(wrapper),
    )


def choose_gloo() -> None:
    """Let accelerate take this rank for one of several GPUs' while it computes on the CPU.

    accelerate 1.15 by itself would start separate single-process jobs on a machine without GPUs, and exit 0.
    """
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    def prepare_backend(self: Any, *_: object, **__: object) -> tuple[str, Any]:
        return "gloo", DistributedType.MULTI_GPU

    def wait_for_everyone(self: Any) -> None:
        distributed.barrier()  # gloo refuses the device that accelerate would name

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    os.environ["ACCELERATE_BYPASS_DEVICE_MAP"] = "true"  # else DDP is given a CUDA device
    PartialState._prepare_backend = prepare_backend
    PartialState.wait_for_everyone = wait_for_everyone
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        use_collectives_of_torch()


def give_way_to_gloo() -> None:
    """Let a gloo thread drop its hold of a collective's tensors before this rank goes on.

    It keeps them until it gets to run again after the collective is done (ProcessGroupGloo.cpp ``runLoop``), so that
    on a busy machine one rank or another would hold a gathered layer longer, by chance. No GPU run has that.
    """
    work: Any = distributed.Work
    wait = work.wait

    def wait_and_give_way(self: Any, *arguments: Any, **words: Any) -> Any:
        result = wait(self, *arguments, **words)
        time.sleep(GLOO_THREAD_S)
        return result

    work.wait = wait_and_give_way


def reduce_scatter_in_place() -> None:
    """Let gloo reduce and scatter within the tensor that it is given, as NCCL does.

    Its own way is to all-reduce a copy (ProcessGroupGloo.cpp ``_reduce_scatter_base``), which no GPU holds. DeepSpeed
    and FSDP2 give a buffer that they drop afterwards, so that what this leaves in it harms nothing.
    """

    def in_place(output: Any, input: Any, op: Any = distributed.ReduceOp.SUM, group: Any = None, **words: Any) -> Any:
        work = distributed.all_reduce(input, op, group)
        keep_own_part(output, input, distributed.get_rank(group))
        return work

    collectives: Any = distributed
    collectives.reduce_scatter_tensor = in_place


def _device(name: str) -> torch.device:
    """This rank's own: the launcher numbers the ranks of a machine."""
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if name == "cuda" else torch.device("cpu")


def write(path: Path, held: object) -> None:
    """*held* as JSON."""
    write_whole(path, json.dumps(held))


def end_with(timeout_s: float) -> None:
    """End this rank some time after its run should have, even where nobody is left to do so."""
    signal.alarm(int(timeout_s) + 10)


def progress_in(folder: Path, rank: int, steps: int) -> Callable[[int], None]:
    """What keeps ``progress<N>.json`` up to date."""
    return lambda done: write(folder / f"progress{rank}.json", {"step": done, "steps": steps})


def main() -> None:
    folder = Path(sys.argv[1])
    config = json.loads((folder / "config.json").read_text())
    request = json.loads((folder / "request.json").read_text())
    job, plan = from_plain(Job, request["job"]), from_plain(Plan, request["plan"])
    steps, rank = int(request.get("steps", STEPS)), int(os.environ["RANK"])
    end_with(float(request["timeout_s"]))
    device = _device(request.get("device", "cpu"))
    if device.type == "cpu":
        torch.set_num_threads(1)
        give_way_to_gloo()
        reduce_scatter_in_place()
        if plan.offload.optimizer:
            leave_out_cpu_adam()
    ways = {"deepspeed": by_file, "torchrun": by_plain_torch, "accelerate": by_accelerate}
    with meter_of(device) as meter:
        model = built_model(config, job, plan, device)
        vocabulary = model.config.vocab_size
        engine = ways[request["launcher"]](model, job, plan, folder, device)
        del model
        meter.built()
        ids = random_tokens(vocabulary, job, plan, distributed.get_rank()).to(device)
        progress = progress_in(folder, rank, steps)
        measured, losses = train(meter, engine, ids, int(plan.accumulation_steps), steps, progress)
    answered = torch.ones((), device=device)
    distributed.all_reduce(answered)
    write(folder / f"rank{rank}.json", record_of(measured, losses, engine, int(answered)))
    distributed.barrier()
    # gloo's threads can outlive the group and abort the interpreter on its way out.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
