from __future__ import annotations

import csv
import io
import json
from typing import Any

import pytest

from advisor.launch.files import render
from advisor.report.machine import csv_text, estimate_object, gpu_row, json_text, plan_object, recommendation_object
from advisor.search.results import row
from advisor.specs.plan import Offload, Plan, Strategy
from report.samples import A100, CLUSTER, JOB, QWEN, T4, made_estimate, made_recommendation, made_refusal

LEDGER_CATEGORIES = {
    "parameters",
    "gradients",
    "optimizer",
    "activations",
    "logits",
    "buffers",
    "temporaries",
    "workspace",
    "rounding",
}
ESTIMATE_FIELDS = {
    "": {"schema", "inputs", "model", "plan", "memory", "traffic", "time", "verdict", "why"},
    "model": {"name", "parameters", "trainable_parameters"},
    "plan": {"strategy", "gpus", "dp", "tp", "pp", "cp", "ep", "micro_batch", "grad_accum", "checkpointing", "offload"},
    "memory": {
        "capacity_bytes",
        "states_bytes",
        "peak_allocated_bytes",
        "peak_reserved_bytes",
        "device_used_bytes",
        "low_bytes",
        "high_bytes",
        "peak_phase",
        "allocator",
        "cache_releases",
        "ledger",
        "timeline",
        "host_bytes",
        "nvme_bytes",
    },
    "time": {
        "step_s",
        "low_s",
        "high_s",
        "compute_s",
        "exposed_comm_s",
        "tokens_per_s",
        "tokens_per_s_per_gpu",
        "mfu",
        "tflops_per_gpu",
    },
}
TRAFFIC_FIELDS = {"what", "collective", "link", "bytes_per_step", "seconds", "exposed_seconds"}
RECOMMENDATION_FIELDS = {"schema", "inputs", "model", "best", "plans", "rejected", "launch", "considered", "seconds"}


def read(answer: dict[str, object]) -> Any:
    return json.loads(json_text(answer))


@pytest.fixture
def recommended() -> Any:
    answer = made_recommendation()
    assert answer.best
    return read(recommendation_object(answer, render(QWEN, JOB, answer.best.plan, CLUSTER)))


@pytest.mark.parametrize("part", ESTIMATE_FIELDS)
def test_an_estimate_has_every_field_that_programs_rely_on(part: str) -> None:
    answer = read(estimate_object(made_estimate()))

    assert ESTIMATE_FIELDS[part] <= (answer[part] if part else answer).keys()


def test_an_estimate_names_its_schema_and_the_origin_of_each_input() -> None:
    answer = read(estimate_object(made_estimate()))

    assert answer["schema"] == "advisor/1"
    assert answer["inputs"]["gpu"] == {"value": "A100-80GB", "origin": "assumed"}
    assert answer["inputs"]["gpus"] == {"value": 4, "origin": "given"}


def test_lists_of_an_estimate_hold_named_bytes() -> None:
    answer = read(estimate_object(made_estimate()))

    assert all(line.keys() == {"category", "label", "bytes"} for line in answer["memory"]["ledger"])
    assert {line["category"] for line in answer["memory"]["ledger"]} <= LEDGER_CATEGORIES
    assert all({"phase", "bytes"} <= phase.keys() for phase in answer["memory"]["timeline"])
    assert all(line.keys() == TRAFFIC_FIELDS for line in answer["traffic"])


def test_the_ledger_sums_to_the_allocated_peak() -> None:
    memory = read(estimate_object(made_estimate()))["memory"]

    assert sum(line["bytes"] for line in memory["ledger"]) == memory["peak_allocated_bytes"]


