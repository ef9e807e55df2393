"""Jobs: what they refuse, and how wide their numbers are."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from advisor.errors import SpecError
from advisor.specs.job import Job, Optimizer


@pytest.mark.parametrize("name", ["sequence_length", "global_batch"])
@pytest.mark.parametrize("value", [0, -8])
def test_nothing_to_train_on_is_refused(name: str, value: int) -> None:
    with pytest.raises(SpecError, match=f"{name} must be at least 1, got {value}"):
        Job(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("precision", "fp8", "precision must be one of bf16, fp16, fp32, got 'fp8'"),
        ("parameter_format", "fp16", "parameter format must be one of fp32, bf16, got 'fp16'"),
        ("optimizer", "adam", f"optimizer must be one of {', '.join(get_args(Optimizer))}, got 'adam'"),
        ("attention", "paged", "attention must be one of sdpa, flash, eager, got 'paged'"),
        ("loss", "none", "loss must be one of full, chunked, fused, tiled, got 'none'"),
    ],
)
def test_an_unknown_choice_is_refused_with_the_known_ones(name: str, value: str, said: str) -> None:
    with pytest.raises(SpecError) as refusal:
        Job(**{name: value})  # type: ignore[arg-type]

    assert str(refusal.value) == said


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_weights_in_bf16_need_bf16_to_compute_in(precision: Any) -> None:
    with pytest.raises(SpecError, match=f"need precision bf16, got {precision}; keep fp32 weights"):
        Job(precision=precision, parameter_format="bf16")


@pytest.mark.parametrize(
    ("precision", "parameter_format", "compute_bytes", "parameter_bytes"),
    [("bf16", "fp32", 2, 4), ("fp16", "fp32", 2, 4), ("fp32", "fp32", 4, 4), ("bf16", "bf16", 2, 2)],
)
def test_formats_have_their_width(
    precision: Any, parameter_format: Any, compute_bytes: int, parameter_bytes: int
) -> None:
    job = Job(precision=precision, parameter_format=parameter_format)

    assert (job.compute_bytes, job.parameter_bytes) == (compute_bytes, parameter_bytes)
