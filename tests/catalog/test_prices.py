"""List prices: each of a known GPU, dated and sourced, and found by provider."""

from __future__ import annotations

import csv
from datetime import datetime

import pytest

from advisor.catalog.gpus import gpu_names
from advisor.catalog.prices import find_price, priced_gpus
from advisor.catalog.profiles import profiles_folder
from advisor.errors import UnknownNameError

ROWS = list(csv.DictReader((profiles_folder() / "prices.csv").read_text(encoding="utf-8").splitlines()))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['name']}, {row['provider']}")
def test_a_price_is_of_a_known_gpu_dated_and_sourced(row: dict[str, str]) -> None:
    found = find_price(row["name"], row["provider"])

    assert row["name"] in gpu_names()
    assert datetime.strptime(row["date"], "%Y-%m-%d" if len(row["date"]) == 10 else "%Y-%m").year >= 2025
    assert found
    assert found.source == f"{row['provider']} {row['date']}, {row['source']}"
    assert row["source"]
    assert 0.1 < found.low_usd_per_gpu_hour <= found.high_usd_per_gpu_hour < 20


def test_a_provider_has_one_price_for_a_gpu() -> None:
    assert len({(row["name"], row["provider"]) for row in ROWS}) == len(ROWS)


def test_without_a_provider_the_first_that_lists_the_gpu_is_taken() -> None:
    found = find_price("H100-SXM5-80GB")

    assert found == find_price("H100-SXM5-80GB", "runpod")
    assert found
    assert (found.low_usd_per_gpu_hour, found.high_usd_per_gpu_hour) == (2.69, 3.99)
    assert found != find_price("H100-SXM5-80GB", "AWS")


def test_what_is_not_listed_has_no_price() -> None:
    assert find_price("P100-SXM2-16GB") is None
    assert find_price("RTX 3090", "Azure") is None
    assert "RTX 3090" in priced_gpus()
    assert "RTX 3090" not in priced_gpus("azure")


def test_an_unknown_provider_is_told_near_ones() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown provider 'runpond'; near names: RunPod"):
        find_price("H100-SXM5-80GB", "runpond")
