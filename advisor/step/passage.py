"""ZeRO-3's gathered weights beside the parts and gradients of one micro-step.

Modules are read off the names of parameters and the order in which they are used: ``self_attn.q_proj.weight`` is held
by the module ``self_attn.q_proj`` inside ``self_attn`` inside the layer. Every module call counts, because DeepSpeed
prefetches at each. Left out: modules without parameters other than one activation a layer and the rotary embedding.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from advisor.specs.model import AnyLayer, ModelSpec, Parameter
from advisor.specs.plan import ZeroSettings
from advisor.step.arrival import Arrival, Source, Where, arrival, handed_over
from advisor.step.gathering import Level, Limits, gathered
from advisor.step.recording import Mode
from advisor.step.recording import Source as Recordings

GATHERED_WHOLE = frozenset({"mixtral", "qwen2_moe", "qwen3_moe"})
"""Families whose block of experts DeepSpeed takes for one module (zero/leaf_module_config.py)."""


class Move(NamedTuple):
    """A change of the gathered elements, and the most that is gathered in between above what was before."""

    net: int
    peak: int


class Stay(NamedTuple):
    """How the gathered elements change around a part's forward pass."""

    entering: Move
    leaving: Move


@dataclass(frozen=True, slots=True)
class Passage:
    """Changes of gathered elements over one micro-step."""

    forward: dict[Where, Stay]
    first: Move
    """At the start of backward."""
    after: dict[Where, tuple[Move, ...]]
    """After each gradient that a part hands over, in order."""
    last: int
    """What is left when the last gradient has come."""
    most: int
    """The most elements gathered at once."""
    usual: dict[Where, Where]
    """For each layer, one of the same kind that fares as most of them do."""

    @property
    def unusual(self) -> frozenset[int]:
        """Layers that fare otherwise than the usual one of their kind."""
        return frozenset(
            number
            for number, other in self.usual.items()
            if isinstance(number, int)
            and (self.forward[number], self.after[number]) != (self.forward[other], self.after[other])
        )


Call = tuple[Where, tuple[int, ...]]
"""A module call: in which part, and the numbers of the tensors that the module owns."""


@lru_cache(maxsize=32)
def passage(model: ModelSpec, mode: Mode, checkpointed: bool, zero: ZeroSettings, recordings: Recordings) -> Passage:
    """The passage of *model* in micro-steps after the first of all, in which DeepSpeed only takes note of the order."""
    arrived = reduced(model, mode, checkpointed, recordings)
    forward = _forward_calls(model, mode, checkpointed, recordings)
    backward = _backward_calls(model, mode, checkpointed, recordings)
    limits = Limits(zero.prefetch_bucket, zero.max_live_parameters, zero.max_reuse_distance, zero.persistence_threshold)
    sizes = tuple(parameter.numel for parameter in model.parameters())
    levels = gathered(tuple(call[1] for call in (*forward, *backward)), sizes, limits)
    stays, held = _stays(forward, levels, mode.loss == "full")
    first, after, last = _changes(arrived, backward, levels[len(forward) :], held)
    return Passage(
        forward=stays,
        first=first,
        after=after,
        last=last,
        most=max(level.running for level in levels),
        usual=_usual(model, stays, after),
    )


@lru_cache(maxsize=32)
def reduced(model: ModelSpec, mode: Mode, checkpointed: bool, recordings: Recordings) -> Arrival:
    """The order in which gradients come to the bucket.

    Those of a block of experts wait until its backward is done, and then come as they are registered (stage3.py
    ``create_reduce_and_remove_grad_hooks``).
    """
    arrived = arrival(model, mode, checkpointed, recordings)
    together = {number: block_of_experts(model, layer) for number, layer in enumerate(model.layers)}
    waiting: list[tuple[int, Source]] = []
    found: list[tuple[int, Source]] = []
    for tensor, source in zip(arrived.tensors, arrived.sources, strict=True):
        block = together[source[0]] if isinstance(source[0], int) else ()
        if source[1] not in block:
            found.append((tensor, source))
            continue
        waiting.append((tensor, source))
        if len(waiting) == len(block):
            found += sorted(waiting, key=lambda pair: pair[0])
            waiting = []
    return Arrival(tuple(each[0] for each in found), tuple(each[1] for each in found))


def block_of_experts(model: ModelSpec, layer: AnyLayer) -> tuple[Parameter, ...]:
    """What DeepSpeed takes for one module's parameters in *layer*: its experts, their router and what runs beside."""
    if model.family not in GATHERED_WHOLE:
        return ()
    blocks = {each.name.partition(".experts.")[0] for each in layer.parameters if ".experts." in each.name}
    return tuple(each for each in layer.parameters if each.name.partition(".")[0] in blocks)


def _stays(calls: list[Call], levels: tuple[Level, ...], loss_after: bool) -> tuple[dict[Where, Stay], int]:
    """Each part's forward pass takes the most that any of its module calls finds, as if from its start to its end.

    In the head that is the loss, which *loss_after* says comes after the last module has ended, not within its call.
    """
    found: dict[Where, Stay] = {}
    held, start = 0, 0
    while start < len(calls):
        end = next((at for at in range(start, len(calls)) if calls[at][0] != calls[start][0]), len(calls))
        part = levels[start:end]
        most, left = max(level.running for level in part), part[-1].after
        if calls[start][0] == "head":
            most = left if loss_after else part[-1].running
        peak = max(level.peak for level in part)
        found[calls[start][0]] = Stay(Move(most - held, peak - held), Move(left - most, 0))
        held, start = left, end
    return found, held


