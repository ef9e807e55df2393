"""Published runs of real trainings: what each of them trained, by which plan, on which machines.

Rows are those of ``profiles/measured/step_times.csv`` and ``peak_memory.csv``. Models that nobody publishes a
configuration of are described here: Megatron's GPT models by ``profiles/measured/models.csv``, MosaicML's MPT by its
own rows; its norms have no biases, which is left out.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any, Literal, NamedTuple

from advisor.catalog.adapters import as_trained
from advisor.catalog.gpus import find_gpu
from advisor.catalog.links import find_link
from advisor.catalog.models import find_model
from advisor.catalog.profiles import profiles_folder
from advisor.catalog.request import DEFAULT_NETWORK, usual_cluster
from advisor.specs.hardware import Cluster
from advisor.specs.job import Job
from advisor.specs.megatron import MegatronSettings
from advisor.specs.model import Attention, Experts, FeedForward, Layer, ModelSpec, Parameter, Run
from advisor.specs.plan import Checkpointing, FsdpSettings, Offload, Plan, Strategy, ZeroSettings

Row = Mapping[str, str]

MPT_VOCABULARY = 50368
SCORES = "scores"
"""The attention kernel of rows that computed the scores matrix."""


class Published(NamedTuple):
    """What a row stands for."""

    model: ModelSpec
    job: Job
    plan: Plan
    cluster: Cluster


def published_rows(table: Literal["step_times", "peak_memory"]) -> list[Row]:
    """All rows of a table."""
    return _rows(table)


def published(row: Row) -> Published:
    """The model, job, plan and cluster of *row*; of a plan what the row does not say is as usual."""
    strategy, gpus, nodes = Strategy(row["strategy"]), int(row["gpus"]), int(row["nodes"])
    plan = Plan(
        strategy=strategy,
        gpus=gpus,
        micro_batch=int(row["micro_batch"]),
        accumulation_steps=int(row["accumulation_steps"]),
        checkpointing=Checkpointing(row["checkpointing"]),
        offload=Offload(row["offload"]),
        zero=ZeroSettings(overlap_communication=strategy is Strategy.ZERO3),
        tensor_parallel=int(row["tensor_parallel"] or 1),
        sequence_parallel=row["sequence_parallel"] == "yes",
        pipeline_parallel=int(row["pipeline_parallel"] or 1),
        virtual_stages=int(row["virtual_stages"] or 1),
        expert_parallel=int(row.get("expert_parallel") or 1),
        expert_tensor_parallel=int(row.get("expert_tensor_parallel") or 1),
        # llm-foundry's composer reduces in every micro-batch (mosaicml 0.16.4, trainer.py ``_train_microbatch``).
        fsdp=FsdpSettings(
            syncs_each_micro_batch=row["model"].startswith("MPT"),
            shard_ranks=gpus // nodes if strategy is Strategy.HSDP else None,
        ),
        megatron=_megatron(row),
    )
    kernel = "eager" if row.get("attention_kernel") == SCORES else "sdpa"
    job = Job(
        sequence_length=int(row["sequence_length"]),
        global_batch=int(plan.global_batch),
        precision="fp16" if row["precision"] == "fp16" else "bf16",
        parameter_format="bf16" if row["parameter_format"] == "bf16" else "fp32",
        attention=row.get("attention") or kernel,  # type: ignore[arg-type]
        loss=row.get("loss") or "full",  # type: ignore[arg-type]
        compile=row.get("compile") == "yes",
        **_adapters(row),
    )
    return Published(as_trained(_model(row), job), job, plan, _cluster(row, gpus, nodes))


def _megatron(row: Row) -> MegatronSettings:
    """What a row leaves out is off, or as the usual plan has it."""
    return MegatronSettings(
        distributed_optimizer=row["distributed_optimizer"] != "no",
        overlaps_weights=row["distributed_optimizer"] != "no",
        fuses_gradient_sums=row["fuses_gradient_sums"] != "no",
        token_dispatcher=row.get("token_dispatcher") or "alltoall",  # type: ignore[arg-type]
        fuses_permutation=not row.get("token_dispatcher"),
        groups_experts=row.get("groups_experts") != "no",
        first_stage_layers=int(row.get("first_stage_layers") or 0),
        last_stage_layers=int(row.get("last_stage_layers") or 0),
        deferred_micro_batches=int(row.get("deferred_micro_batches") or 0),
        optimizer_instances=int(row.get("optimizer_instances") or 1),
    )


def _adapters(row: Row) -> dict[str, Any]:
    """What a job says of adapters; nothing where every weight is trained."""
    if not row.get("lora_rank"):
        return {}
    return {
        "method": "lora",
        "lora_rank": int(row["lora_rank"]),
        "lora_targets": tuple(row["lora_targets"].split(",")),
        "lora_dropout": float(row["lora_dropout"]),
    }


def _cluster(row: Row, gpus: int, nodes: int) -> Cluster:
    network = find_link(row.get("network") or DEFAULT_NETWORK)
    return replace(usual_cluster(find_gpu(row["gpu"]), gpus // nodes), gpus=gpus, nodes=nodes, network=network)


def _model(row: Row) -> ModelSpec:
    described = {each["model"]: each for each in _rows("models")}
    if row["model"] in described:
        return gpt(described[row["model"]])
    return mpt(row) if row["model"].startswith("MPT") else find_model(row["model"]).model


@cache
def _rows(table: str) -> list[Row]:
    with (profiles_folder() / "measured" / f"{table}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def gpt(row: Row) -> ModelSpec:
    """A GPT model as Megatron-LM's arguments make it: learned positions, LayerNorm, GELU, and biases where not off."""
    width, heads, shared = int(row["hidden"]), int(row["heads"]), int(row["key_value_heads"])
    inner, vocabulary, dropout = int(row["feed_forward"]), int(row["vocabulary"]), float(row["dropout"])
    head_dim, tied, biased = width // heads, row["tied"] == "yes", row.get("biased") != "no"
    layer = Layer(
        attention=Attention(
            heads=heads,
            key_value_heads=shared,
            head_dim=head_dim,
            bias=biased,
            output_bias=biased,
            fused_projection=True,
            rotary_fraction=0.0,
            dropout=dropout,
        ),
        feed_forward=Experts(
            count=int(row["experts"]), active=int(row["active"]), width=inner, gated=False, activation="gelu"
        )
        if row.get("experts")
        else FeedForward(width=inner, gated=False, activation="gelu", bias=biased),
        norm="layer",
        dropout=dropout,
        parameters=(
            *_norm("input_layernorm", width),
            *_product("self_attention.linear_qkv", width + 2 * shared * head_dim, width),
            *_product("self_attention.linear_proj", width, width),
            *_norm("pre_mlp_layernorm", width),
            *_product("mlp.linear_fc1", inner, width),
            *_product("mlp.linear_fc2", width, inner),
        ),
    )
    return ModelSpec(
        name=row["model"],
        family="megatron-gpt",
        objective="causal",
        hidden_size=width,
        vocabulary_size=vocabulary,
        maximum_positions=int(row["positions"]),
        tied_embeddings=tied,
        embedding=(
            Parameter("embedding.word_embeddings.weight", (vocabulary, width)),
            Parameter("embedding.position_embeddings.weight", (int(row["positions"]), width)),
        ),
        embedding_dropout=dropout,
        runs=(Run((layer,), int(row["layers"])),),
        final_norm="layer",
        head=(
            *_norm("final_layernorm", width),
            *(() if tied else (Parameter("output_layer.weight", (vocabulary, width)),)),
        ),
        source=row["source"],
    )


