"""What the families share: parameters of the usual modules, and layers gathered into runs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

from advisor.catalog.configuration import Configuration
from advisor.specs.model import AnyLayer, Attention, ModelSpec, NormKind, Parameter, Run

Parameters = tuple[Parameter, ...]
Kind = TypeVar("Kind", bound=Hashable)


def weight(name: str, *shape: int) -> Parameters:
    """A tensor that stands alone under ``name.weight``, such as an embedding or an RMS norm's scale."""
    return (Parameter(f"{name}.weight", shape),)


def linear(name: str, outputs: int, inputs: int, bias: bool = False) -> Parameters:
    """``torch.nn.Linear``."""
    return weight(name, outputs, inputs) + ((Parameter(f"{name}.bias", (outputs,)),) if bias else ())


def layer_norm(name: str, width: int) -> Parameters:
    """``torch.nn.LayerNorm``."""
    return (*weight(name, width), Parameter(f"{name}.bias", (width,)))


def projections(attention: Attention, hidden_size: int, prefix: str = "self_attn") -> Parameters:
    """Separate query, key, value and output matrices in Llama's order."""
    return (
        *linear(f"{prefix}.q_proj", attention.query_width, hidden_size, attention.bias),
        *linear(f"{prefix}.k_proj", attention.key_value_width, hidden_size, attention.bias),
        *linear(f"{prefix}.v_proj", attention.key_value_width, hidden_size, attention.bias),
        *linear(f"{prefix}.o_proj", hidden_size, attention.query_width, attention.output_bias),
    )


def head_norms(attention: Attention) -> Parameters:
    """The scales of a norm over each query and key head, where *attention* has them."""
    if attention.query_key_norm != "per-head":
        return ()
    return (*weight("self_attn.q_norm", attention.head_dim), *weight("self_attn.k_norm", attention.head_dim))


def gated_projections(hidden_size: int, width: int, prefix: str = "mlp", bias: bool = False) -> Parameters:
    """Gate, up and down matrices in Llama's order."""
    return (
        *linear(f"{prefix}.gate_proj", width, hidden_size, bias),
        *linear(f"{prefix}.up_proj", width, hidden_size, bias),
        *linear(f"{prefix}.down_proj", hidden_size, width, bias),
    )


def stacked_experts(count: int, hidden_size: int, width: int, prefix: str = "mlp.experts") -> Parameters:
    """Matrices of all experts in two tensors, gate and up joined."""
    return (
        Parameter(f"{prefix}.gate_up_proj", (count, 2 * width, hidden_size)),
        Parameter(f"{prefix}.down_proj", (count, hidden_size, width)),
    )


def runs_of(kinds: Sequence[Kind], layer: Callable[[Kind], AnyLayer]) -> tuple[Run, ...]:
    """One layer for each of *kinds*, in few runs of repeating patterns; each distinct kind is built once."""
    built = {kind: layer(kind) for kind in dict.fromkeys(kinds)}
    runs: list[Run] = []
    rest = list(kinds)
    while rest:
        length, repeats = _pattern(rest)
        runs.append(Run(tuple(built[kind] for kind in rest[:length]), repeats))
        rest = rest[length * repeats :]
    return tuple(runs)


def _pattern(kinds: Sequence[Hashable]) -> tuple[int, int]:
    """Length and repeats of the pattern at the start of *kinds* that covers most of them; the shortest of equals."""
    best = (1, _repeats(kinds, 1))
    for length in range(2, len(kinds) // 2 + 1):
        repeats = _repeats(kinds, length)
        if repeats > 1 and length * repeats > best[0] * best[1]:
            best = (length, repeats)
    return best


def _repeats(kinds: Sequence[Hashable], length: int) -> int:
    count = 1
    while kinds[count * length : (count + 1) * length] == kinds[:length]:
        count += 1
    return count


def decoder(
    config: Configuration,
    family: str,
    *,
    hidden_size: int,
    vocabulary: int,
    positions: int | None,
    tied: bool,
    runs: tuple[Run, ...],
    norm: NormKind = "rms",
    embedding_scale: bool = False,
    embedding_dropout: float = 0.0,
    logit_soft_cap: bool = False,
    notes: tuple[str, ...] = (),
) -> ModelSpec:
    """A causal language model with Llama's names around its layers."""
    final_norm = layer_norm if norm == "layer" else weight
    return ModelSpec(
        name=config.name,
        family=family,
        objective="causal",
        hidden_size=hidden_size,
        vocabulary_size=vocabulary,
        maximum_positions=positions,
        tied_embeddings=tied,
        embedding=weight("model.embed_tokens", vocabulary, hidden_size),
        embedding_scale=embedding_scale,
        embedding_dropout=embedding_dropout,
        runs=runs,
        final_norm=norm,
        head=final_norm("model.norm", hidden_size) + (() if tied else weight("lm_head", vocabulary, hidden_size)),
        logit_soft_cap=logit_soft_cap,
        source=config.source,
        notes=notes,
    )
