"""Runs a real transformers model without its data and records what the step holds.

The model is built under torch's FakeTensorMode, which runs the real modelling code, autograd, FSDP2 and optimizer on
tensors that have shapes but no memory. With several ranks, torch's fake process group makes this process rank 0 of
them. A dispatch mode counts every storage from its creation to its end. What a CPU cannot show is not in the count:
kernel scratch, the allocator's rounding, NCCL, the CUDA context.

Needs the extra ``run``; this module imports torch.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from advisor.errors import ConfigError
from advisor.specs.job import Job
from advisor.specs.model import Objective
from advisor.specs.plan import Checkpointing, Plan, Strategy

AUTO_CLASSES: dict[Objective, str] = {
    "causal": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
}


@dataclass(frozen=True, slots=True)
class Trace:
    """Bytes that one rank held in the second of two optimizer steps."""

    parameters: int
    states_bytes: int
    forward_peak_bytes: int
    """Highest up to the loss, the loss included."""
    after_forward_bytes: int
    backward_peak_bytes: int
    step_peak_bytes: int

    @property
    def peak_bytes(self) -> int:
        return max(self.forward_peak_bytes, self.backward_peak_bytes, self.step_peak_bytes)


class StorageCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of live storages.

    A dispatch mode keeps autograd from summing two gradients of one tensor in place, which real runs do; the
    counter does it in its stead.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: dict[int, int] = {}
        self.on_host: set[int] = set()
        self.live_bytes = 0
        self.peak_bytes = 0
        self.in_backward = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.in_backward and _sums_two_gradients(func, args, kwargs):
            return torch.ops.aten.add_.Tensor(*args)
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor)
        return output

    def _count(self, tensor: torch.Tensor) -> None:
        """Take note of *tensor*'s storage; a distributed tensor's is its local shard's. Meta tensors have none."""
        if tensor.device.type == "meta":
            return
        storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = 0
            weakref.finalize(storage, self._forget, key)
        self.resized(storage)

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Take note of a storage's size, which FSDP2 changes to free gathered weights."""
        key = storage._cdata
        if key in self.sizes and key not in self.on_host:
            self.live_bytes += storage.nbytes() - self.sizes[key]
            self.sizes[key] = storage.nbytes()
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def leave_out(self, tensor: torch.Tensor) -> None:
        """Take *tensor* out of the count: a GPU run keeps it in host memory."""
        key = tensor.untyped_storage()._cdata
        if key not in self.on_host:
            self.live_bytes -= self.sizes.get(key, 0)
            self.on_host.add(key)

    def _forget(self, key: int) -> None:
        size = self.sizes.pop(key)
        self.live_bytes -= 0 if key in self.on_host else size
        self.on_host.discard(key)

    @contextmanager
    def phase(self) -> Iterator[None]:
        """Start a new peak."""
        self.peak_bytes = self.live_bytes
        yield


def _sums_two_gradients(func: Any, args: Any, kwargs: Any) -> bool:
    return (
        func is torch.ops.aten.add.Tensor
        and not torch.is_grad_enabled()
        and not kwargs
        and len(args) == 2
        and all(isinstance(each, torch.Tensor) for each in args)
        and args[0].shape == args[1].shape
        and args[0].dtype == args[1].dtype
    )


def trace_step(config: Mapping[str, Any], objective: Objective, job: Job, plan: Plan) -> Trace:
    """Two optimizer steps of the model that *config* describes, on rank 0 of *plan*'s GPUs.

    One GPU alone, or FSDP2 set up as accelerate does. On one GPU, weights wider than the job's precision run under
    autocast. Dropout is off: the CPU's fused attention has none. Raises ConfigError where transformers refuses.
    """
    import transformers
    from transformers import masking_utils

    settings = {key: value for key, value in config.items() if not key.startswith("_")}
    family = settings.pop("model_type")
    built = transformers.AutoConfig.for_model(family, **settings)
    built.use_cache = False
    if objective == "seq2seq":
        built.decoder_start_token_id = built.pad_token_id = 0
    for name in DROPOUT_SETTINGS:
        if hasattr(built, name):
            setattr(built, name, 0.0)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[job.parameter_format]
    mesh = _mesh(int(plan.gpus)) if plan.strategy.is_fsdp else None
    # A real run finds that plain batches are not packed and builds no mask; fake tensors cannot be asked.
    packed, masking_utils.find_packed_sequence_indices = masking_utils.find_packed_sequence_indices, _not_packed
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), StorageCounter() as counter, resizes_counted(counter):
            factory = getattr(transformers, AUTO_CLASSES[objective])
            model = factory.from_config(built, dtype=dtype, attn_implementation=job.attention)
            model.train()
            if plan.checkpointing is Checkpointing.FULL:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            if mesh is not None:
                shard(model, mesh, plan.strategy is Strategy.FSDP)
            optimizer = torch.optim.AdamW(model.parameters(), **adamw(job))
            ids = torch.zeros(int(plan.micro_batch), job.sequence_length, dtype=torch.long)
            autocast = job.parameter_format == "fp32" and job.precision != "fp32"
            _step(counter, model, optimizer, ids, autocast)
            return _step(counter, model, optimizer, ids, autocast)
    except ValueError as error:
        raise ConfigError(f"transformers cannot build or run {family}: {error}") from error
    finally:
        masking_utils.find_packed_sequence_indices = packed