def _changes(
    arrived: Arrival, calls: list[Call], levels: tuple[Level, ...], held: int
) -> tuple[Move, dict[Where, tuple[Move, ...]], int]:
    """The change at the start of backward, that after each gradient, and what is left at the end.

    Between two gradients stands the most that the module calls between them find.
    """
    call_of = {tensor: at for at, (_, tensors) in enumerate(calls) for tensor in tensors}
    moves: list[Move] = []
    passed, before = 0, held
    for tensor in arrived.tensors:
        until = call_of[tensor] + 1
        running = peak = before
        if until > passed:
            running = max(level.running for level in levels[passed:until])
            peak = max(level.peak for level in levels[passed:until])
            passed = until
        moves.append(Move(running - before, peak - before))
        before = running
    after: dict[Where, list[Move]] = {}
    for (part, _), move in zip(arrived.sources, [*moves[1:], Move(0, 0)], strict=True):
        after.setdefault(part, []).append(move)
    return moves[0], {part: tuple(found) for part, found in after.items()}, before


def _usual(model: ModelSpec, stays: dict[Where, Stay], after: dict[Where, tuple[Move, ...]]) -> dict[Where, Where]:
    fares: dict[int, Counter[tuple[Stay, tuple[Move, ...]]]] = {}
    for number, layer in enumerate(model.layers):
        fares.setdefault(id(layer), Counter())[stays[number], after[number]] += 1
    found: dict[Where, Where] = {}
    example: dict[int, int] = {}
    for number, layer in enumerate(model.layers):
        if (stays[number], after[number]) == fares[id(layer)].most_common(1)[0][0]:
            example.setdefault(id(layer), number)
    for number, layer in enumerate(model.layers):
        found[number] = example[id(layer)]
    return found


def _forward_calls(model: ModelSpec, mode: Mode, checkpointed: bool, recordings: Recordings) -> list[Call]:
    # The model with its head, the model, the embedding, the rotary embedding.
    calls: list[Call] = [("embedding", ()), ("embedding", ())]
    calls += [("embedding", tensors) for tensors in _modules(model.embedding, range(len(model.embedding)))]
    calls.append(("embedding", ()))
    for number, used in enumerate(_layers(model, mode, checkpointed, recordings)):
        calls += [(number, ()), *((number, tensors) for tensors in used)]
    return [*calls, *(("head", tensors) for tensors in _head(model))]


def _backward_calls(model: ModelSpec, mode: Mode, checkpointed: bool, recordings: Recordings) -> list[Call]:
    head = list(reversed(_head(model)))
    calls: list[Call] = [("head", ()), ("head", head[0]), ("head", ()), *(("head", tensors) for tensors in head[1:])]
    layers = _layers(model, mode, checkpointed, recordings)
    for number in range(len(layers) - 1, -1, -1):
        again = _enclosing_first(layers[number])
        calls.append((number, ()))
        if checkpointed:
            # The first module whose backward needs what was not kept has the layer computed again.
            calls += [(number, tensors) for tensors in (*again[:2], *layers[number], *again[2:])]
        else:
            calls += [(number, tensors) for tensors in again]
    embeddings = list(reversed(_modules(model.embedding, range(len(model.embedding)))))
    return [*calls, *(("embedding", tensors) for tensors in embeddings)]


def _enclosing_first(calls: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Backward's order: modules from the last to the first, each after the one that encloses it."""
    found: list[tuple[int, ...]] = []
    inside: list[tuple[int, ...]] = []
    for tensors in reversed(calls):
        if tensors:
            inside.append(tensors)
        else:
            found += [tensors, *inside]
            inside = []
    return [*found, *inside]


def _head(model: ModelSpec) -> list[tuple[int, ...]]:
    first = model.tensor_count - len(model.head)
    calls = _modules(model.head, range(first, model.tensor_count))
    return [*calls, (0,)] if model.tied_embeddings else calls


def _layers(model: ModelSpec, mode: Mode, checkpointed: bool, recordings: Recordings) -> list[list[tuple[int, ...]]]:
    """For each layer the module calls inside it, in the order of its forward pass."""
    found: list[list[tuple[int, ...]]] = []
    first = len(model.embedding)
    for layer in model.layers:
        experts = block_of_experts(model, layer)
        recorded = recordings.layer(layer, model.hidden_size, mode, checkpointed).backward
        used = handed_over(recorded)[::-1]
        at = {parameter: first + index for index, parameter in enumerate(layer.parameters)}
        calls: list[tuple[int, ...]] = []
        container = ""
        for path, parameters in _by_module(used, experts):
            if path.rpartition(".")[0] != container:
                container = path.rpartition(".")[0]
                calls += [()] if container else []
            calls.append(tuple(sorted(at[each] for each in parameters)))
        found.append(calls if experts else [*calls[:-1], (), calls[-1]])
        first += len(layer.parameters)
    return found


def _modules(parameters: tuple[Parameter, ...], numbers: range) -> list[tuple[int, ...]]:
    at = dict(zip(parameters, numbers, strict=True))
    return [tuple(at[each] for each in found) for _, found in _by_module(list(parameters))]


def _by_module(parameters: list[Parameter], together: tuple[Parameter, ...] = ()) -> list[tuple[str, list[Parameter]]]:
    """Neighbours that one module owns, with its name; those *together* have one module of their own."""
    found: list[tuple[str, list[Parameter]]] = []
    for parameter in parameters:
        path = parameter.name.partition(".")[0] if parameter in together else parameter.name.rpartition(".")[0]
        if found and found[-1][0] == path:
            found[-1][1].append(parameter)
        else:
            found.append((path, [parameter]))
    return found
