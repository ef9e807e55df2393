"""Predicted against traced memory: the real modelling code, autograd, FSDP2 and optimizer on fake tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from advisor.catalog.profiles import model_profiles
from advisor.specs.job import Job
from advisor.specs.model import Experts
from advisor.specs.plan import Checkpointing, Plan, Strategy
from advisor.validation.accuracy import (
    COUNTERS,
    Case,
    Comparison,
    compare,
    score,
    summary,
    table,
    with_fewer_layers,
    without_dropout,
)

pytest.importorskip("torch")
pytest.importorskip("transformers")

# transformers renamed it in 5.23; the new name is missing from older releases that will do.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")

MOST_LAYERS = 2
PEAK_ERROR = 0.002

DENSE = ("Qwen__Qwen2.5-1.5B", "meta-llama__Llama-3.2-1B", "openai-community__gpt2", "google-bert__bert-base-uncased")
MIXTURE = "Qwen__Qwen3-30B-A3B-Base"
TIED, UNTIED = "Qwen__Qwen2.5-1.5B", "meta-llama__Llama-3.1-8B"


@pytest.fixture(autouse=True)
def a_process_as_it_was() -> Iterator[None]:
    """Fake tensors need no threads, and the ranks that are not there go with the test."""
    import torch
    import torch.distributed
    from transformers.utils import logging

    threads, verbosity = torch.get_num_threads(), logging.get_verbosity()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    yield
    torch.set_num_threads(threads)
    logging.set_verbosity(verbosity)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def shrunken(profile: str, job: Job, plan: Plan) -> Case:
    """A profile cut to few layers, whose widths stay."""
    config = json.loads((model_profiles() / f"{profile}.json").read_text(encoding="utf-8"))["config"]
    return Case(profile, with_fewer_layers(config, MOST_LAYERS), job, plan)


def assert_close(found: Comparison) -> None:
    assert found.difference_bytes("between steps") == 0
    assert abs(found.error("peak")) < PEAK_ERROR


@pytest.mark.parametrize("checkpointing", list(Checkpointing))
@pytest.mark.parametrize(
    ("profile", "parameter_format"),
    [(profile, each) for profile in (*DENSE, MIXTURE) for each in ("bf16", "fp32")],
)
def test_one_rank_is_predicted(profile: str, parameter_format: Any, checkpointing: Checkpointing) -> None:
    """In pure bf16, and with fp32 weights under autocast."""
    job = Job(sequence_length=256, global_batch=2, parameter_format=parameter_format)
    plan = Plan(strategy=Strategy.DDP, gpus=1, micro_batch=2, checkpointing=checkpointing)

    assert_close(compare(shrunken(profile, job, plan)))


@pytest.mark.parametrize("checkpointing", list(Checkpointing))
@pytest.mark.parametrize("strategy", [Strategy.FSDP, Strategy.FSDP_GRAD_OP])
@pytest.mark.parametrize("profile", [TIED, UNTIED])
def test_a_rank_of_fsdp_2_is_predicted(profile: str, strategy: Strategy, checkpointing: Checkpointing) -> None:
    plan = Plan(strategy=strategy, gpus=8, micro_batch=1, checkpointing=checkpointing)

    assert_close(compare(shrunken(profile, Job(sequence_length=512, global_batch=8), plan)))


@pytest.mark.parametrize("optimizer", ["adamw-fused", "adamw-foreach", "adamw-loop"])
def test_each_optimizer_s_own_tensors_are_predicted(optimizer: Any) -> None:
    """A sequence so short that the update is the peak."""
    job = Job(sequence_length=8, global_batch=1, parameter_format="bf16", optimizer=optimizer)

    assert_close(compare(shrunken(TIED, job, Plan(strategy=Strategy.DDP, gpus=1, micro_batch=1))))


def test_the_scores_matrix_is_predicted() -> None:
    job = Job(sequence_length=512, global_batch=2, parameter_format="bf16", attention="eager")

    found = compare(shrunken(TIED, job, Plan(strategy=Strategy.DDP, gpus=1, micro_batch=2)))

    assert_close(found)
    assert abs(found.error("saved for backward")) < PEAK_ERROR


# Latent heads of two widths; heads shared in fp32; position biases; a mask in every layer and autocast that does not
# keep its copies; one head for all; sinks and clamped experts; experts that see every token.
@pytest.mark.parametrize(
    ("profile", "weights", "products"),
    [
        ("deepseek-ai__DeepSeek-V2-Lite", "bf16", "bf16"),
        ("Qwen__Qwen2.5-0.5B", "fp32", "fp32"),
        ("Qwen__Qwen2.5-0.5B", "fp32", "fp16"),
        ("google-t5__t5-small", "fp32", "fp32"),
        ("tiiuae__falcon-40b", "fp32", "bf16"),
        ("tiiuae__falcon-7b", "bf16", "bf16"),
        ("openai__gpt-oss-20b", "bf16", "bf16"),
        ("meta-llama__Llama-4-Scout-17B-16E", "fp32", "bf16"),
        ("google__gemma-3-4b-it", "bf16", "bf16"),
    ],
)
def test_what_backward_needs_is_predicted_by_the_kernels_of_a_gpu(profile: str, weights: Any, products: Any) -> None:
    job = Job(sequence_length=128, global_batch=2, parameter_format=weights, precision=products)

    found = compare(shrunken(profile, job, Plan(strategy=Strategy.DDP, gpus=1, micro_batch=2)))

    assert_close(found)
    assert abs(found.error("saved for backward")) < PEAK_ERROR


@pytest.mark.parametrize(
    ("profile", "padded", "length"),
    [
        ("Qwen__Qwen2.5-1.5B", True, 256),
        ("google-bert__bert-base-uncased", True, 256),
        ("google__gemma-3-1b-it", False, 640),
        ("mistralai__Mistral-7B-v0.1", False, 4096),
    ],
)
@pytest.mark.parametrize("checkpointing", [Checkpointing.NONE, Checkpointing.FULL])
def test_masks_are_predicted(profile: str, padded: bool, length: int, checkpointing: Checkpointing) -> None:
    """Padding makes them, and so does a window that the sequence fills."""
    job = Job(sequence_length=length, global_batch=2, parameter_format="bf16", padded=padded)
    plan = Plan(strategy=Strategy.DDP, gpus=1, micro_batch=2, checkpointing=checkpointing)

    found = compare(shrunken(profile, job, plan))

    assert_close(found)
    assert abs(found.error("saved for backward")) < PEAK_ERROR


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("profile", ["openai-community__gpt2", "google-bert__bert-base-uncased"])
def test_dropout_is_predicted_as_cuda_keeps_it(profile: str, attention: Any) -> None:
    job = Job(sequence_length=256, global_batch=2, parameter_format="bf16", attention=attention)

    found = compare(shrunken(profile, job, Plan(strategy=Strategy.DDP, gpus=1, micro_batch=2)), dropout=True)

    assert_close(found)
    assert abs(found.error("saved for backward")) < PEAK_ERROR


def test_dropout_is_left_out_of_a_comparison_and_of_nothing_else() -> None:
    model = shrunken("openai-community__gpt2", Job(), Plan(strategy=Strategy.DDP, gpus=1, micro_batch=1)).model
    dry = without_dropout(model)

    assert any(layer.dropout or layer.attention.dropout for layer in model.layers)
    assert not any(layer.dropout or layer.attention.dropout for layer in dry.layers)
    assert not any(layer.feed_forward.dropout for layer in dry.layers if not isinstance(layer.feed_forward, Experts))
    assert dry.embedding_dropout == 0
    assert list(dry.parameters()) == list(model.parameters())


def measured(**bytes_by_counter: int) -> Comparison:
    """A comparison in which every counter is predicted to be 100 bytes, and was so where nothing else is said."""
    alike = dict.fromkeys(COUNTERS, 100)
    return Comparison(alike, alike | {"peak": bytes_by_counter["peak"]})


def test_an_error_is_relative_to_what_was_true() -> None:
    assert measured(peak=80).error("peak") == pytest.approx(0.25)
    assert measured(peak=125).error("peak") == pytest.approx(-0.2)
    assert measured(peak=125).difference_bytes("peak") == -25


def test_a_score_says_how_far_how_often_and_where() -> None:
    job, plan = Job(), Plan(strategy=Strategy.ZERO2, gpus=8, micro_batch=1)
    near, far = (Case(name, {}, job, plan) for name in ("near", "far"))

    scores = score("runs", [(near, measured(peak=100)), (far, measured(peak=125))])
    peak = next(each for each in scores if each.counter == "peak")
    others = [each for each in scores if each is not peak]

    assert (peak.truth, peak.counter, peak.count, peak.worst) == ("runs", "peak", 2, far.title)
    assert (peak.mean_error, peak.max_error) == (pytest.approx(0.1), pytest.approx(0.2))
    assert peak.max_difference_bytes == 25
    assert {each.max_error for each in others} == {0.0}
    assert table([*others, peak])[-1] == f"  worst peak: {far.title}"
    assert summary([*others, peak])[-1].split() == [
        "runs",
        "2",
        "off",
        "by",
        "at",
        "most",
        "0",
        "B",
        "10.000",
        "%",
        "20.000",
        "%",
    ]


def test_fewer_layers_leave_the_widths_alone() -> None:
    whole = {"num_hidden_layers": 28, "hidden_size": 1536, "layer_types": ["full_attention"] * 28}

    cut = with_fewer_layers(whole, 4)

    assert (cut["num_hidden_layers"], len(cut["layer_types"]), cut["hidden_size"]) == (4, 4, 1536)
    assert with_fewer_layers(cut, 8) == cut
