"""Multi-head latent attention in Megatron: low-rank projections of queries, and of keys and values together.

megatron-core 0.16.1, transformer/multi_latent_attention.py ``MLASelfAttention`` with YaRN and ``apply_rope_fusion``.
The projections to low rank are whole on every tensor-parallel rank and read its piece of the sequence; those to the
heads are cut, and gather the low-rank rows.
"""

from __future__ import annotations

from advisor.specs.model import Attention, LatentAttention
from advisor.step.megatron_operators import Cut, Norm, column_linear, linear, norm_linear
from advisor.step.operators import view
from advisor.step.tape import Gradients, Tape, Tensor, Weight

Named = dict[str, Weight]
PREFIX = "self_attention."


def latent_projections(
    tape: Tape, hidden: Tensor, spec: Attention, weights: Named, cut: Cut
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of this rank's heads, rotated, each in memory of its own."""
    latent = spec.latent
    assert latent
    if latent.query_rank is None:
        query = column_linear(tape, hidden, weights[f"{PREFIX}linear_q_proj.weight"], cut)
    else:
        compressed = linear(tape, hidden, weights[f"{PREFIX}linear_q_down_proj.weight"], cut)
        query = _up(tape, compressed, "linear_q_up_proj", weights, cut)
        del compressed
    joint = linear(tape, hidden, weights[f"{PREFIX}linear_kv_down_proj.weight"], cut)
    tokens = joint.numel // (latent.key_value_rank + latent.rotary_head_dim)
    compressed = view(tape, joint, tokens * latent.key_value_rank)
    positions = view(tape, joint, tokens * latent.rotary_head_dim)
    del joint
    if cut.sequence:
        positions = _gathered(tape, positions, cut)
    expanded = _up(tape, compressed, "linear_kv_up_proj", weights, cut)
    del compressed
    query = _turned(tape, query)
    key, value = _keys_and_values(tape, expanded, positions, spec.heads, latent)
    return query, key, value


def _up(tape: Tape, x: Tensor, name: str, weights: Named, cut: Cut) -> Tensor:
    norm: Norm = weights[f"{PREFIX}{name}.layer_norm_weight"], weights.get(f"{PREFIX}{name}.layer_norm_bias")
    return norm_linear(tape, x, norm, weights[f"{PREFIX}{name}.weight"], None, cut)


def _gathered(tape: Tape, x: Tensor, cut: Cut) -> Tensor:
    output, numel = tape.new(x.numel * cut.tensor, x.element_bytes), x.numel

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        return (tape.new(numel, gradient.element_bytes),)

    return tape.attach(output, [x], backward, saves="nothing")


def _turned(tape: Tape, x: Tensor) -> Tensor:
    """Rotated in place (fusions/fused_mla_yarn_rope_apply.py ``ApplyMLARotaryEmbQ``)."""
    tape.work(x, x)
    output = Tensor(x.numel, x.element_bytes, True, x.storage)

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        tape.work(gradient, gradient)
        return (gradient,)

    return tape.attach(output, [x], backward, saves="nothing")


def _keys_and_values(
    tape: Tape, expanded: Tensor, positions: Tensor, heads: int, latent: LatentAttention
) -> tuple[Tensor, Tensor]:
    """Keys, with the rotated part that all heads share, and values (the same, ``ApplyMLARotaryEmbKV``)."""
    tokens = positions.numel // latent.rotary_head_dim
    element_bytes, arrived = expanded.element_bytes, list[Tensor]()
    key = tape.new(tokens * heads * (latent.plain_head_dim + latent.rotary_head_dim), element_bytes)
    value = tape.new(tokens * heads * latent.value_head_dim, element_bytes)
    tape.work(expanded, positions, key, value)
    whole, shared = expanded.numel, positions.numel

    def wait(tape: Tape, gradient: Tensor) -> Gradients:
        arrived.append(gradient)
        return ()

    def join(tape: Tape, gradient: Tensor) -> Gradients:
        for_whole, for_shared = tape.new(whole, element_bytes), tape.new(shared, element_bytes)
        tape.work(gradient, *arrived, for_whole, for_shared)
        arrived.clear()
        return for_whole, for_shared

    tape.attach(key, [expanded, positions], join, saves="nothing")
    tape.attach(value, [], wait, saves="nothing")
    return key, value