def mpt(row: Row) -> ModelSpec:
    """MosaicML's MPT with learned positions and a tied head (llm-foundry, scripts/train/yamls/pretrain)."""
    width, heads = int(row["hidden"]), int(row["heads"])
    layer = Layer(
        attention=Attention(
            heads=heads, key_value_heads=heads, head_dim=width // heads, fused_projection=True, rotary_fraction=0.0
        ),
        feed_forward=FeedForward(width=4 * width, gated=False, activation="gelu"),
        norm="layer",
        parameters=(
            *_norm("norm_1", width),
            Parameter("attn.Wqkv.weight", (3 * width, width)),
            Parameter("attn.out_proj.weight", (width, width)),
            *_norm("norm_2", width),
            Parameter("ffn.up_proj.weight", (4 * width, width)),
            Parameter("ffn.down_proj.weight", (width, 4 * width)),
        ),
    )
    return ModelSpec(
        name=row["model"],
        family="mpt",
        objective="causal",
        hidden_size=width,
        vocabulary_size=MPT_VOCABULARY,
        maximum_positions=int(row["sequence_length"]),
        tied_embeddings=True,
        embedding=(
            Parameter("wte.weight", (MPT_VOCABULARY, width)),
            Parameter("wpe.weight", (int(row["sequence_length"]), width)),
        ),
        runs=(Run((layer,), int(row["layers"])),),
        final_norm="layer",
        head=_norm("norm_f", width),
    )


def _norm(name: str, width: int) -> tuple[Parameter, Parameter]:
    return Parameter(f"{name}.weight", (width,)), Parameter(f"{name}.bias", (width,))


def _product(name: str, outputs: int, inputs: int) -> tuple[Parameter, Parameter]:
    return Parameter(f"{name}.weight", (outputs, inputs)), Parameter(f"{name}.bias", (outputs,))
