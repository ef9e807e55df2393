"""PyTorch FSDP1 as accelerate 1.15 sets it up (torch 2.13, distributed/fsdp; accelerator.py ``prepare_model``).

Each layer's parameters are laid into one flat tensor, and all others into that of the root; a flat tensor is padded
to equal cuts, each parameter in it to 16 bytes (``use_orig_params``). Layers are gathered without prefetch, which is
accelerate's default, and freed after use; the root stays whole from the start of forward to the end of backward.
Weights are held in the parameter format, gathered and reduced in the half format, and forward runs under autocast.

Left out: ``record_stream``, which on a GPU lets a freed layer count for a little longer.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

from advisor.specs.model import Parameter
from advisor.specs.plan import Strategy
from advisor.step.program import Amount, Block, Collective, hold, release, scratch, total
from advisor.step.scheme import MicroStep, Nodes, Part, Scheme
from advisor.step.states import (
    ADAM_MOVES,
    FP32_BYTES,
    MOMENTS,
    FlatUnit,
    adam_step_counters,
    adam_temporaries,
    flat_unit,
)

ADDRESS_BYTES = 16
"""Each parameter starts at a multiple of this in its flat tensor (_flat_param.py ``_get_aligned_numel``)."""


class FullyShardedDataParallelOne(Scheme):
    """``FULL_SHARD`` frees a layer after forward; ``SHARD_GRAD_OP`` keeps it to backward."""

    @property
    def parameter_bytes(self) -> int:
        return self.job.compute_bytes

    @property
    def autocasts_half(self) -> bool:
        return self.casts

    @property
    def tables_bytes(self) -> int:
        """Mixed precision casts the model's registered buffers as well. Those of causal models hold no integers."""
        if not self.casts:
            return super().tables_bytes
        sizes = {True: self.job.compute_bytes, False: FP32_BYTES}
        return sum(buffer.numel * sizes[buffer.registered] for buffer in self.model.buffers)

    @property
    def reshards(self) -> bool:
        return self.plan.strategy is Strategy.FSDP

    @property
    def casts(self) -> bool:
        """Whether weights are cast before they are gathered, and reduced gradients back."""
        return self.job.compute_bytes != self.job.parameter_bytes

    @cached_property
    def root(self) -> tuple[Parameter, ...]:
        """What is outside the layers."""
        return self.model.embedding + self.model.head

    def _unit(self, parameters: tuple[Parameter, ...]) -> FlatUnit:
        if parameters not in self._units:
            aligned = ADDRESS_BYTES // self.job.compute_bytes
            self._units[parameters] = flat_unit(parameters, self.plan.gpus, aligned)
        return self._units[parameters]

    @cached_property
    def _units(self) -> dict[tuple[Parameter, ...], FlatUnit]:
        return {}

    def _whole(self, parameters: tuple[Parameter, ...]) -> Amount:
        return self._unit(parameters).share * self.plan.gpus * self.job.compute_bytes

    @cached_property
    def _every_unit(self) -> tuple[tuple[FlatUnit, int], ...]:
        """Each kind of unit and how often it stands in the model."""
        layers = [(layer.parameters, run.repeats) for run in self.model.runs for layer in run.layers]
        return tuple((self._unit(parameters), times) for parameters, times in [(self.root, 1), *layers])

    @cached_property
    def shard(self) -> Amount:
        """Elements of the model on one rank, padding included."""
        return total(unit.share * times for unit, times in self._every_unit)

    def states(self) -> Nodes:
        share = self.shard * self.job.parameter_bytes
        filled = total(unit.filled * times for unit, times in self._every_unit)
        tensors = total(unit.tensors * times for unit, times in self._every_unit)
        return (
            hold("weights, rank's share", "parameters", share),
            hold("Adam moments, rank's share", "optimizer", MOMENTS * filled * self.job.parameter_bytes),
            hold("Adam step counters", "optimizer", adam_step_counters(self.job, tensors)),
        )

    def begin_forward(self) -> Nodes:
        return self._gather(self.root, "root")

    def before_forward(self, part: Part) -> Nodes:
        return self._gather(part.parameters, "layer") if part.kind == "layer" else ()

    def after_forward(self, part: Part) -> Nodes:
        return (self._free(part.parameters, "layer"),) if part.kind == "layer" and self.reshards else ()

    def before_backward(self, part: Part, micro: MicroStep) -> Nodes:
        return self._gather(part.parameters, "layer") if part.kind == "layer" and self.reshards else ()

    def gradient(self, part: Part, parameter: Parameter, size_bytes: int, micro: MicroStep) -> Nodes:
        return (hold("gradients of a unit", "gradients", size_bytes),)

    def after_backward(self, part: Part, micro: MicroStep) -> Nodes:
        if part.kind == "head":
            return ()
        return self._finish(*((part.parameters, "layer") if part.kind == "layer" else (self.root, "root")), micro)

    def _finish(self, parameters: tuple[Parameter, ...], name: str, micro: MicroStep) -> Nodes:
        """Lay a unit's gradients into one tensor, free its weights, and reduce where gradients are reduced."""
        unit = self._unit(parameters)
        separate = sum(parameter.numel for parameter in parameters) * self.job.compute_bytes
        synced = self.plan.fsdp.syncs_each_micro_batch
        flat, kept = self._whole(parameters), 1 if synced else micro.first
        laid = (
            Block("flat gradients", "gradients", flat * kept, flat, "gradients"),
            release("gradients of a unit", "gradients", separate),
        )
        reduces = micro.last or synced
        if not reduces:
            return (*laid, self._free(parameters, name)) if self.reshards else laid
        reduced, output = unit.share * self.job.parameter_bytes, unit.share * self.job.compute_bytes * self.casts
        reduce = Collective("gradients", "reduce-scatter", flat, 1, waits=False)
        return (
            *laid,
            self._free(parameters, name),
            Block(
                "gradients, rank's share",
                "gradients",
                reduced * (micro.first if synced else 1),
                reduced + output,
                "buffers",
                moved_bytes=flat,
                transfers=(reduce,),
            ),
            release("flat gradients", "gradients", flat),
        )

    def end_backward(self, micro: MicroStep) -> Nodes:
        if self.reshards or micro.last or self.plan.fsdp.syncs_each_micro_batch:
            return ()
        # Weights that stay whole for the next micro-batch are let go of here, and taken again in its forward.
        layers = total(self._whole(layer.parameters) for layer in self.model.layers)
        return (release("gathered layer", "parameters", layers), self._free(self.root, "root"))

    def _sizes(self) -> Iterator[Amount]:
        outside = self._unit(self.root).pieces
        yield from outside[: len(self.model.embedding)]
        for layer in self.model.layers:
            yield from self._unit(layer.parameters).pieces
        yield from outside[len(self.model.embedding) :]

    def update(self) -> Nodes:
        share, element_bytes = self.shard, self.job.parameter_bytes
        return (
            scratch("Adam temporaries", adam_temporaries(self.job, self._sizes, element_bytes)),
            Block("Adam update", "optimizer", moved_bytes=ADAM_MOVES * share * element_bytes, kernels=1),
            release("gradients, rank's share", "gradients", share * element_bytes),
        )

    def host_once(self) -> Nodes:
        """``cpu_ram_efficient_loading``: rank 0 alone reads the weights and sends them to the others."""
        size = self.model.parameter_count * self.job.parameter_bytes
        return (scratch("weights while loading", size, "parameters"),)

    def _gather(self, parameters: tuple[Parameter, ...], name: str) -> Nodes:
        """The rank's share is cast, and gathered into the flat tensor that the parameters are views of."""
        size, cast = self._whole(parameters), self._unit(parameters).share * self.job.compute_bytes * self.casts
        gather = Collective("weights", "all-gather", size, 1, waits=True)
        return (
            Block(
                f"gathered {name}", "parameters", size, size + cast, "buffers", moved_bytes=size, transfers=(gather,)
            ),
        )

    def _free(self, parameters: tuple[Parameter, ...], name: str) -> Block:
        return release(f"gathered {name}", "parameters", self._whole(parameters))
