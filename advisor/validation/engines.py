"""The real model and its engine, set up as the plan says: by DeepSpeed, or by torch's DDP and FSDP2.

The same set-up serves a real rank and an emulated one (:mod:`advisor.validation.emulate`), on a CPU and on a GPU: the
device is an argument, the process group is whichever is there. It needs the extra ``run``; this module imports torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as distributed
from torch.utils._python_dispatch import _disable_current_modes

from advisor.launch.train import checkpointing_contexts
from advisor.launch.train import fuse_loss as fuse_loss_on_gpu
from advisor.specs.job import Job
from advisor.specs.plan import Checkpointing, Plan
from advisor.tracing.real_model import described, real_model, recompute_layers, settings_of
from advisor.validation.adapters import with_adapters
from advisor.validation.four_bits import in_four_bits
from advisor.validation.measured import Messages
from advisor.validation.optimizers import optimizer_of
from advisor.validation.sharding import FORMATS, data_parallel_emulated, fully_sharded, mesh_of
from advisor.validation.trace import take_loss

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
"""What carries collectives, by type of device."""


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
        ancestors = [each.__name__ for each in type(self.wrapper).__mro__]
        return "FSDPModule" if "FSDPModule" in ancestors else ancestors[0]

    @property
    def logs_communication(self) -> bool:
        """Whether DeepSpeed sends something, and says what."""
        several = distributed.is_initialized() and distributed.get_world_size() > 1
        return several and distributed.get_backend() != "fake" and self.name == "DeepSpeedEngine"


def built_model(config: Mapping[str, Any], job: Job, plan: Plan, device: torch.device) -> Any:
    """The causal model with random weights on *device*, in the format in which its framework expects them."""
    description = described(config)
    # DeepSpeed keeps fp32 masters beside weights in the format that it computes in.
    halves = plan.strategy.zero_stage is not None or job.method == "qlora"
    built_in = job.precision if halves else job.model_format
    on_gpu = device.type == "cuda"
    # A CPU runs no flash-attn; its own fused kernel saves what that one saves.
    attention = "sdpa" if job.attention == "flash" and not on_gpu else job.attention
    with device:
        model = real_model(settings_of(description), description, FORMATS[built_in], attention)
    if plan.checkpointing is not Checkpointing.NONE:
        recompute_layers(model, checkpointing_contexts(plan.checkpointing.value))
    if job.loss == "fused" and on_gpu:
        fuse_loss_on_gpu(model)
    else:
        take_loss(model, job)
    if job.method == "qlora":
        model = in_four_bits(model, FORMATS[job.precision], packed=cuts_weights(plan))
    return with_adapters(model, job, widens=plan.framework == "ddp")


def cuts_weights(plan: Plan) -> bool:
    """Whether frozen weights are cut over ranks."""
    return plan.strategy.is_fsdp or plan.strategy.zero_stage == 3


def by_deepspeed(model: Any, job: Job, plan: Plan, settings: Mapping[str, Any], device: torch.device) -> Engine:
    """``deepspeed.initialize`` with the JSON that a user gets, as accelerate's ``_prepare_deepspeed`` calls it."""
    import deepspeed

    if device.type == "cpu":
        use_collectives_of_torch()
    deepspeed.init_distributed(dist_backend=BACKENDS[device.type])
    # Of an optimizer on the host DeepSpeed makes its own, as its JSON says.
    optimizer = None if "optimizer" in settings else optimizer_of(model, job)
    weights = model.parameters()
    ulysses = {"mpu": attend_by_heads(model, plan)} if plan.ulysses_parallel > 1 else {}
    engine = deepspeed.initialize(
        model=model, optimizer=optimizer, model_parameters=weights, config=dict(settings), **ulysses
    )[0]
    del optimizer, weights
    more: dict[str, torch.Tensor] = {}

    def forward(ids: torch.Tensor, labels: torch.Tensor) -> Any:
        if ulysses:
            more.update(part_of_sequence(ids, labels, plan))
        return engine(input_ids=ids, labels=labels, **more).loss

    def backward(loss: torch.Tensor) -> None:
        engine.backward(loss)
        more.clear()

    return Engine(
        engine,
        engine.optimizer,
        forward=forward,
        backward=backward,
        update=lambda last: engine.step(),
        micro_step=lambda last: contextlib.nullcontext(),
    )


