"""Runs a model's parts on a tape and keeps what one sequence does in forward and in backward.

The residual stream runs from part to part: a part frees its input where nothing saved it and leaves its output,
and in backward the same with gradients. So the recordings of equal layers can be laid end to end any number of
times. A recording depends on neither the micro-batch nor the strategy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple, Protocol

from advisor.errors import SpecError
from advisor.specs.cuts import WHOLE, SequenceCut
from advisor.specs.job import AttentionKernel, Job, LossKernel
from advisor.specs.model import AnyLayer, Layer, ModelSpec, Parameter
from advisor.step.layers import close_stack, cross_entropy, decoder_layer, embed, finish, head
from advisor.step.losses import chunked_loss, fused_loss
from advisor.step.tape import Caching, Event, Tape, Tensor, Weight
from advisor.step.tiled_loss import tiled_loss
from advisor.step.weights import Weights, weights_of

STREAM = "residual stream"
GRADIENT_STREAM = "gradient stream"
ENCODER_OUTPUT = "encoder output"

STREAM_NUMBER, GRADIENT_NUMBER = -2, -3
"""Numbers of the memory that passes between parts, the same on every tape."""
UNNUMBERED = -1
KEPT_NUMBER = -10
"""From here on downwards, what selective checkpointing keeps of a layer."""


@dataclass(frozen=True, slots=True)
class Mode:
    """In which formats the model runs, and with which attention kernel."""

    compute_bytes: int
    parameter_bytes: int
    """Bytes per element of the model that the modelling code sees."""
    sequence_length: int
    attention: AttentionKernel
    padded: bool = False
    autocasts_half: bool = False
    """Whether forward runs under autocast though its weights have the compute format already (FSDP1)."""
    alone: bool = False
    """Whether the micro-batch is one sequence, whose heads products can read as views."""
    loss: LossKernel = "full"
    adapter_bytes: int | None = None
    """Bytes per element of adapters, where these alone are trained."""
    keeps_inputs: bool = False
    """Whether products keep their input for backward though their weight be frozen (ZeRO-3)."""
    cut: SequenceCut = WHOLE
    """How the ranks share a sequence, of which ``sequence_length`` is what one of them has."""
    embedding_norm: bool = False
    """Whether the stream leaves a LayerNorm before the first layer, which autocast runs in fp32 (BLOOM)."""
    caching: Caching | None = None
    """How keys and values are cached where the model generates."""

    @property
    def trained_bytes(self) -> int:
        """Bytes per element of the weights that are trained."""
        return self.parameter_bytes if self.adapter_bytes is None else self.adapter_bytes

    @property
    def autocast(self) -> bool:
        """Whether products cast their inputs, and norms run in fp32."""
        return self.autocasts_half or max(self.parameter_bytes, self.trained_bytes) > self.compute_bytes

    @property
    def stream_bytes(self) -> int:
        """Bytes per element of the residual stream, which has the format of the embedding, or of its norm."""
        return 4 if self.embedding_norm and self.autocast else self.parameter_bytes

    def tape(self) -> Tape:
        return Tape(
            self.compute_bytes,
            self.autocast,
            self.sequence_length,
            padded=self.padded,
            half_stream=self.autocasts_half or self.stream_bytes == self.compute_bytes,
            alone=self.alone,
            keeps_inputs=self.keeps_inputs,
            caching=self.caching,
            grad_enabled=self.caching is None,
            cut=self.cut,
        )


def mode_of(job: Job, parameter_bytes: int, autocasts_half: bool = False, cut: SequenceCut = WHOLE) -> Mode:
    length, formats = job.sequence_length // cut.ranks, (job.compute_bytes, parameter_bytes)
    return Mode(*formats, length, job.attention, job.padded, autocasts_half, loss=job.loss, cut=cut)


class Recording(NamedTuple):
    """Events of one part for one sequence. ``kept_copy_bytes`` stay until forward ends though nothing saved them."""

    forward: tuple[Event, ...]
    backward: tuple[Event, ...]
    kept_copy_bytes: int = 0
    unpassed: tuple[Parameter, ...] = ()
    """Frozen weights of whose products no gradient is asked for, so that backward does not come by their modules."""


Run = Callable[[Tape, Tensor, Weights], Tensor]


@lru_cache(maxsize=256)
def record_layer(layer: Layer, hidden_size: int, mode: Mode, checkpointed: bool, selective: bool = False) -> Recording:
    """One layer, its residual stream coming in and going out. Where *selective*, a checkpointed one keeps products."""
    needs_gradient = checkpointed or not layer.starts_gradients

    def run(tape: Tape, stream: Tensor, weights: Weights) -> Tensor:
        memory = None
        if layer.cross_attention:
            memory = tape.input(stream.numel, mode.stream_bytes, ENCODER_OUTPUT)
        output = decoder_layer(tape, stream, layer, weights, hidden_size, mode.attention, memory)
        _check_claimed(weights, "layer")
        return output

    if not checkpointed:
        return _record(run, layer.parameters, hidden_size, mode, layer.adapter_dropout, needs_gradient)
    if layer.closes_stack:
        alone = replace(layer, closes_stack=False, parameters=layer.parameters[:-1])
        return _followed(
            record_layer(alone, hidden_size, mode, True, selective), _record_norm(layer, hidden_size, mode)
        )
    return _record_checkpointed(run, layer, hidden_size, mode, selective)


def _record_norm(layer: Layer, hidden_size: int, mode: Mode) -> Recording:
    """The norm behind the last layer of a stack."""

    def run(tape: Tape, stream: Tensor, weights: Weights) -> Tensor:
        return close_stack(tape, stream, layer, weights, hidden_size)

    return _record(run, layer.parameters[-1:], hidden_size, mode)


def _followed(first: Recording, second: Recording) -> Recording:
    """Two parts as one. Storages keep their numbers apart."""
    past = 1 + max(event.storage for event in first.forward + first.backward)
    forward, backward = (
        tuple(event if event.storage < 0 else event._replace(storage=event.storage + past) for event in events)
        for events in (second.forward, second.backward)
    )
    return Recording(first.forward + forward, backward + first.backward, first.kept_copy_bytes + second.kept_copy_bytes)


@lru_cache(maxsize=64)
def record_embedding(model: ModelSpec, mode: Mode, checkpointed: bool = False) -> Recording:
    """From token ids to the residual stream.

    Where *checkpointed*, transformers lets the stream need a gradient though the embedding be frozen
    (modeling_utils.py ``enable_input_require_grads``). Its memory and its gradient's are given back with the graph.
    """
    tape = mode.tape()
    weights = weights_of(model.embedding, mode.parameter_bytes, mode.trained_bytes)
    output = embed(tape, model, weights, needs_gradient=checkpointed)
    _check_claimed(weights, "embedding")
    output.storage.rename(STREAM, "activations")
    last = len(tape.events)
    root, shape, number = output.node, (output.numel, output.element_bytes), output.storage.event.storage
    del output
    if root is None:
        return Recording(passed(tape.events[:last], STREAM_NUMBER, taken=number), ())
    tape.run_backward(root, *shape, None)
    forward = passed(tape.events[:last], STREAM_NUMBER, taken=number)
    return Recording(forward, after_forward(tape, last, number))


_LOSSES: dict[LossKernel, Callable[[Tape, Tensor, ModelSpec, Weights], Tensor]] = {
    "chunked": chunked_loss,
    "fused": fused_loss,
    "tiled": tiled_loss,
}


class HeadRecording(NamedTuple):
    """Events of the head for one sequence: up to the logits, the loss, and both backwards."""

    forward: tuple[Event, ...]
    loss: tuple[Event, ...]
    loss_backward: tuple[Event, ...]
    """Up to the gradient of what the output matrix gave."""
    backward: tuple[Event, ...]


@lru_cache(maxsize=64)
def record_head(model: ModelSpec, mode: Mode) -> HeadRecording:
    """From the residual stream to the loss. The training loop drops the logits before it goes backwards."""
    if mode.loss != "full" and model.objective != "causal":
        raise SpecError(f"--loss {mode.loss} is for causal models, and {model.name} is a {model.objective} one")
    tape = mode.tape()
    parameters = model.head + ((_output_matrix(model),) if model.tied_embeddings else ())
    weights = weights_of(parameters, mode.parameter_bytes, mode.trained_bytes)
    uncopied = list(weights.unclaimed)
    stream = tape.input(mode.sequence_length * model.hidden_size, mode.stream_bytes, STREAM)
    start, first, given = stream.node, len(tape.events), stream.storage.event.storage
    hidden = finish(tape, stream, model, weights)
    del stream
    logits = head(tape, hidden, model, weights) if mode.loss == "full" else None
    last = len(tape.events)
    tape.scope = "logits"
    if logits is not None:
        loss = cross_entropy(tape, logits, model)
    else:
        loss = _LOSSES[mode.loss](tape, hidden, model, weights)
    _check_claimed(weights, "head")
    del logits, hidden
    _forget_copies(uncopied)
    end = len(tape.events)
    assert loss.node is not None
    returned = tape.run_backward(loss.node, loss.numel, loss.element_bytes, start)
    assert returned is not None
    returned.storage.rename(GRADIENT_STREAM, "temporaries")
    del loss
    named = (event if event.label != "logits" else _as_logits(event) for event in tape.events)
    events = passed(named, STREAM_NUMBER, given=given)
    events = passed(events, GRADIENT_NUMBER, taken=returned.storage.event.storage)
    turn = tape.reached_at
    return HeadRecording(events[first:last], events[last:end], events[end:turn], events[turn:])


def record_inputs(model: ModelSpec, mode: Mode) -> tuple[Event, ...]:
    """Token ids, labels and shifted labels (int64), and the rotary tables that every layer reads.

    The fused loss, whose gradients are there when forward ends, drops its shifted labels by then; the tiled one keeps
    those that it scores itself. Where ranks share a sequence, its labels come shifted, and its positions with them, for
    which tables are made sequence by sequence.
    """
    length, shared = mode.sequence_length, mode.cut != WHOLE
    copies = 2 if mode.loss in ("fused", "tiled") and not shared else 3
    found = [Event("take", "token ids and labels", "activations", copies * INDEX_BYTES * length, True)]
    if mode.padded:
        found.append(Event("take", "padding mask", "activations", INDEX_BYTES * length, True))
    turned = model.described_layers[0].attention.rotary_dimensions
    if turned:
        table_bytes = 2 * model.rotary_kinds * length * turned * mode.parameter_bytes
        found.append(Event("take", "rotary tables", "activations", table_bytes, shared))
    return tuple(found)


class Source(Protocol):
    """Where the recordings of a model's parts come from. Equal sources give equal recordings."""

    def __hash__(self) -> int: ...

    def inputs(self, model: ModelSpec, mode: Mode) -> tuple[Event, ...]:
        """What is taken before forward and given back after backward."""

    def embedding(self, model: ModelSpec, mode: Mode, checkpointed: bool) -> Recording:
        """From token ids to the residual stream."""

    def layer(
        self, layer: AnyLayer, hidden_size: int, mode: Mode, checkpointed: bool, selective: bool = False
    ) -> Recording:
        """One layer, recomputed in backward where *checkpointed*, but for its products where *selective*."""

    def head(self, model: ModelSpec, mode: Mode, checkpointed: bool) -> HeadRecording:
        """From the residual stream to the loss."""


