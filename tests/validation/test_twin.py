"""A twin is of its model's family, small, buildable, and has what its model has."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.catalog.models import find_model, model_names
from advisor.errors import ConfigError
from advisor.specs.job import Job
from advisor.specs.model import Experts
from advisor.specs.plan import Plan, Strategy, zero_settings
from advisor.validation.twin import MOST_TOKENS, TWIN_PARAMETERS, Twin, plan_cuts, twin_of

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

OF_OTHER_CODE = ("internlm/internlm2_5-7b", "THUDM/chatglm3-6b")
CAUSAL = [name for name in model_names() if find_model(name).model.objective == "causal" and name not in OF_OTHER_CODE]
LARGEST_HEADS = ("gemma-2-2b", "gemma-3-1b-it", "gemma-3-4b-it")
"""Of one head of 256 that no cut makes smaller."""


@pytest.mark.parametrize("name", CAUSAL)
def test_every_model_has_a_small_twin_of_its_family(name: str) -> None:
    found = find_model(name)
    whole, twin = found.model, twin_of(found.config, found.model)

    assert twin.model.family == whole.family
    assert twin.model.parameter_count <= (9e6 if name.partition("/")[2] in LARGEST_HEADS else TWIN_PARAMETERS)
    assert twin.share == twin.model.largest_parameter.numel / whole.largest_parameter.numel
    assert twin.model.tied_embeddings == whole.tied_embeddings
    experts = [any(isinstance(layer.feed_forward, Experts) for layer in model.layers) for model in (whole, twin.model)]
    assert experts[0] == experts[1]


@pytest.mark.parametrize(
    "family",
    [
        *("Qwen2.5-1.5B", "gpt2", "gemma-3-4b-it", "falcon-7b"),
        *("DeepSeek-V3", "gpt-oss-20b", "Qwen3-30B-A3B", "Mixtral-8x7B-v0.1"),
    ],
)
def test_transformers_builds_the_twin_that_is_counted(family: str) -> None:
    import torch

    from advisor.tracing.real_model import described, quiet, real_model, settings_of

    found = find_model(family)
    twin = twin_of(found.config, found.model)
    description = described(twin.config)
    with quiet(), torch.device("meta"):
        built = real_model(settings_of(description), description, torch.float32, "sdpa")

    assert sum(each.numel() for each in built.parameters()) == twin.model.parameter_count


def test_a_small_model_is_its_own_twin() -> None:
    found = find_model("gpt2")
    twin = twin_of(found.config, found.model, parameters=10**9)

    assert twin.config is found.config
    assert twin.cuts == ()


def test_the_largest_that_fits_is_taken() -> None:
    found = find_model("Qwen2.5-1.5B")
    large = twin_of(found.config, found.model, parameters=10**8)
    small = twin_of(found.config, found.model, parameters=10**8, fits=lambda twin: twin.model.parameter_count < 5e6)

    assert 5e7 < large.model.parameter_count <= 10**8
    assert small.model.parameter_count < 5e6


def test_a_family_that_transformers_lacks_has_none() -> None:
    found = find_model("chatglm3-6b")

    with pytest.raises(ConfigError, match="has no family chatglm"):
        twin_of(found.config, found.model)


@pytest.fixture(scope="module")
def twin() -> Twin:
    found = find_model("Qwen2.5-1.5B")
    return twin_of(found.config, found.model)


@given(micro_batch=st.integers(1, 64), steps=st.integers(1, 64), gpus=st.integers(1, 64), length=st.integers(1, 8192))
def test_batches_and_buckets_shrink_and_are_named(micro_batch: int, steps: int, gpus: int, length: int) -> None:
    found = find_model("Qwen2.5-1.5B")
    twin = Twin(found.config, found.model, (), 0.01, 0.1)
    plan = Plan(
        strategy=Strategy.ZERO3,
        gpus=gpus,
        micro_batch=micro_batch,
        accumulation_steps=steps,
        zero=zero_settings(Strategy.ZERO3),
    )
    job = Job(sequence_length=length, global_batch=gpus * micro_batch * steps)
    small = twin.plan(plan, min(gpus, 4))
    small_job = twin.job(job, small)

    assert small_job.sequence_length == min(length, MOST_TOKENS)
    assert small_job.global_batch == small.global_batch
    assert small.zero.reduce_bucket == 5_000_000
    assert small.zero.persistence_threshold == 1000
    named = {cut.rpartition(" → ")[0].rpartition(" ")[0] for cut in plan_cuts(job, plan, small_job, small)}
    assert ("ranks" in named) == (gpus > 4)
    assert ("tokens in a sequence" in named) == (length > MOST_TOKENS)
    assert ("micro-batch" in named) == (micro_batch > 2)


def test_a_plan_that_is_small_already_stays(twin: Twin) -> None:
    plan = Plan(strategy=Strategy.DDP, gpus=2, micro_batch=1)
    same = replace(plan, zero=twin.plan(plan, 2).zero)

    assert twin.plan(plan, 2) == same
    assert plan_cuts(Job(sequence_length=64, global_batch=2), plan, Job(sequence_length=64, global_batch=2), same) == ()
