"""What is known of optimizers is whole."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from advisor.catalog.optimizers import optimizer_called, optimizer_profiles, packages_of
from advisor.specs.job import Job, Optimizer

OPTIMIZERS: tuple[Any, ...] = get_args(Optimizer)


def test_every_optimizer_has_a_profile_and_no_other() -> None:
    assert tuple(optimizer_profiles()) == OPTIMIZERS


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_is_known_by_its_own_name_and_by_transformers(name: str) -> None:
    word = optimizer_profiles()[name].optim

    assert {optimizer_called(each) for each in (name, name.replace("-", "_"), word) if each} == {name}


def test_two_words_of_one_optimizer_and_an_unknown_one() -> None:
    assert (optimizer_called("adamw_8bit"), optimizer_called("ademamix")) == ("adamw-8bit", None)


def test_what_is_installed_for_an_optimizer() -> None:
    assert [packages_of(Job(optimizer=each)) for each in ("lion", "muon", "galore")] == [
        " bitsandbytes",
        "",
        " galore-torch",
    ]
