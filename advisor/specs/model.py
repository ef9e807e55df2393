"""The facts of a transformer that its memory, traffic and time depend on.

A model is an embedding, runs of layers and a head. Every part lists its parameters as transformers registers
them (name, shape, order), because partition boundaries, bucket fills and row-wise shards depend on each tensor;
its other fields say how the part computes, because what autograd saves depends on that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Literal

from advisor.errors import SpecError

NormKind = Literal["rms", "rms-narrow", "rms-fp32-weight", "layer"]
"""How a norm computes in low precision.

``rms``: upcasts to fp32, casts back, then multiplies by the weight (Llama). ``rms-narrow``: upcasts for the variance
alone (T5). ``rms-fp32-weight``: multiplies by the weight in fp32, then casts back (Gemma, OLMo-2, gpt-oss).
``layer``: torch's fused LayerNorm.
"""

Placement = Literal["pre", "post-branch", "sandwich", "post-sum", "parallel"]
"""Where a layer normalises.

``pre``: x + f(norm(x)). ``post-branch``: x + norm(f(x)) (OLMo-2). ``sandwich``: x + norm(f(norm(x))) (Gemma 2, 3).
``post-sum``: norm(x + f(x)) (BERT). ``parallel``: x + attention(norm(x)) + mlp(norm(x)) (GPT-NeoX, Falcon).
"""

Held = Literal["as model", "products", "four bits", "four bits, plain scales", "int8", "fp8"]
"""In which format a weight is held: that of the model, or that which products read; four bits by bitsandbytes, their
scales quantized too or not; int8 by rows (LLM.int8); fp8 by blocks."""

Objective = Literal["causal", "masked", "seq2seq"]


SCALED, SCALES_SCALED = 64, 256
"""Weights that share a scale, and scales that share one."""


FP8_BLOCK = 128
"""Rows and columns of a matrix in fp8 that share a scale."""


def plain_four_bit_bytes(numel: int) -> int:
    """Bytes of *numel* weights in four bits with a scale in fp32 for each block, and the table of 16 values."""
    return -(-numel // 2) + 4 * (-(-numel // SCALED) + 16)


def int8_bytes(shape: tuple[int, ...]) -> int:
    """Bytes of a matrix (outputs, inputs) in int8 with a scale in fp32 for each row (bitsandbytes ``Linear8bitLt``)."""
    return prod(shape) + 4 * shape[0]


def fp8_bytes(shape: tuple[int, ...]) -> int:
    """Bytes of a matrix, or of several, in fp8 with a scale in fp32 for each block (transformers 5.23,
    integrations/finegrained_fp8.py ``FP8Linear`` and ``FP8Experts``)."""
    *several, rows, columns = shape
    return prod(shape) + 4 * prod(several) * -(-rows // FP8_BLOCK) * -(-columns // FP8_BLOCK)


def nested_scale_bytes(numel: int) -> int:
    """Bytes beside *numel* weights in four bits whose scales are quantized too (bitsandbytes 0.50.2, functional.py).

    A byte for each scale; fp32 for the scales of these, for their mean, and for the tables of 16 and 256 values that
    the codes stand for.
    """
    scales = -(-numel // SCALED)
    return scales + 4 * (-(-scales // SCALES_SCALED) + 1 + 16 + 256)


@dataclass(frozen=True, slots=True)
class Parameter:
    """One tensor of weights, named and shaped as transformers registers it."""

    name: str
    shape: tuple[int, ...]
    trained: bool = True
    """False for a weight that stays as it is."""
    held: Held = "as model"
    """``four bits``, ``products``: in the format that products read, or as the model."""
    numel: int = field(init=False, compare=False, repr=False)
    """Its elements."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "numel", prod(self.shape))

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Its shape as frameworks cut it over ranks.

        Four bits lie packed in one column of elements of two bytes, ``bnb_4bit_quant_storage``.
        """
        return (-(-self.numel // 4), 1) if self.held == "four bits" else self.shape

    @property
    def stored_numel(self) -> int:
        """Elements of that shape."""
        return -(-self.numel // 4) if self.held == "four bits" else self.numel

    @property
    def scale_bytes(self) -> int:
        """What it takes besides to read four bits, which no framework cuts."""
        return nested_scale_bytes(self.numel) if self.held == "four bits" else 0

    @property
    def module(self) -> str:
        """The module that owns it, within the part."""
        return self.name.rpartition(".")[0]

    @property
    def is_bias(self) -> bool:
        return self.name.rpartition(".")[2] == "bias"

    def held_bytes(self, model_bytes: int, compute_bytes: int) -> int:
        """Its bytes, where the model and what products read have so many per element."""
        match self.held:
            case "four bits":
                return -(-self.numel // 2) + self.scale_bytes
            case "four bits, plain scales":
                return plain_four_bit_bytes(self.numel)
            case "int8":
                return int8_bytes(self.shape)
            case "fp8":
                return fp8_bytes(self.shape)
        return self.numel * (compute_bytes if self.held == "products" else model_bytes)


@dataclass(frozen=True, slots=True)
class Buffer:
    """A table that is no parameter; every rank holds it whole."""

    name: str
    numel: int
    number_format: Literal["fp32", "int64", "weights", "bool"]
    """``weights``: as the model's weights are built."""
    registered: bool = True
    """Whether what casts a model's buffers casts this one too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentAttention:
    """DeepSeek's multi-head latent attention: low-rank projections of queries and of keys and values."""

    query_rank: int | None
    """Rank of the compressed queries; None where queries are projected directly (V2-Lite)."""
    key_value_rank: int
    rotary_head_dim: int
    plain_head_dim: int
    value_head_dim: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """One attention block. Widths are per head; ``key_value_heads`` < ``heads`` is grouped-query attention."""

    heads: int
    key_value_heads: int
    head_dim: int
    bias: bool = False
    """Whether the query, key and value projections have biases."""
    output_bias: bool = False
    fused_projection: bool = False
    """Queries, keys and values leave one matrix product, so views of them keep its whole output alive."""
    query_key_norm: Literal["none", "per-head", "full-width", "unweighted"] = "none"
    rotary_fraction: float = 1.0
    """Share of each head that is rotated; 0 for learned, ALiBi or relative positions."""
    window: int | None = None
    """Tokens that a query sees at most; None without a sliding window or chunk."""
    additive_bias: bool = False
    """ALiBi or relative positions: a bias of heads x length x length is added to the scores."""
    soft_cap: bool = False
    narrow_softmax: bool = False
    """transformers' own code computes probabilities in the format of the scores, not in fp32 (BERT, GPT-2)."""
    holds_scores: bool = False
    """transformers' own code scales scores in the product, and holds them raw and masked until it returns (BLOOM)."""
    sinks: bool = False
    latent: LatentAttention | None = None
    dropout: float = 0.0
    causal: bool = True
    broadcast_heads: bool = False
    """Keys and values of one head are broadcast, which no fused kernel takes: torch falls back to fp32 (Falcon-7B)."""
    expanded_heads: bool = False
    """Keys and values are copied out for every query head before they are rotated (Falcon-40B)."""
    rotates_by_head: bool = False
    """The rotation ends in a concatenation, which lays queries and keys out head by head (Phi-3, GPT-NeoX)."""
    always_masked: bool = False
    """transformers builds a mask tensor for torch's fused kernels whatever the batch (Falcon)."""
    eager_only: bool = False
    """transformers has no fused kernel for this block and computes the scores matrix (BLOOM, Gemma 2, gpt-oss)."""

    def __post_init__(self) -> None:
        if min(self.heads, self.key_value_heads, self.head_dim) < 1:
            raise SpecError(
                f"attention needs positive counts, got heads {self.heads}, "
                f"key_value_heads {self.key_value_heads}, head_dim {self.head_dim}"
            )
        if self.heads % self.key_value_heads:
            raise SpecError(f"{self.heads} attention heads do not divide by {self.key_value_heads} key-value heads")

    @property
    def rotary_dimensions(self) -> int:
        """Dimensions of each head that are rotated."""
        return self.latent.rotary_head_dim if self.latent else int(self.head_dim * self.rotary_fraction)

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def key_value_width(self) -> int:
        return self.key_value_heads * self.head_dim

    @property
    def value_head_dim(self) -> int:
        return self.latent.value_head_dim if self.latent else self.head_dim


