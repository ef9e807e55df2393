"""However a run ends is a recorded outcome: earlier records stay, no process does, and the exit code says which."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from advisor.catalog.detect import Detected
from advisor.cli.main import cli
from advisor.errors import SpecError
from advisor.validation import campaign, processes
from advisor.validation import run as running
from advisor.validation.recorded import read_records

for package in ("torch", "transformers", "accelerate", "deepspeed", "psutil"):
    pytest.importorskip(package)

STAND_IN = Path(__file__).with_name("stand_in.py")
TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
}
SHORT_S = 1

Validate = Callable[..., Result]


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that runs are recorded in."""
    path = tmp_path / "data" / "records.jsonl"
    monkeypatch.setenv("ADVISOR_RECORDS", str(path))
    return path


@pytest.fixture
def validate(records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Validate:
    """``advisor validate`` of a tiny model on two ranks, for which stand-ins with the given faults run in turns."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(TINY))
    monkeypatch.setattr(processes, "GRACE_S", 0.5)

    def invoke(*faults: str, words: tuple[str, ...] = ("--strategy", "zero2"), timeout_s: float = 60) -> Result:
        left = list(faults)

        def command(folder: Path, ask: running.Ask) -> list[str]:
            return [sys.executable, str(STAND_IN), left.pop(0), str(folder)]

        monkeypatch.setattr(running, "_command", command)
        asked = ("validate", "--model", str(config), "--gpus", "2", "--device", "cpu", "--timeout", str(timeout_s))
        return CliRunner().invoke(cli, [*asked, *words], prog_name="advisor")

    return invoke


def processes_left(records: Path) -> list[str]:
    """Command lines of living processes of runs that this test made: they inherit its environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes()
        except OSError:  # it has just ended, or is another user's
            continue
        if f"{processes.MARK}=".encode() in environment and str(records).encode() in environment:
            found.append((folder / "cmdline").read_text())
    return found


def outcomes() -> list[str]:
    return [record.outcome.kind for record in read_records().records]


def test_a_run_that_ends_well_is_compared_and_recorded(validate: Validate, records: Path) -> None:
    result = validate("none", words=("--strategy", "zero2", "--json"))

    assert result.exit_code == 0, result.stderr
    assert result.stderr == "Plan 1 of 1: ZeRO-2 by deepspeed\n"
    found = json.loads(result.stdout)
    (run,) = found["runs"]
    peak = next(each for each in run["counters"] if each["counter"] == "peak")
    assert peak["measured_bytes"] == 2_000_000
    assert peak["error"] == pytest.approx(peak["predicted_bytes"] / 2_000_000 - 1)
    assert run["tokens_per_s"] == pytest.approx(2 * 128 / 0.25)
    (record,) = read_records().records
    execution = record.execution
    assert execution
    assert execution.id == run["id"]
    assert set(execution.files) == {"accelerate.yaml", "ds_config.json", "run.sh"}
    assert [rank.host_peak_bytes for rank in execution.ranks] == [2**29, 2**29]
    assert record.versions["torch"]
    assert processes_left(records) == []


@pytest.mark.parametrize(
    ("fault", "outcome", "last_line"),
    [
        ("raises", "crashed", "ValueError: weights of the wrong shape"),
        ("out of memory", "out-of-memory", "can't allocate memory"),
        ("killed", "killed", "ended with exit code -9"),
        ("hangs", "timeout", f"did not end within {SHORT_S} s"),
        ("leaves a child", "crashed", "ValueError: weights of the wrong shape"),
        ("prints garbage", "crashed", "ended with exit code 3"),
        ("never stops printing", "timeout", f"did not end within {SHORT_S} s"),
        ("fills its quota", "crashed", "File too large"),
        ("finds its port busy", "crashed", "Address already in use"),
        ("leaves a rank out", "other-run", "rank 1 of 2 ended without a record"),
        ("writes no JSON", "other-run", "what rank 1 of 2 wrote is no JSON"),
        ("reports something else", "other-run", "rank 0 of 2 wrote no measurement"),
    ],
)
def test_a_fault_is_recorded_with_its_last_lines(
    validate: Validate, records: Path, fault: str, outcome: str, last_line: str
) -> None:
    assert validate("none").exit_code == 0
    before = records.read_bytes()

    result = validate(fault, timeout_s=SHORT_S if outcome == "timeout" else 60)

    assert result.exit_code == 1
    assert "Traceback" not in result.stderr
    assert outcome in result.stdout
    assert records.read_bytes().startswith(before)
    recorded = read_records().records[-1]
    assert recorded.outcome.kind == outcome
    assert last_line in " ".join(recorded.outcome.last_lines)
    assert all(line.isprintable() and len(line) < 400 for line in recorded.outcome.last_lines)
    assert recorded.true == {}
    assert processes_left(records) == []


def test_a_terminal_shows_which_plan_and_step_it_is_at(validate: Validate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    result = validate("hangs", timeout_s=3)

    assert "Plan 1 of 1: ZeRO-2 by deepspeed" in result.stderr
    assert "step 1 of 8, " in result.stderr


def test_a_lock_that_a_killed_compilation_left_is_named(
    validate: Validate, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "extensions" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(lock.parents[1]))
    monkeypatch.setattr(campaign, "LOCKS_S", 0.1)

    result = validate("waits on a lock", timeout_s=SHORT_S)

    assert result.exit_code == 1
    assert f"DeepSpeed waits on {lock}" in result.stderr  # said while it waits, too
    last_line = read_records().records[-1].outcome.last_lines[-1]
    assert f"DeepSpeed waits on {lock}" in last_line
    assert "no process here holds it" in last_line
    with lock.open():
        result = validate("waits on a lock", timeout_s=SHORT_S)
        assert "no process here holds it" not in read_records().records[-1].outcome.last_lines[-1]


def test_a_rank_that_dies_under_a_real_launcher_ends_the_others(
    validate: Validate, records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = running._command
    validate("none")
    monkeypatch.setattr(running, "_command", command)
    monkeypatch.setattr(running, "WORKER", "validation.stand_in")
    monkeypatch.setenv("STAND_IN_FAULT", "one rank dies")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))

    result = CliRunner().invoke(
        cli,
        [
            *("validate", "--model", str(records.parents[1] / "config.json"), "--gpus", "2", "--device", "cpu"),
            *("--strategy", "ddp"),
        ],
    )

    assert result.exit_code == 1
    assert outcomes() == ["ran", "killed"]
    assert processes_left(records) == []


def interrupt_once_it_runs(records: Path) -> None:
    def interrupt() -> None:
        while not processes_left(records):
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()


def test_an_interrupted_campaign_goes_on_where_it_stopped(validate: Validate, records: Path) -> None:
    handler = signal.getsignal(signal.SIGINT)
    interrupt_once_it_runs(records)
    stopped = validate("hangs", "none", words=("--top", "2"))

    assert stopped.exit_code == 130
    assert "--resume goes on" in stopped.stderr
    assert outcomes() == ["interrupted"]
    assert processes_left(records) == []
    assert signal.getsignal(signal.SIGINT) is handler

    ended = validate("none", "raises", words=("--top", "2", "--resume"))
    assert ended.exit_code == 1
    assert outcomes() == ["interrupted", "ran", "crashed"]

    again = validate(words=("--top", "2", "--resume", "--json"))
    assert again.exit_code == 1
    assert [each["resumed"] for each in json.loads(again.stdout)["runs"]] == [True, True]
    assert outcomes() == ["interrupted", "ran", "crashed"]


def test_a_model_is_cut_and_that_is_said(validate: Validate) -> None:
    words = ("--model", "Qwen2.5-1.5B", "--gpus", "8", "--strategy", "zero2")
    result = validate("none", words=words)

    assert result.exit_code == 0, result.stderr
    text = " ".join(result.stdout.split())
    assert "No GPU is used: a small twin of it" in text
    for cut in ("layers 28 → 4", "ranks 8 → 4", "tokens in a sequence 2,048 → 128", "reduce bucket 500,000,000 → "):
        assert cut in text
    (record,) = read_records().records
    assert record.model_name == "Qwen2.5-1.5B"
    assert record.case.plan.gpus == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--strategy", "zero2", "--offload", "optimizer"), "the kernel of DeepSpeedCPUAdam"),
        (("--strategy", "zero2", "--precision", "fp32"), "--attention eager is the same on both"),
        (("--strategy", "ddp", "--model", "gpt2"), "a CPU computes LayerNorm under autocast otherwise"),
        (("--strategy", "ddp", "--model", "DeepSeek-V2-Lite"), "values are narrower than its keys"),
    ],
)
def test_what_a_cpu_does_otherwise_is_noted(validate: Validate, words: tuple[str, ...], said: str) -> None:
    result = validate("none", words=words)

    assert result.exit_code == 0, result.stderr
    assert said in result.stderr