def _mesh(ranks: int) -> Any:
    """A device mesh of which this process is rank 0; the others are not there."""
    import torch.distributed as distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if distributed.is_initialized():
        distributed.destroy_process_group()
    distributed.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    return init_device_mesh("cpu", (ranks,))


def shard(model: Any, mesh: Any, reshards: bool) -> None:
    """FSDP2's groups as accelerate 1.15 makes them (utils/fsdp_utils.py ``fsdp2_prepare_model``)."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    half = torch.bfloat16
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=half, output_dtype=half)
    inner = model.base_model
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    for layer in inner.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=reshards)
    tail = [inner.norm, output]
    if embedding.weight is output.weight:
        tail.insert(1, embedding)
    else:
        fully_shard(embedding, mesh=mesh, mp_policy=policy, reshard_after_forward=reshards)
    fully_shard(tail, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, mp_policy=policy)


@contextmanager
def resizes_counted(counter: StorageCounter) -> Iterator[None]:
    """Let *counter* know when a storage changes its size."""
    original = torch.UntypedStorage.resize_

    def resize(storage: torch.UntypedStorage, size: int) -> Any:
        result = original(storage, size)
        counter.resized(storage)
        return result

    setattr(torch.UntypedStorage, "resize_", resize)  # noqa: B010 - mypy refuses the plain assignment
    try:
        yield
    finally:
        setattr(torch.UntypedStorage, "resize_", original)  # noqa: B010


def _step(counter: StorageCounter, model: Any, optimizer: Any, ids: torch.Tensor, autocast: bool) -> Trace:
    states = counter.live_bytes - ids.untyped_storage().nbytes()
    labels = torch.zeros_like(ids)
    with counter.phase(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = model(input_ids=ids, labels=labels).loss
    forward_peak, after_forward = counter.peak_bytes, counter.live_bytes
    with counter.phase():
        counter.in_backward = True
        loss.backward()
        counter.in_backward = False
    backward_peak = counter.peak_bytes
    del loss, labels
    with counter.phase():
        optimizer.step()
    step_peak = counter.peak_bytes
    leave_out_step_counters(counter, optimizer)
    optimizer.zero_grad(set_to_none=True)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Trace(parameters, states, forward_peak, after_forward, backward_peak, step_peak)


def leave_out_step_counters(counter: StorageCounter, optimizer: Any) -> None:
    """Only a fused AdamW keeps its step counters on the GPU."""
    if not optimizer.defaults["fused"]:
        for state in optimizer.state.values():
            counter.leave_out(getattr(state["step"], "_local_tensor", state["step"]))


def adamw(job: Job) -> dict[str, Any]:
    return {
        "adamw-fused": {"fused": True},
        "adamw-foreach": {"foreach": True},
        "adamw-loop": {"foreach": False, "fused": False},
    }[job.optimizer]


DROPOUT_SETTINGS = (
    "activation_dropout",
    "attention_dropout",
    "attention_probs_dropout_prob",
    "attn_pdrop",
    "dropout",
    "dropout_rate",
    "embd_pdrop",
    "embedding_dropout",
    "hidden_dropout",
    "hidden_dropout_prob",
    "resid_pdrop",
    "residual_dropout",
)


def _not_packed(*_: Any, **__: Any) -> None:
    return None
