"""``advisor limits``: how far given GPUs go."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from advisor.cli.answer import NOTHING_FITS, form_of, note, notes, print_answer
from advisor.cli.options import SectionCommand, form_options, given, question_options, search_options, trace_options

if TYPE_CHECKING:
    from advisor.cli.answer import Form


@click.command(cls=SectionCommand)
@question_options
@trace_options
@search_options
@form_options
@click.pass_context
def limits(context: click.Context, /, *, as_json: bool, as_csv: bool, **question: Any) -> None:
    """Find the largest micro-batch, the longest sequence or the largest model.

    Says from which micro-batch on larger ones are no faster, too. With --model any, finds the largest of the known
    models that train on the GPUs. Exits with 3 where nothing fits.

    \b
    Examples:
      advisor limits --model Llama-3.1-8B --gpus 8 --gpu H100
      advisor limits --model Qwen2.5-7B --gpus 1 --gpu RTX-4090 --method qlora
      advisor limits --model any --gpus 4 --gpu RTX-4090
    """
    form = form_of(as_json, as_csv)
    words = given(context, question)
    fits = _of_any_model(words, form) if words["model"].casefold() == "any" else _of_one_model(words, form)
    if not fits:
        context.exit(NOTHING_FITS)


def _of_one_model(words: dict[str, Any], form: Form) -> bool:
    from advisor.report.limits import limits_object, limits_report, limits_rows
    from advisor.search.limits import limits as search

    answer = search(**words)
    notes(answer.warnings)
    print_answer(
        form,
        whole=lambda: limits_object(answer),
        rows=lambda: limits_rows(answer),
        page=lambda width: limits_report(answer, width=width),
    )
    return bool(answer.reaches)


def _of_any_model(words: dict[str, Any], form: Form) -> bool:
    from advisor.report.limits import models_object, models_report, models_rows
    from advisor.search.limits import largest_models

    del words["model"]
    answer = largest_models(**words)
    print_answer(
        form,
        whole=lambda: models_object(answer),
        rows=lambda: models_rows(answer),
        page=lambda width: models_report(answer, width=width),
    )
    if form == "table":
        note(f"Looked at {len(answer.fitting) + len(answer.too_large)} models in {answer.seconds:.2f} s.")
    return bool(answer.fitting)
