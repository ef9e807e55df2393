"""Words about a whole training: what they add up to, and what cannot be meant."""

from __future__ import annotations

from typing import Any

import pytest

from advisor.catalog.gpus import find_gpu
from advisor.catalog.request import resolve
from advisor.catalog.training import training_of
from advisor.errors import SpecError
from advisor.specs.job import Job
from advisor.specs.question import Input
from advisor.specs.training import Price

JOB = Job(sequence_length=1000)


@pytest.mark.parametrize(
    ("words", "tokens"),
    [
        ({"tokens": 10**9}, 10**9),
        ({"tokens": 10**9, "epochs": 3}, 3 * 10**9),
        ({"samples": 50_000}, 50_000_000),
        ({"samples": 50_000, "epochs": 0.5}, 25_000_000),
        ({"samples": 50_000, "tokens": None, "epochs": None}, 50_000_000),
    ],
)
def test_tokens_follow_from_what_is_said_of_the_data(words: Any, tokens: int) -> None:
    training, inputs = training_of(words, JOB, find_gpu("H100"))

    assert training
    assert training.tokens == tokens
    assert inputs[0] == Input("tokens", tokens, "given")


def test_where_nothing_is_said_nothing_is_asked() -> None:
    assert training_of({}, JOB, find_gpu("H100")) == (None, ())
    assert resolve("gpt2", gpus=1, gpu="H100").training is None


@pytest.mark.parametrize(
    ("words", "price", "shown"),
    [
        ({}, (2.69, 3.99), Input("price", "2.69–3.99 USD per GPU-hour (RunPod 2026-11-09)", "assumed")),
        ({"price": "aws"}, (6.88, 6.88), Input("price", "6.88 USD per GPU-hour (AWS 2026-11-09)", "given")),
        ({"price": 2}, (2, 2), Input("price", "2.00 USD per GPU-hour (given)", "given")),
    ],
)
def test_a_price_is_given_or_listed_and_says_which(words: Any, price: tuple[float, float], shown: Input) -> None:
    training, inputs = training_of({"tokens": 10**9, **words}, JOB, find_gpu("H100"))

    assert training
    assert isinstance(training.price, Price)
    assert (training.price.low_usd_per_gpu_hour, training.price.high_usd_per_gpu_hour) == price
    assert inputs[1] == shown


def test_a_gpu_without_a_list_price_has_none() -> None:
    training, inputs = training_of({"tokens": 10**9}, JOB, find_gpu("P100"))

    assert training
    assert training.price is None
    assert [each.name for each in inputs] == ["tokens"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"tokens": 0}, "--tokens must be a positive number, got 0"),
        ({"tokens": -1e9}, r"--tokens must be a positive number, got -1e\+09"),
        ({"samples": float("inf")}, "--samples must be a positive number, got inf"),
        ({"tokens": 1e9, "epochs": 0}, "--epochs must be a positive number, got 0"),
        ({"tokens": 1e9, "samples": 1e5}, r"--tokens 1e\+09 and --samples 100000 both say"),
        ({"epochs": 3}, "--epochs: of how long a training"),
        ({"price": 2, "max_hours": 3}, "--price, --max-hours: of how long a training"),
        ({"tokens": 1e9, "price": 0}, "--price must be a positive number of USD per GPU-hour, got 0"),
        ({"tokens": 1e9, "price": -2.5}, "--price must be a positive number of USD per GPU-hour, got -2.5"),
        ({"tokens": 1e9, "price": float("nan")}, "--price must be a positive number of USD per GPU-hour, got nan"),
        ({"tokens": 1e9, "price": "azure"}, "azure has no list price for P100-SXM2-16GB; give --price in USD"),
        ({"tokens": 1e9, "max_cost": 100}, "--max-cost needs a price, and none is listed for P100-SXM2-16GB"),
        ({"tokens": 1e9, "max_hours": 0}, "--max-hours must be a positive number, got 0"),
    ],
)
def test_what_cannot_be_meant_is_one_line(words: Any, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        training_of(words, JOB, find_gpu("P100"))
