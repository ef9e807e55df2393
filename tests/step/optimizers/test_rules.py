"""What optimizers keep and take, beside sizes from their packages' sources and laws that hold for any tensors."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.specs.job import Job
from advisor.step.optimizers.rule import Given, Piece, flat
from advisor.step.optimizers.rules import rule_of
from advisor.step.program import Block, fold, then

ONE_OF_EACH_RULE: tuple[Any, ...] = ("adamw-fused", "sgd-momentum", "adamw-8bit", "lion", "adafactor", "muon", "galore")
sizes = st.integers(1, 300_000)
shapes = st.lists(st.integers(1, 300), min_size=1, max_size=3).map(tuple)


def tensors(*found: tuple[int, ...], element_bytes: int = 4, hidden: bool = True) -> Given:
    """Whole tensors of those shapes, the matrices among them of layers or not."""
    pieces = tuple(Piece(prod(shape), shape, hidden and len(shape) == 2) for shape in found)
    return Given(sum(piece.elements for piece in pieces), len(pieces), lambda: pieces, element_bytes)


def kept_bytes(name: Any, given_: Given) -> int:
    return int(fold(then(*rule_of(Job(optimizer=name)).kept(given_))).net_bytes)


def host_bytes(name: Any, given_: Given) -> int:
    return int(fold(then(*rule_of(Job(optimizer=name)).host(given_))).net_bytes)


# bitsandbytes 0.50.2, optim/optimizer.py ``init_state``: below 4,096 elements fp32; else a byte an element, fp32 for
# each block of 256 and, once, tables of 1,024 bytes. galore-torch 1.0: rank 128; in fp32 the smaller square stays.
@pytest.mark.parametrize(
    ("name", "shape", "element_bytes", "kept"),
    [
        ("adamw-8bit", (4095,), 4, 2 * 4 * 4095),
        ("adamw-8bit", (4096,), 2, 2 * (4096 + 4 * 16 + 1024)),
        ("lion-8bit", (300, 200), 4, 60_000 + 4 * 235 + 1024),
        ("lion", (300, 200), 2, 4 * 60_000),
        ("adafactor", (300, 200), 2, 4 * (300 + 200) + 4),
        ("adafactor", (8, 300, 200), 4, 4 * 8 * (300 + 200) + 4),
        ("adafactor", (300,), 4, 4 * 300 + 4),
        ("sgd", (300, 200), 4, 0),
        ("sgd-momentum", (300, 200), 2, 2 * 60_000),
        ("muon", (300, 200), 4, 4 * 60_000),
        ("muon", (300,), 4, 2 * 4 * 300 + 4),
        ("galore", (1000, 300), 4, 2 * 4 * 128 * 1000 + 4 * 300 * 300),
        ("galore", (300, 1000), 2, 2 * 2 * 128 * 1000 + 2 * 128 * 300),
        ("galore", (100, 1000), 2, 2 * 2 * 100 * 1000 + 2 * 100 * 100),
    ],
)
def test_what_is_kept_of_one_tensor(name: str, shape: tuple[int, ...], element_bytes: int, kept: int) -> None:
    assert kept_bytes(name, tensors(shape, element_bytes=element_bytes)) == kept


@pytest.mark.parametrize("name", ONE_OF_EACH_RULE)
@given(st.lists(shapes, min_size=1, max_size=5), st.sampled_from([2, 4]))
def test_the_tensors_that_are_kept_sum_to_what_is_kept(name: Any, found: list[Any], element_bytes: int) -> None:
    given_, rule = tensors(*found, element_bytes=element_bytes), rule_of(Job(optimizer=name))
    known = rule.tensor_sizes(given_)
    blocks = [block for block in rule.kept(given_) if isinstance(block, Block) and block.net_bytes]

    assert [sum(known[block.label]()) for block in blocks] == [block.net_bytes for block in blocks]


@pytest.mark.parametrize(("paged", "plain"), [("adamw-paged", None), ("adamw-8bit-paged", "adamw-8bit")])
@given(st.lists(sizes, min_size=1, max_size=5))
def test_paged_moments_are_on_the_host_in_place_of_the_device(paged: str, plain: Any, found: list[int]) -> None:
    given_ = tensors(*((size,) for size in found))
    both = kept_bytes(paged, given_) + host_bytes(paged, given_)

    assert both == (kept_bytes(plain, given_) if plain else 8 * sum(found))
    assert (host_bytes(paged, given_) > 0) == (max(found) >= 100_000)


@given(st.lists(sizes, min_size=1, max_size=6))
def test_eight_bits_never_take_more_than_their_tables_beyond_fp32(found: list[int]) -> None:
    given_ = tensors(*((size,) for size in found))

    assert kept_bytes("lion-8bit", given_) <= kept_bytes("lion", given_) + 1024
    assert kept_bytes("lion-8bit", given_) < kept_bytes("adamw-8bit", given_)


@pytest.mark.parametrize("name", ONE_OF_EACH_RULE[:5])
@given(st.lists(sizes, min_size=1, max_size=4))
def test_many_plans_at_once_are_each_alone(name: Any, found: list[int]) -> None:
    rule, together = rule_of(Job(optimizer=name)), flat(np.array(found), 4)
    alone = [flat(size, 4) for size in found]

    kept = np.broadcast_to(fold(then(*rule.kept(together))).net_bytes, len(found))
    taken = np.broadcast_to(rule.temporaries(together), len(found))
    assert kept.tolist() == [fold(then(*rule.kept(each))).net_bytes for each in alone]
    assert taken.tolist() == [rule.temporaries(each) for each in alone]


# Live bytes of their own code in the second of two steps, on fake tensors.
@pytest.mark.parametrize(
    ("name", "element_bytes", "found", "taken"),
    [
        ("muon", 4, [(1000, 300)], 2_760_000),
        ("muon", 2, [(300, 200), (1000, 300)], 2_160_000),
        ("muon", 4, [(400, 400)], 1_920_000),
        ("galore", 4, [(300, 200), (1000, 300)], 3_936_000),
        ("galore", 4, [(400, 400)], 1_894_400),
        ("galore", 2, [(1000, 300)], 3_350_000),
        ("galore", 2, [(400, 400)], 2_228_800),
        ("galore", 2, [(300, 200), (1000, 300)], 3_546_800),
    ],
)
def test_what_a_step_on_matrices_takes(name: Any, element_bytes: int, found: list[Any], taken: int) -> None:
    given_ = tensors(*found, element_bytes=element_bytes)

    assert rule_of(Job(optimizer=name)).temporaries(given_) == taken


def test_muon_multiplies_each_matrix_fifteen_times_and_moves_no_other() -> None:
    """Five iterations, each X·Xᵀ, its square and the product with X, in bf16."""
    update, others = rule_of(Job(optimizer="muon")).moving(tensors((1000, 300), (300,)))

    assert isinstance(update, Block)
    assert isinstance(others, Block)
    assert sum(product.flop for product in update.matmuls) == 5 * (2 * 2 * 300 * 300 * 1000 + 2 * 300**3)
    assert others.moved_bytes == 7 * 4 * 300


def test_an_embedding_is_left_to_adamw() -> None:
    assert kept_bytes("muon", tensors((500, 64), hidden=False)) == 2 * 4 * 500 * 64 + 4
    assert kept_bytes("galore", tensors((500, 64), hidden=False)) == 2 * 4 * 500 * 64


# The kernel reads weights and gradients and writes weights, and reads and writes what it keeps.
@pytest.mark.parametrize(("name", "moved"), [("adamw-fused", 28), ("adamw-8bit", 16), ("lion-8bit", 14), ("sgd", 12)])
def test_fewer_bits_move_fewer_bytes(name: Any, moved: int) -> None:
    blocks = rule_of(Job(optimizer=name)).moving(tensors((1000, 1024)))

    assert sum(float(block.moved_bytes) for block in blocks if isinstance(block, Block)) == pytest.approx(
        moved * 1_024_000, rel=0.02
    )
