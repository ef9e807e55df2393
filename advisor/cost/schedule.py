"""How long an optimizer step takes: compute, what launches and communication add to it, and the update.

Two extremes bound it. On idle streams, what can hide hides in full (:mod:`advisor.cost.streams`). On streams that only
take turns, nothing does. In between lies a GPU whose transfers take multiprocessors and bandwidth from the kernels
they run beside: of what could hide, ``overlap_share`` does. So hiding never makes a step shorter than its compute.

A pipeline goes at the pace of its slowest stage (:attr:`StepProgram.pace`), and waits while it fills and drains.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np

from advisor.cost.compute import Load, load, rates, work
from advisor.cost.results import StepTime, TrafficLine
from advisor.cost.streams import LAUNCHES, Cause, Costs, waits
from advisor.cost.traffic import Flow, Routes, Ways, flows, transfers
from advisor.specs.calibration import Calibration, Range, likeness
from advisor.specs.hardware import Cluster
from advisor.specs.job import Job
from advisor.specs.plan import Count, Plan
from advisor.step.pipeline import bubble_share
from advisor.step.program import Amount, Block, Node, Sequence, total

MODEL_FLOP_PER_FORWARD = 3
"""Forward, and twice as much for the gradients of inputs and weights."""
FROZEN_FLOP_PER_FORWARD = 2
"""Without those of weights; those of adapters, a small share, are left out."""


class TimedFlow(NamedTuple):
    """Transfers of one purpose over a whole step."""

    flow: Flow
    exposed_seconds: Amount


@dataclass(frozen=True, kw_only=True, eq=False)
class StepTimes:
    """Times of every plan that a program stands for, side by side. Streams are played when what waits is asked for."""

    step: Node
    tokens: Amount
    """Tokens of one optimizer step over all GPUs."""
    compute_s: Amount
    optimizer_s: Amount
    model_flop: Amount
    """Per GPU and step, no recomputation: 6 per parameter in a matrix product and token, and 12·layers·width·length
    per token for attention (Chowdhery et al., arXiv:2204.02311, appendix B). It counts active experts only, no
    embedding lookups, and the whole score matrix under a causal mask; two thirds of it where weights are frozen."""
    peak_flop_per_s: float
    costs: Costs
    overlap_share: float
    bubble_share: Amount
    gpus: Count
    ways: Ways
    range: Range
    """Where the measured time may lie, as shares of the predicted."""

    @cached_property
    def waited_s(self) -> dict[Cause, Amount]:
        """What compute waits for on streams that are idle otherwise."""
        return waits(self.step, self.costs)

    @property
    def launch_s(self) -> Amount:
        return self.waited_s.get(LAUNCHES, 0.0)

    @cached_property
    def timed_flows(self) -> tuple[TimedFlow, ...]:
        serial = 1 - self.overlap_share
        return tuple(
            TimedFlow(flow, self.overlap_share * self.waited_s.get(flow[:2], 0.0) + serial * flow.seconds)
            for flow in flows(self.step, self.ways)
        )

    @cached_property
    def exposed_communication_s(self) -> Amount:
        return sum((flow.exposed_seconds for flow in self.timed_flows), 0.0)

    @property
    def bubble_s(self) -> Amount:
        """What a pipeline stage waits for others while it fills and drains (``bubble_share`` of what it works)."""
        return self.bubble_share * (self.compute_s + self.launch_s + self.exposed_communication_s)

    @property
    def step_s(self) -> Amount:
        return self.compute_s + self.launch_s + self.exposed_communication_s + self.bubble_s + self.optimizer_s

    @property
    def tokens_per_s(self) -> Amount:
        return self.tokens / self.step_s

    @property
    def most_tokens_per_s(self) -> Amount:
        """At most: with launches, and all that compute does not have to wait for, hidden in full. Plays nothing."""
        serial = 1 - self.overlap_share
        exposed = total(
            runs * self.ways.seconds(each) * (1.0 if each.waits and _is_zero(each.ahead) else serial)
            for each, runs in transfers(self.step)
        )
        least_s = (1 + self.bubble_share) * (self.compute_s + exposed) + self.optimizer_s
        return self.tokens / least_s

    def at(self, index: int) -> StepTime:
        """The plan at *index*."""
        step_s, rate = _pick(self.step_s, index), _pick(self.tokens_per_s, index)
        flop_per_s = _pick(self.model_flop, index) / step_s
        return StepTime(
            step_s=step_s,
            low_s=step_s * self.range[0],
            high_s=step_s * self.range[1],
            compute_s=_pick(self.compute_s, index),
            launch_s=_pick(self.launch_s, index),
            exposed_communication_s=_pick(self.exposed_communication_s, index),
            bubble_s=_pick(self.bubble_s, index),
            optimizer_s=_pick(self.optimizer_s, index),
            tokens_per_s=rate,
            tokens_per_s_per_gpu=rate / _pick(self.gpus, index),
            mfu=flop_per_s / self.peak_flop_per_s,
            flop_per_s_per_gpu=flop_per_s,
        )

    def traffic_at(self, index: int) -> tuple[TrafficLine, ...]:
        """What one rank of the plan at *index* sends and copies; nothing where it has nobody to talk to."""
        lines = (
            TrafficLine(
                what=flow.what,
                collective=flow.kind,
                link=self.ways.link(flow, index),
                bytes_per_step=round(_pick(flow.sent_bytes, index)),
                seconds=_pick(flow.seconds, index),
                exposed_seconds=_pick(exposed_seconds, index),
            )
            for flow, exposed_seconds in self.timed_flows
        )
        return tuple(line for line in lines if line.bytes_per_step)


def step_time(
    step: Node,
    job: Job,
    plan: Plan,
    cluster: Cluster,
    calibration: Calibration,
    excess: float = 1.0,
    routes: Routes | None = None,
) -> StepTimes:
    """Times of one optimizer step for every plan that *step* was built for, whose model FLOPs are *excess* times those
    of a GPU on average. *routes* are known ways through *cluster*."""
    at, ways = rates(cluster.gpu, job.precision, calibration), Ways(cluster, plan, routes)
    host = partial(_host_update_seconds, plan.gpus, cluster, calibration)
    compute: Amount = 0.0
    optimizer: Amount = 0.0
    forward_flop: Amount = 0.0
    for phase, times in _phases(step, 1):
        done = load(phase, at)
        if phase.phase == "step":
            optimizer = optimizer + times * (done.busy_s + host(done))
        else:
            compute = compute + times * done.busy_s
        if phase.phase == "forward":
            forward_flop = forward_flop + times * work(phase).whole_flop
    needed = MODEL_FLOP_PER_FORWARD if job.method == "full" else FROZEN_FLOP_PER_FORWARD

    def busy_s(node: Node) -> Amount:
        done = load(node, at)
        return done.busy_s + host(done)

    def launch_s(node: Node) -> Amount:
        return load(node, at).kernels * at.kernel_launch_s

    return StepTimes(
        step=step,
        tokens=plan.global_batch * job.sequence_length,
        compute_s=compute,
        optimizer_s=optimizer,
        model_flop=needed * forward_flop / excess,
        peak_flop_per_s=at.peak_flop_per_s,
        costs=Costs(busy_s, launch_s, ways.seconds),
        overlap_share=calibration.overlap_share,
        bubble_share=bubble_share(plan),
        gpus=plan.gpus,
        ways=ways,
        range=calibration.time_range(likeness(plan, cluster.gpu.compute_capability)),
    )


def _host_update_seconds(gpus: Count, cluster: Cluster, calibration: Calibration, done: Load) -> Amount:
    """An optimizer on the CPU streams its states through host memory, which the ranks of a machine share."""
    parameters = done.host_updated_parameters
    if isinstance(parameters, int) and not parameters:
        return 0.0
    moved = parameters * calibration.cpu_adam_bytes_per_parameter * np.minimum(gpus, cluster.gpus_per_node)
    return moved / cluster.cpu_memory_bandwidth_bytes_per_s


def _phases(node: Node, times: Amount) -> Iterator[tuple[Sequence, Amount]]:
    """Each phase with how often it runs; a phase that occurs at several places comes up once for each."""
    if isinstance(node, Block):
        return
    if not isinstance(node, Sequence):
        yield from _phases(node.body, times * node.times)
    elif node.phase is not None:
        if node.phase != "init":
            yield node, times
    else:
        for each in node.steps:
            yield from _phases(each, times)


def _pick(amount: Amount, index: int) -> float:
    return float(np.asarray(amount).reshape(-1)[index if np.ndim(amount) else 0])


def _is_zero(amount: Amount) -> bool:
    return np.ndim(amount) == 0 and amount == 0
