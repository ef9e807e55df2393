"""What of a model one rank of Megatron holds: its tensor-parallel part of the layers of its pipeline stage.

megatron-core 0.16.1 with TransformerEngine: queries, keys and values leave one product, and so do gate and up; these
and the embedding are cut by their outputs, attention's output and the last projection by their inputs
(tensor_parallel/layers.py, transformer/attention.py, transformer/mlp.py). Experts are spread over ranks, and each may
be cut as a dense block is (transformer/moe/experts.py). Norms and the biases of products cut by their inputs are whole
on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, groupby
from typing import Literal

import numpy as np

from advisor.errors import SpecError
from advisor.specs.job import Job
from advisor.specs.model import AnyLayer, Attention, Experts, Layer, ModelSpec, NormKind, Parameter
from advisor.specs.plan import Count, GroupName, Plan

EXPERTS = "mlp.experts."
WORD_EMBEDDINGS, OUTPUT_LAYER = "embedding.word_embeddings.weight", "output_layer.weight"


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Layers of one rank that follow one another, with the embedding before them or the head after them."""

    ends: ModelSpec
    """Embedding and head, where it has them; no layers."""
    runs: tuple[tuple[Layer, Count], ...]
    """Layers, and how often each comes in a row."""
    several: Count = 1
    """How many such chunks follow one another on the stage."""

    def counted(self) -> Iterator[tuple[Parameter, Count]]:
        """Its tensors, and how often the stage has each."""
        for parameter in self.ends.embedding:
            yield parameter, self.several
        for layer, repeats in self.runs:
            for parameter in layer.parameters:
                yield parameter, repeats * self.several
        for parameter in self.ends.head:
            yield parameter, self.several


@dataclass(frozen=True, slots=True, eq=False)
class Stage:
    """The chunks of layers that the ranks of one pipeline stage hold, in the order in which tokens pass them."""

    chunks: tuple[Chunk, ...]
    """One for each virtual stage, or for several that are alike. The model's first has the embedding, its last the
    head."""
    last: bool
    shares_embedding: bool
    """Whether the embedding's matrix is on another stage too, as the output matrix or as what it is tied to."""

    def counted(self) -> Iterator[tuple[Parameter, Count]]:
        """Tensors of the rank, and how many of each."""
        for chunk in self.chunks:
            yield from chunk.counted()

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """Every tensor of the rank, of a single plan."""
        return tuple(parameter for parameter, times in self.counted() for _ in range(int(times)))


def is_of_expert(parameter: Parameter) -> bool:
    return parameter.name.startswith(EXPERTS)


Place = Literal["only", "first", "between", "last"]
"""Of a pipeline stage."""


def place_of(plan: Plan, number: int) -> Place:
    """Where stage *number* of a single *plan* stands."""
    if plan.pipeline_parallel == 1:
        return "only"
    return "first" if number == 0 else "last" if number == plan.pipeline_parallel - 1 else "between"


def stage_of(model: ModelSpec, job: Job, plan: Plan, number: Count, place: Place | None = None) -> Stage:
    """What a rank of stage *number* of *plan* holds. Raises SpecError where Megatron cannot train or cut *model*.

    Of many plans at once, for which layers have to be alike, *place* says where the stages stand.
    """
    check(model, job, plan)
    place = place or place_of(plan, int(number))
    ends = replace(
        model,
        vocabulary_size=vocabulary_rows(model, plan),
        tied_embeddings=model.tied_embeddings and place == "only",
        runs=(),
        early_head=0,
        buffers=(),
    )
    opening, closing = place in ("only", "first"), place in ("only", "last")
    chunks = _alike if len(kinds_of(model)) == 1 else _unlike
    return Stage(
        tuple(chunks(model, plan, number, ends, opening, closing)),
        last=closing,
        shares_embedding=model.tied_embeddings and place in ("first", "last"),
    )


def kinds_of(model: ModelSpec) -> tuple[AnyLayer, ...]:
    """The layers of *model* that differ from one another, in the order in which they first come."""
    return tuple(dict.fromkeys(layer for run in model.runs for layer in run.layers))


