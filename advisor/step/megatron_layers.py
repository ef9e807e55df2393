"""Megatron's GPT model on one tensor-parallel rank: embedding, layers, head and loss.

megatron-core 0.16.1 with TransformerEngine's layers (models/gpt/gpt_layer_specs.py
``get_gpt_layer_with_transformer_engine_spec``) and its fused kernels on.
"""

from __future__ import annotations

from advisor.specs.model import Experts, Layer, ModelSpec
from advisor.step.megatron_attention import Kernel, attention, latent_attention
from advisor.step.megatron_experts import mixture
from advisor.step.megatron_latent import latent_projections
from advisor.step.megatron_operators import (
    Cut,
    Norm,
    activate,
    bias_dropout_add,
    norm_linear,
    normalise,
    row_linear,
    weights_gradient,
)
from advisor.step.megatron_shard import OUTPUT_LAYER, WORD_EMBEDDINGS
from advisor.step.operators import weight_gradient
from advisor.step.program import Matmul
from advisor.step.tape import Gradients, Product, Tape, Tensor, Weight

INDEX_BYTES = 8
Named = dict[str, Weight]
"""Weights of a part by their names."""


def gpt_layer(tape: Tape, hidden: Tensor, layer: Layer, weights: Named, cut: Cut, kernel: Kernel) -> Tensor:
    """One layer over this rank's piece of the residual stream."""
    tape.scope = "attention"
    matrix, bias = _product(weights, "self_attention.linear_proj")
    attended = row_linear(tape, _attended(tape, hidden, layer, weights, cut, kernel), matrix, cut)
    hidden = bias_dropout_add(tape, attended, bias, hidden, layer.dropout)
    del attended
    output, bias = _feed_forward(tape, hidden, layer, weights, cut)
    return bias_dropout_add(tape, output, bias, hidden, layer.dropout)


def _attended(tape: Tape, hidden: Tensor, layer: Layer, weights: Named, cut: Cut, kernel: Kernel) -> Tensor:
    """What attention's last product reads. Latent projections have their norm apart."""
    if layer.attention.latent:
        norm = _norm(weights, "input_layernorm.")
        normed = normalise(tape, hidden, norm, norm[0].parameter.numel)
        parts = latent_projections(tape, normed, layer.attention, weights, cut)
        del normed
        return latent_attention(tape, *parts, layer.attention, cut, kernel)
    into = "self_attention.linear_qkv"
    names = ("self_attention.q_layernorm", "self_attention.k_layernorm")
    norms = tuple(_norm(weights, f"{name}.") for name in names if f"{name}.weight" in weights)
    return attention(
        tape,
        norm_linear(tape, hidden, _norm(weights, f"{into}.layer_norm_"), *_product(weights, into), cut),
        layer.attention,
        norms,
        cut,
        kernel,
    )


def _feed_forward(tape: Tape, hidden: Tensor, layer: Layer, weights: Named, cut: Cut) -> tuple[Tensor, Weight | None]:
    """The second branch, and the bias that is still to be added to it. Experts have their norm apart."""
    forward = layer.feed_forward
    if isinstance(forward, Experts):
        tape.scope = "experts"
        norm = _norm(weights, "pre_mlp_layernorm.")
        normed = normalise(tape, hidden, norm, norm[0].parameter.numel)
        return mixture(tape, normed, forward, weights, cut), None
    tape.scope = "feed-forward"
    into = "mlp.linear_fc1"
    matrix, bias = _product(weights, into)
    inner = norm_linear(tape, hidden, _norm(weights, f"{into}.layer_norm_"), matrix, None, cut)
    inner = activate(tape, inner, bias, gated=forward.gated)
    matrix, bias = _product(weights, "mlp.linear_fc2")
    return row_linear(tape, inner, matrix, cut), bias


def _product(weights: Named, name: str) -> tuple[Weight, Weight | None]:
    return weights[f"{name}.weight"], weights.get(f"{name}.bias")