@dataclass(frozen=True, slots=True)
class Formulas:
    """Recordings by the operators of this package, for models whose layers are described."""

    def inputs(self, model: ModelSpec, mode: Mode) -> tuple[Event, ...]:
        return record_inputs(model, mode)

    def embedding(self, model: ModelSpec, mode: Mode, checkpointed: bool) -> Recording:
        return record_embedding(model, mode, checkpointed)

    def layer(
        self, layer: AnyLayer, hidden_size: int, mode: Mode, checkpointed: bool, selective: bool = False
    ) -> Recording:
        if not isinstance(layer, Layer):
            raise SpecError("what this layer computes is not described; its recording has to be traced")
        return record_layer(layer, hidden_size, mode, checkpointed, selective)

    def head(self, model: ModelSpec, mode: Mode, checkpointed: bool) -> HeadRecording:
        return record_head(model, mode)


FORMULAS = Formulas()
INDEX_BYTES = 8
"""torch's indices are int64."""


def _output_matrix(model: ModelSpec) -> Parameter:
    return model.embedding[0]


def _as_logits(event: Event) -> Event:
    return event._replace(category="logits") if event.category in ("activations", "temporaries") else event


def _record(
    run: Run,
    parameters: tuple[Parameter, ...],
    hidden_size: int,
    mode: Mode,
    adapter_dropout: float = 0.0,
    needs_gradient: bool = True,
) -> Recording:
    """A part whose input *needs_gradient* or not."""
    tape = mode.tape()
    weights = weights_of(parameters, mode.parameter_bytes, mode.trained_bytes, adapter_dropout)
    uncopied = weights.every()
    stream = tape.input(mode.sequence_length * hidden_size, mode.stream_bytes, STREAM)
    if not needs_gradient:
        stream.node = None
    start, first, given = stream.node, len(tape.events), stream.storage.event.storage
    output = run(tape, stream, weights)
    output.storage.rename(STREAM, "activations")
    del stream
    _forget_copies(uncopied)
    last = len(tape.events)
    root, shape, number = output.node, (output.numel, output.element_bytes), output.storage.event.storage
    assert root is not None
    del output
    returned = tape.run_backward(root, *shape, start)
    if returned:
        returned.storage.rename(GRADIENT_STREAM, "temporaries")
    forward = passed(_own(tape.events[first:last]), STREAM_NUMBER, given=given, taken=number)
    backward = after_forward(tape, last, number, returned.storage.event.storage if returned else None)
    unpassed = tuple(each.parameter for each in uncopied if not each.is_passed and not each.needs_gradient)
    return Recording(forward, passed(backward, STREAM_NUMBER, given=given), unpassed=unpassed)


