"""Prices every plan, ranks those that fit, and says why the others lost."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from advisor.cost.estimate import explained
from advisor.cost.question import ask
from advisor.cost.results import Estimate
from advisor.errors import ConfigError
from advisor.search.explain import Leasts, barred, headline, lost, refused, won
from advisor.search.results import Recommendation, Rejected
from advisor.search.sheet import Sheet, fastest, nearest_miss, price_sheet
from advisor.search.space import VARIANTS, Barred, sheets
from advisor.specs.plan import Offload, Strategy
from advisor.specs.question import Question

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from advisor.catalog.request import Words

TIE_SHARE = 0.03
"""Plans whose throughput differs by less than this count as equally fast, which is finer than the time model can
tell apart without a measurement; the simpler strategy goes first."""

OFFLOAD_LEAD = 0.1
"""By how much an offloading plan has to be faster to come first: it rests on the host's speed, which is assumed."""


def recommend(
    model: str, *, trace: bool = False, trust_remote_code: bool = False, **words: Unpack[Words]
) -> Recommendation:
    """The best plan for *model* on a cluster, the best of each strategy, and why each other lost.

    Words: ``cluster``, ``gpus``, ``nodes``, ``gpu``, ``link``, ``network``, ``host_memory`` (GiB per machine),
    ``seq_len``, ``global_batch``, ``precision``, ``param_dtype``, ``optimizer``, ``attention``, ``loss``, ``margin``.
    With *trace*, transformers' own code on tensors without memory stands in for formulas, which takes any causal
    language model and the extra ``run``; *trust_remote_code* lets that code come from the model's repository. Raises
    SpecError or UnknownNameError for words that make no sense, ConfigError for a model that cannot be read.
    """
    return search(ask(model, trace=trace, trust_remote_code=trust_remote_code, **words))


def search(question: Question) -> Recommendation:
    """Every legal plan, exhaustively."""
    started = time.perf_counter()
    priced: dict[tuple[Strategy, Offload], list[Sheet]] = {}
    untraceable: dict[tuple[Strategy, Offload], str] = {}
    ruled_out: list[Rejected] = []
    for each in sheets(question):
        if isinstance(each, Barred):
            ruled_out.append(barred(question, each))
            continue
        try:
            sheet = price_sheet(question, each)
        except ConfigError as error:
            # A traced model's code does not run in every number format, or knows no checkpointing.
            untraceable[each.strategy, each.offload] = str(error)
        else:
            priced.setdefault((each.strategy, each.offload), []).append(sheet)
    if untraceable and not priced:
        raise ConfigError(next(iter(untraceable.values())))
    ruled_out += [
        barred(question, Barred(*variant, why)) for variant, why in untraceable.items() if variant not in priced
    ]
    chosen: list[Estimate] = []
    known: Leasts = {}
    for variant in priced.values():
        best = fastest(question, variant)
        if best is None:
            ruled_out.append(refused(question, nearest_miss(variant), known))
        else:
            chosen.append(best)
    plans = _explained(_ranked(chosen))
    text, fewest = headline(question, plans, ruled_out, known)
    return Recommendation(
        model=question.model,
        job=question.job,
        cluster=question.cluster,
        inputs=question.inputs,
        plans=plans,
        rejected=tuple(ruled_out),
        headline=text,
        fewest_gpus=fewest,
        considered=sum(sheet.size for variant in priced.values() for sheet in variant),
        seconds=time.perf_counter() - started,
        warnings=question.warnings,
    )


def _ranked(estimates: Sequence[Estimate]) -> list[Estimate]:
    """Fastest first; among those within the tie share of the fastest left, the simplest first."""
    left = sorted(estimates, key=_standing, reverse=True)
    ranked: list[Estimate] = []
    while left:
        floor = _standing(left[0]) * (1 - TIE_SHARE)
        tied = [estimate for estimate in left if _standing(estimate) >= floor]
        simplest = min(tied, key=_simplicity)
        ranked.append(simplest)
        left.remove(simplest)
    return ranked


def _standing(estimate: Estimate) -> float:
    """Tokens per second, less the lead that offloading has to have."""
    return estimate.time.tokens_per_s * (1 - OFFLOAD_LEAD * estimate.plan.offload.optimizer)


def _simplicity(estimate: Estimate) -> int:
    return VARIANTS.index((estimate.plan.strategy, estimate.plan.offload))


def _explained(ranked: list[Estimate]) -> tuple[Estimate, ...]:
    if not ranked:
        return ()
    best = ranked[0]
    return (explained(best, won(ranked)), *(explained(other, lost(best, other)) for other in ranked[1:]))
