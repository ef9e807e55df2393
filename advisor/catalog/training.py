"""The words about a whole training run to what they mean: tokens in all, a price, limits."""

from __future__ import annotations

import math
from typing import TypedDict

from advisor.catalog.prices import find_price
from advisor.errors import SpecError
from advisor.specs.hardware import Gpu
from advisor.specs.job import Job
from advisor.specs.question import Input
from advisor.specs.training import CURRENCY, Price, Training


class TrainingWords(TypedDict, total=False):
    """What may be said of a whole training run. Without tokens or samples there is none."""

    tokens: float | None
    """Tokens of the data."""
    samples: float | None
    """Sequences of the data, in place of tokens."""
    epochs: float | None
    """How often all of it is gone through; once where nobody says."""
    price: float | str | None
    """USD per GPU-hour, or the provider whose list price is taken."""
    max_hours: float | None
    max_cost: float | None
    """USD."""


def training_of(words: TrainingWords, job: Job, gpu: Gpu) -> tuple[Training | None, tuple[Input, ...]]:
    """The training run that *words* describe for *job* on *gpu*, with its inputs; None where they are silent.

    Raises SpecError for words that make no sense alone or together.
    """
    tokens = _tokens(words.get("tokens"), words.get("samples"), words.get("epochs"), job)
    if tokens is None:
        if alone := [name for name in ("epochs", "price", "max_hours", "max_cost") if words.get(name) is not None]:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in alone)
            raise SpecError(f"{flags}: of how long a training? give --tokens, or --samples")
        return None, ()
    given = words.get("price")
    price = _price(given, gpu)
    most_hours, most_usd = words.get("max_hours"), words.get("max_cost")
    if most_usd is not None and price is None:
        raise SpecError(f"--max-cost needs a price, and none is listed for {gpu.name}; give --price")
    training = Training(tokens=tokens, price=price, most_hours=most_hours, most_usd=most_usd)
    inputs = [Input("tokens", tokens, "given")]
    if price:
        inputs.append(Input("price", price_text(price), "assumed" if given is None else "given"))
    return training, tuple(inputs)


def price_text(price: Price) -> str:
    """*price* in a few words: ``1.39–1.79 USD per GPU-hour (RunPod 2026-11-09)``."""
    low, high = price.low_usd_per_gpu_hour, price.high_usd_per_gpu_hour
    amount = f"{low:.2f}" if low == high else f"{low:.2f}–{high:.2f}"
    return f"{amount} {CURRENCY} per GPU-hour ({price.source.split(',')[0]})"


def _tokens(tokens: float | None, samples: float | None, epochs: float | None, job: Job) -> int | None:
    """Tokens in all; a sample is one sequence of the job's length, however it was filled."""
    for flag, amount in (("--tokens", tokens), ("--samples", samples), ("--epochs", epochs)):
        if amount is not None and not (amount > 0 and math.isfinite(amount)):
            raise SpecError(f"{flag} must be a positive number, got {amount:g}")
    if tokens is not None and samples is not None:
        raise SpecError(f"--tokens {tokens:g} and --samples {samples:g} both say how much data there is; give one")
    data = tokens if samples is None else samples * job.sequence_length
    return None if data is None else round(data * (1 if epochs is None else epochs))


def _price(given: float | str | None, gpu: Gpu) -> Price | None:
    if isinstance(given, str):
        found = find_price(gpu.name, given)
        if found is None:
            raise SpecError(f"{given} has no list price for {gpu.name}; give --price in {CURRENCY} per GPU-hour")
        return found
    if given is not None:
        if not (given > 0 and math.isfinite(given)):
            raise SpecError(f"--price must be a positive number of {CURRENCY} per GPU-hour, got {given:g}")
        return Price(low_usd_per_gpu_hour=given, high_usd_per_gpu_hour=given, source="given")
    return find_price(gpu.name)
