"""What the parts of Megatron's GPT model do for one sequence, recorded: a :class:`Source` for the shards of one plan.

A rank's *mode* has its local tokens as the sequence, weights and stream in the compute format, and no autocast.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from advisor.specs.job import Job
from advisor.specs.model import AnyLayer, Layer, ModelSpec, Parameter
from advisor.specs.plan import Plan
from advisor.step.megatron_attention import Kernel
from advisor.step.megatron_layers import INDEX_BYTES, Named, cross_entropy, embed, gpt_layer, logits
from advisor.step.megatron_operators import Cut, ExpertCut
from advisor.step.recording import (
    GRADIENT_NUMBER,
    GRADIENT_STREAM,
    STREAM,
    STREAM_NUMBER,
    HeadRecording,
    Mode,
    Recording,
    after_forward,
    passed,
)
from advisor.step.tape import Event, Tape, Tensor, Weight

MASK_BYTES = 4
"""Of the loss mask, per token."""
Run = Callable[[Tape, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class MegatronSource:
    """Recordings of a rank's shards, which have fewer heads and narrower products than the model."""

    cut: Cut
    mask_in_batch: bool = True

    def inputs(self, model: ModelSpec, mode: Mode) -> tuple[Event, ...]:
        """The batch as the stages with the embedding or the head read it, while forward runs.

        Token and position ids; labels and the loss mask; both with the attention mask (Megatron-LM, training/utils.py
        ``get_batch_on_this_tp_rank``).
        """
        tokens = mode.sequence_length
        ids = 2 * INDEX_BYTES * bool(model.embedding) + (INDEX_BYTES + MASK_BYTES) * bool(model.head)
        found = [Event("take", "token ids and labels", "activations", ids * tokens, True)] if ids else []
        if ids and self.mask_in_batch:
            found.append(Event("take", "attention mask", "activations", tokens * tokens * self.cut.context, True))
        return tuple(found)

    def embedding(self, model: ModelSpec, mode: Mode, checkpointed: bool) -> Recording:
        """From token ids to the residual stream."""
        return _embedding(model, mode, self.cut)

    def layer(
        self, layer: AnyLayer, hidden_size: int, mode: Mode, checkpointed: bool, selective: bool = False
    ) -> Recording:
        """One layer, computed again in backward where *checkpointed*, or its attention alone where *selective*."""
        assert isinstance(layer, Layer)
        return _layer(layer, hidden_size, mode, self.cut, checkpointed, selective)

    def left_bytes(self, layer: AnyLayer, hidden_size: int, mode: Mode) -> int:
        """Of what the modules of a layer refer to until they run again: how the last tokens were sent to experts."""
        assert isinstance(layer, Layer)
        return _left_bytes(layer, hidden_size, mode, self.cut)

    def head(self, model: ModelSpec, mode: Mode, checkpointed: bool) -> HeadRecording:
        """From the residual stream to the loss."""
        return _head(model, mode, self.cut)


def source_of(plan: Plan) -> MegatronSource:
    """The recordings of *plan*'s shards."""
    chosen = plan.megatron
    experts = ExpertCut(
        plan.expert_parallel,
        plan.expert_tensor_parallel,
        chosen.token_dispatcher,
        chosen.fuses_permutation,
        chosen.groups_experts,
        chosen.balances_experts,
    )
    cut = Cut(
        tensor=plan.tensor_parallel,
        sequence=plan.cuts_sequence,
        context=plan.context_parallel,
        context_exchange=chosen.context_exchange,
        fuses_gradient_sums=chosen.fuses_gradient_sums,
        experts=experts,
    )
    return MegatronSource(cut, chosen.mask_in_batch)


def megatron_mode(job: Job, plan: Plan) -> Mode:
    """How a rank of *plan* computes."""
    length = job.sequence_length // plan.context_parallel
    alone = isinstance(plan.micro_batch, int) and plan.micro_batch == 1
    return Mode(job.compute_bytes, job.compute_bytes, length, job.attention, alone=alone)


@lru_cache(maxsize=256)
def _layer(layer: Layer, hidden_size: int, mode: Mode, cut: Cut, checkpointed: bool, selective: bool) -> Recording:
    kernel = Kernel(mode.attention != "eager", checkpointed and selective)

    def run(tape: Tape, stream: Tensor) -> Tensor:
        return gpt_layer(tape, stream, layer, _weights(layer.parameters, mode), cut, kernel)

    width = hidden_size // cut.stream_parts
    return (_recomputed if checkpointed and not selective else _recorded)(run, width, mode)


