"""``advisor launch``: show, write or start the files of one plan."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from advisor.cli.answer import note, notes, print_answer, traced_first
from advisor.cli.estimate import parallel_options, plan_options
from advisor.cli.options import SectionCommand, given, option, question_options, trace_options
from advisor.launch.targets import DEFAULT_IMAGE, TARGETS, Target

if TYPE_CHECKING:
    from rich.console import RenderableType

    from advisor.cost.results import Estimate
    from advisor.launch.files import Launch

_LAUNCH = "The launch"


@click.command(cls=SectionCommand)
@question_options
@trace_options
@plan_options
@parallel_options
@option(
    _LAUNCH,
    "--target",
    type=click.Choice(list(TARGETS)),
    metavar="NAME",
    help=f"What starts it: {', '.join(TARGETS)}.  [default: accelerate, or what starts the trainer]",
)
@option(
    _LAUNCH,
    "--image",
    metavar="NAME",
    help=f"Container of each machine, for Kubernetes and SkyPilot.  [default: Kubernetes {DEFAULT_IMAGE}]",
)
@option(
    _LAUNCH,
    "--date",
    type=click.DateTime(["%Y-%m-%d"]),
    metavar="YYYY-MM-DD",
    help="What the files' headers give as their date.  [default: SOURCE_DATE_EPOCH's, else today's]",
)
@option(
    _LAUNCH,
    "--keep-auto",
    is_flag=True,
    help="Leave auto in DeepSpeed's JSON where transformers' Trainer fills it in.",
)
@option(_LAUNCH, "--out", metavar="FOLDER", type=click.Path(path_type=Path), help="Write the files there.")
@option(_LAUNCH, "--force", is_flag=True, help="Let --out overwrite files that hold something else.")
@option(_LAUNCH, "--run", is_flag=True, help="Start it in that folder, and exit with its exit code.")
@option(_LAUNCH, "--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.argument("arguments", nargs=-1, metavar="[-- ARGUMENT]...")
@click.pass_context
def launch(
    context: click.Context,
    /,
    *,
    target: Target | None,
    image: str | None,
    date: datetime.datetime | None,
    keep_auto: bool,
    out: Path | None,
    force: bool,
    run: bool,
    as_json: bool,
    arguments: tuple[str, ...],
    **question: Any,
) -> None:
    """Show, write or start the files that train by one plan.

    Without --out nothing is written. With --run, what the run measured is printed beside the prediction at its end.
    Words after -- are arguments of the training program, with paths as seen from the folder of the files. Where they
    begin with a script, it is started in place of train.py, by the plan's launcher and configuration.

    \b
    Examples:
      advisor launch --model Qwen2.5-1.5B --gpus 4 --strategy zero2
      advisor launch --model gpt2 --gpus 2 --strategy fsdp --target torchrun
      advisor launch --model gpt2 --strategy ddp --out run --run -- --steps=20
      advisor launch --model gpt2 --gpus 2 --strategy zero2 --trainer trl
      advisor launch --model gpt2 --gpus 2 --strategy fsdp -- my_script.py --flag
    """
    from advisor.cost.estimate import estimate as price
    from advisor.launch.files import launch_of, write

    _refuse_what_cannot_be_meant(out, run, as_json, question["trainer"], arguments)
    with traced_first(question["trace"]):
        answer = price(**given(context, question))
    day = date.date() if date else _today()
    started = launch_of(answer, target, arguments, image=image, date=day, keep_auto=keep_auto)
    if out:
        write(started, out, force)
    notes((*answer.warnings, *started.notes))
    print_answer(
        "json" if as_json else "table",
        whole=lambda: _whole(answer, started),
        rows=list,
        page=lambda width: _page(answer, started, width, out),
    )
    if answer.verdict == "no":
        note(f"Note: it is predicted not to fit: {answer.why}")
    if out and run:
        context.exit(_run(answer, started, out))


def _today() -> datetime.date:
    """The day to write into files, in UTC: https://reproducible-builds.org/specs/source-date-epoch."""
    said = os.environ.get("SOURCE_DATE_EPOCH")
    if said is None:
        return datetime.datetime.now(datetime.timezone.utc).date()
    try:
        return datetime.datetime.fromtimestamp(int(said), datetime.timezone.utc).date()
    except (ValueError, OverflowError, OSError):
        raise click.UsageError(f"SOURCE_DATE_EPOCH is {said!r}, which is no time in seconds; unset it") from None


def _refuse_what_cannot_be_meant(
    out: Path | None, run: bool, as_json: bool, trainer: str, arguments: tuple[str, ...]
) -> None:
    from advisor.launch.trainers.own import names_a_script

    if run and not out:
        raise click.UsageError("--run starts what lies in a folder; give --out FOLDER too")
    if run and as_json:
        raise click.UsageError("--run prints what the training prints; leave --json out")
    if arguments and not (arguments[0].startswith("-") or arguments[0].endswith(".py") or "=" in arguments[0]):
        raise click.UsageError(
            f"{arguments[0]!r} is no argument and no script; arguments of train.py follow --, such as -- --steps=20"
        )
    by_train_py = trainer == "advisor" and not names_a_script(arguments)
    if run and by_train_py and any(word.partition("=")[0] == "--log" for word in arguments):
        raise click.UsageError("--run keeps the log itself, in log.jsonl; leave --log out")


def _run(answer: Estimate, started: Launch, folder: Path) -> int:
    from advisor.launch.start import start
    from advisor.report.launch import comparison_report
    from advisor.report.terminal import results, show

    code, measured = start(started, folder)
    if measured:
        console = results()
        show(comparison_report(answer, measured), console)
    elif started.keeps_log and not started.submits:
        note("Nothing to compare with the prediction: no step was logged.")
    elif not started.submits:
        note("Nothing to compare with the prediction: only train.py logs what its steps take.")
    return code


def _whole(answer: Estimate, started: Launch) -> Mapping[str, object]:
    from advisor.report.machine import launch_object

    return launch_object(answer, started)


def _page(answer: Estimate, started: Launch, width: int, out: Path | None) -> Iterable[RenderableType]:
    from advisor.report.launch import launch_report

    return launch_report(answer, started, width=width, out=out)
