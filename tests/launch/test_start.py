"""Starting a launch: where it runs, what it is told, what comes back."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from advisor.errors import RunError
from advisor.launch.files import Launch
from advisor.launch.start import LOG, Measured, start


def lies_in(folder: Path, program: str, keeps_log: bool = True) -> Launch:
    """A launch that runs *program*, in Python, and whose script lies in *folder*."""
    (folder / "run.sh").write_text(f'exec {sys.executable} -c {shlex.quote(program)} "$@"\n')
    return Launch(("not", "this"), {}, (), keeps_log=keeps_log)


def step(number: int, **changed: float) -> dict[str, Any]:
    usual = {"loss": 5.0, "seconds": 1.0, "tokens_per_s": 100.0, "peak_allocated_bytes": 7, "peak_reserved_bytes": 9}
    return {"step": number} | usual | changed


def logged(folder: Path, *records: dict[str, Any]) -> Measured | None:
    """What is measured of a run that logs *records*."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    return start(lies_in(folder, f"open({LOG!r}, 'a').write({text!r})"), folder)[1]


RECORD = "import sys, os, json; json.dump([os.getcwd(), *sys.argv[1:]], open('told', 'w'))"


def test_it_runs_in_the_folder_and_is_told_to_keep_a_log(tmp_path: Path) -> None:
    assert start(lies_in(tmp_path, RECORD), tmp_path) == (0, None)
    assert json.loads((tmp_path / "told").read_text()) == [str(tmp_path), "--log=log.jsonl"]


def test_a_program_that_knows_no_log_is_told_of_none(tmp_path: Path) -> None:
    start(lies_in(tmp_path, RECORD, keeps_log=False), tmp_path)

    assert json.loads((tmp_path / "told").read_text()) == [str(tmp_path)]


def test_what_is_submitted_is_the_command_itself(tmp_path: Path) -> None:
    start(Launch((sys.executable, "-c", RECORD), {}, (), submits=True), tmp_path)

    assert json.loads((tmp_path / "told").read_text()) == [str(tmp_path)]


def test_its_output_streams_to_where_this_process_writes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    start(lies_in(tmp_path, "import sys; print('out'); print('err', file=sys.stderr)"), tmp_path)

    assert capfd.readouterr() == ("out\n", "err\n")


@pytest.mark.parametrize(
    ("ending", "code"), [("sys.exit(0)", 0), ("sys.exit(7)", 7), ("os.kill(os.getpid(), 15)", 128 + 15)]
)
def test_its_exit_code_is_passed_on(ending: str, code: int, tmp_path: Path) -> None:
    assert start(lies_in(tmp_path, f"import os, sys; {ending}"), tmp_path)[0] == code


def test_a_program_beside_this_python_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "venv"
    own.mkdir()
    (own / "only-here").write_text("#!/bin/sh\nexit 3\n")
    (own / "only-here").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(own / "python"))

    (tmp_path / "run.sh").write_text("only-here\n")

    assert start(Launch((), {}, ()), tmp_path)[0] == 3


def test_a_scheduler_that_is_not_there_is_an_explained_failure(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no-such-scheduler is not installed on this machine; give the command where it"):
        start(Launch(("no-such-scheduler",), {}, (), submits=True), tmp_path)


def test_what_is_measured_leaves_the_first_step_out(tmp_path: Path) -> None:
    first = step(1, tokens_per_s=1.0, peak_allocated_bytes=99)
    later = [step(2, tokens_per_s=90.0), step(3, tokens_per_s=120.0, peak_reserved_bytes=12), step(4)]

    assert logged(tmp_path, {"processes": 2}, first, *later) == Measured(
        steps=3, peak_allocated_bytes=7, peak_reserved_bytes=12, tokens_per_s=100.0
    )


def test_a_single_step_is_measured_all_the_same(tmp_path: Path) -> None:
    assert logged(tmp_path, step(1)) == Measured(
        steps=1, peak_allocated_bytes=7, peak_reserved_bytes=9, tokens_per_s=100.0
    )


def test_an_earlier_run_s_log_is_not_this_run_s(tmp_path: Path) -> None:
    logged(tmp_path, *[step(number, tokens_per_s=5.0) for number in range(1, 4)])

    second = logged(tmp_path, step(1), step(2, tokens_per_s=50.0))
    silent = logged(tmp_path)

    assert second
    assert second.tokens_per_s == 50.0
    assert silent is None


def test_half_a_line_is_no_step(tmp_path: Path) -> None:
    cut = json.dumps(step(1)) + "\n" + json.dumps(step(2))[:20]

    _, measured = start(lies_in(tmp_path, f"open({LOG!r}, 'w').write({cut!r})"), tmp_path)

    assert measured
    assert measured.steps == 1


def test_an_interruption_is_left_to_the_training(tmp_path: Path) -> None:
    """It gets the terminal's signal too; what it then does decides."""
    child = (
        "import os, signal, time; signal.signal(2, lambda *_: (time.sleep(0.3), os._exit(9))); "
        "os.killpg(0, 2); time.sleep(60)"
    )
    lies_in(tmp_path, child)
    program = f"""
import sys
from pathlib import Path
from advisor.launch.start import start
from advisor.launch.files import Launch
sys.exit(start(Launch((), {{}}, ()), Path({str(tmp_path)!r}))[0])
"""
    done = subprocess.run([sys.executable, "-c", program], start_new_session=True, capture_output=True, text=True)

    assert (done.returncode, done.stderr) == (9, "")