@lru_cache(maxsize=64)
def _left_bytes(layer: Layer, hidden_size: int, mode: Mode, cut: Cut) -> int:
    tape = mode.tape()
    kernel = Kernel(mode.attention != "eager", recomputed=False)
    stream = _stream(tape, hidden_size // cut.stream_parts, mode)
    gpt_layer(tape, stream, layer, _weights(layer.parameters, mode), cut, kernel)
    return sum(each.size_bytes for each in tape.left)


@lru_cache(maxsize=64)
def _embedding(model: ModelSpec, mode: Mode, cut: Cut) -> Recording:
    tape = mode.tape()
    output = embed(tape, model, _weights(model.embedding, mode), cut)
    output.storage.rename(STREAM, "activations")
    last = len(tape.events)
    root, shape, number = output.node, (output.numel, output.element_bytes), output.storage.event.storage
    assert root is not None
    del output
    tape.run_backward(root, *shape, None)
    forward = passed(tape.events[:last], STREAM_NUMBER, taken=number)
    return Recording(forward, after_forward(tape, last, number))


@lru_cache(maxsize=64)
def _head(model: ModelSpec, mode: Mode, cut: Cut) -> HeadRecording:
    tape = mode.tape()
    weights = _weights(model.head + (model.embedding[:1] if model.tied_embeddings else ()), mode)
    stream = _stream(tape, model.hidden_size // cut.stream_parts, mode)
    start, first, given = stream.node, len(tape.events), stream.storage.event.storage
    scores = logits(tape, stream, model, weights, cut)
    del stream
    last = len(tape.events)
    tape.scope = "logits"
    loss = cross_entropy(tape, scores)
    del scores
    end = len(tape.events)
    assert loss.node is not None
    returned = tape.run_backward(loss.node, loss.numel, loss.element_bytes, start)
    assert returned is not None
    returned.storage.rename(GRADIENT_STREAM, "temporaries")
    del loss
    named = (event._replace(category="logits") if _is_logits(event) else event for event in tape.events)
    events = passed(named, STREAM_NUMBER, given=given)
    events = passed(events, GRADIENT_NUMBER, taken=returned.storage.event.storage)
    turn = tape.reached_at
    return HeadRecording(events[first:last], events[last:end], events[end:turn], events[turn:])


def _is_logits(event: Event) -> bool:
    return event.label == "logits" and event.category in ("activations", "temporaries")


def _weights(parameters: tuple[Parameter, ...], mode: Mode) -> Named:
    return {parameter.name: Weight(parameter, mode.parameter_bytes) for parameter in parameters}


def _stream(tape: Tape, width: int, mode: Mode) -> Tensor:
    return tape.input(mode.sequence_length * width, mode.stream_bytes, STREAM)


def _recorded(run: Run, width: int, mode: Mode) -> Recording:
    """A part with the residual stream coming in and going out, *width* elements a token."""
    tape = mode.tape()
    stream = _stream(tape, width, mode)
    start, first, given = stream.node, len(tape.events), stream.storage.event.storage
    output = run(tape, stream)
    output.storage.rename(STREAM, "activations")
    del stream
    tape.left.clear()
    last = len(tape.events)
    root, shape, number = output.node, (output.numel, output.element_bytes), output.storage.event.storage
    assert root is not None
    del output
    returned = tape.run_backward(root, *shape, start)
    assert returned is not None
    returned.storage.rename(GRADIENT_STREAM, "temporaries")
    forward = passed(tape.events[first:last], STREAM_NUMBER, given=given, taken=number)
    backward = after_forward(tape, last, number, returned.storage.event.storage)
    return Recording(forward, passed(backward, STREAM_NUMBER, given=given))


def _recomputed(run: Run, width: int, mode: Mode) -> Recording:
    """The same under tensor_parallel/random.py ``checkpoint``: keeps the input, and in backward runs again whole.

    What the second run puts out is there until its backward is over.
    """
    tape = mode.tape()
    tape.grad_enabled = False
    stream = _stream(tape, width, mode)
    first = len(tape.events)
    output = run(tape, stream)
    tape.left.clear()
    output.storage.rename(STREAM, "activations")
    forward = passed(tape.events[first:], STREAM_NUMBER, taken=output.storage.event.storage)
    tape = mode.tape()
    stream = _stream(tape, width, mode)
    start, first, given = stream.node, len(tape.events), stream.storage.event.storage
    output = run(tape, stream)
    tape.left.clear()
    last = len(tape.events)
    assert output.node is not None
    returned = tape.run_backward(output.node, output.numel, output.element_bytes, start)
    assert returned is not None
    returned.storage.rename(GRADIENT_STREAM, "temporaries")
    again = tuple(tape.events[first:last])
    del stream, output
    backward = after_forward(tape, last, -1, returned.storage.event.storage)
    return Recording(forward, passed(again + backward, STREAM_NUMBER, given=given))
