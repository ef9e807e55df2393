"""ZeRO-3's gathered weights beside the parts and gradients of one micro-step.

Modules are read off the names of parameters and the order in which they are used: ``self_attn.q_proj.weight`` is held
by the module ``self_attn.q_proj`` inside ``self_attn`` inside the layer. Every module call counts, because DeepSpeed
prefetches at each. Left out: modules without parameters other than one activation a layer and the rotary embedding.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from advisor.specs.model import AnyLayer, Experts, Layer, ModelSpec, Parameter
from advisor.specs.plan import ZeroSettings
from advisor.step.arrival import Arrival, Source, Where, arrival, handed_over
from advisor.step.gathering import PLAIN, Buffers, Call, Level, Limits, gathered
from advisor.step.recording import Mode
from advisor.step.recording import Source as Recordings

OWN_LINEAR = frozenset({"falcon"})
"""Families whose linear layers multiply by a transposed view, ``input @ weight.T``."""
GATHERED_WHOLE = frozenset({"mixtral", "qwen2_moe", "qwen3_moe"})
"""Families whose block of experts DeepSpeed takes for one module (zero/leaf_module_config.py)."""


class Move(NamedTuple):
    """A change of the gathered elements, and the most that is gathered in between above what was before."""

    net: float
    peak: float
    freed: tuple[Parameter, ...] = ()
    """Under hpZ, what is freed meanwhile for the first time since the optimizer's step."""


class Stay(NamedTuple):
    """How the gathered elements change around a part's forward pass."""

    entering: Move
    leaving: Move
    kept: tuple[Parameter, ...] = ()
    """Of what is freed as it ends, what backward's saved tensors keep nevertheless."""


class Passage(NamedTuple):
    """Changes of gathered elements over one micro-step."""

    forward: dict[Where, Stay]
    first: Move
    """At the start of backward."""
    after: dict[Where, tuple[Move, ...]]
    """After each gradient that a part hands over, in order."""
    last: Move
    """After the last gradient has come."""
    most: float
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


PartCall = tuple[Where, Call]
"""A module call, and in which part."""


@lru_cache(maxsize=32)
def passage(
    model: ModelSpec,
    mode: Mode,
    checkpointed: bool,
    zero: ZeroSettings,
    accumulates: bool,
    recordings: Recordings,
    buffers: Buffers = PLAIN,
) -> Passage:
    """The passage of *model* in micro-steps after the first of all, in which DeepSpeed only takes note of the order."""
    found = reduced(model, mode, checkpointed, recordings)
    numbers = [number for number, parameter in enumerate(model.parameters()) if parameter.trained]
    arrived = Arrival(tuple(numbers[tensor] for tensor in found.tensors), found.sources)
    forward = _forward_calls(model, mode, checkpointed, recordings)
    backward = _backward_calls(model, mode, checkpointed, recordings)
    limits = Limits(zero.prefetch_bucket, zero.max_live_parameters, zero.max_reuse_distance, zero.persistence_threshold)
    sizes = tuple(parameter.stored_numel for parameter in model.parameters())
    levels = gathered(tuple(call[1] for call in (*forward, *backward)), sizes, limits, accumulates, buffers)
    first_freed = _first_freed(model, levels) if zero.hpz_partition > 1 else ((),) * len(levels)
    seen: dict[Where, tuple[Parameter, ...]] = {
        number: _seen(model, layer, mode, checkpointed, recordings) for number, layer in enumerate(model.layers)
    }
    stays, held = _stays(model, forward, levels, first_freed, mode.loss == "full", seen)
    first, after, last = _changes(arrived, backward, levels[len(forward) :], first_freed[len(forward) :], held)
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
    together = {
        number: [each for each in block_of_experts(model, layer) if each.trained]
        for number, layer in enumerate(model.layers)
    }
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


def seen_transposed(model: ModelSpec, layer: AnyLayer) -> tuple[Parameter, ...]:
    """The matrices of *layer* of which products save a transposed view: of experts, and all of Falcon's.

    A view keeps what was gathered, while DeepSpeed frees a weight by giving it other data, so that a product that
    saves the weight itself keeps nothing (transformers 5.23, integrations/moe.py ``_grouped_linear`` and
    models/falcon/modeling_falcon.py ``FalconLinear``).
    """
    if model.family in OWN_LINEAR:
        return tuple(each for each in layer.parameters if len(each.shape) == 2)
    block = layer.feed_forward if isinstance(layer, Layer) else None
    if not isinstance(block, Experts) or not block.outputs_first:
        return ()
    return tuple(each for each in layer.parameters if ".experts." in each.name)


Freed = tuple[tuple[Parameter, ...], ...]


def _first_freed(model: ModelSpec, levels: tuple[Level, ...]) -> Freed:
    """For each call the parameters that no call before it has freed."""
    parameters, seen = tuple(model.parameters()), set[int]()
    found = []
    for level in levels:
        new = [tensor for tensor in level.freed if tensor not in seen]
        seen.update(new)
        found.append(tuple(parameters[tensor] for tensor in new))
    return tuple(found)


