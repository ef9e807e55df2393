"""``advisor calibrate``: this machine measured, for the constants that predictions take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from advisor.cli.answer import form_of, note, print_answer
from advisor.cli.options import SectionCommand, complete_model, form_options, option

if TYPE_CHECKING:
    from rich.console import RenderableType

    from advisor.validation.calibrate import Calibrated


@click.command(cls=SectionCommand)
@option(
    "What to measure",
    "--model",
    metavar="NAME",
    default="Qwen2.5-1.5B",
    show_default=True,
    shell_complete=complete_model,
    help="Products and attention have the sizes of this model's.",
)
@option("What to measure", "--nvme", metavar="FOLDER", help="A folder on the NVMe that offloading would use.")
@option(
    "What to measure",
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    help="Where single operations are timed.  [default: cuda where there is a GPU]",
)
@option(
    "What to measure",
    "--within",
    "budget_s",
    type=click.FloatRange(min=1),
    metavar="SECONDS",
    default=60,
    show_default=True,
    help="Nothing is begun after so long.",
)
@option("The file", "--name", metavar="NAME", help="What to call the calibration.  [default: after the GPU]")
@form_options
def calibrate(
    *,
    model: str,
    nvme: str | None,
    device: str | None,
    budget_s: float,
    name: str | None,
    as_json: bool,
    as_csv: bool,
) -> None:
    """Measure this machine for the constants that predictions use.

    Times matrix products, attention, copies, collectives and Adam, and reads what `advisor validate` recorded on the
    same GPU. Predictions for a GPU found here use the result; for any other, name it with --calibration. Needs the
    extra `run`.

    \b
    Examples:
      advisor calibrate
      advisor calibrate --model Llama-3.1-8B --nvme /mnt/nvme --name node7
    """
    form = form_of(as_json, as_csv)
    with _progress() as tell:
        from advisor.validation.calibrate import calibrate as measure

        found = measure(model=model, name=name, nvme=nvme, device=device, budget_s=budget_s, tell=tell)
    for each in found.skipped:
        note(f"Not measured: {each}")
    print_answer(form, whole=lambda: _whole(found), rows=lambda: _rows(found), page=lambda width: _page(found, width))


@contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
    """Show on stderr what is measured and how much of the time is spent; off a terminal, a line each."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda what, share: note(f"Measuring: {what}")
        return
    columns = (TextColumn("Measuring: {task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=1.0)
        yield lambda what, share: progress.update(task, description=what, completed=share)


def _whole(found: Calibrated) -> Mapping[str, object]:
    from advisor.report.calibrate import calibration_object

    return calibration_object(found)


def _rows(found: Calibrated) -> Sequence[Mapping[str, object]]:
    from advisor.report.calibrate import calibration_rows

    return calibration_rows(found)


def _page(found: Calibrated, width: int) -> Iterable[RenderableType]:
    from advisor.report.calibrate import calibration_report

    return calibration_report(found, width=width)
