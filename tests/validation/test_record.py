"""A record read back is the run that was written."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.errors import ConfigError
from advisor.specs.job import Job
from advisor.specs.plan import Checkpointing, Plan, Strategy, ZeroSettings, zero_settings
from advisor.validation.accuracy import COUNTERS, Case
from advisor.validation.record import Record, from_plain, line, plain, read, write

TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}


def record(plan: Plan, job: Job) -> Record:
    return Record("a run", Case("tiny", TINY, job, plan, rank=1), dict.fromkeys(COUNTERS, 7), {"torch": "2"})


plans = st.builds(
    Plan,
    strategy=st.sampled_from(Strategy),
    gpus=st.integers(1, 64),
    micro_batch=st.integers(1, 8),
    accumulation_steps=st.integers(1, 4),
    checkpointing=st.sampled_from(Checkpointing),
    zero=st.builds(ZeroSettings, reduce_bucket=st.integers(1, 10**9), overlap_communication=st.booleans()),
)


@given(plan=plans, length=st.integers(1, 4096))
def test_what_is_written_is_read_back(plan: Plan, length: int) -> None:
    job = Job(sequence_length=length, parameter_format="bf16")

    assert from_plain(Plan, plain(plan)) == plan
    assert from_plain(Job, plain(job)) == job


def test_a_file_of_records_is_read_back_and_compared(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    plan = Plan(strategy=Strategy.ZERO1, gpus=2, micro_batch=1, zero=zero_settings(Strategy.ZERO1, 1000))

    write(path, [record(plan, Job(sequence_length=16))] * 2)
    first, second = read(path)

    assert line(first) == line(second)
    assert first.case.plan == plan
    assert first.comparison().true["peak"] == 7
    assert first.comparison().predicted["peak"] > 0
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", ["not json", "{}", '{"schema": "advisor/record/99"}', '{"schema": 1, "case": 3}'])
def test_a_line_that_is_no_record_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text(text + "\n", encoding="utf-8")

    with pytest.raises(ConfigError, match=r"runs\.jsonl:1"):
        list(read(path))