def _alike(
    model: ModelSpec, plan: Plan, number: Count, ends: ModelSpec, opening: bool, closing: bool
) -> Iterator[Chunk]:
    """Chunks of equal layers: of those with neither end, however many, one."""
    virtual = plan.virtual_stages
    (layer,) = kinds_of(model)
    repeats = _layers_of_chunk(len(model.layers), plan, opening, closing)
    runs = ((_local_layer(layer, model.hidden_size, plan), repeats),)
    interleaved = bool(np.all(np.asarray(virtual) > 1))
    inner = replace(ends, embedding=(), final_norm=None, head=())
    if opening:
        yield Chunk(_with_ends(model, plan, ends, True, closing), runs)
    if interleaved or not (opening or closing):
        yield Chunk(inner, runs, virtual - (opening or closing))
    if closing and not opening:
        yield Chunk(_with_ends(model, plan, ends, False, True), runs)


def _unlike(
    model: ModelSpec, plan: Plan, number: Count, ends: ModelSpec, opening: bool, closing: bool
) -> Iterator[Chunk]:
    """Every chunk of a single plan by itself."""
    stages, virtual = int(plan.pipeline_parallel), int(plan.virtual_stages)
    first, between = (int(_layers_of_chunk(len(model.layers), plan, opens, False)) for opens in (True, False))
    local = {layer: _local_layer(layer, model.hidden_size, plan) for layer in kinds_of(model)}
    for place in range(virtual):
        before = place * stages + int(number)
        start = first + (before - 1) * between if before else 0
        each = int(_layers_of_chunk(len(model.layers), plan, before == 0, before == stages * virtual - 1))
        opens, closes = opening and place == 0, closing and place == virtual - 1
        runs = [(local[layer], len(list(several))) for layer, several in groupby(model.layers[start : start + each])]
        yield Chunk(_with_ends(model, plan, ends, opens, closes), tuple(runs))


def _layers_of_chunk(layers: int, plan: Plan, opening: bool, closing: bool) -> Count:
    """As many for each chunk, but for the first and last stage where their numbers are given
    (transformer/transformer_block.py ``get_num_layers_to_build``)."""
    first, last = plan.megatron.first_stage_layers, plan.megatron.last_stage_layers
    if (opening and first) or (closing and last):
        return first if opening else last
    others = plan.pipeline_parallel * plan.virtual_stages - (first > 0) - (last > 0)
    return (layers - first - last) // (max(others, 1) if isinstance(others, int) else np.maximum(others, 1))


def _with_ends(model: ModelSpec, plan: Plan, ends: ModelSpec, opens: bool, closes: bool) -> ModelSpec:
    return replace(
        ends,
        embedding=_embedding(model, plan) if opens else (),
        final_norm=model.final_norm if closes else None,
        head=_head(model, plan, ends.tied_embeddings) if closes else (),
    )


