"""What of a model one rank of Megatron holds: its tensor-parallel part of the layers of its pipeline stage.

megatron-core 0.16.1 with TransformerEngine: queries, keys and values leave one product, and so do gate and up; these
and the embedding are cut by their outputs, attention's output and the last projection by their inputs
(tensor_parallel/layers.py, transformer/attention.py, transformer/mlp.py). Norms and the biases of products cut by
their inputs are whole on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from advisor.errors import SpecError
from advisor.specs.job import Job
from advisor.specs.model import AnyLayer, FeedForward, Layer, ModelSpec, NormKind, Parameter, Run
from advisor.specs.plan import Plan

WORD_EMBEDDINGS, OUTPUT_LAYER = "embedding.word_embeddings.weight", "output_layer.weight"


@dataclass(frozen=True, slots=True)
class Stage:
    """The chunks of layers that the ranks of one pipeline stage hold, in the order in which tokens pass them."""

    chunks: tuple[ModelSpec, ...]
    """One for each virtual stage. The model's first has the embedding, its last the head."""
    first: bool
    last: bool
    shares_embedding: bool
    """Whether the embedding's matrix is on another stage too, as the output matrix or as what it is tied to."""

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """Every tensor of the rank."""
        return tuple(parameter for chunk in self.chunks for parameter in chunk.parameters())


def stage_of(model: ModelSpec, job: Job, plan: Plan, number: int) -> Stage:
    """What a rank of stage *number* of *plan* holds. Raises SpecError where Megatron cannot train or cut *model*."""
    check(model, job, plan)
    stages, virtual = plan.pipeline_parallel, plan.virtual_stages
    each = len(model.layers) // (stages * virtual)
    local = {layer: _local_layer(layer, model.hidden_size, plan) for layer in dict.fromkeys(model.layers)}
    layers = [local[layer] for layer in model.layers]
    tied = model.tied_embeddings and stages == 1
    chunks = []
    for place in range(virtual):
        start = (place * stages + number) * each
        opens, closes = start == 0, start + each == len(layers)
        chunks.append(
            replace(
                model,
                vocabulary_size=vocabulary_rows(model, plan),
                tied_embeddings=tied,
                embedding=_embedding(model, plan) if opens else (),
                runs=tuple(_runs(layers[start : start + each])),
                final_norm=model.final_norm if closes else None,
                head=_head(model, plan, tied) if closes else (),
                early_head=0,
                buffers=(),
            )
        )
    return Stage(
        tuple(chunks),
        first=number == 0,
        last=number == stages - 1,
        shares_embedding=model.tied_embeddings and stages > 1 and number in (0, stages - 1),
    )