def _stays(
    model: ModelSpec,
    calls: list[PartCall],
    levels: tuple[Level, ...],
    first_freed: Freed,
    loss_after: bool,
    seen: dict[Where, tuple[Parameter, ...]],
) -> tuple[dict[Where, Stay], float]:
    """Each part's forward pass takes the most that any of its module calls finds, as if from its start to its end.

    In the head that is the loss, which *loss_after* says comes after the last module has ended, not within its call.
    """
    found: dict[Where, Stay] = {}
    held: float = 0
    start = 0
    while start < len(calls):
        end = next((at for at in range(start, len(calls)) if calls[at][0] != calls[start][0]), len(calls))
        part = levels[start:end]
        most, left = max(level.running for level in part), part[-1].after
        if calls[start][0] == "head":
            most = left if loss_after else part[-1].running
        peak = max(level.peak for level in part)
        freed = {tensor for level in part for tensor in level.freed}
        kept = _kept(model, calls[start][0], freed, seen)
        first = tuple(each for call in first_freed[start:end] for each in call)
        found[calls[start][0]] = Stay(Move(most - held, peak - held), Move(left - most, 0, first), kept)
        held, start = left, end
    return found, held


def _seen(
    model: ModelSpec, layer: AnyLayer, mode: Mode, checkpointed: bool, recordings: Recordings
) -> tuple[Parameter, ...]:
    """The weights of *layer* of which the forward pass leaves views to backward.

    Checkpointing drops what autograd saves, but not what bitsandbytes' product sets aside: a view of each weight in
    four bits (0.50.2, autograd/_functions.py ``MatMul4Bit``).
    """
    packed = tuple(each for each in layer.parameters if each.held == "four bits")
    if checkpointed:
        return packed
    views = (*packed, *seen_transposed(model, layer))
    unpassed = recordings.layer(layer, model.hidden_size, mode, checkpointed).unpassed if views else ()
    return tuple(each for each in views if each not in unpassed)


def _kept(
    model: ModelSpec, part: Where, freed: set[int], seen: dict[Where, tuple[Parameter, ...]]
) -> tuple[Parameter, ...]:
    """What views keep of the tensors *freed* in *part*."""
    if not isinstance(part, int) or not seen[part]:
        return ()
    first = len(model.embedding) + sum(len(layer.parameters) for layer in model.layers[:part])
    numbered = enumerate(model.layers[part].parameters, first)
    return tuple(each for number, each in numbered if number in freed and each in seen[part])


def _changes(
    arrived: Arrival, calls: list[PartCall], levels: tuple[Level, ...], first_freed: Freed, held: float
) -> tuple[Move, dict[Where, tuple[Move, ...]], Move]:
    """The change at the start of backward, that after each gradient, and that at the end.

    Between two gradients stands the most that the module calls between them find.
    """
    call_of = {tensor: at for at, (_, call) in enumerate(calls) for tensor in call.tensors}
    moves: list[Move] = []
    passed, before = 0, held
    first: tuple[Parameter, ...] = ()
    for tensor in arrived.tensors:
        until = call_of[tensor] + 1
        running = peak = before
        if until > passed:
            running = max(level.running for level in levels[passed:until])
            peak = max(level.peak for level in levels[passed:until])
            # What the call before this gradient frees goes as the next one begins.
            moves.append(Move(running - before, peak - before, first))
            first = tuple(each for call in first_freed[passed:until] for each in call)
            passed = until
        else:
            moves.append(Move(0, 0))
        before = running
    after: dict[Where, list[Move]] = {}
    for (part, _), move in zip(arrived.sources, [*moves[1:], Move(0, 0)], strict=True):
        after.setdefault(part, []).append(move)
    rest = tuple(each for call in first_freed[passed:] for each in call)
    return moves[0], {part: tuple(found) for part, found in after.items()}, Move(-before, 0, (*first, *rest))


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


def _forward_calls(model: ModelSpec, mode: Mode, checkpointed: bool, recordings: Recordings) -> list[PartCall]:
    outermost, inner = _around(model)
    embeddings = _modules(model.embedding, range(len(model.embedding)))
    rotary_embedding = Call()
    calls: list[PartCall] = [("embedding", call) for call in (outermost, inner, *embeddings, rotary_embedding)]
    for number, (layer, used) in enumerate(_layers(model, mode, checkpointed, recordings)):
        calls += [(number, layer), *((number, call) for call in used)]
    return [*calls, *(("head", call) for call in _head(model))]


