"""In which order the gradients of a backward pass are handed over."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from advisor.specs.model import ModelSpec, Parameter
from advisor.step.recording import Mode
from advisor.step.recording import Source as Recordings
from advisor.step.scheme import Part
from advisor.step.tape import Event

Where = int | str
"""A layer by number, or the embedding or the head."""
Source = tuple[Where, Parameter]


class Arrival(NamedTuple):
    """The gradients of one backward pass in the order in which they are handed over."""

    tensors: tuple[int, ...]
    """Each by its number among the trained tensors in registration order."""
    sources: tuple[Source, ...]


@lru_cache(maxsize=32)
def arrival(model: ModelSpec, mode: Mode, checkpointed: bool, recordings: Recordings) -> Arrival:
    """The arrival of *model*'s gradients. A tied matrix comes once both of its are summed, with the embedding."""
    head = recordings.head(model, mode, checkpointed)
    trained_head = _trained(model.head)
    first = len(model.trained) - len(trained_head)
    heads = {parameter: first + number for number, parameter in enumerate(trained_head)}
    found: list[tuple[int, Where, Parameter]] = [
        (heads[each], "head", each) for each in handed_over(head.backward) if each in heads
    ]
    for number in range(len(model.layers) - 1, -1, -1):
        layer = model.layers[number]
        trained = _trained(layer.parameters)
        first -= len(trained)
        recorded = recordings.layer(layer, model.hidden_size, mode, checkpointed).backward
        at = {parameter: first + index for index, parameter in enumerate(trained)}
        found += [(at[each], number, each) for each in handed_over(recorded)]
    places = {parameter: number for number, parameter in enumerate(_trained(model.embedding))}
    recorded = recordings.embedding(model, mode, checkpointed).backward
    found += [(places[each], "embedding", each) for each in handed_over(recorded)]
    return Arrival(tuple(each[0] for each in found), tuple(each[1:] for each in found))


def _trained(parameters: tuple[Parameter, ...]) -> tuple[Parameter, ...]:
    return tuple(parameter for parameter in parameters if parameter.trained)


def handed_over(events: tuple[Event, ...]) -> list[Parameter]:
    """The parameters whose gradients *events* hand over, in order."""
    return [event.parameter for event in events if event.kind == "gradient" and event.parameter is not None]


def where(part: Part) -> Where | None:
    """Where *part* stands; None for layers that stand together."""
    return part.number if part.kind == "layer" else part.kind
