"""Makes a real model one rank of many, under DDP, FSDP2 or FSDP1.

The model is wrapped as accelerate 1.15 wraps it. torch's fake process group makes this process rank 0 of the plan's
GPUs; the others are not there, and collectives do nothing, but what they would read and write is allocated.

Needs the extra ``run``; this module imports torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as distributed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import _disable_current_modes

from advisor.specs.job import Job
from advisor.specs.plan import Plan, Strategy
from advisor.tracing.counter import StorageCounter, resizes_counted

FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Wrapped:
    """A model as its strategy runs it."""

    run: Callable[..., Any]
    """Its forward pass."""
    unsynced: Callable[[], Any]
    """A context in which backward leaves gradients unreduced."""
    after_step: Callable[[], None] = lambda: None
    """Drops what the optimizer's own ``zero_grad`` leaves to the next forward pass."""


@contextmanager
def ranks_of(plan: Plan) -> Iterator[Any]:
    """A process group and device mesh of *plan*'s ranks of which this process is the first; none for one GPU alone."""
    count = int(plan.gpus)
    if count == 1 and not plan.strategy.is_fsdp:
        yield None
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if distributed.is_initialized():
        distributed.destroy_process_group()
    # Of context-parallel ranks the one that is recorded (advisor/step/ring_attention.py).
    rank = (plan.context_parallel - 1) // 2
    distributed.init_process_group("fake", rank=rank, world_size=count, store=FakeStore())
    try:
        yield mesh_of(plan, "cpu")
    finally:
        distributed.destroy_process_group()


def mesh_of(plan: Plan, device_type: str) -> Any:
    """The device mesh that FSDP2 cuts tensors over: of HSDP the replicas, and the ranks of each."""
    from torch.distributed.device_mesh import init_device_mesh

    count, shard = int(plan.gpus), int(plan.shard_ranks)
    if plan.context_parallel > 1:
        mesh = init_device_mesh(
            device_type, (count // plan.context_parallel, plan.context_parallel), mesh_dim_names=("data", "context")
        )
        return mesh["data", "context"]._flatten("shard")
    if plan.strategy is not Strategy.HSDP:
        return init_device_mesh(device_type, (count,))
    return init_device_mesh(device_type, (count // shard, shard), mesh_dim_names=("replica", "shard"))


@contextmanager
def whole_attention(plan: Plan, device_type: str, counter: StorageCounter) -> Iterator[None]:
    """While active, torch's attention goes over the tokens of all context-parallel ranks.

    accelerator.py ``_prepare_cp`` and torch 2.13's ``context_parallel``, less what that does to the batch. How a
    distributed tensor finds out the shapes of its results is left out of the count: a GPU has no part in it.
    """
    if plan.context_parallel == 1:
        yield
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental._context_parallel import _attention

    ring: Any = _attention
    ring.set_rotate_method(plan.fsdp.context_exchange)
    shape = int(plan.gpus) // plan.context_parallel, plan.context_parallel
    with _disable_current_modes():  # the mesh's own list of ranks lies on the host, and is not counted
        mesh = init_device_mesh(device_type, shape, mesh_dim_names=("data", "context"))["context"]
    propagator: Any = DTensor._op_dispatcher.sharding_propagator
    propagate = propagator.propagate

    def uncounted(*arguments: Any, **words: Any) -> Any:
        counter.pauses = True
        try:
            return propagate(*arguments, **words)
        finally:
            counter.pauses = False

    ring._enable_context_parallel_dispatcher_impl(seq_dim=2, mesh=mesh)
    try:
        with mock.patch.object(propagator, "propagate", uncounted):
            yield
    finally:
        ring._disable_context_parallel_dispatcher_impl()


@contextmanager
def counted() -> Iterator[StorageCounter]:
    """Fake tensors whose storages are counted. FSDP1 asks for addresses, which they do not have."""
    from torch.distributed.fsdp import _flat_param

    allocated = mock.patch.object(_flat_param, "_data_ptr_allocated", _flat_param._storage_size_allocated)
    with allocated, FakeTensorMode(allow_non_fake_inputs=True), StorageCounter() as counter, resizes_counted(counter):
        yield counter


def wrap(model: Any, mesh: Any, job: Job, plan: Plan) -> Wrapped:
    """*model* as accelerate's ``prepare`` hands it back."""
    if mesh is None:
        _autocast(model, job)
        return Wrapped(model, contextlib.nullcontext)
    if plan.strategy is Strategy.DDP:
        return _data_parallel(model, job)
    if plan.fsdp.version == 1:
        return _fully_sharded_one(model, job, plan)
    return fully_sharded(model, mesh, job, plan)


def _data_parallel(model: Any, job: Job) -> Wrapped:
    """``DistributedDataParallel`` around a forward pass under autocast (accelerator.py ``prepare_model``)."""
    _autocast(model, job)
    wrapped = data_parallel_emulated(model)
    wrapped.reducer = _FirstBuckets(wrapped.reducer)
    return Wrapped(wrapped, wrapped.no_sync)


def data_parallel_emulated(model: Any) -> Any:
    """``DistributedDataParallel`` in a fake process group, of which its reducer takes no all-reduce of its own."""
    wrapped: Any = torch.nn.parallel.DistributedDataParallel(model, init_sync=False)
    wrapped.register_comm_hook(None, lambda state, bucket: _done(bucket.buffer()))  # every bucket back as it is
    return wrapped


def _done(buffer: torch.Tensor) -> Any:
    future: Any = torch.futures.Future()
    future.set_result(buffer)
    return future


class _FirstBuckets:
    """A reducer that keeps its first buckets: laying them out anew, which changes no size, reads what tensors hold."""

    def __init__(self, reducer: Any) -> None:
        self._reducer = reducer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reducer, name)

    def _rebuild_buckets(self) -> bool:
        return False


def _mixes(job: Job) -> bool:
    """Whether accelerate's ``mixed_precision`` is on."""
    return job.precision != job.parameter_format


def _autocast(model: Any, job: Job) -> None:
    """Run *model*'s forward pass under autocast where formats are mixed."""
    if not _mixes(job):
        return
    forward = model.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", dtype=FORMATS[job.precision]):
            return forward(*args, **kwargs)

    model.forward = run


def fully_sharded(model: Any, mesh: Any, job: Job, plan: Plan) -> Wrapped:
    """FSDP2's groups as accelerate makes them (utils/fsdp_utils.py ``fsdp2_prepare_model``). There is no autocast."""
    from accelerate.utils.fsdp_utils import _find_final_norm
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    half = FORMATS[job.precision] if _mixes(job) else None
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=half, output_dtype=half)
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy}
    reshards = plan.strategy is not Strategy.FSDP_GRAD_OP
    for layer in _layers(model):
        fully_shard(layer, reshard_after_forward=reshards, **options)
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    tail = [_find_final_norm(model), output]
    if embedding.weight is output.weight:
        tail.insert(1, embedding)
    else:
        fully_shard(embedding, reshard_after_forward=reshards, **options)
    fully_shard([module for module in tail if module is not None], reshard_after_forward=False, **options)
    fully_shard(model, **options)

    @contextmanager
    def unsynced() -> Iterator[None]:
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)

    return Wrapped(model, unsynced)