def vocabulary_rows(model: ModelSpec, plan: Plan) -> int:
    """Rows of the embedding on one rank: the vocabulary is padded to whole multiples on each."""
    multiple = plan.megatron.vocabulary_multiple
    return -(-model.vocabulary_size // (multiple * plan.tensor_parallel)) * multiple


def check(model: ModelSpec, job: Job, plan: Plan) -> None:
    """Raises SpecError where Megatron cannot train *model* by *plan*, or the step program does not know how."""
    reason = refusal_of_job(model, job) or refusal_of_cut(model, job, plan)
    if reason:
        raise SpecError(f"{plan.title} cannot train {model.name}: {reason}")


def refusal_of_job(model: ModelSpec, job: Job) -> str | None:
    """Why Megatron cannot train *model* so by any plan, or None."""
    return next(chain(_model_reasons(model), _job_reasons(model, job)), None)


def refusal_of_cut(model: ModelSpec, job: Job, plan: Plan) -> str | None:
    """Why *model* does not divide as *plan* has it, or None."""
    return next(_division_reasons(model, job, plan), None)


def _model_reasons(model: ModelSpec) -> Iterator[str]:
    if model.objective != "causal" or not _described(model):
        yield "only causal models whose layers are described are modelled for Megatron"
    if model.embedding_norm or model.embedding_scale or model.logit_soft_cap or model.head_activation:
        yield "its embedding or head does more than Megatron's GPT model"
    for layer in _described(model):
        attention = layer.attention
        if isinstance(layer.feed_forward, Experts):
            yield from _expert_reasons(layer.feed_forward)
        if layer.placement != "pre" or layer.cross_attention or layer.norm == "rms-narrow":
            yield "its layers normalise elsewhere than Megatron's GPT layers"
        if attention.additive_bias or attention.soft_cap or attention.sinks or (attention.latent and attention.bias):
            yield "its attention is not modelled for Megatron"
        if attention.query_key_norm not in ("none", "per-head"):
            yield "its norms of queries and keys are not those of Megatron's GPT layers"


def _described(model: ModelSpec) -> tuple[Layer, ...]:
    return tuple(layer for layer in kinds_of(model) if isinstance(layer, Layer))


def _expert_reasons(experts: Experts) -> Iterator[str]:
    if experts.every_token:
        yield "transformers runs every token through every expert of it, Megatron only those of its choice"
    if experts.bias or experts.activation not in ("silu", "gelu"):
        yield f"experts with biases or the activation {experts.activation} are not modelled for Megatron"


def _job_reasons(model: ModelSpec, job: Job) -> Iterator[str]:
    if job.precision == "fp32" or job.parameter_format != "fp32":
        yield "it is modelled in bf16 or fp16 with fp32 masters; take --precision bf16 and --param-dtype fp32"
    if job.optimizer != "adamw-fused":
        yield f"Megatron brings its own fused AdamW, not {job.optimizer}; take --optimizer adamw-fused"
    if job.loss != "full" or job.padded:
        yield "its loss is over all logits of joined sequences; leave --loss full and --padded off"


def _division_reasons(model: ModelSpec, job: Job, plan: Plan) -> Iterator[str]:
    tensor, context = plan.tensor_parallel, plan.context_parallel
    stages, virtual = plan.pipeline_parallel, plan.virtual_stages
    given = [each for each in (plan.megatron.first_stage_layers, plan.megatron.last_stage_layers) if each]
    rest, others = len(model.layers) - sum(given), np.asarray(stages * virtual) - len(given)
    if given and np.any((np.asarray(stages) == 1) | (np.asarray(virtual) > 1)):
        yield "numbers of layers of the first and last stage need a pipeline that is not interleaved"
    elif np.any(np.where(others > 0, (rest < others) | (rest % np.maximum(others, 1) > 0), rest != 0)):
        runs = f"{stages} stages x {virtual} = {stages * virtual} runs"
        apart = f", {' and '.join(map(str, given))} of them for those that were given" if given else ""
        yield f"{len(model.layers)} layers do not divide over {runs}{apart}"
    for layer in _described(model):
        attention, forward = layer.attention, layer.feed_forward
        exchanged = context if plan.megatron.context_exchange == "a2a" else 1
        for what, count in (("attention heads", attention.heads), ("key-value heads", attention.key_value_heads)):
            if count % tensor:
                yield f"{count} {what} do not divide over tensor_parallel {tensor}"
            elif count % (tensor * exchanged):
                yield f"{count} {what} do not divide over tensor_parallel {tensor} x context_parallel {context} by a2a"
        dense = forward.shared if isinstance(forward, Experts) else forward
        if dense and dense.width % tensor:
            yield f"a feed-forward width of {dense.width} does not divide over tensor_parallel {tensor}"
        if attention.latent and tensor > 1 and not plan.cuts_sequence:
            yield "latent attention over several tensor-parallel ranks is modelled with --sequence-parallel; give it"
    yield from _expert_division_reasons(model, plan)
    instances = plan.megatron.optimizer_instances
    groups: tuple[GroupName, ...] = ("data", "expert-data") if plan.expert_parallel > 1 else ("data",)
    for name in groups:
        if np.any(np.asarray(plan.group(name).size) % instances):
            yield f"{plan.group(name).size} {name} ranks do not divide into {instances} instances of the optimizer"
    if plan.megatron.deferred_micro_batches and np.any(np.asarray(stages) == 1):
        yield "only pipelines have a while in which gradients that were deferred can be computed; leave that off"
    length = job.sequence_length
    if context > 1 and job.attention == "eager":
        yield "context parallelism needs a fused attention kernel; take --attention flash"
    if context > 1 and length % (2 * context):
        yield f"a sequence of {length} tokens does not divide into 2 x context_parallel {context} = {2 * context} parts"
    if plan.cuts_sequence and (length // context) % tensor:
        yield f"{length // context} tokens of a sequence do not divide over tensor_parallel {tensor}"


def _expert_division_reasons(model: ModelSpec, plan: Plan) -> Iterator[str]:
    mixtures = {each.feed_forward for each in _described(model) if isinstance(each.feed_forward, Experts)}
    ranks, slices, tensor = plan.expert_parallel, plan.expert_tensor_parallel, plan.tensor_parallel
    if not mixtures and ranks * slices > 1:
        yield f"it has no experts to spread over expert_parallel {ranks} x expert_tensor_parallel {slices}"
    for experts in mixtures:
        if experts.count % ranks:
            yield f"{experts.count} experts do not divide over expert_parallel {ranks}"
        if experts.width % slices:
            yield f"an expert's width of {experts.width} does not divide over expert_tensor_parallel {slices}"
        if tensor > 1 and not plan.cuts_sequence:
            # moe_layer.py, ``MoELayer.forward``.
            yield "Megatron refuses experts beside tensor parallelism without sequence parallelism; give both"
        if ranks == 1 and slices != tensor:
            # Gradients of experts that are not spread are summed with those of all other weights, over the data ranks.
            yield f"experts on every rank are cut as the rest is; give expert_tensor_parallel {tensor}, not {slices}"


def _local_layer(layer: AnyLayer, hidden_size: int, plan: Plan) -> Layer:
    """*layer* with its rank's share of heads and feed-forward, its tensors named and ordered as megatron-core does.

    Experts keep their count: what a rank has of them, its parameters say.
    """
    assert isinstance(layer, Layer)
    tensor, attention, forward = plan.tensor_parallel, layer.attention, layer.feed_forward
    local = replace(
        attention,
        heads=attention.heads // tensor,
        key_value_heads=attention.key_value_heads // tensor,
        fused_projection=not attention.latent,
    )
    attends = _latent_parameters if local.latent else _attention_parameters
    parameters = [*attends(local, layer.norm, hidden_size)]
    if isinstance(forward, Experts):
        parameters += _expert_parameters(forward, layer.norm, hidden_size, plan)
        return replace(layer, attention=local, parameters=tuple(parameters))
    inner = forward.width // tensor
    parameters += [
        *_norm("mlp.linear_fc1.layer_norm", layer.norm, hidden_size),
        *_product("mlp.linear_fc1", inner * (2 if forward.gated else 1), hidden_size, forward.bias),
        *_product("mlp.linear_fc2", hidden_size, inner, forward.bias),
    ]
    return replace(
        layer,
        attention=local,
        feed_forward=replace(forward, width=inner, fused_gate=forward.gated),
        parameters=tuple(parameters),
    )


def _attention_parameters(local: Attention, norm: NormKind, hidden_size: int) -> Iterator[Parameter]:
    yield from _product("self_attention.linear_proj", hidden_size, local.query_width, local.output_bias)
    yield from _norm("self_attention.linear_qkv.layer_norm", norm, hidden_size)
    fused_width = local.query_width + 2 * local.key_value_width
    yield from _product("self_attention.linear_qkv", fused_width, hidden_size, local.bias)
    if local.query_key_norm == "per-head":
        for name in ("q_layernorm", "k_layernorm"):
            yield from _norm(f"self_attention.{name}", norm, local.head_dim, joint=".")


def _latent_parameters(local: Attention, norm: NormKind, hidden_size: int) -> Iterator[Parameter]:
    """The projections to low rank are whole on every rank."""
    latent, own = local.latent, "self_attention."
    assert latent
    yield from _norm("input_layernorm", norm, hidden_size, joint=".")
    yield from _product(f"{own}linear_proj", hidden_size, local.heads * latent.value_head_dim, False)
    if latent.query_rank is None:
        yield from _product(f"{own}linear_q_proj", local.query_width, hidden_size, False)
    else:
        yield from _product(f"{own}linear_q_down_proj", latent.query_rank, hidden_size, False)
        yield from _norm(f"{own}linear_q_up_proj.layer_norm", norm, latent.query_rank)
        yield from _product(f"{own}linear_q_up_proj", local.query_width, latent.query_rank, False)
    yield from _product(f"{own}linear_kv_down_proj", latent.key_value_rank + latent.rotary_head_dim, hidden_size, False)
    yield from _norm(f"{own}linear_kv_up_proj.layer_norm", norm, latent.key_value_rank)
    expanded = local.heads * (latent.plain_head_dim + latent.value_head_dim)
    yield from _product(f"{own}linear_kv_up_proj", expanded, latent.key_value_rank, False)


def _expert_parameters(experts: Experts, norm: NormKind, hidden_size: int, plan: Plan) -> Iterator[Parameter]:
    """Matrices of one rank's experts are one tensor here, of which each is one of its own in megatron-core."""
    count, inner = experts.count // plan.expert_parallel, experts.width // plan.expert_tensor_parallel
    yield from _norm("pre_mlp_layernorm", norm, hidden_size, joint=".")
    yield Parameter("mlp.router.weight", (experts.count, hidden_size))
    yield Parameter(f"{EXPERTS}linear_fc1.weight", (count, inner * (2 if experts.gated else 1), hidden_size))
    yield Parameter(f"{EXPERTS}linear_fc2.weight", (count, hidden_size, inner))
    if experts.shared:
        if experts.shared_gate:
            yield Parameter("mlp.shared_experts.gate_weight", (1, hidden_size))
        width = experts.shared.width // plan.tensor_parallel
        yield from _product("mlp.shared_experts.linear_fc1", 2 * width, hidden_size, False)
        yield from _product("mlp.shared_experts.linear_fc2", hidden_size, width, False)


def _embedding(model: ModelSpec, plan: Plan) -> tuple[Parameter, ...]:
    words = Parameter(WORD_EMBEDDINGS, (vocabulary_rows(model, plan), model.hidden_size))
    positions = [
        Parameter("embedding.position_embeddings.weight", parameter.shape) for parameter in model.embedding[1:2]
    ]
    return (words, *positions)


def _head(model: ModelSpec, plan: Plan, tied: bool) -> tuple[Parameter, ...]:
    """Final norm and output matrix. A tied one is a second copy where the embedding is on another stage."""
    norm = _norm("decoder.final_layernorm", model.final_norm, model.hidden_size, joint=".") if model.final_norm else ()
    matrix = Parameter(OUTPUT_LAYER, (vocabulary_rows(model, plan), model.hidden_size))
    return (*norm, *(() if tied else (matrix,)))


def _product(name: str, outputs: int, inputs: int, bias: bool) -> tuple[Parameter, ...]:
    matrix = Parameter(f"{name}.weight", (outputs, inputs))
    return (matrix, Parameter(f"{name}.bias", (outputs,))) if bias else (matrix,)


def _norm(name: str, kind: NormKind, width: int, joint: str = "_") -> tuple[Parameter, ...]:
    weight = Parameter(f"{name}{joint}weight", (width,))
    return (weight, Parameter(f"{name}{joint}bias", (width,))) if kind == "layer" else (weight,)
