"""The GPUs of the price list side by side, each with its best plan for one training."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from advisor.catalog.prices import priced_gpus
from advisor.cost.question import ask
from advisor.cost.results import Estimate
from advisor.errors import SpecError
from advisor.search.contenders import contenders, why_none
from advisor.search.pareto import front, undominated
from advisor.search.rank import ordered
from advisor.search.space import kept_to
from advisor.search.words import kept_to_layout, parted
from advisor.specs.hardware import Cluster
from advisor.specs.model import ModelSpec
from advisor.specs.question import Input, Question
from advisor.specs.training import Objective

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from advisor.catalog.request import Words
    from advisor.search.words import SearchWords

ANY = "any"
"""The name that asks for all of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuChoice:
    """One kind of GPU with its best plan."""

    cluster: Cluster
    best: Estimate | None
    """None where nothing fits, or nothing within the limits."""
    why_none: str
    """Why; empty where there is a best plan."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuRanking:
    """The answer to: on which GPUs?"""

    model: ModelSpec
    objective: Objective
    inputs: tuple[Input, ...]
    """Those that hold for every GPU."""
    choices: tuple[GpuChoice, ...]
    """Best first by the objective; those without a plan at the end."""
    pareto: tuple[Estimate, ...]
    """Of all plans on all of them those that none beats in time, memory and cost; empty where not asked for."""
    considered: int
    """Plans priced."""
    seconds: float
    warnings: tuple[str, ...] = ()

    @property
    def plans(self) -> tuple[Estimate, ...]:
        """The best plan of each GPU that has one, best first."""
        return tuple(choice.best for choice in self.choices if choice.best)

    @property
    def best(self) -> Estimate | None:
        return self.plans[0] if self.plans else None

    def least(self, objective: Objective) -> Estimate | None:
        """The plan of :attr:`plans` with least of *objective*; None where it is not known of any."""
        known = [plan for plan in self.plans if amount_of(plan, objective) < math.inf]
        return min(known, key=lambda plan: amount_of(plan, objective), default=None)


def rank_gpus(
    model: str,
    *,
    objective: Objective = "time",
    pareto: bool = False,
    strategy: str | None = None,
    offload: str | None = None,
    trace: bool = False,
    trust_remote_code: bool = False,
    **words: Unpack[SearchWords],
) -> GpuRanking:
    """The GPUs of the price list, or of one provider's with ``price``, in the order of *objective*.

    Words: those of :func:`advisor.recommend`, but for ``gpu``. Raises SpecError where one price is given for unlike
    GPUs, or the objective is cost or energy of a training of unknown length.
    """
    started = time.perf_counter()
    layout, asked = parted(words)
    provider = words.get("price")
    if provider is not None and not isinstance(provider, str):
        raise SpecError(f"--price {provider:g} cannot hold for every GPU; name a provider, or one GPU with --gpu")
    if objective in ("cost", "energy") and words.get("tokens") is None and words.get("samples") is None:
        raise SpecError(f"--objective {objective}: of how long a training? give --tokens, or --samples")
    questions = [
        ask(model, trace=trace, trust_remote_code=trust_remote_code, **cast("Words", {**asked, "gpu": name}))
        for name in priced_gpus(provider)
    ]
    questions = [kept_to_layout(kept_to(question, strategy, offload), layout) for question in questions]
    choices: list[GpuChoice] = []
    beaten_by_none: list[Estimate] = []
    considered = 0
    for question in questions:
        found = contenders(question, objective, only_best=True)
        plans = ordered(found.best, objective)
        choices.append(
            GpuChoice(
                cluster=question.cluster,
                best=plans[0] if plans else None,
                why_none="" if plans else why_none(question, found),
            )
        )
        considered += found.considered
        if pareto:
            beaten_by_none += front(question, found.sheets)
    return GpuRanking(
        model=questions[0].model,
        objective=objective,
        inputs=_common(questions),
        choices=tuple(sorted(choices, key=lambda choice: _rank(choice, objective))),
        pareto=undominated(sorted(beaten_by_none, key=lambda plan: amount_of(plan, "time"))),
        considered=considered,
        seconds=time.perf_counter() - started,
        warnings=tuple(dict.fromkeys(warning for question in questions for warning in question.warnings)),
    )


def amount_of(plan: Estimate, objective: Objective) -> float:
    """What *plan* takes of *objective*, to be compared between clusters; infinite where it is not known.

    Time is that of a token.
    """
    training = plan.training
    amounts: dict[Objective, float | None] = {
        "time": 1 / plan.time.tokens_per_s,
        "memory": float(plan.memory.device_used_bytes),
        "cost": training.cost_usd if training else None,
        "energy": training.energy_kwh if training else None,
    }
    found = amounts[objective]
    return math.inf if found is None else found


def _rank(choice: GpuChoice, objective: Objective) -> tuple[bool, float, float]:
    if choice.best is None:
        return True, 0.0, 0.0
    return False, amount_of(choice.best, objective), amount_of(choice.best, "time")


def _common(questions: Sequence[Question]) -> tuple[Input, ...]:
    """The inputs that are the same in all *questions*."""
    others = [set(question.inputs) for question in questions[1:]]
    return tuple(each for each in questions[0].inputs if all(each in inputs for inputs in others))
