"""Records are added whole or not at all, by several processes at once, and bad lines harm no others."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from advisor.errors import WriteError
from advisor.specs.job import Job
from advisor.specs.plan import Plan, Strategy, zero_settings
from advisor.validation.accuracy import COUNTERS, Case
from advisor.validation.measured import Measured, PhaseMeasured
from advisor.validation.outcome import Outcome
from advisor.validation.record import Execution, Record, line, parsed
from advisor.validation.recorded import read_records
from advisor.validation.store import append, own, own_path, shipped

TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}
PHASE = PhaseMeasured(peak_allocated_bytes=7, end_allocated_bytes=5, peak_reserved_bytes=None, seconds=0.5)
RANK = Measured(
    device="cpu",
    states_bytes=3,
    forward=PHASE,
    backward=PHASE,
    step=PHASE,
    step_s=(0.5, 0.25),
    tokens_per_step=64,
    host_peak_bytes=2**29,
)


RAN = Outcome("ran")


def made(name: str = "tiny", outcome: Outcome = RAN, strategy: Strategy = Strategy.ZERO2) -> Record:
    plan = Plan(strategy=strategy, gpus=2, micro_batch=1, zero=zero_settings(strategy, 1000))
    return Record(
        truth="a run",
        case=Case(name, TINY, Job(sequence_length=32, global_batch=2), plan, rank=1),
        true=dict.fromkeys(COUNTERS[:7], 400_000) if outcome.ran else {},
        versions={"torch": "2"},
        execution=Execution(
            id="1",
            started="2026-01-02T03:04:05+00:00",
            outcome=outcome,
            launcher="deepspeed",
            device="cpu",
            steps=3,
            seconds=1.5,
            stands_for="Large",
            cuts=("layers 28 → 2",),
            ranks=(RANK, RANK) if outcome.ran else (),
        ),
    )


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    found = tmp_path / "records.jsonl"
    monkeypatch.setenv("ADVISOR_RECORDS", str(found))
    return found


@pytest.mark.parametrize("outcome", [Outcome("ran"), Outcome("timeout", ("waited", "did not end within 1 s"))])
def test_what_is_recorded_of_a_run_is_read_back(outcome: Outcome) -> None:
    record = made(outcome=outcome)
    found = parsed(line(record), "here")

    assert line(found) == line(record)
    assert found.execution
    assert found.execution.outcome == outcome
    assert found.execution.cuts == ("layers 28 → 2",)
    assert [rank.median_step_s for rank in found.execution.ranks] == ([0.375, 0.375] if outcome.ran else [])


def test_records_lie_where_the_environment_says_else_in_the_user_s_folder(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert own_path() == path
    monkeypatch.delenv("ADVISOR_RECORDS")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert own_path().name == "records.jsonl"
    assert own_path().parent.name == "advisor"


def test_processes_that_append_at_once_do_not_mix_their_lines(path: Path) -> None:
    root, here = Path(__file__).parents[2], Path(__file__).parent.parent
    program = (
        f"import sys; sys.path[:0] = [{str(root)!r}, {str(here)!r}]\n"
        "from pathlib import Path\n"
        "from validation.test_store import made\n"
        "from advisor.validation.store import append\n"
        f"for _ in range(20): append(made('x' * 9000), Path({str(path)!r}))\n"
    )
    started = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(3)]

    assert [each.wait(60) for each in started] == [0, 0, 0]
    records, unread = own(path)
    assert len(records) == 60
    assert unread == []


def test_a_full_disk_leaves_earlier_records_as_they_were(path: Path) -> None:
    append(made(), path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, limits[1]))
    try:
        with pytest.raises(WriteError, match=r"cannot add a record to .*: File too large"):
            append(made(), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert path.read_bytes() == before


def test_lines_that_are_no_records_are_named_and_left_out(path: Path) -> None:
    append(made("first"), path)
    with path.open("ab") as file:
        file.write(b'{"schema": "advisor/record/9"}\n\xff\xfe\n\n' + line(made("cut short")).encode()[:300])
    append(made("last"), path)

    found = read_records()

    assert [record.case.name for record in found.records] == ["first", "last"]
    assert [each.partition(": ")[2].split()[0] for each in found.warnings] == [f"{path}:{at}" for at in (2, 3, 5)]


def test_records_are_chosen_by_what_they_are(path: Path) -> None:
    for record in (made(), made(outcome=Outcome("crashed", ("no",))), made(strategy=Strategy.DDP)):
        append(record, path)

    assert len(read_records().records) == 3
    assert len(read_records(strategy="ddp").records) == 1
    assert len(read_records(outcome="crashed", model="LARGE", device="CPU").records) == 1
    assert len(read_records(model="tiny").records) == 0
    frame = read_records().to_frame()
    assert list(frame["outcome"]) == ["ran", "crashed", "ran"]
    assert frame["tokens_per_s"][0] == pytest.approx(2 * 64 / 0.375)
    assert frame["peak_bytes"].count() == 2


def test_scores_are_of_those_that_ran(path: Path) -> None:
    for record in (made(), made(outcome=Outcome("crashed", ("no",)))):
        append(record, path)

    scores = {each.counter: each for each in read_records().scores()}

    assert set(scores) == set(COUNTERS[:7])
    assert {each.count for each in scores.values()} == {1}
    assert scores["peak"].truth == "cpu: ZeRO-2"


def test_the_records_of_the_package_are_all_readable() -> None:
    records = list(shipped())

    assert len(records) > 200
    assert all(record.outcome.ran for record in records if record.true)
