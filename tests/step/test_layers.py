"""What layers and the loss keep and take, against closed formulas.

The formulas were derived from the Llama code of transformers 5.23 and checked by tracing it. They are per token, in
the letters h hidden size, a heads of width d, k key-value heads, f feed-forward width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.specs.model import Attention, FeedForward, Layer, ModelSpec, Parameter, Run
from advisor.step.recording import Mode, record_embedding, record_head, record_layer
from advisor.step.tape import Event


@dataclass(frozen=True)
class Shape:
    """A Llama-like model in the letters of the formulas, and the tokens of a sequence."""

    h: int
    a: int
    k: int
    d: int
    f: int
    v: int
    tokens: int

    @property
    def layer(self) -> Layer:
        query, key_value = self.a * self.d, self.k * self.d
        shapes = {
            "q": (query, self.h),
            "k": (key_value, self.h),
            "v": (key_value, self.h),
            "o": (self.h, query),
            "gate": (self.f, self.h),
            "up": (self.f, self.h),
            "down": (self.h, self.f),
            "attention norm": (self.h,),
            "mlp norm": (self.h,),
        }
        return Layer(
            attention=Attention(heads=self.a, key_value_heads=self.k, head_dim=self.d),
            feed_forward=FeedForward(width=self.f),
            norm="rms",
            parameters=tuple(Parameter(name, shape) for name, shape in shapes.items()),
        )

    @property
    def matrix_elements(self) -> int:
        return self.h * (2 * self.a * self.d + 2 * self.k * self.d + 3 * self.f)

    @property
    def model(self) -> ModelSpec:
        return ModelSpec(
            name="made up",
            family="llama",
            objective="causal",
            hidden_size=self.h,
            vocabulary_size=self.v,
            maximum_positions=None,
            tied_embeddings=False,
            embedding=(Parameter("embedding", (self.v, self.h)),),
            runs=(Run((self.layer,), 2),),
            final_norm="rms",
            head=(Parameter("final norm", (self.h,)), Parameter("output", (self.v, self.h))),
        )


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    key_value_heads = draw(st.integers(1, 8))
    return Shape(
        h=draw(st.integers(1, 512)),
        a=key_value_heads * draw(st.integers(1, 8)),
        k=key_value_heads,
        d=2 * draw(st.integers(1, 64)),
        f=draw(st.integers(1, 2048)),
        v=draw(st.integers(2, 10_000)),
        tokens=draw(st.integers(1, 512)),
    )


def mode(shape: Shape, parameter_bytes: int = 2, kernel: str = "sdpa") -> Mode:
    return Mode(2, parameter_bytes, shape.tokens, kernel)  # type: ignore[arg-type]


def changes(events: Iterable[Event], *, scales: bool = True) -> list[int]:
    """Bytes taken and given back, one event after another, of what grows with the micro-batch or what does not."""
    signs = {"take": 1, "give": -1}
    return [signs.get(event.kind, 0) * event.size_bytes for event in events if event.scales is scales]


def peak(events: Iterable[Event]) -> int:
    return max(accumulate(changes(events), initial=0))


def saved_bf16(shape: Shape) -> int:
    h, a, k, d, f = shape.h, shape.a, shape.k, shape.d, shape.f
    return (16 * h + 4 * a * d + 4 * k * d + 4 * a + 8 * f + 8) * shape.tokens


def saved_autocast(shape: Shape) -> int:
    h, a, k, d, f = shape.h, shape.a, shape.k, shape.d, shape.f
    return (26 * h + 4 * a * d + 4 * k * d + 4 * a + 8 * f + 8) * shape.tokens


# Two fp32 copies of the stream for the norms (8h) with their fp32 scales (8), cast back (4h) and times the weight (4h);
# queries and the kernel's output (4ad), keys and values (4kd), a log-sum-exp (4a); four tensors in the MLP (8f).
@given(shapes())
def test_a_layer_in_bf16_saves_the_closed_formula(shape: Shape) -> None:
    recording = record_layer(shape.layer, shape.h, mode(shape), False)

    assert sum(changes(recording.forward)) == saved_bf16(shape)
    assert sum(changes(recording.forward, scales=False)) == 0


# The stream is fp32, and each of q, k, v, gate and up casts the norm's output for itself.
@given(shapes())
def test_a_layer_under_autocast_saves_the_closed_formula_and_copies_of_its_matrices(shape: Shape) -> None:
    recording = record_layer(shape.layer, shape.h, mode(shape, parameter_bytes=4), False)

    assert sum(changes(recording.forward)) == saved_autocast(shape)
    assert sum(changes(recording.forward, scales=False)) == 2 * shape.matrix_elements


def test_a_layer_of_qwen2_7b_saves_225_400_bytes_a_token() -> None:
    shape = Shape(h=3584, a=28, k=4, d=128, f=18944, v=152064, tokens=64)
    recording = record_layer(shape.layer, shape.h, mode(shape), False)

    assert sum(changes(recording.forward)) == 225_400 * shape.tokens


# Nothing but the layer's input: 2h in bf16, 4h in the fp32 stream of autocast.
@given(shapes(), st.sampled_from([2, 4]))
def test_checkpointing_keeps_one_stream_per_layer(shape: Shape, parameter_bytes: int) -> None:
    recording = record_layer(shape.layer, shape.h, mode(shape, parameter_bytes), True)

    assert sum(changes(recording.forward)) == parameter_bytes * shape.h * shape.tokens


# While one layer runs backwards again there are its saved tensors, the gradient that arrives (2h), and the gradients of
# the SwiGLU's two factors (4f).
def test_backward_under_checkpointing_holds_one_layer_and_its_largest_transient() -> None:
    shape = Shape(h=256, a=8, k=2, d=32, f=704, v=1000, tokens=128)
    recording = record_layer(shape.layer, shape.h, mode(shape), True)
    arriving = 2 * shape.h * shape.tokens

    assert arriving + peak(recording.backward) == saved_bf16(shape) + (4 * shape.f + 2 * shape.h) * shape.tokens


def flop(events: Iterable[Event]) -> float:
    return sum(float(product.matmul.flop) for event in events for product in event.work.products)


# torch.utils.checkpoint stops early: all that backward needs is there before the down projection's product.
@given(shapes())
def test_recomputing_stops_before_the_product_whose_output_nothing_needs(shape: Shape) -> None:
    kept, again = (record_layer(shape.layer, shape.h, mode(shape), checkpointed) for checkpointed in (False, True))
    down = 2 * shape.h * shape.f * shape.tokens

    assert flop(again.forward) == flop(kept.forward)
    assert flop(again.backward) == flop(kept.backward) + flop(kept.forward) - down


# fp32 probabilities (4) and their bf16 copy (2) for each head and pair of tokens, expanded keys and values, no
# log-sum-exp.
@given(shapes())
def test_the_scores_matrix_takes_the_square_of_the_sequence(shape: Shape) -> None:
    fused = record_layer(shape.layer, shape.h, mode(shape), False)
    eager = record_layer(shape.layer, shape.h, mode(shape, kernel="eager"), False)

    assert sum(changes(eager.forward)) - sum(changes(fused.forward)) == (
        6 * shape.a * shape.tokens**2 + 4 * (shape.a - shape.k) * shape.d * shape.tokens - 4 * shape.a * shape.tokens
    )


@given(shapes())
def test_flash_saves_what_sdpa_saves(shape: Shape) -> None:
    sdpa, flash = (
        record_layer(shape.layer, shape.h, mode(shape, kernel=kernel), False) for kernel in ("sdpa", "flash")
    )

    assert sum(changes(sdpa.forward)) == sum(changes(flash.forward))


@given(shapes(), st.sampled_from([0.1, 0.5]))
def test_dropout_keeps_a_byte_for_each_element_of_its_branch(shape: Shape, probability: float) -> None:
    dry = record_layer(shape.layer, shape.h, mode(shape), False)
    wet = record_layer(replace(shape.layer, dropout=probability), shape.h, mode(shape), False)

    assert sum(changes(wet.forward)) - sum(changes(dry.forward)) == 2 * shape.h * shape.tokens


# A Phi-3 layer: keys and values are views of the fused product, which stays whole beside the rotated copies (v is a
# view and no copy of its own), and the attention output is stored a second time for its projection.
@given(shapes())
def test_a_fused_projection_stays_whole(shape: Shape) -> None:
    query, key_value = shape.a * shape.d, shape.k * shape.d
    split = shape.layer
    joint = Parameter("qkv", (query + 2 * key_value, shape.h))
    fused = replace(
        split,
        attention=replace(split.attention, fused_projection=True, rotates_by_head=True),
        parameters=(joint, *split.parameters[3:]),
    )
    apart, together = (record_layer(each, shape.h, mode(shape), False) for each in (split, fused))

    assert (
        sum(changes(together.forward)) - sum(changes(apart.forward))
        == (2 * (query + key_value) + 2 * query) * shape.tokens
    )


# Beside what the final norm and the output matrix keep of the stream (8h + 4): bf16 logits (2V), their fp32 copy (4V)
# and its log-softmax (4V) at once; when backward starts, the log-softmax and the gradients of loss and softmax (4V
# each).
@given(shapes())
def test_logits_take_ten_bytes_in_forward_and_twelve_when_backward_starts(shape: Shape) -> None:
    head = record_head(shape.model, mode(shape))
    logit = shape.v * shape.tokens
    kept = (8 * shape.h + 4) * shape.tokens
    stream = 2 * shape.h * shape.tokens
    before = stream + sum(changes(head.forward))
    after = before + sum(changes(head.loss))

    assert before == kept + 2 * logit
    assert before + peak(head.loss) == kept + 10 * logit
    assert after == kept + 4 * logit
    assert kept + 12 * logit in accumulate(changes(head.loss_backward + head.backward), initial=after)


def test_the_twelve_bytes_of_a_large_vocabulary_are_the_peak_of_the_head_s_backward() -> None:
    shape = Shape(h=64, a=4, k=4, d=16, f=128, v=10_000, tokens=128)
    head = record_head(shape.model, mode(shape))
    after = sum(changes(head.forward + head.loss)) + 2 * shape.h * shape.tokens

    assert after + peak(head.loss_backward + head.backward) == (8 * shape.h + 4 + 12 * shape.v) * shape.tokens


@pytest.mark.parametrize("parameter_bytes", [2, 4])
def test_the_embedding_saves_nothing_but_the_stream_it_makes(parameter_bytes: int) -> None:
    shape = Shape(h=64, a=4, k=4, d=16, f=128, v=1000, tokens=128)
    recording = record_embedding(shape.model, mode(shape, parameter_bytes))

    assert sum(changes(recording.forward)) == parameter_bytes * shape.h * shape.tokens
