"""Recordings of one pass of a model that generates: over the prompt, or over one new token behind others.

Nothing is kept for backward, and there is no dropout. The cache of each layer lives on from pass to pass: what a
pass leaves is what the next one finds, under numbers of its own for each kind of layer.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from advisor.specs.model import Layer, ModelSpec, Parameter
from advisor.step.layers import decoder_layer, embed, finish, head
from advisor.step.operators import view
from advisor.step.recording import STREAM, STREAM_NUMBER, Mode, passed
from advisor.step.tape import Event
from advisor.step.weights import Weights, weights_of

Events = tuple[Event, ...]

CACHED_NUMBER, UNCACHED_NUMBER = -100, -200
"""From here on downwards, what the cache holds of a layer after the pass, and what it held before."""


@lru_cache(maxsize=256)
def record_pass(layer: Layer, hidden_size: int, mode: Mode) -> Events:
    """One layer, its residual stream coming in and going out."""
    tape = mode.tape()
    stream = tape.input(mode.sequence_length * hidden_size, mode.stream_bytes, STREAM)
    stream.node = None
    first, given = len(tape.events), stream.storage.event.storage
    output = decoder_layer(tape, stream, layer, _weights(layer.parameters, mode), hidden_size, mode.attention)
    output.storage.rename(STREAM, "activations")
    del stream
    numbers = {each.storage.event.storage: CACHED_NUMBER - place for place, each in enumerate(tape.cached)}
    numbers |= {storage: UNCACHED_NUMBER - place for place, storage in enumerate(tape.uncached)}
    there = set(tape.uncached)
    events = (event for event in tape.events[first:] if not (event.kind == "take" and event.storage in there))
    between = passed(events, STREAM_NUMBER, given=given, taken=output.storage.event.storage)
    return tuple(event._replace(storage=numbers.get(event.storage, event.storage)) for event in between)


@lru_cache(maxsize=64)
def record_embedding(model: ModelSpec, mode: Mode) -> Events:
    """From token ids to the residual stream."""
    tape = mode.tape()
    output = embed(tape, model, _weights(model.embedding, mode), needs_gradient=False)
    output.storage.rename(STREAM, "activations")
    return passed(tape.events, STREAM_NUMBER, taken=output.storage.event.storage)


class HeadPass(NamedTuple):
    """Events of what stands behind the layers."""

    norm: Events
    logits: Events
    """Of the last token alone, with what is freed as the model returns."""
    choice: Events
    """The same in fp32, of which the next token is chosen."""


LOGITS_NUMBER, CHOICE_NUMBER = -4, -5
LOGITS, CHOSEN_FROM = "logits", "logits in fp32"


@lru_cache(maxsize=64)
def record_head(model: ModelSpec, mode: Mode, vocabulary: int) -> HeadPass:
    """From the residual stream to the next token's logits (transformers 5.23, generation/utils.py ``_sample``).

    Those in fp32 stay until the next pass has made its own. Where the rank's *model* has a part of the *vocabulary*,
    that of all ranks is gathered and then laid side by side.
    """
    tape = mode.tape()
    parameters = model.head + (model.embedding[:1] if model.tied_embeddings else ())
    weights = _weights(parameters, mode)
    stream = tape.input(mode.sequence_length * model.hidden_size, mode.stream_bytes, STREAM)
    stream.node = None
    first, given = len(tape.events), stream.storage.event.storage
    hidden = finish(tape, stream, model, weights)
    del stream
    normed = len(tape.events)
    last = view(tape, hidden, model.hidden_size) if mode.sequence_length > 1 else hidden
    tape.sequence_length = 1
    logits = head(tape, last, model, weights)
    if vocabulary > model.vocabulary_size:
        gathered = tape.new(vocabulary, logits.element_bytes)
        logits = tape.new(vocabulary, logits.element_bytes)
        tape.work(gathered, logits)
        del gathered
    logits.storage.rename(LOGITS, "logits")
    del hidden, last
    made = len(tape.events)
    tape.scope = CHOSEN_FROM
    choice = tape.new(logits.numel, 4, category="logits", label=CHOSEN_FROM)
    tape.work(logits, choice, choice, kernels=2)
    names = {logits.storage.event.storage: LOGITS_NUMBER, choice.storage.event.storage: CHOICE_NUMBER}
    events = passed(tape.events, STREAM_NUMBER, given=given)
    events = tuple(event._replace(storage=names.get(event.storage, event.storage)) for event in events)
    return HeadPass(events[first:normed], events[normed:made], events[made:])


def _weights(parameters: tuple[Parameter, ...], mode: Mode) -> Weights:
    return weights_of(parameters, mode.parameter_bytes, mode.parameter_bytes)
