"""Prices every plan, ranks those that fit, and says why the others lost."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from advisor.cost.question import ask
from advisor.search.contenders import contenders
from advisor.search.explain import Leasts, barred, headline, refused
from advisor.search.pareto import front
from advisor.search.rank import ranked
from advisor.search.results import Recommendation, Rejected
from advisor.search.sheet import nearest_miss
from advisor.search.space import kept_to
from advisor.search.words import kept_to_layout, parted
from advisor.specs.question import Question
from advisor.specs.training import Objective

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from advisor.search.words import SearchWords


def recommend(
    model: str,
    *,
    objective: Objective = "time",
    pareto: bool = False,
    strategy: str | None = None,
    offload: str | None = None,
    trace: bool = False,
    trust_remote_code: bool = False,
    **words: Unpack[SearchWords],
) -> Recommendation:
    """The best plan for *model* on a cluster, the best of each strategy, and why each other lost.

    Words: ``cluster``, ``gpus``, ``nodes``, ``gpu``, ``link``, ``network``, ``host_memory`` (GiB per machine),
    ``seq_len``, ``global_batch``, ``precision``, ``param_dtype``, ``optimizer``, ``attention``, ``loss``, ``trainer``,
    ``margin``; of a whole training ``tokens`` or ``samples``, ``epochs``, ``price``, ``max_hours``, ``max_cost``.
    Trainer ``megatron`` has layouts searched; ``tp``, ``sequence_parallel``, ``pp``, ``vpp``, ``cp``, ``micro_batch``
    and ``checkpointing`` keep that search to theirs.
    *strategy* keeps the search to names or patterns such as ``zero*``, joined by commas, and *offload* to one choice.
    *objective* says what the best plan has least of; *pareto* asks for all plans that none beats in time and memory.
    With *trace*, transformers' own code on tensors without memory stands in for formulas, which takes any causal
    language model and the extra ``run``; *trust_remote_code* lets that code come from the model's repository. Raises
    SpecError or UnknownNameError for words that make no sense, ConfigError for a model that cannot be read.
    """
    layout, asked = parted(words)
    question = kept_to(ask(model, trace=trace, trust_remote_code=trust_remote_code, **asked), strategy, offload)
    question = kept_to_layout(question, layout)
    return search(question, objective=objective, pareto=pareto)


def search(question: Question, *, objective: Objective = "time", pareto: bool = False) -> Recommendation:
    """Every legal plan, exhaustively."""
    started = time.perf_counter()
    found = contenders(question, objective)
    known: Leasts = {}
    ruled_out = [
        *(barred(question, each) for each in found.barred),
        *(Rejected(plan=each.plan, why=each.why, short_by_bytes=0, remedy=None) for each in found.beyond),
        *(found.refused or (refused(question, nearest_miss(each), known) for each in found.too_large)),
    ]
    plans = ranked(found.best, objective)
    text, fewest = headline(question, plans, ruled_out, found.beyond, known)
    return Recommendation(
        model=question.model,
        job=question.job,
        cluster=question.cluster,
        inputs=question.inputs,
        plans=plans,
        rejected=tuple(ruled_out),
        headline=text,
        fewest_gpus=fewest,
        considered=found.considered,
        seconds=time.perf_counter() - started,
        warnings=question.warnings,
        pareto=front(question, found.sheets) if pareto else (),
    )
