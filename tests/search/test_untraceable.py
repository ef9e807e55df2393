"""A traced model whose code does not run in every mode."""

from __future__ import annotations

from dataclasses import dataclass, fields

import pytest

from advisor.cost.question import TracedQuestion
from advisor.errors import ConfigError
from advisor.search.recommend import search
from advisor.specs.model import AnyLayer, ModelSpec
from advisor.specs.plan import Checkpointing, Strategy
from advisor.specs.question import Question
from advisor.step.recording import FORMULAS, HeadRecording, Mode, Recording
from advisor.step.tape import Event
from search.questions import question

ASKED = question(gpus=4, global_batch=16, seq_len=512)


@dataclass(frozen=True)
class Limited:
    """Formulas, except in the modes that a model's code is said not to run in."""

    autocast: bool = True
    checkpointing: bool = True
    anything: bool = True

    def _check(self, mode: Mode, checkpointed: bool) -> None:
        if not self.anything or (mode.autocast and not self.autocast) or (checkpointed and not self.checkpointing):
            raise ConfigError("its code does not run")

    def inputs(self, model: ModelSpec, mode: Mode) -> tuple[Event, ...]:
        return FORMULAS.inputs(model, mode)

    def embedding(self, model: ModelSpec, mode: Mode, checkpointed: bool) -> Recording:
        self._check(mode, checkpointed)
        return FORMULAS.embedding(model, mode, checkpointed)

    def layer(
        self, layer: AnyLayer, hidden_size: int, mode: Mode, checkpointed: bool, selective: bool = False
    ) -> Recording:
        return FORMULAS.layer(layer, hidden_size, mode, checkpointed)

    def head(self, model: ModelSpec, mode: Mode, checkpointed: bool) -> HeadRecording:
        return FORMULAS.head(model, mode, checkpointed)


def traced(source: Limited, asked: Question = ASKED) -> TracedQuestion:
    return TracedQuestion(source=source, **{each.name: getattr(asked, each.name) for each in fields(Question)})


def test_the_source_answers_in_the_place_of_formulas() -> None:
    by_source, by_formulas = search(traced(Limited())), search(ASKED)

    assert [each.plan for each in by_source.plans] == [each.plan for each in by_formulas.plans]


def test_a_strategy_whose_mode_the_code_does_not_run_in_is_ruled_out_with_the_reason() -> None:
    found = search(traced(Limited(autocast=False)))

    assert {each.plan.strategy for each in found.rejected} == {Strategy.DDP}
    assert found.rejected[0].why == "its code does not run"
    assert found.best is not None


def test_without_checkpointing_the_plans_are_those_that_need_none() -> None:
    found = search(traced(Limited(checkpointing=False)))

    assert {each.plan.checkpointing for each in found.plans} == {Checkpointing.NONE}


def test_code_that_runs_in_no_mode_at_all_is_an_error() -> None:
    with pytest.raises(ConfigError, match="its code does not run"):
        search(traced(Limited(anything=False)))
