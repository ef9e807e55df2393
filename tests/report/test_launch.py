"""A launch on a page."""

from __future__ import annotations

from pathlib import Path

import pytest

from advisor.launch.files import Launch, launch_of
from advisor.launch.start import Measured
from advisor.launch.targets import Target
from advisor.launch.trainers.advisor import FILES
from advisor.report.launch import comparison_report, launch_report
from advisor.report.terminal import results, show
from report.samples import made_estimate


def printed(
    capsys: pytest.CaptureFixture[str], launch: Launch, out: Path | None = None, columns: int = 80
) -> list[str]:
    console = results()
    console.width = columns
    show(launch_report(made_estimate(), launch, width=columns, out=out), console)
    return capsys.readouterr().out.splitlines()


def launch(target: Target = "accelerate", *words: str) -> Launch:
    return launch_of(made_estimate(), target, words)


def test_what_is_only_shown_is_shown_whole(capsys: pytest.CaptureFixture[str]) -> None:
    asked = launch("accelerate", "--dataset=" + "long" * 50)

    lines = printed(capsys, asked)

    for file in asked.files:
        assert file.name in lines
        if file.name not in FILES:
            for line in file.text.splitlines():
                assert f"  {line}".rstrip() in lines
        else:
            assert f"  {len(file.text.splitlines())} lines of the training program, the same for every plan." in lines
    names = ", ".join(file.name for file in asked.files)
    assert f"Give --out FOLDER to write {names}. In that folder:" in " ".join(map(str.strip, lines))


def test_what_is_written_is_named_and_the_command_starts_it_from_here(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, launch("slurm"), Path("my runs"), columns=200)

    names = ", ".join(file.name for file in launch("slurm").files)
    assert lines[-3:] == [
        f"  {names} are in my runs. Type:",
        "",
        "  cd 'my runs' && sbatch job.sbatch",
    ]
    assert not any(line.startswith("  #SBATCH") for line in lines)


def compared(capsys: pytest.CaptureFixture[str], measured: Measured) -> str:
    show(comparison_report(made_estimate(), measured), results())
    return capsys.readouterr().out


def test_a_measured_run_stands_beside_its_prediction(capsys: pytest.CaptureFixture[str]) -> None:
    predicted = made_estimate()
    half = Measured(
        steps=19,
        peak_allocated_bytes=predicted.memory.peak_allocated_bytes // 2,
        peak_reserved_bytes=predicted.memory.peak_reserved_bytes,
        tokens_per_s=predicted.time.tokens_per_s * 2,
    )

    lines = compared(capsys, half).splitlines()

    assert lines[1] == "Predicted for 4 × A100-80GB beside measured over 19 steps"
    assert [line.split()[-2:] for line in lines[-3:]] == [["+100.0", "%"], ["+0.0", "%"], ["-50.0", "%"]]


def test_a_run_without_a_gpu_says_nothing_of_memory(capsys: pytest.CaptureFixture[str]) -> None:
    text = compared(capsys, Measured(steps=1, peak_allocated_bytes=0, peak_reserved_bytes=0, tokens_per_s=5.0))

    assert "beside measured without a GPU over 1 step\n" in text
    assert "tokens per s" in text
    assert "peak" not in text
