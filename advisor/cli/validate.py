"""``advisor validate``: plans run for a few steps on this machine, beside their predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from advisor.cli.answer import form_of, note, notes, print_answer
from advisor.cli.estimate import plan_options
from advisor.cli.options import SectionCommand, elements, form_options, given, option, question_options

if TYPE_CHECKING:
    from rich.console import RenderableType

    from advisor.validation.campaign import Moment, Validation

NOT_ALL_RAN = 1
INTERRUPTED = 130


@click.command(cls=SectionCommand)
@question_options
@plan_options
@option("The runs", "--steps", type=int, default=8, show_default=True, help="Optimizer steps, two of them warm-up.")
@option("The runs", "--top", type=int, default=3, show_default=True, help="Without --strategy: how many of the best.")
@option(
    "The runs",
    "--launcher",
    type=click.Choice(["deepspeed", "torchrun", "accelerate"]),
    help="What starts the ranks.  [default: deepspeed for ZeRO, accelerate for FSDP, torchrun for DDP]",
)
@option(
    "The runs",
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    help="What they run on; on cpu a small twin of the model.  [default: cuda where there are GPUs]",
)
@option(
    "The runs",
    "--twin",
    "twin_parameters",
    type=elements,
    metavar="PARAMETERS",
    default="8e6",
    show_default=True,
    help="Most parameters of the twin.",
)
@option(
    "The runs",
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=1),
    metavar="SECONDS",
    default=600,
    show_default=True,
    help="When a run is given up.",
)
@option(
    "The runs",
    "--emulate-ranks",
    type=click.IntRange(min=1),
    metavar="GPUS",
    help="In place of --gpus: be one rank of so many on one device, the others not there. Memory alone.",
)
@option("The runs", "--resume", is_flag=True, help="Do not run again what these versions ran before.")
@form_options
@click.pass_context
def validate(context: click.Context, /, *, as_json: bool, as_csv: bool, **question: Any) -> None:
    """Run plans for a few steps on this machine, and compare with the prediction.

    The launch files that you would get are started by the real launcher, with random weights and tokens. Where there
    is no GPU, ranks on the CPU run a small twin of the model. Every run is recorded, however it ends. Needs the extra
    `run`. Exits with 1 where a run does not end well, with 3 where no plan fits.

    \b
    Examples:
      advisor validate --model Qwen2.5-1.5B --gpus 2 --strategy zero2
      advisor validate --model Qwen2.5-1.5B --gpus 2 --top 3 --json
    """
    form = form_of(as_json, as_csv)
    with _progress() as watch:
        found = _validated(given(context, question), watch)
    notes(found.planned.warnings)
    print_answer(form, whole=lambda: _whole(found), rows=lambda: _rows(found), page=lambda width: _page(found, width))
    if found.interrupted:
        note(
            f"Interrupted at plan {len(found.checks)} of {len(found.planned.runs)}; "
            "the same command with --resume goes on from there."
        )
        context.exit(INTERRUPTED)
    if not found.all_ran:
        context.exit(NOT_ALL_RAN)


def _validated(words: dict[str, Any], watch: Callable[[Moment], None]) -> Validation:
    from advisor.validation.campaign import validate as run

    return run(**words, watch=watch)


@contextmanager
def _progress() -> Iterator[Callable[[Moment], None]]:
    """Show on stderr which plan runs, its step, the time, and when it should end; off a terminal, a line a plan."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _line_a_plan()
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[said]}"))
    with Progress(*columns, console=console, transient=True) as progress:
        tasks: dict[int, TaskID] = {}

        def watch(moment: Moment) -> None:
            if moment.number not in tasks:
                for earlier in tasks.values():
                    progress.update(earlier, said="done")
                title = f"Plan {moment.number} of {moment.plans}: {moment.title}"
                tasks[moment.number] = progress.add_task(title, total=moment.steps, said="")
            said = f"step {moment.step} of {moment.steps}, {moment.elapsed_s:.0f} s"
            if not moment.step:
                said = f"starting, {moment.elapsed_s:.0f} s"
            if moment.remaining_s is not None:
                said += f", about {moment.remaining_s:.0f} s left"
            if moment.note:
                said += f"; {moment.note}"
            progress.update(tasks[moment.number], completed=moment.step, said=said)

        yield watch


def _line_a_plan() -> Callable[[Moment], None]:
    said: set[object] = set()

    def watch(moment: Moment) -> None:
        for what in (f"Plan {moment.number} of {moment.plans}: {moment.title}", moment.note):
            if what and what not in said:
                said.add(what)
                note(what)

    return watch


def _whole(found: Validation) -> Mapping[str, object]:
    from advisor.report.validate import validation_object

    return validation_object(found)


def _rows(found: Validation) -> Sequence[Mapping[str, object]]:
    from advisor.report.validate import validation_rows

    return validation_rows(found)


def _page(found: Validation, width: int) -> Iterable[RenderableType]:
    from advisor.report.validate import validation_report

    return validation_report(found, width=width)
