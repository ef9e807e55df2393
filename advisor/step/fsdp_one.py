"""PyTorch FSDP1 as accelerate 1.15 sets it up (torch 2.13, distributed/fsdp; accelerator.py ``prepare_model``).

Each layer's parameters are laid into one flat tensor, and all others into that of the root; a flat tensor is padded
to equal cuts, each parameter in it to 16 bytes (``use_orig_params``). Layers are gathered without prefetch, which is
accelerate's default, and freed after use; the root stays whole from the start of forward to the end of backward.
Weights are held in the parameter format, gathered and reduced in the half format, and forward runs under autocast.

Left out: ``record_stream``, which on a GPU lets a freed layer count for a little longer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property

from advisor.specs.model import Parameter
from advisor.step.program import Amount, Block, Collective, hold, release, total
from advisor.step.scheme import MicroStep, Nodes, Part
from advisor.step.sharded import Sharded
from advisor.step.states import (
    FP32_BYTES,
    FlatUnit,
    flat_unit,
)

ADDRESS_BYTES = 16
"""Each parameter starts at a multiple of this in its flat tensor (_flat_param.py ``_get_aligned_numel``)."""


class FullyShardedDataParallelOne(Sharded):
    """``FULL_SHARD`` frees a layer after forward; ``SHARD_GRAD_OP`` keeps it to backward."""

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
        return total(unit.share * times for unit, times in self._every_unit)

    @property
    def updated(self) -> Amount:
        return total(unit.filled * times for unit, times in self._every_unit)

    @property
    def tensors(self) -> Amount:
        return total(unit.tensors * times for unit, times in self._every_unit)

    def held_sizes(self) -> list[Amount]:
        size = self.job.parameter_bytes
        return [unit.share * size for unit, times in self._every_unit for _ in range(times)]

    @property
    def streams(self) -> Mapping[str, str]:
        """``_unshard_stream`` and ``_post_backward_stream`` (_runtime_utils.py)."""
        gathers = dict.fromkeys(("gathered root", "gathered layer"), "unshard")
        return {**gathers, "gradients, rank's share": "post-backward"}

    def begin_forward(self) -> Nodes:
        return self._gather(self.root, "root", ahead=1)

    def before_forward(self, part: Part) -> Nodes:
        return self._gather(part.parameters, "layer", ahead=1) if part.kind == "layer" else ()

    def after_forward(self, part: Part) -> Nodes:
        return (self._free(part.parameters, "layer"),) if part.kind == "layer" and self.reshards else ()

    def before_backward(self, part: Part, micro: MicroStep) -> Nodes:
        # NO_PREFETCH, accelerate's default: asked for after the layer before it was reduced, on the same communicator.
        return self._gather(part.parameters, "layer", ahead=0) if part.kind == "layer" and self.reshards else ()

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
        flat, kept = self._whole(parameters), 1 if self.plan.fsdp.syncs_each_micro_batch else micro.first
        laid = (
            Block("flat gradients", "gradients", flat * kept, flat, "gradients"),
            release("gradients of a unit", "gradients", separate),
        )
        if not self.reduces(micro):
            return (*laid, self._free(parameters, name)) if self.reshards else laid
        return (
            *laid,
            self._free(parameters, name),
            self.reduced(unit.share, flat, micro),
            release("flat gradients", "gradients", flat),
        )

    def end_backward(self, micro: MicroStep) -> Nodes:
        if self.reshards or self.reduces(micro):
            return ()
        # Weights that stay whole for the next micro-batch are let go of here, and taken again in its forward.
        layers = total(self._whole(layer.parameters) for layer in self.model.layers)
        return (release("gathered layer", "parameters", layers), self._free(self.root, "root"))

    def sizes(self) -> Iterator[Amount]:
        outside = self._unit(self.root).pieces
        yield from outside[: len(self.model.embedding)]
        for layer in self.model.layers:
            yield from self._unit(layer.parameters).pieces
        yield from outside[len(self.model.embedding) :]

    def _gather(self, parameters: tuple[Parameter, ...], name: str, ahead: int) -> Nodes:
        """The rank's share is cast, and gathered into the flat tensor that the parameters are views of."""
        size, cast = self._whole(parameters), self._unit(parameters).share * self.job.compute_bytes * self.casts
        gather = Collective("weights", "all-gather", size, 1, waits=True, group="shard", ahead=ahead)
        return (
            Block(
                f"gathered {name}", "parameters", size, size + cast, "buffers", moved_bytes=size, transfers=(gather,)
            ),
        )

    def _free(self, parameters: tuple[Parameter, ...], name: str) -> Block:
        return release(f"gathered {name}", "parameters", self._whole(parameters))
