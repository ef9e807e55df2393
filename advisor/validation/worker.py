"""One rank of a real run: builds the model, trains three steps by the plan, and writes down what it held.

    <launcher> -m advisor.validation.worker FOLDER

:mod:`advisor.validation.run` writes the folder and starts the launcher; the rank leaves ``rank<N>.json`` there. It
needs the extra ``run``.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed

from advisor.specs.job import Job
from advisor.specs.plan import Plan
from advisor.tracing.counter import StorageCounter, resizes_counted
from advisor.validation.loop import (
    Engine,
    built_model,
    by_deepspeed,
    optimizer_of,
    train,
    use_collectives_of_torch,
)
from advisor.validation.record import from_plain, plain
from advisor.validation.sharding import fully_sharded

GLOO_THREAD_S = 0.003
"""Sleep in which a gloo thread gets its turn."""


def by_file(model: Any, job: Job, plan: Plan, folder: Path) -> Engine:
    """DeepSpeed, with the JSON that lies in *folder*."""
    return by_deepspeed(model, job, json.loads((folder / "ds_config.json").read_text()))


def by_torch(model: Any, job: Job, plan: Plan, folder: Path) -> Engine:
    """DistributedDataParallel, or FSDP2 set up as accelerate does, in a plain loop."""
    distributed.init_process_group("gloo")
    autocast = job.parameter_format == "fp32" and job.precision != "fp32" and not plan.strategy.is_fsdp
    wrapper = model
    if plan.strategy.is_fsdp:
        from torch.distributed.device_mesh import init_device_mesh

        fully_sharded(model, init_device_mesh("cpu", (int(plan.gpus),)), job, plan)
    else:
        wrapper = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = optimizer_of(model, job)

    def forward(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss: torch.Tensor = wrapper(input_ids=ids, labels=labels).loss
        return loss

    def update(last: bool) -> None:
        if last:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def micro_step(last: bool) -> AbstractContextManager[Any]:
        if plan.strategy.is_fsdp:
            wrapper.set_requires_gradient_sync(last)
            return contextlib.nullcontext()
        return contextlib.nullcontext() if last else wrapper.no_sync()

    def backward(loss: Any) -> None:
        loss.backward()

    return Engine(wrapper, optimizer, forward, backward, update, micro_step)


def by_accelerate(model: Any, job: Job, plan: Plan, folder: Path) -> Engine:
    """``Accelerator.prepare`` with the YAML that a user gets, in the loop of the training program beside it."""
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


def _tokens(vocabulary: int, job: Job, plan: Plan) -> torch.Tensor:
    """Random ones, others on every rank."""
    generator = torch.Generator().manual_seed(distributed.get_rank())
    return torch.randint(vocabulary, (int(plan.micro_batch), job.sequence_length), generator=generator)


def main() -> None:
    folder = Path(sys.argv[1])
    config = json.loads((folder / "config.json").read_text())
    request = json.loads((folder / "request.json").read_text())
    job, plan = from_plain(Job, request["job"]), from_plain(Plan, request["plan"])
    signal.alarm(int(request["timeout_s"]) + 10)  # ends this rank even where nobody is left to end it
    torch.set_num_threads(1)
    give_way_to_gloo()
    ways = {"deepspeed": by_file, "torchrun": by_torch, "accelerate": by_accelerate}
    with StorageCounter() as counter, resizes_counted(counter):
        model = built_model(config, job, plan)
        vocabulary = model.config.vocab_size
        engine = ways[request["launcher"]](model, job, plan, folder)
        del model
        trace, losses = train(counter, engine, _tokens(vocabulary, job, plan), int(plan.accumulation_steps))
    answered = torch.ones(())
    distributed.all_reduce(answered)
    record = {
        "ranks": int(answered),
        "engine": engine.name,
        "optimizer": type(engine.optimizer).__name__,
        "losses": losses,
        "trace": plain(trace),
    }
    path = folder / f"rank{distributed.get_rank()}.json"
    path.with_suffix(".part").write_text(json.dumps(record))
    path.with_suffix(".part").replace(path)
    distributed.barrier()
    # gloo's threads can outlive the group and abort the interpreter on its way out.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
