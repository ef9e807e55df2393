"""Real runs of two ranks on the CPU, and what is refused of them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from advisor.cli.main import cli
from advisor.errors import RunError
from advisor.specs.job import Job
from advisor.specs.plan import Plan, Strategy, zero_settings
from advisor.validation.accuracy import Case
from advisor.validation.recorded import read_records
from advisor.validation.run import check_ran, run

for package in ("torch", "transformers", "accelerate", "psutil"):
    pytest.importorskip(package)

QWEN2 = {
    "model_type": "qwen2",
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
    "tie_word_embeddings": True,
}
PEAK_ERROR = 0.001


def case(strategy: Strategy) -> Case:
    plan = Plan(
        strategy=strategy,
        gpus=2,
        micro_batch=2,
        accumulation_steps=2,
        zero=zero_settings(strategy, 2_000_000),
    )
    return Case("Qwen2", QWEN2, Job(sequence_length=128, global_batch=8), plan)


@pytest.mark.parametrize(("strategy", "engine"), [("zero2", "deepspeed"), ("fsdp", "accelerate")])
def test_two_real_ranks_hold_what_is_predicted(
    strategy: str, engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(engine)
    monkeypatch.setenv("ADVISOR_RECORDS", str(tmp_path / "records.jsonl"))
    config = tmp_path / "config.json"
    config.write_text(json.dumps(QWEN2))
    batch = ("--seq-len", "128", "--global-batch", "8", "--micro-batch", "2", "--grad-accum", "2")
    how = ("--gpus", "2", "--device", "cpu", "--strategy", strategy, "--bucket-size", "2e6", "--steps", "4")

    result = CliRunner().invoke(cli, ["validate", "--model", str(config), *batch, *how, "--json"], prog_name="advisor")

    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    (run,) = found["runs"]
    counters = {each["counter"]: each for each in run["counters"]}
    assert run["launcher"] == engine
    assert run["outcome"] == "ran"
    assert counters["between steps"]["predicted_bytes"] == counters["between steps"]["measured_bytes"]
    assert abs(counters["peak"]["error"]) < PEAK_ERROR
    assert [len(steps) for steps in run["step_s"]] == [2, 2]
    assert run["tokens_per_s"] > 0
    assert all(2**27 < size < 2**31 for size in run["host_peak_bytes"])
    (record,) = read_records().records
    assert record.comparison().error() == counters["peak"]["error"]
    sent = {each["collective"]: each["size_bytes"] for each in run["communication"]}
    if engine == "deepspeed":
        half_format_bytes = 2 * found["model"]["parameters"]
        # Stage 2 reduces all gradients in each of the two micro-steps, and gathers the share that a rank has updated.
        assert sent["all_reduce"] == pytest.approx(2 * half_format_bytes, rel=1e-3)
        assert sent["all_gather_into_tensor"] == pytest.approx(half_format_bytes / 2, rel=1e-3)
    else:
        assert not sent


def test_one_rank_of_eight_is_emulated_as_predicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("ADVISOR_RECORDS", str(tmp_path / "records.jsonl"))
    config = tmp_path / "config.json"
    config.write_text(json.dumps(QWEN2))
    how = ("--device", "cpu", "--emulate-ranks", "8", "--strategy", "zero2", "--steps", "3", "--json")

    result = CliRunner().invoke(cli, ["validate", "--model", str(config), *how], prog_name="advisor")

    assert result.exit_code == 0, result.output
    (run,) = json.loads(result.stdout)["runs"]
    counters = {each["counter"]: each for each in run["counters"]}
    assert run["plan"]["gpus"] == 8
    assert counters["between steps"]["predicted_bytes"] == counters["between steps"]["measured_bytes"]
    assert abs(counters["peak"]["error"]) < PEAK_ERROR
    assert run["tokens_per_s"] is None  # one rank of many waits for nobody


def test_a_run_that_takes_too_long_is_ended_with_all_its_processes() -> None:
    asked = case(Strategy.DDP)

    with pytest.raises(RunError, match="did not end within 2 s"):
        run(asked.config, asked.job, asked.plan, "torchrun", timeout_s=2)

    assert not workers_of_this_process()


def workers_of_this_process() -> list[str]:
    """Command lines of living workers that carry this process's mark."""
    own = os.environ.get("PYTEST_CURRENT_TEST", "").encode()
    return [
        line
        for folder in Path("/proc").glob("[0-9]*")
        if own
        and own in read(folder / "environ")
        and "validation.worker" in (line := read(folder / "cmdline").decode())
    ]


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has just ended, or is another user's
        return b""


def test_a_run_that_fails_says_its_last_words() -> None:
    asked = case(Strategy.DDP)
    no_activation = QWEN2 | {"hidden_act": "none of these"}

    with pytest.raises(RunError, match=r"exit code 1; its last lines: .*KeyError: 'none of these'$"):
        run(no_activation, asked.job, asked.plan, "torchrun", timeout_s=60)


RECORD = {
    "ranks": 2,
    "engine": "DistributedDataParallel",
    "optimizer": "AdamW",
    "losses": [5.0, 4.0],
    "trace": {"parameters": 7},
}


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"ranks": 1}, "ranks that answered 1, expected 2"),
        ({"engine": "Qwen2ForCausalLM"}, "class around the model Qwen2ForCausalLM"),
        ({"optimizer": "SGD"}, "optimizer SGD, expected AdamW"),
        ({"losses": [5.0, float("nan")]}, "rank 1 lost its loss"),
        ({"trace": {"parameters": 8}}, "parameters 8, expected 7"),
        ({"skipped_steps": 1}, "rank 1 skipped 1 steps"),
    ],
)
def test_a_run_that_was_another_than_asked_is_refused(changed: dict[str, object], complaint: str) -> None:
    asked = case(Strategy.DDP)
    check_ran([RECORD, RECORD], asked.job, asked.plan)

    with pytest.raises(RunError, match=complaint):
        check_ran([RECORD, RECORD | changed], asked.job, asked.plan, parameters=7)
