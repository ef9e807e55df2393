"""What training programs can be told, in which version, and what the flags were called before."""

from __future__ import annotations

from typing import Any, get_args

import pytest

import advisor
from advisor.catalog import trainers
from advisor.catalog.trainers import (
    flag_changes,
    flag_name,
    gone,
    older_than,
    profile_of,
    trainer_profiles,
    versions_of,
)
from advisor.errors import SpecError
from advisor.launch.trainers.programs import MODULES
from advisor.specs.job import AttentionKernel, LossKernel, Optimizer, Precision, Trainer
from advisor.specs.plan import Checkpointing, Strategy

QUESTION: dict[str, Any] = {"model": "Qwen2.5-0.5B", "gpus": 4, "gpu": "A100-80GB", "global_batch": 16}


def test_each_trainer_has_a_profile_and_a_program() -> None:
    assert set(trainer_profiles()) == set(get_args(Trainer)) == set(MODULES)


@pytest.mark.parametrize("trainer", get_args(Trainer))
def test_a_profile_speaks_the_words_of_a_job(trainer: Trainer) -> None:
    profile = trainer_profiles()[trainer]

    assert set(profile.strategies) <= {each.value for each in Strategy}
    assert set(profile.checkpointing) <= {each.value for each in Checkpointing}
    assert set(profile.losses) <= set(get_args(LossKernel))
    assert set(profile.optimizers) <= set(get_args(Optimizer))
    assert set(profile.attention) <= set(get_args(AttentionKernel))
    assert set(profile.precisions) <= set(get_args(Precision))
    assert profile.source
    assert all(each["source"] for each in profile.before)


def test_every_change_of_a_flag_has_a_source_and_versions() -> None:
    packages = {package for profile in trainer_profiles().values() for package in profile.packages}
    for change in flag_changes():
        assert change.package in packages
        assert change.source
        assert change.old or change.new
        assert not change.until or not older_than(change.until, change.since)


@pytest.mark.parametrize(
    ("package", "version", "newest", "then"),
    [
        ("trl", "0.15.2", "max_length", "max_seq_length"),
        ("trl", "0.16.0", "max_length", "max_length"),
        ("trl", "0.18.2", "packing_strategy", None),
        ("trl", "0.22.2", "dtype", "torch_dtype"),
        ("transformers", "4.40.2", "eval_strategy", "evaluation_strategy"),
        ("transformers", "5.22.0", "activation_checkpointing", "gradient_checkpointing"),
        ("transformers", "5.23.0", "activation_checkpointing", "activation_checkpointing"),
        ("transformers", "4.52.3", "liger_kernel_config", None),
        ("transformers", "4.40.2", "optim", "optim"),
    ],
)
def test_a_flag_has_the_name_of_its_version(package: str, version: str, newest: str, then: str | None) -> None:
    assert flag_name(newest, {package: version}) == then


@pytest.mark.parametrize(
    ("package", "version", "old", "new"),
    [
        ("trl", "0.20.0", "max_seq_length", "max_length"),
        ("transformers", "4.51.0", "evaluation_strategy", "eval_strategy"),
        ("transformers", "5.15.0", "warmup_ratio", "warmup_steps"),
        ("transformers", "5.0.0", "save_safetensors", ""),
    ],
)
def test_a_flag_is_gone_from_its_version_on(package: str, version: str, old: str, new: str) -> None:
    change = gone(old, {package: version})

    assert change is not None
    assert change.new == new
    assert gone(old, {package: "0.1"}) is None


def test_release_candidates_count_as_their_release() -> None:
    assert older_than("0.9", "0.10")
    assert older_than("4.57.1", "5.0.0")
    assert not older_than("5.0.0rc1", "5.0.0")
    assert not older_than("0.1.0.dev0", "0.1")


def test_versions_are_those_installed_beside_the_trainers_own_package(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"trl": "0.22.2", "transformers": "4.55.4"}
    monkeypatch.setattr(trainers, "installed", there.get)

    assert versions_of("trl") == ({"trl": "0.22.2", "transformers": "4.55.4", "accelerate": "1.15.0"}, True)
    # open-r1 is not there, and so what it was released with is assumed, whatever else is.
    assert versions_of("open-r1")[0]["trl"] == "0.18.0"


def test_trl_computes_all_logits_before_it_tiled_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert profile_of("trl", {"trl": "1.14.2", "accelerate": "1.15.0"}).losses == ("full", "fused")
    assert profile_of("trl", {"trl": "1.15.0", "accelerate": "1.15.0"}).losses == ("tiled",)


def test_trls_loss_is_priced_unless_another_is_asked_for() -> None:
    tiled = advisor.estimate(**QUESTION, strategy="zero1", trainer="trl")
    full = advisor.estimate(**QUESTION, strategy="zero1")

    assert (tiled.job.loss, full.job.loss) == ("tiled", "full")
    assert tiled.memory.peak_allocated_bytes < full.memory.peak_allocated_bytes


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ({"trainer": "nobody"}, "--trainer must be one of advisor, hf, trl"),
        ({"trainer": "hf", "loss": "chunked"}, r"hf \(transformers [\d.]+\) knows no loss chunked; give --loss full"),
        (
            {"trainer": "axolotl", "optimizer": "adamw-loop"},
            "knows no optimizer adamw-loop; give --optimizer adamw-f",
        ),
        ({"trainer": "hf", "padded": True}, "joins texts and cuts them; leave --padded out"),
        ({"trainer": "trl", "compile": True}, r"what trl \(trl [\d.]+\) compiles is not modelled; leave --compile out"),
        ({"loss": "tiled"}, "advisor knows no loss tiled; give --loss full"),
        ({"trainer": "axolotl"}, "DDP cannot train Qwen2.5-0.5B: axolotl .* holds whole weights in bf16"),
        ({"trainer": "torchtitan", "strategy": "zero3"}, "torchtitan .* does not run it; it runs ddp, fsdp"),
        ({"trainer": "trl", "checkpointing": "selective"}, "trl .* has no checkpointing selective"),
        (
            {"trainer": "open-r1", "strategy": "fsdp", "fsdp_version": 2},
            "runs FSDP of version 1; give --fsdp-ver",
        ),
    ],
)
def test_what_a_trainer_cannot_be_told_is_refused(words: dict[str, Any], complaint: str) -> None:
    with pytest.raises(SpecError, match=complaint):
        advisor.estimate(**QUESTION, **({"strategy": "ddp"} | words))


def test_a_search_keeps_to_what_the_trainer_runs() -> None:
    answer = advisor.recommend(**QUESTION, trainer="torchtitan")

    assert {each.plan.strategy for each in answer.plans} == {Strategy.DDP, Strategy.FSDP, Strategy.FSDP_GRAD_OP}
    assert all("torchtitan" in each.why for each in answer.rejected)
    assert any(each.startswith("torchtitan: ") for each in answer.warnings)


def test_a_search_uses_the_fsdp_that_the_trainers_accelerate_has() -> None:
    answer = advisor.recommend(**QUESTION, trainer="open-r1")

    assert {each.plan.fsdp.version for each in answer.plans} == {1}
