"""What the losses without all logits take, against closed formulas, per token and row."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.errors import SpecError
from advisor.specs.job import LossKernel
from advisor.specs.model import ModelSpec, Parameter, Run, UndescribedLayer
from advisor.step.losses import LOSS_TOKENS
from advisor.step.recording import Mode, record_head
from advisor.step.rows import Beyond, OtherPieces, Piece, PowerOfTwo, UpTo
from advisor.step.tape import Event
from advisor.step.tiled_loss import TILE_COLUMNS, TILE_TOKENS

WIDTH, VOCABULARY, TOKENS = 64, 10_000, 4096


def model(objective: str = "causal") -> ModelSpec:
    return ModelSpec(
        name="made up",
        family="llama",
        objective=objective,  # type: ignore[arg-type]
        hidden_size=WIDTH,
        vocabulary_size=VOCABULARY,
        maximum_positions=None,
        tied_embeddings=False,
        embedding=(Parameter("embedding", (VOCABULARY, WIDTH)),),
        runs=(Run((UndescribedLayer(number=0, eager_only=False, parameters=()),), 1),),
        final_norm="rms",
        head=(Parameter("final norm", (WIDTH,)), Parameter("output", (VOCABULARY, WIDTH))),
    )


def mode(loss: LossKernel, parameter_bytes: int = 2) -> Mode:
    return Mode(2, parameter_bytes, TOKENS, "sdpa", loss=loss)


def sizes(events: Iterable[Event], batch: int = 1) -> list[int]:
    """Bytes taken and given back, one event after another."""
    signs = {"take": 1, "give": -1}
    found = []
    for event in events:
        times = event.scales if isinstance(event.scales, bool) else event.scales.of(batch)
        times = (batch if times else 1) if isinstance(event.scales, bool) else int(times)
        found.append(signs.get(event.kind, 0) * event.size_bytes * times)
    return found


# Every piece holds 12 bytes for each logit of its own rows, and two matrix gradients are there at once.
def test_chunked_logits_are_those_of_one_piece() -> None:
    head = record_head(model(), mode("chunked"))
    kept = sum(sizes(head.forward)) + sum(sizes(head.loss))
    most = max(accumulate(sizes(head.loss_backward + head.backward), initial=kept))
    hidden, matrix, rows = 2 * WIDTH * TOKENS, 2 * WIDTH * VOCABULARY, LOSS_TOKENS
    held = kept + matrix + hidden * (TOKENS - rows) // TOKENS + 12 * VOCABULARY * rows

    assert most == pytest.approx(held, abs=64)


# Both gradients are there when forward ends, in the formats of the hidden states and the matrix, and no logits.
@pytest.mark.parametrize("parameter_bytes", [2, 4])
def test_the_fused_loss_leaves_gradients_and_no_logits(parameter_bytes: int) -> None:
    fused = sum(sizes(record_head(model(), mode("fused", parameter_bytes)).loss))
    hidden, matrix = parameter_bytes * WIDTH * TOKENS, parameter_bytes * WIDTH * VOCABULARY
    # Autocast keeps its copy of the matrix to the end of forward; the hidden states themselves go.
    assert fused == hidden + matrix + 4 - hidden


# Both gradients in fp32 and in bf16, one row of tiles, the mask, and beside each scored token's hidden state its label,
# its normaliser and its entropy; the gradient of its loss comes in twice.
def test_tiles_hold_both_gradients_in_fp32_and_no_logits() -> None:
    head = record_head(model(), mode("tiled"))
    kept = sum(sizes(head.forward)) + sum(sizes(head.loss))
    most = max(accumulate(sizes(head.loss_backward + head.backward), initial=kept))
    scored = TOKENS - 1
    gradients = 6 * WIDTH * VOCABULARY + 6 * WIDTH * scored
    held = kept + gradients + 2 * TILE_COLUMNS * min(scored, TILE_TOKENS)

    assert most == pytest.approx(held + 4 * scored, abs=64)


@given(tokens=st.integers(1, 10**6), most=st.integers(1, 10**4), batch=st.integers(1, 64))
def test_rows_of_tiles_are_full_from_their_size_on(tokens: int, most: int, batch: int) -> None:
    rows, more = int(UpTo(tokens, most).of(batch)), int(Beyond(tokens, most).of(batch))

    assert rows == (most if more else tokens * batch)


@given(tokens=st.integers(1, 10**6), most=st.integers(1, 10**4), batch=st.integers(1, 64))
def test_pieces_are_two_or_more_and_make_up_the_whole(tokens: int, most: int, batch: int) -> None:
    piece = Piece(tokens, most)
    rows, others = int(piece.of(batch)), int(OtherPieces(piece).of(batch))

    assert 1 <= rows <= most
    assert rows + others == tokens * batch
    assert others > 0 or tokens * batch == 1


@given(tokens=st.integers(1, 10**6), pieces=st.integers(1, 200), batch=st.integers(1, 64))
def test_a_power_of_two_holds_a_piece_and_less_than_two(tokens: int, pieces: int, batch: int) -> None:
    rows, piece = int(PowerOfTwo(tokens, pieces).of(batch)), -(-tokens * batch // pieces)

    assert piece <= rows <= tokens * batch
    assert rows == tokens * batch or (rows < 2 * piece and rows.bit_count() == 1)


@given(tokens=st.integers(1, 10**6), batches=st.lists(st.integers(1, 64), min_size=1))
def test_many_micro_batches_at_once_give_what_each_gives(tokens: int, batches: list[int]) -> None:
    pieces = Piece(tokens, LOSS_TOKENS)
    for rows in (pieces, OtherPieces(pieces), PowerOfTwo(tokens, 31), UpTo(tokens, 4096), Beyond(tokens, 4096)):
        assert np.asarray(rows.of(np.array(batches))).tolist() == [int(rows.of(batch)) for batch in batches]


@pytest.mark.parametrize("loss", ["chunked", "fused", "tiled"])
def test_other_objectives_have_no_loss_in_pieces(loss: LossKernel) -> None:
    with pytest.raises(SpecError, match=f"--loss {loss} is for causal models, and made up is a masked one"):
        record_head(model("masked"), mode(loss))


def test_a_soft_cap_is_not_for_the_chunked_loss() -> None:
    with pytest.raises(SpecError, match="caps its logits"):
        record_head(replace(model(), logit_soft_cap=True), mode("chunked"))
