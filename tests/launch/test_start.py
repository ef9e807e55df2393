"""Starting a launch: where it runs, what it is told, what comes back."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from advisor.errors import RunError
from advisor.launch.files import Launch
from advisor.launch.start import LOG, Measured, start


def by_python(program: str, **environment: str) -> Launch:
    return Launch((sys.executable, "-c", program), environment, ())


def step(number: int, **changed: float) -> dict[str, Any]:
    usual = {"loss": 5.0, "seconds": 1.0, "tokens_per_s": 100.0, "peak_allocated_bytes": 7, "peak_reserved_bytes": 9}
    return {"step": number} | usual | changed


def logging(*records: dict[str, Any]) -> Launch:
    text = "".join(json.dumps(record) + "\n" for record in records)
    return by_python(f"open({LOG!r}, 'a').write({text!r})")


def test_it_runs_in_the_folder_and_is_told_to_keep_a_log(tmp_path: Path) -> None:
    record = "import sys, os, json; json.dump([os.getcwd(), *sys.argv[1:]], open('told', 'w'))"

    assert start(by_python(record), tmp_path) == (0, None)
    assert json.loads((tmp_path / "told").read_text()) == [str(tmp_path), "--log=log.jsonl"]

    start(replace(by_python(record), submits=True), tmp_path)
    assert json.loads((tmp_path / "told").read_text()) == [str(tmp_path)]


def test_its_output_streams_to_where_this_process_writes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    start(by_python("import sys; print('out'); print('err', file=sys.stderr)"), tmp_path)

    assert capfd.readouterr() == ("out\n", "err\n")


@pytest.mark.parametrize(
    ("ending", "code"), [("sys.exit(0)", 0), ("sys.exit(7)", 7), ("os.kill(os.getpid(), 15)", 128 + 15)]
)
def test_its_exit_code_is_passed_on(ending: str, code: int, tmp_path: Path) -> None:
    assert start(by_python(f"import os, sys; {ending}"), tmp_path)[0] == code


def test_the_user_s_environment_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINE", "mine")
    record = "import os, json; json.dump([os.environ['MINE'], os.environ['OTHER']], open('told', 'w'))"

    start(by_python(record, MINE="its", OTHER="its"), tmp_path)

    assert json.loads((tmp_path / "told").read_text()) == ["mine", "its"]


def test_a_program_beside_this_python_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "venv"
    own.mkdir()
    (own / "only-here").write_text("#!/bin/sh\nexit 3\n")
    (own / "only-here").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(own / "python"))

    assert start(Launch(("sh", "-c", "only-here"), {}, ()), tmp_path)[0] == 3


def test_a_program_that_is_not_there_is_an_explained_failure(tmp_path: Path) -> None:
    absent = Launch(("no-such-launcher",), {}, ())

    with pytest.raises(RunError, match="no-such-launcher is not installed on this machine; pip install torch"):
        start(absent, tmp_path)
    with pytest.raises(RunError, match="give the command where it is"):
        start(replace(absent, submits=True), tmp_path)


def test_what_is_measured_leaves_the_first_step_out(tmp_path: Path) -> None:
    first = step(1, tokens_per_s=1.0, peak_allocated_bytes=99)
    later = [step(2, tokens_per_s=90.0), step(3, tokens_per_s=120.0, peak_reserved_bytes=12), step(4)]

    _, measured = start(logging({"processes": 2}, first, *later), tmp_path)

    assert measured == Measured(steps=3, peak_allocated_bytes=7, peak_reserved_bytes=12, tokens_per_s=100.0)


def test_a_single_step_is_measured_all_the_same(tmp_path: Path) -> None:
    assert start(logging(step(1)), tmp_path)[1] == Measured(
        steps=1, peak_allocated_bytes=7, peak_reserved_bytes=9, tokens_per_s=100.0
    )


def test_an_earlier_run_s_log_is_not_this_run_s(tmp_path: Path) -> None:
    start(logging(*[step(number, tokens_per_s=5.0) for number in range(1, 4)]), tmp_path)

    _, second = start(logging(step(1), step(2, tokens_per_s=50.0)), tmp_path)
    _, silent = start(by_python("pass"), tmp_path)

    assert second
    assert second.tokens_per_s == 50.0
    assert silent is None


def test_an_interruption_is_left_to_the_training(tmp_path: Path) -> None:
    """It gets the terminal's signal too; what it then does decides."""
    program = f"""
import os, sys
from pathlib import Path
from advisor.launch.start import start
from advisor.launch.files import Launch
child = "import os, signal, time; signal.signal(2, lambda *_: (time.sleep(0.3), os._exit(9))); " \\
        "os.killpg(0, 2); time.sleep(60)"
sys.exit(start(Launch((sys.executable, "-c", child), {{}}, ()), Path({str(tmp_path)!r}))[0])
"""
    done = subprocess.run([sys.executable, "-c", program], start_new_session=True, capture_output=True, text=True)

    assert (done.returncode, done.stderr) == (9, "")