def test_numbers_stay_in_base_units() -> None:
    estimate = made_estimate(Strategy.ZERO2, offload=Offload.OPTIMIZER)
    answer = read(estimate_object(estimate))

    assert answer["memory"]["device_used_bytes"] == estimate.memory.device_used_bytes
    assert answer["time"]["step_s"] == estimate.time.step_s
    assert answer["time"]["tflops_per_gpu"] == pytest.approx(estimate.time.flop_per_s_per_gpu / 1e12)
    assert answer["model"]["parameters"] == answer["model"]["trainable_parameters"] == 1_543_714_304


def test_megatron_s_plan_says_what_each_group_cuts() -> None:
    plan = Plan(
        strategy=Strategy.MEGATRON,
        gpus=32,
        micro_batch=1,
        accumulation_steps=4,
        tensor_parallel=4,
        sequence_parallel=True,
        pipeline_parallel=2,
        virtual_stages=2,
        expert_parallel=8,
        expert_tensor_parallel=2,
    )

    found = plan_object(plan)

    cuts = ("dp", "tp", "pp", "vpp", "cp", "ep", "etp", "sequence_parallel", "global_batch")
    assert {name: found[name] for name in cuts} == {
        "dp": 4,
        "ep": 8,
        "etp": 2,
        "tp": 4,
        "pp": 2,
        "vpp": 2,
        "cp": 1,
        "sequence_parallel": True,
        "global_batch": 16,
    }


def test_the_plan_says_how_gpus_are_split_and_what_deepspeed_is_told() -> None:
    plan = read(estimate_object(made_estimate(Strategy.ZERO2, offload=Offload.OPTIMIZER)))["plan"]

    assert (plan["dp"], plan["tp"], plan["pp"], plan["cp"], plan["ep"]) == (4, 1, 1, 1, 1)
    assert (plan["strategy"], plan["offload"], plan["zero"]["reduce_bucket"]) == ("zero2", "optimizer", 500_000_000)
    assert read(estimate_object(made_estimate(Strategy.DDP)))["plan"]["zero"] is None


def test_a_recommendation_has_every_field_that_programs_rely_on(recommended: Any) -> None:
    assert recommended.keys() >= RECOMMENDATION_FIELDS
    assert recommended["best"] == recommended["plans"][0]
    assert len(recommended["plans"]) == 6
    assert {"plan", "why", "short_by_bytes"} <= recommended["rejected"][0].keys()


def test_a_recommendation_carries_the_files_that_launch_it(recommended: Any) -> None:
    launch = recommended["launch"]

    assert {"command", "env", "files"} == launch.keys()
    assert launch["command"][:2] == ["accelerate", "launch"]
    assert "run.sh" in [file["name"] for file in launch["files"]]
    assert all(file["text"] for file in launch["files"])


def test_where_nothing_fits_there_is_no_best_plan_and_nothing_to_launch() -> None:
    answer = read(recommendation_object(made_refusal(), None))

    assert (answer["best"], answer["plans"], answer["launch"]) == (None, [], None)
    assert answer["fewest_gpus"] == 8
    assert answer["rejected"][0]["short_by_bytes"] > 0


def test_json_is_ascii_whatever_names_it_holds() -> None:
    assert json_text({"name": "千问"}).isascii()


def test_csv_reads_back_as_the_rows_it_was_made_from() -> None:
    plans = made_recommendation().plans
    read_back = list(csv.DictReader(io.StringIO(csv_text([row(plan) for plan in plans]))))

    assert [line["strategy"] for line in read_back] == [plan.plan.strategy.value for plan in plans]
    assert [int(line["device_used_bytes"]) for line in read_back] == [plan.memory.device_used_bytes for plan in plans]
    assert [float(line["step_s"]) for line in read_back] == [plan.time.step_s for plan in plans]
    assert [line["why"] for line in read_back] == [plan.why for plan in plans]


def test_csv_without_rows_is_empty() -> None:
    assert csv_text([]) == ""


def test_a_gpu_without_a_number_format_has_no_rate_for_it() -> None:
    assert gpu_row(A100)["bf16_flop_per_s"] == 312e12
    assert gpu_row(T4)["bf16_flop_per_s"] is None
