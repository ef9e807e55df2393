"""The random cases that accuracy is measured on: the same for one seed, of every family, and legal."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from step.catalog_models import PROFILES, model_of

from advisor.catalog.families.fused import REMOTE_CODE
from advisor.specs.plan import Checkpointing
from advisor.validation.accuracy import Case

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from cases.one_rank import MOST_LAYERS, cases, variations


def described(drawn: list[Case]) -> list[str]:
    return [case.title for case in drawn]


def test_a_seed_draws_the_same_cases_every_time_and_another_seed_others() -> None:
    assert described(cases(3, 20)) == described(cases(3, 20))
    assert described(cases(3, 20)) != described(cases(4, 20))
    assert described(cases(3, 40))[:20] == described(cases(3, 20))


def test_every_family_that_transformers_has_code_for_is_drawn() -> None:
    described_here = {model_of(name).family for name in PROFILES if REMOTE_CODE not in model_of(name).notes}

    assert {case.model.family for case in cases(0, 400)} == described_here


@pytest.mark.parametrize("seed", [1, 2])
def test_cases_stay_within_what_their_model_admits(seed: int) -> None:
    for case in cases(seed, 100):
        longest = case.model.maximum_positions
        assert longest is None or case.job.sequence_length <= longest
        assert len(case.model.layers) <= 2 * MOST_LAYERS
        assert case.plan.global_batch == case.job.global_batch


def test_variations_pad_or_checkpoint_selectively() -> None:
    varied = variations(1, 60)

    assert all(case.job.padded or case.plan.checkpointing is Checkpointing.SELECTIVE for case in varied)
    assert {case.job.padded for case in varied} == {True, False}
