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
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed

from advisor.specs.job import Job
from advisor.specs.plan import Checkpointing, Plan
from advisor.tracing.counter import StorageCounter, resizes_counted
from advisor.tracing.real_model import DROPOUT_SETTINGS
from advisor.validation.record import from_plain
from advisor.validation.sharding import fully_sharded
from advisor.validation.trace import Trace, adamw, leave_out_step_counters

STEPS = 3
"""ZeRO-3 records its trace in the first step, and Adam's moments are made in it."""

GLOO_THREAD_S = 0.003
"""Sleep in which a gloo thread gets its turn."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Engine:
    """One framework's way through a step."""

    wrapper: Any
    """What the framework made of the model."""
    optimizer: Any
    forward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """Token ids and labels to the loss."""
    backward: Callable[[torch.Tensor], None]
    update: Callable[[bool], None]
    """The optimizer's turn after each micro-step; True after the last."""
    micro_step: Callable[[bool], AbstractContextManager[Any]]
    """What a micro-step runs in; True for the last."""

    @property
    def name(self) -> str:
        """Its class; ``fully_shard`` mixes FSDPModule into the model's own."""
        return "FSDPModule" if "FSDPModule" in _ancestors(self.wrapper) else type(self.wrapper).__name__


def _ancestors(value: Any) -> list[str]:
    return [each.__name__ for each in type(value).__mro__]


def build_model(config: Mapping[str, Any], job: Job, plan: Plan) -> Any:
    """The causal model with random weights in the format in which its framework expects them."""
    import transformers

    settings = {key: value for key, value in config.items() if not key.startswith("_")}
    built = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    built.use_cache = False
    for name in DROPOUT_SETTINGS:
        if hasattr(built, name):
            setattr(built, name, 0.0)
    # DeepSpeed keeps fp32 masters beside weights in the format that it computes in.
    built_in = job.precision if plan.strategy.zero_stage is not None else job.parameter_format
    factory: Any = transformers.AutoModelForCausalLM
    kernel = {"sdpa": None, "eager": "eager"}[job.attention]
    model = factory.from_config(built, dtype=DTYPES[built_in], attn_implementation=kernel)
    model.train()
    if plan.checkpointing is Checkpointing.FULL:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def by_deepspeed(model: Any, job: Job, plan: Plan, folder: Path) -> Engine:
    """``deepspeed.initialize`` with the JSON that a user gets."""
    import deepspeed

    use_gloo_alone()
    deepspeed.init_distributed(dist_backend="gloo")
    settings = json.loads((folder / "ds_config.json").read_text())
    engine = deepspeed.initialize(model=model, optimizer=_adamw(model, job), config=settings)[0]
    return Engine(
        engine,
        engine.optimizer,
        forward=lambda ids, labels: engine(input_ids=ids, labels=labels).loss,
        backward=engine.backward,
        update=lambda last: engine.step(),
        micro_step=lambda last: contextlib.nullcontext(),
    )


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
    optimizer = _adamw(model, job)

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
    wrapper, optimizer = accelerator.prepare(model, _adamw(model, job))

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
        use_gloo_alone()


def use_gloo_alone() -> None:
    """Keep DeepSpeed from compiling its shared-memory collectives, which takes minutes and can wait on a dead lock."""
    backend: Any = import_module("deepspeed.comm.torch")  # as an attribute of deepspeed.comm, that name is torch itself
    backend.build_shm_op = lambda: None


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


def _adamw(model: Any, job: Job) -> Any:
    return torch.optim.AdamW(model.parameters(), **adamw(job))


def train(counter: StorageCounter, engine: Engine, vocabulary: int, job: Job, plan: Plan) -> tuple[Trace, list[float]]:
    """The last of three optimizer steps, and every micro-step's loss. Ranks see different random tokens."""
    generator = torch.Generator().manual_seed(distributed.get_rank())
    ids = torch.randint(vocabulary, (int(plan.micro_batch), job.sequence_length), generator=generator)
    losses: list[float] = []
    for _ in range(STEPS):
        trace = _optimizer_step(counter, engine, ids, int(plan.accumulation_steps), losses)
    return trace, losses


def _optimizer_step(
    counter: StorageCounter, engine: Engine, ids: torch.Tensor, micro_steps: int, losses: list[float]
) -> Trace:
    states = counter.live_bytes - ids.untyped_storage().nbytes()
    forward_peak = backward_peak = step_peak = after_forward = 0
    for index in range(micro_steps):
        last = index == micro_steps - 1
        labels = ids.clone()
        with engine.micro_step(last):
            with counter.phase():
                loss = engine.forward(ids, labels)
            forward_peak, after_forward = max(forward_peak, counter.peak_bytes), counter.live_bytes
            with counter.phase():
                counter.in_backward = True
                engine.backward(loss)
                counter.in_backward = False
            backward_peak = max(backward_peak, counter.peak_bytes)
            losses.append(loss.item())
            del loss, labels
            with counter.phase():
                engine.update(last)
            if last:
                step_peak = counter.peak_bytes
                leave_out_step_counters(counter, getattr(engine.optimizer, "optimizer", engine.optimizer))
    parameters = sum(getattr(each, "ds_numel", each.numel()) for each in engine.wrapper.parameters())
    return Trace(parameters, states, forward_peak, after_forward, backward_peak, step_peak)


def main() -> None:
    folder = Path(sys.argv[1])
    config = json.loads((folder / "config.json").read_text())
    request = json.loads((folder / "request.json").read_text())
    job, plan = from_plain(Job, request["job"]), from_plain(Plan, request["plan"])
    signal.alarm(int(request["timeout_s"]) + 10)  # ends this rank even where nobody is left to end it
    torch.set_num_threads(1)
    give_way_to_gloo()
    ways = {"deepspeed": by_deepspeed, "torchrun": by_torch, "accelerate": by_accelerate}
    with StorageCounter() as counter, resizes_counted(counter):
        model = build_model(config, job, plan)
        vocabulary = model.config.vocab_size
        engine = ways[request["launcher"]](model, job, plan, folder)
        del model
        trace, losses = train(counter, engine, vocabulary, job, plan)
    answered = torch.ones(())
    distributed.all_reduce(answered)
    record = {
        "ranks": int(answered),
        "engine": engine.name,
        "optimizer": type(engine.optimizer).__name__,
        "losses": losses,
        "trace": asdict(trace),
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