def _layers(model: Any) -> list[Any]:
    """The modules that accelerate makes units of: those whose classes the model says are not to be split."""
    names = set(model._no_split_modules)
    return [module for module in model.modules() if type(module).__name__ in names]


def _fully_sharded_one(model: Any, job: Job, plan: Plan) -> Wrapped:
    """FSDP1 around a forward pass under autocast (accelerator.py ``prepare_model``), with accelerate's defaults."""
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    _autocast(model, job)
    half = FORMATS[job.precision]
    mixed = MixedPrecision(param_dtype=half, reduce_dtype=half, buffer_dtype=half) if _mixes(job) else None
    full = plan.strategy is Strategy.FSDP
    wrapped: Any = FullyShardedDataParallel(
        model,
        sharding_strategy=ShardingStrategy.FULL_SHARD if full else ShardingStrategy.SHARD_GRAD_OP,
        auto_wrap_policy=ModuleWrapPolicy({type(layer) for layer in _layers(model)}),
        mixed_precision=mixed,
        backward_prefetch=None,
        use_orig_params=True,
        limit_all_gathers=True,
        device_id=torch.device("cpu"),
    )
    return Wrapped(wrapped, wrapped.no_sync, lambda: _drop_gradients(wrapped))


def _drop_gradients(wrapped: Any) -> None:
    """What FSDP1 does first in the next forward pass: ``zero_grad`` alone leaves the flat gradients."""
    from torch.distributed.fsdp._runtime_utils import _reset_flat_param_grad_info_if_needed

    _reset_flat_param_grad_info_if_needed(wrapped._all_handles)
