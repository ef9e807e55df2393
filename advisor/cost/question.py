"""A question whose model was traced, and the step program of any question."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from advisor.catalog.request import Describe, Words, by_formulas, resolve
from advisor.errors import SpecError
from advisor.specs.plan import Plan
from advisor.specs.question import Input, Question
from advisor.step.build import StepProgram, build, build_contenders
from advisor.step.recording import FORMULAS, Source

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True, kw_only=True, slots=True)
class TracedQuestion(Question):
    """A question that the real modelling code answers where else formulas would."""

    source: Source


def ask(
    model: str,
    *,
    describe: Describe = by_formulas,
    trace: bool = False,
    trust_remote_code: bool = False,
    **words: Unpack[Words],
) -> Question:
    """The question that *words* ask of *model*; *trace* lets transformers' code stand in for formulas."""
    if not trace:
        return resolve(model, describe=describe, **words)
    if words.get("compile"):
        raise SpecError("--trace sees kernels of eager mode, which --compile would fuse: drop one of them")
    from advisor.tracing.real_model import described
    from advisor.tracing.source import TracedSource, traced

    question = resolve(model, describe=lambda found, job: traced(found, job, trust_remote_code), **words)
    source = TracedSource(described(question.config, question.weights_from, trust_remote_code))
    asked = {each.name: getattr(question, each.name) for each in fields(Question)}
    noted = {
        "inputs": (*question.inputs, Input("layers", "traced", "given")),
        "warnings": (*question.warnings, *question.model.notes),
    }
    return TracedQuestion(source=source, **(asked | noted))


def program(question: Question, plan: Plan, rank: int | None = None) -> StepProgram:
    """The step of *plan* for what *question* trains, as *rank* or the rank that holds most runs it."""
    return build(question.model, question.job, plan, rank, _source(question))


def program_of_contenders(question: Question, plan: Plan) -> StepProgram:
    """The step of *plan* as each of the ranks runs it that can be the one that holds most."""
    return build_contenders(question.model, question.job, plan, _source(question))


def _source(question: Question) -> Source:
    return question.source if isinstance(question, TracedQuestion) else FORMULAS
