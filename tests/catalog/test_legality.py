"""What cannot run together is a table, and every row of it can be met."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from advisor.catalog import legality
from advisor.catalog.gpus import all_gpus, find_gpu
from advisor.catalog.legality import (
    CONDITIONS,
    Rule,
    facts_of,
    refusal,
    refusal_of_optimizer,
    rules,
    unrun_strategies,
    usual_fsdp_version,
    why_not_run,
)
from advisor.catalog.models import find_model
from advisor.specs.job import AttentionKernel, Job, Method, Optimizer, Precision, Trainer
from advisor.specs.plan import Offload, Strategy

A100, T4, P100, MI300X = (find_gpu(name) for name in ("A100-80GB", "T4", "P100", "MI300X"))
BERT, GPT2 = (find_model(name).model for name in ("bert-base-uncased", "gpt2"))


def rule(**given: object) -> Rule:
    fields = {"conditions": {}, "below_capability": None, "package": "", "since": "", "until": "", "instead": ""}
    return Rule(**{"name": "one", "reason": "no", "source": "here", **fields, **given})  # type: ignore[arg-type]


def test_every_rule_has_a_name_of_its_own_a_source_and_some_condition() -> None:
    assert len({each.name for each in rules()}) == len(rules())
    assert all(each.source and each.reason and (each.conditions or each.below_capability) for each in rules())
    assert all(each.package for each in rules() if each.since or each.until)


def test_every_pattern_names_something_that_there_is() -> None:
    names: dict[str, set[str]] = {
        "strategy": {each.value for each in Strategy} | {*unrun_strategies()},
        "fsdp": {"fsdp1", "fsdp2"},
        "offload": {each.value for each in Offload},
        "method": set(get_args(Method)),
        "optimizer": set(get_args(Optimizer)),
        "precision": set(get_args(Precision)),
        "attention": set(get_args(AttentionKernel)),
        "compile": {"yes", "no"},
        "trainer": set(get_args(Trainer)),
        "model": {"causal", "masked", "seq2seq", "experts", "latent attention"},
        "gpu_lacks": set(legality.FORMATS),
    }

    assert names.keys() == set(CONDITIONS)
    for each in rules():
        for column, patterns in each.conditions.items():
            for pattern in patterns:
                assert any(
                    rule(conditions={column: (pattern,)}).speaks_of({column: frozenset({name})}, A100)
                    for name in names[column]
                ), (each.name, column, pattern)


@pytest.mark.parametrize(
    ("job", "gpu", "said"),
    [
        (Job(precision="bf16"), T4, "T4 has no bf16; use --precision fp16"),
        (Job(precision="fp16", attention="flash"), T4, "8.0 and above, T4 has 7.5; use --attention sdpa"),
        (Job(precision="fp32", attention="flash"), A100, "takes fp16 and bf16 alone; use --attention sdpa"),
        (Job(precision="fp16", compile=True), P100, "7.0 and above, P100-SXM2-16GB has 6.0; leave --compile out"),
    ],
)
def test_what_a_gpu_or_kernel_cannot_do_is_said_with_a_way_out(job: Job, gpu: object, said: str) -> None:
    assert said in str(refusal(job, gpu))  # type: ignore[arg-type]


def test_compute_capabilities_are_asked_of_nvidia_alone() -> None:
    assert refusal(Job(attention="flash", compile=True), MI300X) is None


def test_gpus_with_bf16_run_all_kernels_and_those_without_are_told_why() -> None:
    refused = {gpu.name for gpu in all_gpus() if refusal(Job(attention="flash", compile=True), gpu)}

    assert refused == {gpu.name for gpu in all_gpus() if not gpu.has_bf16}


def test_rules_of_strategies_and_models_speak_where_those_are_known() -> None:
    assert refusal(Job(), A100, BERT, Strategy.FSDP, Offload.NONE)
    assert refusal(Job(), A100, BERT, Strategy.ZERO3, Offload.NONE) is None
    assert refusal(Job(), A100, GPT2, Strategy.FSDP, Offload.NONE) is None
    assert refusal(Job(), A100, BERT) is None


@pytest.mark.parametrize(
    ("version", "holds"), [(None, True), ("1.9.9", False), ("2.0.0", True), ("2.4", True), ("2.5.0", False)]
)
def test_a_rule_holds_from_a_version_to_before_another(version: str | None, holds: bool) -> None:
    assert rule(package="torch", since="2.0.0", until="2.5").holds_in(version) is holds


def test_the_facts_have_all_columns() -> None:
    assert facts_of(Job(), A100, GPT2, Strategy.DDP, Offload.NONE).keys() == set(CONDITIONS)


@pytest.mark.parametrize("name", get_args(Optimizer))
@pytest.mark.parametrize("strategy", [Strategy.DDP, Strategy.ZERO0])
def test_whole_states_go_with_every_optimizer(name: Any, strategy: Strategy) -> None:
    assert refusal_of_optimizer(Job(optimizer=name), strategy, Offload.NONE, 2) is None


@pytest.mark.parametrize(
    ("name", "strategy", "version", "offload", "said"),
    [
        ("muon", Strategy.ZERO2, 2, Offload.NONE, "muon takes whole matrices, and ZeRO-2 hands it flat partitions"),
        ("galore", Strategy.FSDP, 1, Offload.NONE, "galore takes whole matrices, and FSDP1 hands it flat shards"),
        ("adamw-8bit", Strategy.FSDP, 2, Offload.NONE, "adamw-8bit takes no sharded tensors (DTensor)"),
        ("adafactor", Strategy.HSDP, 2, Offload.NONE, "adafactor keeps mean squares in plain tensors"),
        ("lion", Strategy.ZERO3, 2, Offload.OPTIMIZER, "of the optimizers that DeepSpeed runs on the CPU Adam"),
    ],
)
def test_optimizers_are_refused_where_they_do_not_run(
    name: Any, strategy: Strategy, version: int, offload: Offload, said: str
) -> None:
    assert str(refusal_of_optimizer(Job(optimizer=name), strategy, offload, version)).startswith(said)


def test_gradients_of_adapters_are_not_projected() -> None:
    job = Job(optimizer="galore", method="lora")

    assert "low rank already" in str(refusal_of_optimizer(job, Strategy.DDP, Offload.NONE, 2))


@pytest.mark.parametrize(("name", "version"), [("adamw-fused", 2), ("sgd", 2), ("lion-8bit", 1), ("adafactor", 1)])
def test_fsdp_is_the_newest_that_the_optimizer_goes_with(name: Any, version: int) -> None:
    job = Job(optimizer=name)

    assert (usual_fsdp_version(job), usual_fsdp_version(job, Strategy.HSDP)) == (version, 2)


def test_strategies_that_people_know_and_nobody_should_run_are_refused_with_the_reason() -> None:
    assert unrun_strategies() == ("dp", "mics")
    assert "copies all weights to every GPU in each forward pass" in str(why_not_run("dp"))
    assert "use --strategy hsdp" in str(why_not_run("mics"))
    assert why_not_run("ddp") is None
    assert why_not_run("zero9") is None
