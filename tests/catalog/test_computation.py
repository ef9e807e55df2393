"""How layers compute, against the configurations and modules that transformers builds."""

from __future__ import annotations

from typing import Any

import pytest

from advisor.catalog.huggingface import model_from_config
from advisor.catalog.models import find_model, model_names
from advisor.specs.model import Experts, ModelSpec

from .meta_device import built_model
from .small_configurations import SMALL, every_configuration

RMS_FAMILIES = tuple(
    family
    for family in SMALL
    if model_from_config({"model_type": family, **SMALL[family]}, family, "test").layers[0].norm != "layer"
)


def described(family: str, fields: dict[str, Any]) -> ModelSpec:
    return model_from_config({"model_type": family, **fields}, family, "test")


@pytest.mark.parametrize("family", SMALL)
def test_layers_are_eager_only_where_transformers_has_no_fused_attention(family: str) -> None:
    pytest.importorskip("transformers")
    supported = built_model({"model_type": family, **SMALL[family]})._supports_sdpa

    assert all(layer.attention.eager_only is not supported for layer in described(family, SMALL[family]).layers)


@pytest.mark.parametrize(("family", "fields"), every_configuration(), ids=str)
def test_windows_are_those_of_the_built_configuration(family: str, fields: dict[str, Any]) -> None:
    pytest.importorskip("transformers")
    config = built_model({"model_type": family, **fields}).config
    layers = described(family, fields).layers
    width = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    kinds = getattr(config, "layer_types", None)
    expected = (
        [width] * len(layers) if kinds is None else [width if kind != "full_attention" else None for kind in kinds]
    )

    assert [layer.attention.window for layer in layers] == expected


@pytest.mark.parametrize(("family", "fields"), every_configuration(), ids=str)
def test_dropout_and_activation_are_those_of_the_built_configuration(family: str, fields: dict[str, Any]) -> None:
    pytest.importorskip("transformers")
    config = built_model({"model_type": family, **fields}).config
    model = described(family, fields)
    layer = model.layers[0]

    def first(*names: str) -> Any:
        return next((getattr(config, name) for name in names if hasattr(config, name)), None)

    # Falcon's fused attention drops nothing out without ALiBi.
    on_attention = first("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "dropout_rate")
    if family == "falcon" and not config.alibi:
        on_attention = 0.0
    on_branches = (
        "hidden_dropout",
        "resid_pdrop",
        "residual_dropout",
        "hidden_dropout_prob",
        "dropout",
        "dropout_rate",
    )
    activation = first("hidden_act", "hidden_activation", "activation_function", "activation", "dense_act_fn")
    if family in ("bloom", "gpt_oss"):  # both write theirs out in code
        activation = {"bloom": "bloom_gelu", "gpt_oss": "clamped-swiglu"}[family]

    assert layer.attention.dropout == on_attention
    assert layer.dropout == (first(*on_branches) or 0.0)
    assert layer.feed_forward.activation == activation


@pytest.mark.parametrize("family", SMALL)
def test_the_longest_sequence_is_the_configuration_s(family: str) -> None:
    pytest.importorskip("transformers")
    config = built_model({"model_type": family, **SMALL[family]}).config
    rows = getattr(config, "max_position_embeddings", None)  # neither BLOOM nor T5 has any
    # RoBERTa numbers positions from one behind its padding token's id (create_position_ids_from_input_ids).
    expected = rows - config.pad_token_id - 1 if family == "roberta" else rows

    assert described(family, SMALL[family]).maximum_positions == expected


@pytest.mark.parametrize("family", RMS_FAMILIES)
def test_rms_norms_multiply_by_the_weight_in_the_format_that_the_kind_says(family: str) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    kind = described(family, SMALL[family]).layers[0].norm
    modules = built_model({"model_type": family, **SMALL[family]}, device="cpu").modules()
    norm = next(each for each in modules if type(each).__name__.endswith(("RMSNorm", "T5LayerNorm")))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 32, generator=generator).bfloat16()
    scale = torch.randn(32, generator=generator).bfloat16()
    norm = norm.bfloat16()
    norm.weight = torch.nn.Parameter(scale)
    plus_one = 1.0 if family.startswith("gemma") else 0.0
    normalised = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    late = {"rms": False, "rms-narrow": False, "rms-fp32-weight": True}[kind]
    computed = norm(x).detach().float()

    def off_by(in_fp32: bool) -> float:
        if in_fp32:
            expected = (normalised * (plus_one + scale.float())).bfloat16()
        else:
            expected = normalised.bfloat16() * (plus_one + scale)
        return float((computed - expected.float()).abs().mean())

    assert off_by(late) < off_by(not late) / 4


def test_gemma_3_repeats_five_local_layers_and_a_global_one() -> None:
    model = find_model("gemma-3-4b-it").model
    patterns = [([layer.attention.window for layer in run.layers], run.repeats) for run in model.runs]

    assert patterns == [([1024] * 5 + [None], 5), ([1024], 4)]


def test_deepseek_v3_has_three_dense_layers_before_its_experts() -> None:
    model = find_model("DeepSeek-V3").model
    sparse = [isinstance(run.layers[0].feed_forward, Experts) for run in model.runs]

    assert [(run.repeats, has_experts) for run, has_experts in zip(model.runs, sparse, strict=True)] == [
        (3, False),
        (58, True),
    ]


def test_smollm3_leaves_every_fourth_layer_without_rotation() -> None:
    model = find_model("SmolLM3-3B").model

    assert [layer.attention.rotary_fraction for layer in model.runs[0].layers] == [1.0, 1.0, 1.0, 0.0]
    assert len(model.runs) == 1


def test_the_decoder_of_a_sequence_to_sequence_model_starts_where_a_run_starts() -> None:
    model = find_model("flan-t5-large").model
    starts = [sum(run.repeats for run in model.runs[:index]) for index in range(len(model.runs))]

    assert model.decoder_start == 24
    assert model.decoder_start in starts
    assert [layer.cross_attention is not None for layer in model.layers] == [False] * 24 + [True] * 24


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("flan-t5-large", "transformers ties the output matrix to the embedding, although the configuration does not"),
        ("DeepSeek-V3", "without the layer that predicts a second token, which transformers does not build"),
        ("gemma-3-4b-it", "the text tower alone; the vision tower is left out"),
        ("falcon-40b", "keys and values are expanded to every query head before the attention kernel"),
        ("Llama-4-Scout-17B-16E", "transformers runs every token through every expert of Llama 4"),
    ],
)
def test_what_a_user_may_not_expect_is_noted(name: str, note: str) -> None:
    assert any(each.startswith(note) for each in find_model(name).model.notes)


@pytest.mark.parametrize("name", ["t5-small", "Qwen2.5-1.5B", "Llama-3.1-8B", "gpt2", "Mixtral-8x7B-v0.1"])
def test_a_model_that_is_as_expected_has_no_notes(name: str) -> None:
    assert find_model(name).model.notes == ()


@pytest.mark.parametrize("name", model_names())
def test_the_parameters_of_every_layer_include_its_own_matrices(name: str) -> None:
    """The widths that say how a layer computes are those of its matrices."""
    model = find_model(name).model
    for run in model.runs:
        for layer in run.layers:
            shapes = {frozenset(parameter.shape[-2:]) for parameter in layer.parameters if len(parameter.shape) > 1}
            spec = layer.attention
            assert frozenset({model.hidden_size, spec.heads * spec.value_head_dim}) in shapes
            assert frozenset({model.hidden_size, layer.feed_forward.width}) in shapes
