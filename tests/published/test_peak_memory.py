"""Predicted against published peak memory of real training runs, and the reasons that are given where they differ."""

from __future__ import annotations

import runpy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from advisor.catalog.models import find_model

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "published_memory.py"
LLAMA = find_model("Llama-3.1-8B").model
WEIGHTS_BYTES = 2 * LLAMA.parameter_count
FEED_FORWARD_WIDTH = 14336


@pytest.fixture(scope="module")
def benchmark() -> dict[str, Any]:
    return runpy.run_path(str(BENCHMARK))


@pytest.fixture(scope="module")
def compared(benchmark: dict[str, Any]) -> dict[tuple[str, str, str], Any]:
    """Each covered run by data parallelism with its prediction, by strategy, tokens of a sequence and loss."""
    return {
        (row["strategy"], row["sequence_length"], row["loss"]): benchmark["Compared"](row, benchmark["predict"](row))
        for row in benchmark["rows"]()
        if not row["not_covered"] and row["strategy"] != "megatron" and not row["lora_rank"]
    }


# stas00/ml-engineering insights/when-to-upgrade-gpus/README.md 744d01e, benchmark.py and bench_decompose.py beside it:
# Llama-3.1-8B on 8 H200; pytorch/torchtune README.md bd2a0fc: Llama-3.2-3B on an A100.
@pytest.mark.parametrize("run", [("ddp", "4096", "full"), ("zero3", "32768", "fused"), ("zero2", "8192", "fused")])
def test_runs_that_are_predicted_within_five_per_cent_stay_so(
    compared: dict[tuple[str, str, str], Any], run: tuple[str, str, str]
) -> None:
    assert abs(compared[run].error) < 0.05


def test_every_prediction_that_is_further_off_has_a_reason(compared: dict[tuple[str, str, str], Any]) -> None:
    assert len(compared) == 9
    for each in compared.values():
        assert each.row["remark"] or abs(each.error) < 0.05


# Segments of the loaded weights can stay reserved: at most their whole size on top. The source has one number for each
# run and no breakdown, so this bounds the difference and does not explain it.
@pytest.mark.parametrize("run", [("zero3", "8192", "fused"), ("zero3", "32768", "fused"), ("zero2", "8192", "full")])
def test_runs_that_loaded_whole_weights_reserved_no_more_than_these_besides(
    compared: dict[tuple[str, str, str], Any], run: tuple[str, str, str]
) -> None:
    found = compared[run]

    assert found.predicted_bytes < found.published_bytes < found.predicted_bytes + WEIGHTS_BYTES
    assert found.published_bytes > WEIGHTS_BYTES


# Liger's SwiGLU holds the gate, what it multiplies, the product and its gradient (8f) where transformers holds 12f; a
# layer's two norms keep 10h less. Both are there once, for the layer that is computed again.
@pytest.mark.parametrize("tokens", ["65536", "131072", "196608", "262144"])
def test_liger_s_other_kernels_keep_as_much_less_as_long_runs_are_overestimated(
    compared: dict[tuple[str, str, str], Any], tokens: str
) -> None:
    found = compared["zero3", tokens, "fused"]
    saved = (4 * FEED_FORWARD_WIDTH + 10 * LLAMA.hidden_size) * int(tokens)

    assert found.predicted_bytes - saved < found.published_bytes < found.predicted_bytes


# NVIDIA/Megatron-LM d98e8a6, golden values of its functional tests: GPT models of 64 M and 6.7 B parameters on 8 A100,
# H100 or GB200, with tensor parallelism, pipelines, interleaved and uneven ones, full recomputation, with and without
# the distributed optimizer and several instances of it, with deferred gradients of the output matrix, with 8 experts of
# which a token takes one or two, over 2 or 4 ranks, whole or cut: the bytes allocated on the last rank. Tokens did not
# spread evenly over experts, which takes up to 2 % more.
def test_megatron_s_own_tests_are_predicted_within_three_per_cent(benchmark: dict[str, Any]) -> None:
    rows = [row for row in benchmark["rows"]() if row["strategy"] == "megatron" and not row["not_covered"]]
    errors = [abs(benchmark["Compared"](row, benchmark["predict"](row)).error) for row in rows]

    assert len(errors) == 38
    assert max(errors) < 0.03
    assert sum(errors) / len(errors) < 0.01


# Lightning-AI/litgpt 2685705, tutorials/resource-tables.md and config_hub/finetune: one GPU, adapters on queries and
# values. Of litgpt's product for queries, keys and values, the values' view keeps what is not theirs (litgpt/lora.py).
def test_adapters_of_litgpt_take_what_is_predicted_and_its_fused_projection(benchmark: dict[str, Any]) -> None:
    rows = [row for row in benchmark["rows"]() if row["lora_rank"]]

    assert len(rows) == 6
    for row in rows:
        found = benchmark["Compared"](row, benchmark["predict"](row))
        model = find_model(row["model"]).model
        spec = model.described_layers[0].attention
        tokens = int(row["micro_batch"]) * int(row["sequence_length"]) * len(model.layers)
        fused_bytes = 2 * (spec.query_width + spec.key_value_width) * tokens
        assert -0.06 < found.error < 0
        assert (found.predicted_bytes + fused_bytes) / found.published_bytes == pytest.approx(1, abs=0.01)


def test_runs_that_are_not_covered_are_counted_by_what_is_not_modelled(benchmark: dict[str, Any]) -> None:
    assert Counter(row["not_covered"] for row in benchmark["rows"]() if row["not_covered"]) == {
        "QLoRA": 4,
        "torch.compile": 3,
        "activations offloaded by Megatron": 4,
        "embedding and loss in place of layers": 3,
        "multi-token prediction": 2,
        "Megatron FSDP": 2,
        "all-to-alls beside another micro-batch": 2,
        "TransformerEngine's fused operators": 1,
        "a cross entropy that torch.compile fuses": 1,
    }