def embed(tape: Tape, model: ModelSpec, weights: Named, cut: Cut) -> Tensor:
    """Rows of this rank's part of the vocabulary, added up over the ranks, positions, dropout.

    Tokens are masked to the rank's part and kept (tensor_parallel/layers.py ``VocabParallelEmbedding``); gradients are
    dense.
    """
    tape.scope = "embedding"
    tokens, width = tape.sequence_length, model.hidden_size
    words = weights[WORD_EMBEDDINGS]
    table = next((weight for name, weight in weights.items() if name != WORD_EMBEDDINGS), None)
    ids = tape.new(tokens * (2 if table else 1), INDEX_BYTES)
    others = tape.new(tokens, 1) if cut.tensor > 1 else None
    whole = tape.new(tokens * width, words.element_bytes)
    tape.work(whole, whole)
    if table:
        positions = tape.like(whole)
        summed = tape.like(whole)
        tape.work(positions, whole, summed, kernels=2)
        whole = summed
        del positions, summed
    if not tape.alone:
        # From sequence after sequence to token after token.
        turned = tape.like(whole)
        tape.work(whole, turned)
        whole = turned
        del turned
    if cut.sequence:
        whole = tape.new(whole.numel // cut.tensor, whole.element_bytes)
    mask = tape.like(whole, 1) if model.embedding_dropout else None
    output = tape.like(whole) if mask else whole
    tape.work(whole, output, *([mask] if mask else []))
    del whole

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        arriving = tape.like(gradient) if mask else gradient
        tape.work(gradient, arriving, *([mask] if mask else []))
        if cut.sequence:
            arriving = tape.new(tokens * width, gradient.element_bytes)
        back = arriving if tape.alone else tape.like(arriving)
        tape.work(arriving, back, ids, *([others] if others else []))
        del arriving
        for_table = weight_gradient(tape, table.parameter, table.element_bytes) if table else None
        for_words = weight_gradient(tape, words.parameter, words.element_bytes)
        tape.work(back, for_words, kernels=2)
        return for_words, for_table

    return tape.attach(output, [words, table], backward, saves="outputs")


def logits(tape: Tape, stream: Tensor, model: ModelSpec, weights: Named, cut: Cut) -> Tensor:
    """The final norm and this rank's columns of the logits.

    What others have of a cut sequence is gathered into a buffer that is never given back (``mpu`` of
    ``GlobalMemoryBuffer``).
    """
    tape.scope = "head"
    width, element_bytes = model.hidden_size, stream.element_bytes
    finished = stream
    if model.final_norm:
        finished = normalise(tape, stream, _norm(weights, "decoder.final_layernorm."), width)
    del stream
    tape.scope = "logits"
    matrix = weights[WORD_EMBEDDINGS if model.tied_embeddings else OUTPUT_LAYER]
    rows, tokens = matrix.parameter.shape[0], tape.sequence_length
    output = tape.new(tokens * rows, element_bytes)
    products = (Product(Matmul(tokens, rows, width), "m"),)
    tape.work(finished, output, matmuls=products, fixed_moved_bytes=matrix.size_bytes)

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        for_whole = tape.new(tokens * width, element_bytes)
        inputs = (Product(Matmul(tokens, width, rows), "m"),)
        tape.work(gradient, for_whole, matmuls=inputs, fixed_moved_bytes=matrix.size_bytes)
        # Sums of it go out, the whole staying, while the matrix's gradient is computed.
        for_stream = tape.like(finished) if cut.sequence else for_whole
        for_matrix = weights_gradient(tape, matrix, cut)
        tape.work(gradient, finished, for_matrix, matmuls=(Product(Matmul(rows, width, tokens), "k"),))
        return for_stream, for_matrix

    tape.attach(output, [finished, matrix], backward)
    tape.watched = output.node
    return output


def cross_entropy(tape: Tape, scores: Tensor) -> Tensor:
    """The loss over a vocabulary that is cut (tensor_parallel/cross_entropy.py): one fp32 copy of the logits, in which
    exponentials, probabilities and gradients are computed in place."""
    tokens = tape.sequence_length
    probabilities = tape.like(scores, 4)
    tape.work(scores, probabilities, probabilities, probabilities, kernels=6)
    targets = tape.new(tokens, INDEX_BYTES), tape.new(tokens, 1)
    loss = tape.new(tokens, 4)
    held = [Tensor(probabilities.numel, 4, True, probabilities.storage), *targets]

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        found = held[0]
        held.clear()
        tape.work(found, found, gradient, kernels=2)
        return (found,)

    return tape.attach(loss, [scores], backward)


def _norm(weights: Named, prefix: str) -> Norm:
    return weights[f"{prefix}weight"], weights.get(f"{prefix}bias")
