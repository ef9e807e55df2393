"""Rates of single operations: what they count, and that a file of them is read back."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from advisor.catalog.request import resolve
from advisor.errors import ConfigError
from advisor.specs.plan import Plan, Strategy
from advisor.step.build import build
from advisor.validation import rates

pytest.importorskip("torch")

import torch

CPU = torch.device("cpu")


def test_a_call_is_timed_without_its_first() -> None:
    calls = []

    def call() -> None:
        calls.append(1)
        time.sleep(0.2 if len(calls) == 1 else 0.01)

    seconds, least_s = rates.timed(call, CPU)

    assert 0.01 <= least_s <= seconds < 0.1
    assert len(calls) == 2 + rates.SAMPLES


def test_what_an_operation_does_is_counted() -> None:
    product = rates.product(CPU, 8, 16, 32)
    forward, backward = rates.attention(CPU, 2, 64, 4, 2, 16)
    copied, updated = rates.copy(CPU, 4096), rates.adamw(CPU, 1000, "adamw-loop")

    assert product.flop == 2 * 8 * 16 * 32
    assert product.moved_bytes == 2 * (8 * 32 + 16 * 32 + 8 * 16)
    assert forward.flop == 2 * 2 * 2 * 4 * 64 * 64 * 16 / 2
    assert backward.flop == 2.5 * forward.flop
    assert forward.moved_bytes == 2 * 2 * 64 * 16 * (4 + 2 + 2 + 4)
    assert copied.moved_bytes == 2 * 4096
    assert updated.moved_bytes == (16 + 12) * 1000
    for each in (product, forward, backward):
        assert each.flop_per_s == pytest.approx(each.flop / each.seconds)
        assert 0 < each.least_s <= each.seconds


def test_products_are_those_of_the_step() -> None:
    question = resolve("Qwen2.5-1.5B", gpus=1, gpu="A100-80GB")
    plan = Plan(strategy=Strategy.DDP, gpus=1, micro_batch=2)

    found = rates.linear_products(build(question.model, question.job, plan).step)

    tokens, width, vocabulary = 2 * 2048, 1536, 151_936
    assert found[0][0] * found[0][1] * found[0][2] == tokens * width * vocabulary
    assert {(tokens, 8960, width), (tokens, width, 8960), (width, 8960, tokens)} <= set(found)
    assert len(found) == len(set(found))


def test_a_file_of_rates_is_read_back(tmp_path: Path) -> None:
    found = [rates.product(CPU, 8, 16, 32), rates.copy(CPU, 4096)]

    rates.write(tmp_path / "rates.json", "a GPU", found)

    assert rates.read(tmp_path / "rates.json") == ("a GPU", tuple(found))
    product, copied = rates.lines(found)
    assert product.endswith("product: m 8 n 16 k 32 number_format bf16")
    assert copied.endswith("copy: size_bytes 4096")


@pytest.mark.parametrize("text", ["", "[]", '{"schema": "advisor/rates/9"}'])
def test_a_file_without_rates_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "rates.json").write_text(text)

    with pytest.raises(ConfigError, match=r"rates\.json"):
        rates.read(tmp_path / "rates.json")
