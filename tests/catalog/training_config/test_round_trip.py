"""What is written can be read: the files of a plan give back that plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from advisor.catalog.request import resolve
from advisor.cost.estimate import plan_of
from advisor.launch.files import render, write
from advisor.search.space import Barred, sheets
from advisor.specs.job import Optimizer
from advisor.specs.plan import Plan
from advisor.specs.question import Question

MODEL = "Qwen2.5-1.5B"

jobs = st.fixed_dictionaries(
    {
        "gpus": st.sampled_from([1, 2, 8, 16]),
        "seq_len": st.sampled_from([512, 2048]),
        "global_batch": st.sampled_from([16, 48, 96]),
        "optimizer": st.sampled_from(get_args(Optimizer)),
        "attention": st.sampled_from(["sdpa", "flash", "eager"]),
        "loss": st.sampled_from(["full", "chunked", "fused"]),
    }
)
formats = st.sampled_from([("bf16", "fp32"), ("bf16", "bf16"), ("fp16", "fp32"), ("fp32", "fp32")])


@st.composite
def searched(draw: st.DrawFn) -> tuple[Question, Plan]:
    """A question, and one of the plans that the search considers for it."""
    words: dict[str, Any] = draw(jobs)
    if words["optimizer"] == "galore":
        words["galore_rank"] = draw(st.sampled_from([64, 128]))
    precision, param_dtype = draw(formats)
    assume(words["attention"] != "flash" or precision != "fp32")
    nodes = 2 if words["gpus"] == 16 else 1
    question = resolve(MODEL, gpu="A100-80GB", nodes=nodes, precision=precision, param_dtype=param_dtype, **words)
    sheet = draw(st.sampled_from([each for each in sheets(question) if not isinstance(each, Barred)]))
    return question, sheet.at(draw(st.integers(0, sheet.micro_batch.size - 1)))  # type: ignore[union-attr]


@settings(max_examples=60, deadline=None)
@given(searched())
def test_the_files_of_a_plan_give_back_the_plan_and_its_job(asked: tuple[Question, Plan]) -> None:
    question, plan = asked
    launch = render(question.model, question.job, plan, question.cluster)
    with TemporaryDirectory() as name:
        folder = Path(name)
        write(launch, folder / "run")
        beside = {"gpu": "A100-80GB", "checkpointing": plan.checkpointing.value}

        read, again = plan_of(MODEL, gpu="A100-80GB", config=str(folder / "run" / "run.sh"))
        # An optimizer on the host is DeepSpeed's own, whatever the program's arguments say.
        kept = {"optimizer": question.job.optimizer} if plan.offload.optimizer else {}
        assert (again, replace(read.job, **kept)) == (plan, question.job)  # type: ignore[arg-type]
        assert read.cluster.nodes == question.cluster.nodes

        batch = {"micro_batch": plan.micro_batch, "grad_accum": plan.accumulation_steps}
        formats = {"param_dtype": question.job.parameter_format}
        _, again = plan_of(MODEL, config=str(folder / "run" / "accelerate.yaml"), **beside, **batch, **formats)  # type: ignore[arg-type]
        assert again == plan

        if plan.strategy.zero_stage:
            # DeepSpeed's JSON does not say in how many machines the GPUs are, by which ZeRO++ quantises gradients.
            beside["nodes"] = question.cluster.nodes
            _, again = plan_of(MODEL, config=str(folder / "run" / "ds_config.json"), **beside)  # type: ignore[arg-type]
            assert again == plan