def _record_checkpointed(run: Run, layer: Layer, hidden_size: int, mode: Mode, selective: bool) -> Recording:
    """torch.utils.checkpoint, not reentrant: keeps the input, and in backward runs again until all is saved.

    That starts when backward first needs something: what comes before, such as a cast, makes its gradient already.
    Where *selective* (``create_selective_checkpoint_contexts``), outputs of products and kernels stay from the first
    run and the second takes them one by one; what it does not come to use stays until the layer's backward ends.
    """
    forward, kept_copy_bytes, kept = _record_forward_only(run, layer, hidden_size, mode, selective)
    tape = mode.tape()
    tape.recalled = [tape.new(numel, element_bytes, label=label) for numel, element_bytes, label in reversed(kept)]
    recalled = _kept_numbers(reversed(tape.recalled))
    weights = weights_of(layer.parameters, mode.parameter_bytes, mode.trained_bytes, layer.adapter_dropout)
    uncopied = weights.every()
    stream = tape.input(mode.sequence_length * hidden_size, mode.stream_bytes, STREAM)
    start, first, given = stream.node, len(tape.events), stream.storage.event.storage
    output = run(tape, stream, weights)
    _forget_copies(uncopied)
    cut, last = tape.needed_until, len(tape.events)
    root, shape = output.node, (output.numel, output.element_bytes)
    assert root is not None
    del output
    returned = tape.run_backward(root, *shape, start)
    assert returned is not None
    returned.storage.rename(GRADIENT_STREAM, "temporaries")
    del stream
    unused = {storage for storage, when in tape.taken.items() if when >= cut}
    again = [event for event in tape.events[cut:last] if event.kind == "give" and event.storage < cut]
    assert tape.unpacked_at is not None
    arrived = after_forward(tape, last, -1, returned.storage.event.storage)
    ahead = len(after_forward(tape, last, -1, end=tape.unpacked_at))
    at_once = [event for event in arrived[:ahead] if not 0 <= event.storage < last]
    of_forward = [event for event in arrived[:ahead] if 0 <= event.storage < last]
    after = [event for event in (*of_forward, *arrived[ahead:]) if not cut <= event.storage < last]
    late = [event for event in (*again, *after) if event.kind == "give" and event.storage in unused]
    early = [event for event in (*at_once, *tape.events[first:cut], *again, *after) if event not in late]
    backward = passed(_own([*early, *late]), STREAM_NUMBER, given=given)
    return Recording(forward, _renumbered(backward, recalled), kept_copy_bytes)