def attend_by_heads(model: Any, plan: Plan) -> Any:
    """Let *model* attend by Ulysses. What DeepSpeed asks for its groups is returned."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    return UlyssesSPAttentionHF.register_with_transformers(
        model_name_or_path=model,
        core_attn_implementation=model.config._attn_implementation,
        sequence_parallel_size=plan.ulysses_parallel,
        micro_batch_size=int(plan.micro_batch),
    )


def part_of_sequence(ids: torch.Tensor, labels: torch.Tensor, plan: Plan) -> dict[str, torch.Tensor]:
    """What a model is told besides where *ids* are this rank's part of a sequence: positions, and labels as shifted."""
    first = distributed.get_rank() % plan.sequence_ranks * ids.shape[1]
    positions = torch.arange(first, first + ids.shape[1], device=ids.device)
    return {"position_ids": positions.repeat(len(ids), 1), "shift_labels": labels}


@contextmanager
def communication_logged() -> Iterator[list[Messages]]:
    """The calls that DeepSpeed makes meanwhile, by its own log (deepspeed.comm ``timed_op``), which waits for each.

    The list is filled at the end.
    """
    module: Any = import_module("deepspeed.comm.comm")
    logger = module.comms_logger
    calls: dict[str, list[tuple[float, int]]] = {}
    found: list[Messages] = []

    def append(raw_name: str, record_name: str, latency_ms: float, size_bytes: int) -> None:
        calls.setdefault(raw_name, []).append((latency_ms, size_bytes))

    # Its own computes bandwidths besides, and ends the process at a collective that it has no formula for.
    usual, logger.append = logger.append, append
    module.configure(enabled=True, prof_all=True)
    try:
        yield found
    finally:
        module.configure(enabled=False)
        logger.append = usual
    for name, made in calls.items():
        found.append(
            Messages(
                collective=name,
                calls=len(made),
                size_bytes=sum(size_bytes for _, size_bytes in made),
                seconds=sum(latency_ms for latency_ms, _ in made) / 1000,
            )
        )


def keep_own_part(output: torch.Tensor, whole: torch.Tensor, rank: int) -> None:
    """Write *rank*'s part of *whole* into *output*, as a reduce-scatter does; nothing is allocated."""
    output.copy_(whole.detach().flatten()[rank * output.numel() :][: output.numel()].view_as(output))


def use_collectives_of_torch() -> None:
    """Keep DeepSpeed from compiling its shared-memory collectives, which takes minutes and can wait on a dead lock."""
    backend: Any = import_module("deepspeed.comm.torch")  # as an attribute of deepspeed.comm, that name is torch itself
    backend.build_shm_op = lambda: None


def leave_out_cpu_adam() -> None:
    """Spare a compiler: DeepSpeedCPUAdam's kernel works in place, and takes and frees nothing.

    ops/adam/cpu_adam.py makes the moments, and asks which processor this is for a warning alone.
    """
    from deepspeed.ops.op_builder import CPUAdamBuilder

    def nothing(*_: object) -> None:
        """Updates no weights."""

    kernel = SimpleNamespace(create_adam=nothing, adam_update=nothing, destroy_adam=nothing)
    CPUAdamBuilder.load = lambda self, verbose=True: kernel
    processor: Any = import_module("cpuinfo")
    processor.get_cpu_info = dict


def by_torch(model: Any, job: Job, plan: Plan, device: torch.device) -> Engine:
    """DistributedDataParallel, FSDP2 set up as accelerate does, or for one GPU alone nothing, in a plain loop."""
    if not distributed.is_initialized():
        distributed.init_process_group(BACKENDS[device.type])
    wrapper, sharded = model, plan.strategy.is_fsdp
    if sharded:
        with _disable_current_modes():  # the mesh's own list of ranks lies on the host, and is not counted
            mesh = mesh_of(plan, device.type)
        fully_sharded(model, mesh, job, plan)
    elif distributed.get_backend() == "fake":
        wrapper = data_parallel_emulated(model)
    elif int(plan.gpus) > 1:
        wrapper = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = optimizer_of(model, job)
    autocast = job.parameter_format != job.precision and not sharded

    def forward(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, dtype=FORMATS[job.precision], enabled=autocast):
            loss: torch.Tensor = wrapper(input_ids=ids, labels=labels).loss
        return loss

    def update(last: bool) -> None:
        if last:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def micro_step(last: bool) -> AbstractContextManager[Any]:
        if sharded:
            wrapper.set_requires_gradient_sync(last or plan.fsdp.syncs_each_micro_batch)
        reduces = last or sharded or wrapper is model
        return contextlib.nullcontext() if reduces else wrapper.no_sync()

    def backward(loss: Any) -> None:
        loss.backward()

    return Engine(wrapper, optimizer, forward, backward, update, micro_step)
