"""``advisor trace``: one plan's step by the real code without a GPU, beside the prediction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from advisor.cli.answer import form_of, note, notes, print_answer, working
from advisor.cli.estimate import cut_options, plan_options
from advisor.cli.options import SectionCommand, form_options, given, option, question_options, trust_option

if TYPE_CHECKING:
    from rich.console import RenderableType

    from advisor.validation.traced import TracedPlan


@click.command(cls=SectionCommand)
@question_options
@trust_option
@plan_options
@cut_options
@option("The plan", "--rank", type=int, default=0, show_default=True, help="Which of the plan's ranks to be.")
@form_options
@click.pass_context
def trace(context: click.Context, /, *, as_json: bool, as_csv: bool, **question: Any) -> None:
    """Run one plan's step without its data, and compare its bytes with the prediction.

    The real model, optimizer and framework run on a CPU, on tensors that have no memory (DDP, FSDP) or small enough
    ones (DeepSpeed). Needs the extra `run`.

    \b
    Examples:
      advisor trace --model Qwen2.5-0.5B --gpus 8 --strategy fsdp
      advisor trace --model my/config.json --gpus 1 --strategy ddp
    """
    form = form_of(as_json, as_csv)
    with working("Running two steps without their data"):
        found = _traced(given(context, question))
    notes(found.warnings)
    print_answer(form, whole=lambda: _whole(found), rows=lambda: _rows(found), page=lambda width: _page(found, width))
    if form == "table":
        note(f"Traced in {found.seconds:.1f} s.")


def _traced(words: dict[str, Any]) -> TracedPlan:
    from advisor.validation.traced import trace as run

    return run(**words)


def _whole(found: TracedPlan) -> Mapping[str, object]:
    from advisor.report.trace import trace_object

    return trace_object(found)


def _rows(found: TracedPlan) -> Sequence[Mapping[str, object]]:
    from advisor.report.trace import trace_rows

    return trace_rows(found)


def _page(found: TracedPlan, width: int) -> Iterable[RenderableType]:
    from advisor.report.trace import trace_report

    return trace_report(found, width=width)
