"""The weights of a module, handed out in the order in which its code uses them."""

from __future__ import annotations

from dataclasses import dataclass

from advisor.errors import SpecError
from advisor.specs.model import Parameter
from advisor.step.tape import Adapter, Weight

ADAPTER_INFIX, ADAPTED_INFIX = ".lora_", ".base_layer."
"""What stands behind a module's name in those of its adapters, and of its own parameters where it has adapters."""


@dataclass(eq=False)
class Weights:
    """The parameters of one module, claimed one by one as its code uses them."""

    unclaimed: list[Weight]
    latest: str = ""
    """The module whose parameter was claimed last."""

    def every(self) -> list[Weight]:
        """Those that are unclaimed, and the adapters beside them."""
        adapters = (each for weight in self.unclaimed if weight.adapter for each in weight.adapter.weights)
        return [*self.unclaimed, *adapters]

    def take(self, *shape: int) -> Weight:
        """The first unclaimed parameter of *shape*, or of its transpose (GPT-2's Conv1D), biases last."""
        fitting = [each for each in self.unclaimed if each.parameter.shape in (shape, shape[:-2] + shape[:-3:-1])]
        return self._claim(min(fitting, key=lambda each: each.parameter.is_bias, default=None), shape)

    def bias(self, width: int, present: bool = True) -> Weight | None:
        """Where it is *present*, the bias of the module whose weight was claimed last; the first of *width* if none."""
        if not present:
            return None
        fitting = [each for each in self.unclaimed if each.parameter.shape == (width,)]
        return self._claim(min(fitting, key=lambda each: each.parameter.module != self.latest, default=None), (width,))

    def _claim(self, weight: Weight | None, shape: tuple[int, ...]) -> Weight:
        if weight is not None:
            self.unclaimed.remove(weight)
            self.latest, weight.shape = weight.parameter.module, shape
            return weight
        left = ", ".join(f"{weight.parameter.name} {weight.parameter.shape}" for weight in self.unclaimed)
        raise SpecError(f"no parameter of shape {shape} is left among: {left or 'none'}")


def weights_of(
    parameters: tuple[Parameter, ...], element_bytes: int, trained_bytes: int, adapter_dropout: float = 0.0
) -> Weights:
    """Weights for *parameters*, in one format those that are frozen and in one those that are trained.

    Adapters come with the weights that they stand beside.
    """
    found: list[Weight] = []
    beside: dict[str, list[Weight]] = {}
    for parameter in parameters:
        weight = Weight(parameter, trained_bytes if parameter.trained else element_bytes)
        module, is_adapter, _ = parameter.name.partition(ADAPTER_INFIX)
        if is_adapter:
            weight.shape = parameter.shape
            beside.setdefault(module, []).append(weight)
        else:
            found.append(weight)
    for weight in found:
        module, is_adapted, kind = weight.parameter.name.partition(ADAPTED_INFIX)
        if is_adapted and kind == "weight":
            inner, outer, *magnitude = beside[module]
            weight.adapter = Adapter(inner, outer, adapter_dropout, magnitude[0] if magnitude else None)
    return Weights(found)
