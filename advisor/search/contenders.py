"""The best plan of each strategy, and what came of the strategies that have none."""

from __future__ import annotations

from dataclasses import dataclass

from advisor.cost.estimate import judge
from advisor.cost.results import Estimate
from advisor.errors import ConfigError
from advisor.search.explain import nearest_beyond
from advisor.search.rank import outdone, promise
from advisor.search.results import Rejected
from advisor.search.sheet import Sheet, fastest, held_by, leanest, nearest_miss, price_sheet
from advisor.search.space import Barred, Variant, sheets
from advisor.specs.question import Question
from advisor.specs.training import Objective


@dataclass(frozen=True, kw_only=True, slots=True)
class Contenders:
    """Every strategy in one of four places."""

    best: tuple[Estimate, ...]
    """The best plan of each that has one."""
    beyond: tuple[Estimate, ...]
    """The fastest plan of each that fits but is beyond a limit on the training's time or cost."""
    too_large: tuple[tuple[Sheet, ...], ...]
    """The sheets of each of which nothing fits."""
    barred: tuple[Barred, ...]
    """Those that cannot run the job at all."""
    sheets: tuple[Sheet, ...]
    """All that were priced."""
    refused: tuple[Rejected, ...] = ()
    """Layouts that do not divide, or of which nothing fits."""

    @property
    def considered(self) -> int:
        """Plans priced."""
        return sum(sheet.size for sheet in self.sheets)


def contenders(question: Question, objective: Objective = "time", *, only_best: bool = False) -> Contenders:
    """Every legal plan, exhaustively; of each strategy the one with least of *objective*.

    On one cluster cost and energy go with time. With *only_best*, strategies are left out whose bounds say that none of
    their plans can come first. Raises ConfigError where a traced model runs in no way.
    """
    if question.job.trainer == "megatron":
        return _layouts(question, objective, only_best=only_best)
    priced, barred = _priced(question)
    best: list[Estimate] = []
    beyond: list[Estimate] = []
    too_large: list[tuple[Sheet, ...]] = []
    variants = list(priced.values())
    if only_best:
        variants.sort(key=lambda variant: promise(variant, objective))
    for variant in variants:
        if only_best and outdone(variant, best, objective):
            continue
        found = fastest(question, variant)
        if found is None:
            too_large.append(tuple(variant))
        elif found.verdict == "no":
            beyond.append(found)
        else:
            best.append((objective == "memory" and leanest(question, variant)) or found)
    return Contenders(
        best=tuple(best),
        beyond=tuple(beyond),
        too_large=tuple(too_large),
        barred=tuple(barred),
        sheets=tuple(sheet for variant in priced.values() for sheet in variant),
    )


def _layouts(question: Question, objective: Objective, *, only_best: bool) -> Contenders:
    """The same of Megatron's layouts."""
    from advisor.search.layout_search import SHOWN, search_layouts  # of use to no other trainer

    found = search_layouts(question, objective, shown=1 if only_best else SHOWN)
    return Contenders(
        best=found.best,
        beyond=found.beyond,
        too_large=() if found.best or found.beyond else (found.sheets,),
        barred=(),
        sheets=found.sheets,
        refused=found.refused,
    )


def _priced(question: Question) -> tuple[dict[Variant, list[Sheet]], list[Barred]]:
    """The sheets of each strategy that can run the job, and those that cannot."""
    priced: dict[Variant, list[Sheet]] = {}
    untraceable: dict[Variant, str] = {}
    barred: list[Barred] = []
    for each in sheets(question):
        if isinstance(each, Barred):
            barred.append(each)
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
    barred += [Barred(*variant, why) for variant, why in untraceable.items() if variant not in priced]
    return priced, barred


def why_none(question: Question, found: Contenders) -> str:
    """Why *found* has no best plan: by how little the nearest to one misses."""
    if found.beyond:
        return nearest_beyond(found.beyond).why
    if not found.too_large:
        return found.barred[0].why
    plan = nearest_miss([sheet for variant in found.too_large for sheet in variant])
    _, why = judge(held_by(question, plan, squeezed=True), question.margin_share(plan))
    return f"{plan.title}: {why}"