def vocabulary_rows(model: ModelSpec, plan: Plan) -> int:
    """Rows of the embedding on one rank: the vocabulary is padded to whole multiples on each."""
    multiple = plan.megatron.vocabulary_multiple
    return -(-model.vocabulary_size // (multiple * plan.tensor_parallel)) * multiple


def check(model: ModelSpec, job: Job, plan: Plan) -> None:
    """Raises SpecError where Megatron cannot train *model* by *plan*, or the step program does not know how."""
    for reason in (*_model_reasons(model), *_job_reasons(model, job), *_division_reasons(model, job, plan)):
        raise SpecError(f"{plan.title} cannot train {model.name}: {reason}")


def _model_reasons(model: ModelSpec) -> Iterator[str]:
    if model.objective != "causal" or not model.described_layers:
        yield "only causal models whose layers are described are modelled for Megatron"
    if model.embedding_norm or model.embedding_scale or model.logit_soft_cap or model.head_activation:
        yield "its embedding or head does more than Megatron's GPT model"
    for layer in model.described_layers:
        attention = layer.attention
        if not isinstance(layer.feed_forward, FeedForward):
            yield "mixtures of experts are not modelled for Megatron"
        elif layer.placement != "pre" or layer.cross_attention or layer.norm == "rms-narrow":
            yield "its layers normalise elsewhere than Megatron's GPT layers"
        if attention.latent or attention.additive_bias or attention.soft_cap or attention.sinks:
            yield "its attention is not modelled for Megatron"
        if attention.query_key_norm not in ("none", "per-head"):
            yield "its norms of queries and keys are not those of Megatron's GPT layers"


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
    if len(model.layers) % (stages * virtual):
        runs = f"{stages} stages x {virtual} = {stages * virtual} runs"
        yield f"{len(model.layers)} layers do not divide over {runs}"
    for layer in dict.fromkeys(model.described_layers):
        attention = layer.attention
        for what, count in (("attention heads", attention.heads), ("key-value heads", attention.key_value_heads)):
            if count % tensor:
                yield f"{count} {what} do not divide over tensor_parallel {tensor}"
        if isinstance(layer.feed_forward, FeedForward) and layer.feed_forward.width % tensor:
            yield f"a feed-forward width of {layer.feed_forward.width} does not divide over tensor_parallel {tensor}"
    length = job.sequence_length
    if context > 1 and job.attention == "eager":
        yield "context parallelism needs a fused attention kernel; take --attention flash"
    if context > 1 and length % (2 * context):
        yield f"a sequence of {length} tokens does not divide into 2 x context_parallel {context} = {2 * context} parts"
    if plan.cuts_sequence and (length // context) % tensor:
        yield f"{length // context} tokens of a sequence do not divide over tensor_parallel {tensor}"


def _local_layer(layer: AnyLayer, hidden_size: int, plan: Plan) -> Layer:
    """*layer* with its rank's share of heads and feed-forward, its tensors named and ordered as megatron-core does."""
    assert isinstance(layer, Layer)
    assert isinstance(layer.feed_forward, FeedForward)
    tensor, attention, forward = plan.tensor_parallel, layer.attention, layer.feed_forward
    local = replace(
        attention,
        heads=attention.heads // tensor,
        key_value_heads=attention.key_value_heads // tensor,
        fused_projection=True,
    )
    inner = forward.width // tensor
    entrance = inner * (2 if forward.gated else 1)
    fused_width = local.query_width + 2 * local.key_value_width
    parameters = [
        *_product("self_attention.linear_proj", hidden_size, local.query_width, attention.output_bias),
        *_norm("self_attention.linear_qkv.layer_norm", layer.norm, hidden_size),
        *_product("self_attention.linear_qkv", fused_width, hidden_size, attention.bias),
    ]
    if attention.query_key_norm == "per-head":
        for name in ("q_layernorm", "k_layernorm"):
            parameters += _norm(f"self_attention.{name}", layer.norm, attention.head_dim, joint=".")
    parameters += [
        *_norm("mlp.linear_fc1.layer_norm", layer.norm, hidden_size),
        *_product("mlp.linear_fc1", entrance, hidden_size, forward.bias),
        *_product("mlp.linear_fc2", hidden_size, inner, forward.bias),
    ]
    return replace(
        layer,
        attention=local,
        feed_forward=replace(forward, width=inner, fused_gate=forward.gated),
        parameters=tuple(parameters),
    )


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


def _runs(layers: Sequence[Layer]) -> Iterator[Run]:
    for layer, several in groupby(layers):
        yield Run((layer,), len(list(several)))


def _product(name: str, outputs: int, inputs: int, bias: bool) -> tuple[Parameter, ...]:
    matrix = Parameter(f"{name}.weight", (outputs, inputs))
    return (matrix, Parameter(f"{name}.bias", (outputs,))) if bias else (matrix,)


def _norm(name: str, kind: NormKind, width: int, joint: str = "_") -> tuple[Parameter, ...]:
    weight = Parameter(f"{name}{joint}weight", (width,))
    return (weight, Parameter(f"{name}{joint}bias", (width,))) if kind == "layer" else (weight,)
