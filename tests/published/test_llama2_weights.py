"""The sizes of Llama 2's weights as they are published everywhere, against the catalog's exact parameter counts."""

from __future__ import annotations

import pytest

from advisor.catalog.models import find_model

GB = 10**9
HALF_A_DIGIT = 0.5 / 7
"""The published sizes take 7 and 70 billion for the parameters: the model's name, which rounds to one digit."""


# huggingface/blog optimize-llm.md: loading X billion parameters takes roughly 4·X GB in fp32 and 2·X GB in bf16 or
# fp16, Llama-2-70b 140 GB; in 8 and 4 bits, as training does not hold them, 1·X and X/2.
@pytest.mark.parametrize(
    ("name", "bits", "published_gb"),
    [
        ("Llama-2-7b-hf", 32, 28),
        ("Llama-2-7b-hf", 16, 14),
        ("Llama-2-7b-hf", 8, 7),
        ("Llama-2-7b-hf", 4, 3.5),
        ("Llama-2-70b-hf", 16, 140),
    ],
)
def test_weights_take_the_published_size(name: str, bits: int, published_gb: float) -> None:
    weights_bytes = find_model(name).model.parameter_count * bits / 8

    assert weights_bytes / GB == pytest.approx(published_gb, rel=HALF_A_DIGIT)