def _record_forward_only(
    run: Run, layer: Layer, hidden_size: int, mode: Mode, selective: bool
) -> tuple[tuple[Event, ...], int, list[tuple[int, int, str]]]:
    """A forward pass that saves nothing but its input and, where *selective*, outputs of products and kernels.

    Returns its events, the bytes of copies that autocast keeps, and elements, formats and labels of what is kept.
    """
    tape = mode.tape()
    tape.grad_enabled = False
    tape.kept = [] if selective else None
    weights = weights_of(layer.parameters, mode.parameter_bytes, mode.trained_bytes, layer.adapter_dropout)
    uncopied = weights.every()
    stream = tape.input(mode.sequence_length * hidden_size, mode.stream_bytes, STREAM)
    first, given = len(tape.events), stream.storage.event.storage
    output = run(tape, stream, weights)
    output.storage.rename(STREAM, "activations")
    copies = {weight.cast.storage.event.storage: weight.cast.size_bytes for weight in uncopied if weight.cast}
    numbers = {**dict.fromkeys(copies, UNNUMBERED), **_kept_numbers(tape.kept or ())}
    events = _renumbered(_own(tape.events[first:]), numbers)
    kept = [(each.numel, each.element_bytes, each.storage.event.label) for each in tape.kept or ()]
    between = passed(events, STREAM_NUMBER, given=given, taken=output.storage.event.storage)
    return between, sum(copies.values()), kept


