"""What ZeRO-3 gathers on its way through a model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from advisor.catalog.huggingface import model_from_config
from advisor.catalog.request import resolve
from advisor.specs.job import Job
from advisor.specs.model import ModelSpec
from advisor.specs.plan import Strategy, ZeroSettings, zero_settings
from advisor.step.passage import Passage, passage
from advisor.step.recording import FORMULAS, mode_of

MIXTURE: dict[str, object] = {
    "model_type": "mixtral",
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
}
FREES_SOON = ZeroSettings(
    prefetch_bucket=50_000, max_live_parameters=300_000, max_reuse_distance=0, persistence_threshold=1000
)


def built(config: dict[str, object]) -> ModelSpec:
    return model_from_config(config, "small", "the test")


def through(model: ModelSpec, zero: ZeroSettings, *, checkpointed: bool = False, accumulates: bool = False) -> Passage:
    return passage(model, mode_of(Job(), 4), checkpointed, zero, accumulates, FORMULAS)


def test_views_of_the_experts_matrices_keep_what_is_freed_after_forward() -> None:
    found = through(built(MIXTURE), FREES_SOON)

    assert [each.name for each in found.forward[0].kept] == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def test_nothing_is_kept_where_the_layer_is_computed_again() -> None:
    found = through(built(MIXTURE), FREES_SOON, checkpointed=True)

    assert all(not stay.kept for stay in found.forward.values())


def test_nothing_is_kept_of_what_stays_whole_until_backward() -> None:
    found = through(built(MIXTURE), replace(FREES_SOON, max_reuse_distance=10**9))

    assert all(not stay.kept for stay in found.forward.values())


def test_falcon_multiplies_by_views_of_all_its_matrices() -> None:
    falcon = {"model_type": "falcon", "vocab_size": 2048, "hidden_size": 128, "num_hidden_layers": 3}
    found = through(built(falcon | {"num_attention_heads": 4}), FREES_SOON)

    names = {each.name for each in found.forward[0].kept}
    assert names == {
        *("self_attention.query_key_value.weight", "self_attention.dense.weight"),
        *("mlp.dense_h_to_4h.weight", "mlp.dense_4h_to_h.weight"),
    }


def test_gpt_oss_multiplies_by_the_matrices_themselves() -> None:
    found = through(built(MIXTURE | {"model_type": "gpt_oss"}), FREES_SOON)

    assert all(not stay.kept for stay in found.forward.values())


@pytest.mark.parametrize("name", ["Qwen2.5-1.5B", "gemma-2-2b", "Mixtral-8x7B-v0.1", "Llama-3.1-70B"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_with_the_settings_that_are_searched_accumulation_does_not_matter(name: str, checkpointed: bool) -> None:
    model, zero = resolve(name).model, zero_settings(Strategy.ZERO3)

    alone = through(model, zero, checkpointed=checkpointed)
    assert alone == through(model, zero, checkpointed=checkpointed, accumulates=True)


def test_with_a_narrow_window_accumulation_decides_what_is_freed() -> None:
    tied = MIXTURE | {"model_type": "gemma", "num_hidden_layers": 6, "head_dim": 32}
    narrow = ZeroSettings(prefetch_bucket=200_000, max_reuse_distance=500_000, persistence_threshold=100_000)

    alone = through(built(tied), narrow)
    assert alone != through(built(tied), narrow, accumulates=True)
