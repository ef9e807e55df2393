"""``advisor recommend``: search, print the answer, write the launch files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from advisor.cli.answer import NOTHING_FITS, form_of, note, notes, print_answer, traced_first
from advisor.cli.options import (
    SectionCommand,
    form_options,
    given,
    layout_options,
    option,
    question_options,
    search_options,
    trace_options,
    training_options,
)
from advisor.specs.training import Objective

if TYPE_CHECKING:
    from rich.console import RenderableType

    from advisor.launch.files import Launch
    from advisor.search.gpu_types import GpuRanking
    from advisor.search.results import Recommendation


@click.command(cls=SectionCommand)
@question_options
@trace_options
@search_options
@layout_options
@training_options
@option(
    "The answer",
    "--objective",
    type=click.Choice(get_args(Objective)),
    default="time",
    show_default=True,
    help="What the best plan has least of; on given GPUs cost and energy go with time.",
)
@option("The answer", "--pareto", is_flag=True, help="Show all plans that none beats in time and memory.")
@option(
    "The answer",
    "--out",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="Write the launch files of the best plan there.",
)
@option("The answer", "--force", is_flag=True, help="Let --out overwrite files.")
@form_options
@click.pass_context
def recommend(
    context: click.Context, /, *, out: Path | None, force: bool, as_json: bool, as_csv: bool, **question: Any
) -> None:
    """Find the fastest plan that fits, and say why not the others.

    With --gpu any, rank the GPUs that have a list price. Exits with 3 where nothing fits.

    \b
    Examples:
      advisor recommend --model Qwen2.5-1.5B --gpus 4
      advisor recommend --model Llama-3.1-8B --gpus 8 --gpu H100 --out run
      advisor recommend --model Llama-3.1-8B --gpus 8 --tokens 1e9 --max-cost 500
      advisor recommend --model gpt2 --gpu any --tokens 1e9 --objective cost
    """
    from advisor.launch.files import launch_of, write

    form = form_of(as_json, as_csv)
    with traced_first(question["trace"]):
        answer = _answer(given(context, question))
    launch = launch_of(answer.best) if answer.best else None
    written = write(launch, out, force) if launch and out else ()
    notes((*answer.warnings, *(launch.notes if launch else ())))
    print_answer(
        form,
        whole=lambda: _whole(answer, launch),
        rows=lambda: _rows(answer),
        page=lambda width: _page(answer, launch, width, written),
    )
    if form == "table":
        if text := _elsewhere(answer):
            note(text)
        note(f"Compared {answer.considered:,} plans in {answer.seconds:.2f} s.")
    if not answer.best:
        if form != "table":
            note(_headline(answer))
        if out:
            note(f"Nothing is written to {out}, since nothing fits.")
        context.exit(NOTHING_FITS)


def _answer(words: dict[str, Any]) -> Recommendation | GpuRanking:
    """The best plan on the GPUs that *words* say, or on those of every kind."""
    if str(words.get("gpu")).casefold() == "any":
        from advisor.search.gpu_types import rank_gpus

        return rank_gpus(**{name: value for name, value in words.items() if name != "gpu"})
    from advisor.search.recommend import recommend as search

    return search(**words)


MANY_GPUS = 64
"""From which on the layouts of Megatron are worth a look, whatever fits."""


def _elsewhere(answer: Recommendation | GpuRanking) -> str:
    """Where else to look, if what data-parallel plans do is not the end of it."""
    from advisor.search.results import Recommendation

    if not isinstance(answer, Recommendation) or answer.job.trainer != "advisor":
        return ""
    if (answer.best and answer.cluster.gpus < MANY_GPUS) or answer.cluster.gpus == 1:
        return ""
    from advisor.step.megatron_shard import refusal_of_job  # of use here alone

    if refusal_of_job(answer.model, answer.job):
        return ""
    return (
        "Only data-parallel plans were searched. The same command with --trainer megatron searches tensor, pipeline "
        "and context parallelism."
    )


def _headline(answer: Recommendation | GpuRanking) -> str:
    from advisor.search.results import Recommendation

    if isinstance(answer, Recommendation):
        return answer.headline
    from advisor.report.gpu_types import headline

    return headline(answer)


def _whole(answer: Recommendation | GpuRanking, launch: Launch | None) -> Mapping[str, object]:
    from advisor.report.machine import ranking_object, recommendation_object
    from advisor.search.results import Recommendation

    if isinstance(answer, Recommendation):
        return recommendation_object(answer, launch)
    return ranking_object(answer, launch)


def _rows(answer: Recommendation | GpuRanking) -> Sequence[Mapping[str, object]]:
    from advisor.report.machine import ranking_rows
    from advisor.search.results import Recommendation, row

    return [row(plan) for plan in answer.plans] if isinstance(answer, Recommendation) else ranking_rows(answer)


def _page(
    answer: Recommendation | GpuRanking, launch: Launch | None, width: int, written: Sequence[Path]
) -> Iterable[RenderableType]:
    from advisor.search.results import Recommendation

    if isinstance(answer, Recommendation):
        from advisor.report.recommendation import recommendation_report

        return recommendation_report(answer, launch, width=width, written=written)
    from advisor.report.gpu_types import ranking_report

    return ranking_report(answer, launch, width=width, written=written)