def _kept_numbers(tensors: Iterable[Tensor]) -> dict[int, int]:
    """For what the first run keeps for the second, by its number on one's tape, a number that is the same for both."""
    return {each.storage.event.storage: KEPT_NUMBER - place for place, each in enumerate(tensors)}


def _renumbered(events: Iterable[Event], numbers: Mapping[int, int]) -> tuple[Event, ...]:
    return tuple(event._replace(storage=numbers.get(event.storage, event.storage)) for event in events)


def after_forward(
    tape: Tape, last: int, output: int, returned: int | None = None, end: int | None = None
) -> tuple[Event, ...]:
    """Events since number *last*, less what belongs to the next part: the output, and the gradient that arrives.

    Those before number *end*, or all. Of the gradient *returned* to the part before, the end belongs to that part.
    """
    arrival = next(number for number, event in enumerate(tape.events[last:], last) if event.kind == "take")
    events = _own(
        event
        for number, event in enumerate(tape.events[last:end], last)
        if number != arrival and not (event.kind == "give" and event.storage == output)
    )
    return passed(events, GRADIENT_NUMBER, given=arrival, taken=returned)


def passed(
    events: Iterable[Event], number: int, *, given: int | None = None, taken: int | None = None
) -> tuple[Event, ...]:
    """*events* with *number* for the memory that passes from part to part.

    On the tape, *given* is the number of what the part before made, *taken* of what goes on to the next.
    """
    found: list[Event] = []
    newer = 0
    for event in events:
        if event.kind == "take" and event.storage == taken:
            event, newer = event._replace(storage=number), 1
        elif event.kind == "give" and event.storage == given:
            event = event._replace(storage=number, newer=newer)
        found.append(event)
    return tuple(found)


def _own(events: Iterable[Event]) -> tuple[Event, ...]:
    """*events* without those of the encoder's output, which outlives the layer."""
    return tuple(event for event in events if event.label != ENCODER_OUTPUT)


def _forget_copies(weights: list[Weight]) -> None:
    """Leave autocast: its cache drops the copies, and those that nothing saved are freed."""
    for weight in weights:
        weight.cast = None


def _check_claimed(weights: Weights, part: str) -> None:
    if weights.unclaimed:
        left = ", ".join(f"{weight.parameter.name} {weight.parameter.shape}" for weight in weights.unclaimed)
        raise SpecError(f"the {part}'s code uses no parameter of these: {left}")