def _backward_calls(model: ModelSpec, mode: Mode, checkpointed: bool, recordings: Recordings) -> list[PartCall]:
    outermost, inner = _around(model)
    output, *others = reversed(_head(model))
    calls: list[PartCall] = [("head", call) for call in (outermost, output, inner, *others)]
    layers = _layers(model, mode, checkpointed, recordings)
    for number in range(len(layers) - 1, -1, -1):
        layer, used = layers[number]
        again = _enclosing_first(_passed(model, number, used, mode, checkpointed, recordings))
        calls.append((number, layer))
        if checkpointed:
            # The first module whose backward needs what was not kept has the layer computed again.
            calls += [(number, call) for call in (*again[:2], *used, *again[2:])]
        else:
            calls += [(number, call) for call in again]
    embeddings = _modules(model.embedding, range(len(model.embedding)))
    if model.frozen_count:
        # Of what frozen tables give a gradient is asked for with checkpointing alone, and of the first table's.
        embeddings = embeddings[:1] if checkpointed else []
    return [*calls, *(("embedding", call) for call in reversed(embeddings))]


def _passed(
    model: ModelSpec, number: int, calls: list[Call], mode: Mode, checkpointed: bool, recordings: Recordings
) -> list[Call]:
    """Those of a layer's *calls* that backward comes by: in the first that is trained, not what stands before it."""
    layer = model.layers[number]
    if not (unpassed := recordings.layer(layer, model.hidden_size, mode, checkpointed).unpassed):
        return calls
    first = len(model.embedding) + sum(len(each.parameters) for each in model.layers[:number])
    left_out = {at for at, parameter in enumerate(layer.parameters, first) if parameter in unpassed}
    return [call for call in calls if not call.tensors or not left_out.issuperset(call.tensors)]


def _around(model: ModelSpec) -> tuple[Call, Call]:
    """The model with its head, and the model without it."""
    everything = tuple(range(model.tensor_count))
    outside = 0 if model.tied_embeddings else 1
    return Call(beneath=everything), Call(beneath=everything[: len(everything) - outside])


def _enclosing_first(calls: list[Call]) -> list[Call]:
    """Backward's order: modules from the last to the first, each after the one that encloses it."""
    found: list[Call] = []
    inside: list[Call] = []
    for call in reversed(calls):
        if call.tensors:
            inside.append(call)
        else:
            found += [call, *inside]
            inside = []
    return [*found, *inside]


def _head(model: ModelSpec) -> list[Call]:
    first = model.tensor_count - len(model.head)
    calls = _modules(model.head, range(first, model.tensor_count))
    return [*calls, Call((0,), (0,))] if model.tied_embeddings else calls


def _layers(model: ModelSpec, mode: Mode, checkpointed: bool, recordings: Recordings) -> list[tuple[Call, list[Call]]]:
    """Each layer's own module call, and those inside it, in the order of its forward pass."""
    found: list[tuple[Call, list[Call]]] = []
    first = len(model.embedding)
    for layer in model.layers:
        experts = block_of_experts(model, layer)
        used = _in_use(model, layer, mode, checkpointed, recordings)
        at = {parameter: first + index for index, parameter in enumerate(layer.parameters)}
        calls: list[Call] = []
        container = module = ""
        last = 0
        for path, parameters in _by_module(used, experts):
            outer = _adapted_module(path)
            if outer.rpartition(".")[0] != container:
                container = outer.rpartition(".")[0]
                within = tuple(at[each] for each in used if each.name.startswith(f"{container}."))
                calls += [Call(beneath=within)] if container else []
            if outer != module:
                module, last = outer, len(calls)
                if path != outer:
                    calls.append(Call(beneath=tuple(at[each] for each in used if each.name.startswith(f"{outer}."))))
            own = tuple(sorted(at[each] for each in parameters))
            # Dropout is a module that runs before an adapter.
            calls += [Call()] if ".lora_A" in path else []
            calls.append(Call(own, own, is_leaf=parameters[0] in experts))
        inside = calls if experts else [*calls[:last], Call(), *calls[last:]]
        found.append((Call(beneath=tuple(at.values())), inside))
        first += len(layer.parameters)
    return found


def _in_use(
    model: ModelSpec, layer: AnyLayer, mode: Mode, checkpointed: bool, recordings: Recordings
) -> list[Parameter]:
    """The weights of *layer* in the order in which forward uses them: the reverse of their gradients', had all one."""
    if any(not each.trained for each in layer.parameters):
        known = {replace(each, trained=True, held="as model"): each for each in layer.parameters}
        thawed = replace(layer, parameters=tuple(known))
        recorded = recordings.layer(thawed, model.hidden_size, mode, checkpointed).backward
        return [known[each] for each in handed_over(recorded)[::-1]]
    return handed_over(recordings.layer(layer, model.hidden_size, mode, checkpointed).backward)[::-1]


def _adapted_module(path: str) -> str:
    """The module that the adapter or the frozen layer at *path* belongs to; *path* where that is neither."""
    return path.removesuffix(".base_layer").partition(".lora_")[0]


def _modules(parameters: tuple[Parameter, ...], numbers: range) -> list[Call]:
    at = dict(zip(parameters, numbers, strict=True))
    owned = [tuple(at[each] for each in found) for _, found in _by_module(list(parameters))]
    return [Call(tensors, tensors) for tensors in owned]


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