def test_what_does_not_fit_this_machine_is_refused_with_the_sum(
    validate: Validate, records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("advisor.validation.room.available_bytes", lambda: 2**30)
    monkeypatch.setattr("advisor.validation.planned.available_bytes", lambda: 2**30)

    result = validate("none")

    assert result.exit_code == 1
    assert "2 processes 1.2 GiB + weights while they are built" in result.stderr
    assert "1.0 GiB available" in result.stderr
    assert not records.exists()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--strategy", "zero2", "--steps", "2"), "--steps must be above 2"),
        (("--strategy", "zero2", "--launcher", "torchrun"), "give --launcher deepspeed"),
        (("--strategy", "ddp", "--launcher", "accelerate"), "DDP is validated by torchrun"),
        (("--strategy", "ddp", "--padded"), "drop --padded"),
        (("--strategy", "ddp", "--compile"), "drop --compile"),
        (("--strategy", "ddp", "--precision", "fp16"), "give --precision bf16"),
        (("--model", "bert-base-uncased", "--strategy", "ddp"), "no causal model"),
        (("--strategy", "zero3", "--offload", "optimizer", "--offload-to", "nvme"), "advisor trace"),
        (("--strategy", "zero3++"), "DeepSpeed quantises on GPUs alone"),
        (("--strategy", "fsdp", "--fsdp-version", "1"), "FSDP version 1 is not run"),
        (("--emulate-ranks", "8", "--strategy", "ddp"), "drop --gpus and --launcher"),
        (("--micro-batch", "2"), "drop --micro-batch, or give --strategy"),
        (("--top", "0"), "--top must be at least 1"),
        (("--device", "cuda", "--strategy", "ddp"), "this machine has none"),
    ],
)
def test_what_cannot_be_run_is_wrong_usage(
    validate: Validate, records: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], complaint: str
) -> None:
    monkeypatch.setattr("advisor.validation.planned.detect", lambda: None)
    result = validate("none", words=words)

    assert result.exit_code == 2, result.output
    assert complaint in result.stderr
    assert not records.exists()


def test_more_gpus_than_there_are_is_refused_with_the_way_out(
    validate: Validate, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Detected(gpu_names=("NVIDIA H200",), gpu_memory_bytes=141 * 2**30, host_memory_bytes=2**37)
    monkeypatch.setattr("advisor.validation.planned.detect", lambda: machine)

    result = validate(words=("--device", "cuda", "--gpus", "8", "--strategy", "ddp"))

    assert result.exit_code == 2
    assert "this machine has 1: give --gpus 1, or --device cpu" in result.stderr


def test_where_nothing_fits_nothing_is_run(validate: Validate, records: Path) -> None:
    result = validate(words=("--model", "Llama-3.1-8B", "--gpus", "1", "--gpu", "T4", "--host-memory", "4"))

    assert result.exit_code == 3
    assert not records.exists()


def test_only_the_own_program_is_validated() -> None:
    with pytest.raises(SpecError, match=r"advisor validate runs the code of its own train.py; leave --trainer out"):
        campaign.validate("Qwen2.5-0.5B", strategy="zero1", trainer="trl")
