"""The weights of a module, handed out in the order in which its code uses them."""

from __future__ import annotations

from dataclasses import dataclass

from advisor.errors import SpecError
from advisor.specs.model import Parameter
from advisor.step.tape import Weight


@dataclass(eq=False)
class Weights:
    """The parameters of one module, claimed one by one as its code uses them."""

    unclaimed: list[Weight]

    def take(self, *shape: int) -> Weight:
        """The first unclaimed parameter of *shape*, or of its transpose (GPT-2's Conv1D)."""
        for index, weight in enumerate(self.unclaimed):
            if weight.parameter.shape in (shape, shape[:-2] + shape[:-3:-1]):
                weight.shape = shape
                return self.unclaimed.pop(index)
        left = ", ".join(f"{weight.parameter.name} {weight.parameter.shape}" for weight in self.unclaimed)
        raise SpecError(f"no parameter of shape {shape} is left among: {left or 'none'}")

    def bias(self, width: int, present: bool) -> Weight | None:
        return self.take(width) if present else None


def weights_of(parameters: tuple[Parameter, ...], element_bytes: int) -> Weights:
    return Weights([Weight(parameter, element_bytes) for parameter in parameters])
