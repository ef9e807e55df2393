"""What is known of optimizers is whole, and what does not go together is refused with its reason."""

from __future__ import annotations

import re
from typing import Any, get_args

import pytest

from advisor.catalog.optimizers import (
    optimizer_called,
    optimizer_profiles,
    optimizer_refusals,
    packages_of,
    refusal_of_optimizer,
)
from advisor.catalog.trainers import usual_fsdp_version
from advisor.specs.job import Job, Optimizer
from advisor.specs.plan import FsdpSettings, Offload, Plan, Strategy

OPTIMIZERS: tuple[Any, ...] = get_args(Optimizer)


def test_every_optimizer_has_a_profile_and_no_other() -> None:
    assert tuple(optimizer_profiles()) == OPTIMIZERS


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_is_known_by_its_own_name_and_by_transformers(name: str) -> None:
    word = optimizer_profiles()[name].optim

    assert {optimizer_called(each) for each in (name, name.replace("-", "_"), word) if each} == {name}


def test_two_words_of_one_optimizer_and_an_unknown_one() -> None:
    assert (optimizer_called("adamw_8bit"), optimizer_called("ademamix")) == ("adamw-8bit", None)


def test_every_refusal_is_of_an_optimizer_and_says_which_version_was_looked_at() -> None:
    for (name, _), reason in optimizer_refusals().items():
        assert name in OPTIMIZERS
        assert re.search(r"\((torch|transformers|bitsandbytes|deepspeed|galore-torch) \d+\.\d+", reason)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("strategy", [Strategy.DDP, Strategy.ZERO0])
def test_whole_states_go_with_every_optimizer(name: Any, strategy: Strategy) -> None:
    assert refusal_of_optimizer(Job(optimizer=name), Plan(strategy=strategy, gpus=2, micro_batch=1)) is None


# Those that need whole matrices; DTensor; the CPU's own Adam.
@pytest.mark.parametrize(
    ("name", "strategy", "version", "offload", "said"),
    [
        ("muon", Strategy.ZERO2, 2, Offload.NONE, "muon with ZeRO-2: it takes whole matrices"),
        ("galore", Strategy.FSDP, 1, Offload.NONE, "galore with FSDP1: it decomposes whole matrices"),
        ("adamw-8bit", Strategy.FSDP, 2, Offload.NONE, "adamw-8bit with FSDP2: its kernels take no sharded tensors"),
        ("adafactor", Strategy.HSDP, 2, Offload.NONE, "adafactor with HSDP: it keeps mean squares in plain tensors"),
        ("lion", Strategy.ZERO3, 2, Offload.OPTIMIZER, "lion with its states on the host: of the optimizers"),
    ],
)
def test_what_does_not_go_together_is_refused(
    name: Any, strategy: Strategy, version: int, offload: Offload, said: str
) -> None:
    plan = Plan(
        strategy=strategy,
        gpus=4,
        micro_batch=1,
        offload=offload,
        fsdp=FsdpSettings(version=version, shard_ranks=2)
        if strategy is Strategy.HSDP
        else FsdpSettings(version=version),
    )

    assert (refusal_of_optimizer(Job(optimizer=name), plan) or "").startswith(said)


def test_adapters_are_not_projected() -> None:
    plan = Plan(strategy=Strategy.DDP, gpus=1, micro_batch=1)

    assert "low rank already" in (refusal_of_optimizer(Job(optimizer="galore", method="lora"), plan) or "")


@pytest.mark.parametrize(("name", "version"), [("adamw-fused", 2), ("sgd", 2), ("lion-8bit", 1), ("adafactor", 1)])
def test_fsdp_is_the_newest_that_the_optimizer_goes_with(name: Any, version: int) -> None:
    job = Job(optimizer=name)

    assert (usual_fsdp_version(job), usual_fsdp_version(job, Strategy.HSDP)) == (version, 2)


def test_what_is_installed_for_an_optimizer() -> None:
    assert [packages_of(Job(optimizer=each)) for each in ("lion", "muon", "galore")] == [
        " bitsandbytes",
        "",
        " galore-torch",
    ]
