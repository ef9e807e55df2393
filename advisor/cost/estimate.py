"""One plan, priced: every reading of its step program, and whether it fits."""

from __future__ import annotations

from dataclasses import replace

from advisor.cost.memory import memory
from advisor.cost.results import Estimate, Memory, Verdict
from advisor.cost.schedule import step_time
from advisor.specs.plan import Plan
from advisor.specs.question import Question
from advisor.step.build import build

GIB = 2**30


def price(question: Question, plan: Plan) -> Estimate:
    """All readings of a single plan."""
    program = build(question.model, question.job, plan)
    held = memory(program, plan, question.cluster, question.calibration)
    timed = step_time(program.step, question.model, question.job, plan, question.cluster, question.calibration)
    verdict, why = judge(held, question.margin_share)
    return Estimate(
        model=question.model,
        job=question.job,
        cluster=question.cluster,
        plan=plan,
        inputs=question.inputs,
        memory=held,
        traffic=timed.traffic_at(0),
        time=timed.at(0),
        verdict=verdict,
        why=why,
        warnings=question.warnings,
    )


def judge(held: Memory, margin_share: float) -> tuple[Verdict, str]:
    """Whether *held* fits its device with the margin free and its host, and the arithmetic that says so."""
    used, capacity = held.device_used_bytes, held.capacity_bytes
    admitted = capacity * (1 - margin_share)
    if held.host_bytes > held.host_capacity_bytes:
        short = (held.host_bytes - held.host_capacity_bytes) / GIB
        return "no", (
            f"host memory: {held.host_bytes / GIB:.1f} GiB needed per machine, "
            f"{held.host_capacity_bytes / GIB:.1f} GiB there, {short:.1f} GiB short"
        )
    if used > capacity:
        return "no", (
            f"{used / GIB:.1f} GiB needed per GPU, {capacity / GIB:.1f} GiB there, "
            f"{(used - capacity) / GIB:.1f} GiB short"
        )
    free = f"{used / GIB:.1f} of {capacity / GIB:.1f} GiB used per GPU, {100 * (1 - used / capacity):.0f} % free"
    return ("fits", free) if used <= admitted else ("tight", f"{free}, below the margin of {100 * margin_share:.0f} %")


def explained(estimate: Estimate, why: str) -> Estimate:
    """The same estimate with another reason."""
    return replace(estimate, why=why)
