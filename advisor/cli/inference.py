"""``advisor estimate --inference``: price a call of ``generate``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

import click

from advisor.cli.answer import NOTHING_FITS, Form, notes, print_answer
from advisor.cli.options import option, options
from advisor.specs.inference import CacheFormat, WeightFormat

if TYPE_CHECKING:
    from rich.console import RenderableType

    from advisor.cost.inference import InferenceEstimate

SECTION = "Instead of training"
WORDS = ("batch", "context", "prompt", "weights", "double_quant", "kv_cache", "static_cache")

inference_options = options(
    option(SECTION, "--inference", is_flag=True, help="Price a call of generate; --tp GPUs share a copy of the model."),
    option(SECTION, "--batch", type=int, help="Sequences that a copy of the model works on at once.  [default: 1]"),
    option(SECTION, "--context", type=int, help="Tokens of each in the cache at the end.  [default: 2048]"),
    option(SECTION, "--prompt", type=int, help="Those of them that come at once.  [default: all but the last]"),
    option(
        SECTION,
        "--weights",
        type=click.Choice(get_args(WeightFormat)),
        help="What weights are held in: int8, nf4, fp4 by bitsandbytes, fp8 by blocks.  [default: the precision]",
    ),
    option(SECTION, "--double-quant", is_flag=True, help="With nf4 and fp4: their scales in 8 bits, too."),
    option(
        SECTION,
        "--kv-cache",
        type=click.Choice(get_args(CacheFormat)),
        help="What keys and values are held in.  [default: the precision]",
    ),
    option(SECTION, "--static-cache", is_flag=True, help="Take memory for the whole context at once."),
)
"""Of a model that generates; they mean nothing without the first."""


def answer_inference(context: click.Context, form: Form, words: Mapping[str, Any]) -> None:
    """Print the answer to *words*, which were typed."""
    from advisor.cost.inference import InferenceWords, estimate_inference

    asked = {name: value for name, value in words.items() if name != "inference"}
    known = {"model", *InferenceWords.__annotations__}
    if of_training := [name for name in asked if name not in known]:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in of_training)
        raise click.UsageError(f"{flags}: of training; leave it out with --inference")
    found = estimate_inference(**asked)
    notes(found.warnings)
    print_answer(form, whole=lambda: _whole(found), rows=lambda: _rows(found), page=lambda width: _page(found, width))
    if found.verdict == "no":
        context.exit(NOTHING_FITS)


def refuse_without_flag(words: Mapping[str, Any]) -> None:
    """Raise where *words*, which were typed, are of a model that generates, and nobody said that it does."""
    if found := [name for name in WORDS if name in words]:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in found)
        raise click.UsageError(f"{flags}: of a model that generates; give --inference too")


def _whole(found: InferenceEstimate) -> Mapping[str, object]:
    from advisor.report.machine import inference_object

    return inference_object(found)


def _rows(found: InferenceEstimate) -> Sequence[Mapping[str, object]]:
    from advisor.report.machine import inference_row

    return [inference_row(found)]


def _page(found: InferenceEstimate, width: int) -> Iterable[RenderableType]:
    from advisor.report.inference import inference_report

    return inference_report(found, width=width)
