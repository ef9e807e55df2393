"""What the layers of a stack share besides the residual stream: attention masks and T5's position biases.

A model makes its masks before its first layer, one for each kind of layer (transformers 5.23, masking_utils.py), and
drops them after its last. Under checkpointing every layer keeps its arguments, and the masks live on to backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from advisor.specs.model import Layer
from advisor.step.attention_kernels import is_masked
from advisor.step.key_value_cache import seen_tokens
from advisor.step.program import Amount
from advisor.step.recording import Mode


class Shared(NamedTuple):
    """Bytes of one stack: in its forward pass, those of them that backward needs, and their gradient in backward."""

    made_bytes: Amount
    kept_bytes: Amount
    gradient_bytes: Amount


def shared_by(layers: Sequence[Layer], mode: Mode, batch: Amount, checkpointed: bool) -> Shared:
    """What *layers*, which form one stack, share for *batch* sequences. Of traced layers it is in their recordings."""
    if not layers:
        return Shared(0, 0, 0)
    positions = _positions(layers, mode)
    biases = positions * mode.stream_bytes
    # Cross-attention's are zeros in the format of its queries, which every layer's kernel keeps.
    zeros = positions * mode.compute_bytes if any(layer.cross_attention for layer in layers) else 0
    masks = _mask_bytes(layers, mode, batch)
    made = masks + biases + zeros
    kept = made if checkpointed else zeros
    if positions and mode.padded and not checkpointed:
        # Choosing between a learned bias and minus infinity saves the mask; the zeros are not used beyond that.
        kept = masks
    return Shared(made, kept, biases + zeros * checkpointed)


def _mask_bytes(layers: Sequence[Layer], mode: Mode, batch: Amount) -> Amount:
    """Masks of batch x length x length: floating for a scores matrix, boolean for torch's fused kernels.

    Without padding the boolean one is one for the whole micro-batch. Cross-attention needs one where there is padding.
    """
    tape = mode.tape()
    kinds = {(layer.attention.window, layer.attention.causal): layer.attention for layer in layers}
    crossings = {layer.cross_attention for layer in layers if layer.cross_attention and mode.padded}
    total: Amount = 0
    for spec in (*kinds.values(), *crossings):
        area = mode.sequence_length * seen_tokens(tape, spec)
        if mode.attention == "eager" or spec.eager_only:
            total = total + area * mode.stream_bytes * batch * (spec.causal or mode.padded)
        elif mode.attention == "sdpa" and is_masked(tape, spec):
            static = mode.caching is not None and mode.caching.capacity is not None
            total = total + area * (batch if mode.padded or static else 1)
    return total


def _positions(layers: Sequence[Layer], mode: Mode) -> int:
    """Elements of the learned positions, heads x length x length, that the first layer looks up and the others add."""
    spec = layers[0].attention
    if not spec.additive_bias or spec.eager_only:
        return 0
    return spec.heads * mode.sequence_length**2