@dataclass(frozen=True, kw_only=True, slots=True)
class FeedForward:
    """A dense multilayer perceptron: gated (up, gate, down) or plain (in, out)."""

    width: int
    gated: bool = True
    activation: str = "silu"
    bias: bool = False
    fused_gate: bool = False
    """Gate and up projections are one matrix product (Phi-3)."""
    dropout: float = 0.0
    """Dropout between activation and the last projection (T5)."""
    widened: bool = False
    """The last projection's input is first brought to the format of its weight, autocast or not (T5)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Experts:
    """A mixture of experts: *active* of *count* experts of *width* for each token."""

    count: int
    active: int
    width: int
    gated: bool = True
    activation: str = "silu"
    bias: bool = False
    shared: FeedForward | None = None
    """An expert that every token passes through."""
    shared_gate: bool = False
    """The shared expert's output is multiplied by a sigmoid gate (Qwen2-MoE)."""
    scoring: Literal["softmax", "sigmoid", "softmax-of-topk"] = "softmax"
    scores_add_up: bool = True
    """The scores of the chosen experts are scaled to add up to one."""
    router_in_fp32: bool = False
    """Router and its input are cast to fp32 (DeepSeek)."""
    every_token: bool = False
    """Every expert computes every token, and the scores zero what was not chosen (Llama 4)."""
    outputs_first: bool = True
    """Matrices are stored as (experts, outputs, inputs), and the products read transposed views of them; not so in
    gpt-oss and Llama 4."""

    def __post_init__(self) -> None:
        if not 1 <= self.active <= self.count:
            raise SpecError(f"{self.active} active experts of {self.count}")


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One transformer layer. Equal layers compare equal, so that runs of them can be repeated."""

    attention: Attention
    feed_forward: FeedForward | Experts
    norm: NormKind
    placement: Placement = "pre"
    cross_attention: Attention | None = None
    shared_norm: bool = False
    """In a parallel layer: attention and MLP read the same normalised input (Falcon-7B)."""
    dropout: float = 0.0
    """Dropout on each branch before it is added to the residual stream."""
    transposed_weights: bool = False
    """Products read a transposed view of their weight, whose copy autocast does not keep for later (Falcon)."""
    names_branches: bool = False
    """The layer's code has names of their own for what its branches take and give, which live until it returns (GPT-2,
    Falcon)."""
    closes_stack: bool = False
    """The last parameter is the encoder's final norm, which runs behind the layer and is not checkpointed with it."""
    starts_gradients: bool = False
    """No weight before this layer is trained, so that no gradient of its input is needed."""
    adapter_dropout: float = 0.0
    parameters: tuple[Parameter, ...]

    @cached_property
    def parameter_count(self) -> int:
        return sum(parameter.numel for parameter in self.parameters)

    @property
    def eager_only(self) -> bool:
        return self.attention.eager_only


