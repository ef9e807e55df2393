"""Recordings of every layer of the catalog: balanced, and joined by the residual stream alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache

import pytest

from advisor.errors import SpecError
from advisor.specs.model import Layer, ModelSpec, Parameter
from advisor.step.recording import (
    GRADIENT_NUMBER,
    STREAM,
    STREAM_NUMBER,
    UNNUMBERED,
    Mode,
    Recording,
    record_embedding,
    record_head,
    record_layer,
)
from advisor.step.tape import Event
from step.catalog_models import PROFILES, model_of

LENGTH = 384
BF16 = Mode(2, 2, LENGTH, "sdpa")
AUTOCAST = Mode(2, 4, LENGTH, "sdpa")
FP32 = Mode(4, 4, LENGTH, "sdpa")
EAGER = Mode(2, 2, LENGTH, "eager")
MODES = {"bf16": BF16, "autocast": AUTOCAST, "fp32": FP32, "eager": EAGER}


def net_bytes(events: Iterable[Event], *, scales: bool) -> int:
    signs = {"take": 1, "give": -1}
    return sum(signs.get(event.kind, 0) * event.size_bytes for event in events if event.scales is scales)


def distinct_layers(model: ModelSpec) -> list[Layer]:
    return list(dict.fromkeys(layer for run in model.runs for layer in run.layers))


@cache
def recordings(profile: str, mode: Mode, checkpointed: bool) -> list[tuple[Layer, Recording]]:
    model = model_of(profile)
    layers = distinct_layers(model)
    return [(layer, record_layer(layer, model.hidden_size, mode, checkpointed)) for layer in layers]


def every_recording(profile: str) -> Iterator[tuple[Mode, bool, Layer, Recording]]:
    for mode in MODES.values():
        for checkpointed in (False, True):
            for layer, recording in recordings(profile, mode, checkpointed):
                yield mode, checkpointed, layer, recording


@pytest.mark.parametrize("profile", PROFILES)
def test_a_layer_gives_back_all_it_took_but_the_weight_copies_that_wait_for_the_loss(profile: str) -> None:
    for _, _, _, recording in every_recording(profile):
        events = recording.forward + recording.backward

        assert net_bytes(events, scales=True) == 0
        assert net_bytes(events, scales=False) == recording.kept_copy_bytes


PASSED = (STREAM_NUMBER, GRADIENT_NUMBER, UNNUMBERED)


def crossing(events: Iterable[Event]) -> tuple[list[int], list[int]]:
    """Sizes of what came from outside and was given back, and of what was taken and stayed. The rest comes and goes."""
    came: list[int] = []
    left: list[int] = []
    held: dict[int, int] = {}
    for event in events:
        if event.kind == "take":
            assert event.storage not in held
            if event.storage in PASSED:
                left.append(event.size_bytes)
            else:
                held[event.storage] = event.size_bytes
        elif event.kind == "give" and event.storage in PASSED:
            came.append(event.size_bytes)
        elif event.kind == "give":
            assert held.pop(event.storage) == event.size_bytes
    assert not held
    return came, left


@pytest.mark.parametrize("profile", PROFILES)
def test_only_the_stream_and_its_gradient_cross_the_borders_of_a_layer(profile: str) -> None:
    for mode in MODES.values():
        stream_bytes = LENGTH * model_of(profile).hidden_size * mode.stream_bytes
        for _, recording in recordings(profile, mode, False):
            assert crossing(recording.forward + recording.backward) == ([stream_bytes] * 2, [stream_bytes] * 2)


@pytest.mark.parametrize("profile", PROFILES)
def test_under_checkpointing_forward_leaves_the_stream_alone_and_backward_starts_from_it(profile: str) -> None:
    for mode in MODES.values():
        stream_bytes = LENGTH * model_of(profile).hidden_size * mode.stream_bytes
        for layer, recording in recordings(profile, mode, True):
            if layer.closes_stack:
                continue  # the norm behind it is not checkpointed with it
            came, left = crossing(recording.forward)
            assert (came, sum(left)) == ([], stream_bytes + recording.kept_copy_bytes)
            assert net_bytes(recording.forward, scales=True) == stream_bytes
            assert crossing(recording.backward) == ([stream_bytes] * 2, [stream_bytes])


@pytest.mark.parametrize("profile", PROFILES)
def test_weight_copies_outlive_forward_only_under_autocast_with_checkpointing(profile: str) -> None:
    for mode, checkpointed, layer, recording in every_recording(profile):
        # Falcon multiplies by transposed views, of which autocast keeps no copies.
        keeps = mode.autocast and checkpointed and not layer.transposed_weights
        assert (recording.kept_copy_bytes > 0) == keeps


@pytest.mark.parametrize("profile", PROFILES)
def test_recomputing_never_holds_more_after_forward_nor_does_less_work(profile: str) -> None:
    for mode in MODES.values():
        for (_, kept), (_, again) in zip(
            recordings(profile, mode, False), recordings(profile, mode, True), strict=True
        ):
            assert net_bytes(again.forward, scales=True) <= net_bytes(kept.forward, scales=True)
            assert flop(again.forward) == flop(kept.forward)
            assert flop(kept.backward) < flop(again.backward) <= flop(kept.backward) + flop(kept.forward)


@pytest.mark.parametrize("profile", PROFILES)
def test_selective_checkpointing_keeps_products_and_does_not_run_them_again(profile: str) -> None:
    model = model_of(profile)
    for mode in (BF16, AUTOCAST):
        for layer, whole in recordings(profile, mode, True):
            again = record_layer(layer, model.hidden_size, mode, True, True)
            events = again.forward + again.backward
            assert net_bytes(events, scales=True) == 0
            assert net_bytes(events, scales=False) == again.kept_copy_bytes
            assert net_bytes(whole.forward, scales=True) < net_bytes(again.forward, scales=True)
            assert flop(again.forward) == flop(whole.forward)
            assert flop(again.backward) < flop(whole.backward)
            assert handed_over(again.backward) == handed_over(whole.backward)


def flop(events: Iterable[Event]) -> float:
    return sum(float(product.matmul.flop) for event in events for product in event.work.products)


def handed_over(events: Iterable[Event]) -> Counter[tuple[Parameter | None, int]]:
    return Counter((event.parameter, event.size_bytes) for event in events if event.kind == "gradient")


@pytest.mark.parametrize("profile", PROFILES)
def test_each_weight_of_a_layer_hands_over_one_gradient_in_its_own_format(profile: str) -> None:
    for mode, _, layer, recording in every_recording(profile):
        wanted = Counter((each, each.numel * mode.parameter_bytes) for each in layer.parameters)

        assert handed_over(recording.backward) == wanted


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("profile", PROFILES)
def test_embedding_and_head_balance_and_hand_over_each_gradient(profile: str, mode: Mode) -> None:
    model = model_of(profile)
    embedding, head = record_embedding(model, mode), record_head(model, mode)
    stream_bytes = LENGTH * model.hidden_size * mode.stream_bytes
    ends = head.forward + head.loss + head.loss_backward + head.backward
    tied = model.embedding[:1] if model.tied_embeddings else ()

    # The stream and its gradient pass from one part to the next, so each part alone is out by one of them.
    assert net_bytes(embedding.forward + embedding.backward, scales=True) == 0
    assert net_bytes(ends, scales=True) == 0
    assert net_bytes(embedding.forward + embedding.backward + ends, scales=False) == 0
    assert Counter(event.size_bytes for event in embedding.forward if event.label == STREAM)[stream_bytes] == 1
    for parameters, events in ((model.embedding, embedding.backward), (model.head + tied, ends)):
        wanted = Counter((each, each.numel * mode.parameter_bytes) for each in parameters)
        assert handed_over(events) == wanted


def test_a_parameter_that_no_code_uses_is_an_error_that_names_it() -> None:
    layer = model_of("Qwen__Qwen2.5-0.5B").layers[0]
    extra = replace(layer, parameters=(*layer.parameters, Parameter("stray", (3, 5))))

    with pytest.raises(SpecError, match=r"stray \(3, 5\)"):
        record_layer(extra, 896, BF16, False)


def test_a_parameter_that_is_missing_is_an_error_that_gives_its_shape() -> None:
    layer = model_of("Qwen__Qwen2.5-0.5B").layers[0]
    fewer = replace(layer, parameters=layer.parameters[:-3])

    with pytest.raises(SpecError, match="no parameter of shape"):
        record_layer(fewer, 896, BF16, False)