@dataclass(frozen=True, kw_only=True)
class UndescribedLayer:
    """A layer of which only the parameters are known; what it computes has to be traced."""

    number: int
    """Index in the model of the first layer that is like it."""
    eager_only: bool = False
    """transformers has no fused kernel for its attention."""
    parameters: tuple[Parameter, ...]

    @cached_property
    def parameter_count(self) -> int:
        return sum(parameter.numel for parameter in self.parameters)


AnyLayer = Layer | UndescribedLayer


@dataclass(frozen=True, slots=True)
class Run:
    """A pattern of layers that stands *repeats* times in a row, as in Gemma's local and global layers."""

    layers: tuple[AnyLayer, ...]
    repeats: int

    def __post_init__(self) -> None:
        if not self.layers or self.repeats < 1:
            raise SpecError(f"a run needs layers and at least one repeat, got {len(self.layers)} x {self.repeats}")


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A transformer as the step program needs it. Sizes in elements; no dtype, no cost."""

    name: str
    family: str
    """transformers' ``model_type``."""
    objective: Objective
    hidden_size: int
    vocabulary_size: int
    maximum_positions: int | None
    """Longest sequence the configuration admits; None where positions are unbounded."""
    tied_embeddings: bool
    embedding: tuple[Parameter, ...]
    embedding_norm: NormKind | None = None
    embedding_dropout: float = 0.0
    embedding_scale: bool = False
    """Embeddings are multiplied by a constant (Gemma)."""
    runs: tuple[Run, ...]
    final_norm: NormKind | None
    final_dropout: float = 0.0
    head: tuple[Parameter, ...]
    """What stands after the layers: final norm, head transform, and the output matrix unless tied."""
    early_head: int = 0
    """How many of the head's tensors transformers registers before the layers (OPT's final norm)."""
    decoder_start: int = 0
    """Index of the first decoder layer of a sequence-to-sequence model; the layers before it encode."""
    head_activation: str | None = None
    """Activation of the transform before the output matrix (BERT, RoBERTa)."""
    logit_soft_cap: bool = False
    rotary_kinds: int = 1
    """Kinds of layers that rotate by angles of their own (Gemma 3)."""
    buffers: tuple[Buffer, ...] = ()
    source: str = ""
    notes: tuple[str, ...] = ()

    @cached_property
    def layers(self) -> tuple[AnyLayer, ...]:
        """Every layer in order."""
        return tuple(layer for run in self.runs for _ in range(run.repeats) for layer in run.layers)

    @cached_property
    def described_layers(self) -> tuple[Layer, ...]:
        """Every layer in order of which it is known what it computes; all of them, or none in a traced model."""
        return tuple(layer for layer in self.layers if isinstance(layer, Layer))

    @property
    def eager_only(self) -> bool:
        """Whether transformers has no fused kernel for the attention of some layer."""
        return any(layer.eager_only for run in self.runs for layer in run.layers)

    @cached_property
    def parameter_count(self) -> int:
        """Elements of all weights, a tied matrix counted once."""
        per_run = sum(run.repeats * sum(layer.parameter_count for layer in run.layers) for run in self.runs)
        return self.embedding_count + per_run + self.head_count

    def tables_bytes(self, weight_bytes: int) -> int:
        """Bytes of its buffers, where weights are built in *weight_bytes* per element."""
        sizes = {"fp32": 4, "int64": 8, "bool": 1, "weights": weight_bytes}
        return sum(buffer.numel * sizes[buffer.number_format] for buffer in self.buffers)

    @cached_property
    def embedding_count(self) -> int:
        return sum(parameter.numel for parameter in self.embedding)

    @cached_property
    def head_count(self) -> int:
        return sum(parameter.numel for parameter in self.head)

    def parameters(self) -> Iterator[Parameter]:
        """Every tensor of weights in registration order, but for ``early_head``: embedding, layers, head."""
        yield from self.embedding
        for layer in self.layers:
            yield from layer.parameters
        yield from self.head

    @cached_property
    def trained(self) -> tuple[Parameter, ...]:
        """The tensors that are trained, in the order of :meth:`parameters`."""
        return tuple(parameter for parameter in self.parameters() if parameter.trained)

    @cached_property
    def trained_count(self) -> int:
        """Their elements."""
        return sum(parameter.numel for parameter in self.trained)

    @property
    def frozen_count(self) -> int:
        """Elements of the weights that stay as they are."""
        return self.parameter_count - self.trained_count

    @cached_property
    def frozen(self) -> tuple[Parameter, ...]:
        """The tensors that stay as they are, in the order of :meth:`parameters`."""
        return tuple(parameter for parameter in self.parameters() if not parameter.trained)

    @cached_property
    def scale_bytes(self) -> int:
        """What it takes besides to read the weights in four bits."""
        return sum(parameter.scale_bytes for parameter in self.frozen)

    @cached_property
    def tensor_count(self) -> int:
        """Tensors of weights, a tied matrix counted once."""
        per_run = sum(run.repeats * sum(len(layer.parameters) for layer in run.layers) for run in self.runs)
        return len(self.embedding) + per_run + len(self.head)

    @cached_property
    def largest_parameter(self) -> Parameter:
        return max(self.parameters(), key=lambda parameter: parameter.numel)
