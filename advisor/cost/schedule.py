"""How long an optimizer step takes: compute, what launches and communication add to it, and the update.

Two extremes bound it. On idle streams, what can hide hides in full (:mod:`advisor.cost.streams`). On streams that only
take turns, nothing does. In between lies a GPU whose transfers take multiprocessors and bandwidth from the kernels
they run beside: of what could hide, ``overlap_share`` does. So hiding never makes a step shorter than its compute.

A pipeline goes at the pace of its slowest stage (:attr:`StepProgram.pace`), and waits while it fills and drains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from advisor.cost.compute import busy_seconds, kernels, rates, work
from advisor.cost.kernels import Rates
from advisor.cost.results import StepTime, TrafficLine
from advisor.cost.streams import LAUNCHES, Costs, waits
from advisor.cost.traffic import Flow, Ways, flows, transfers
from advisor.specs.calibration import Calibration, Range, likeness
from advisor.specs.hardware import Cluster
from advisor.specs.job import Job
from advisor.specs.plan import Count, Plan
from advisor.step.pipeline import bubble_share
from advisor.step.program import Amount, Block, Node, Repeat, Sequence, read_once, total

MODEL_FLOP_PER_FORWARD = 3
"""Forward, and twice as much for the gradients of inputs and weights."""
FROZEN_FLOP_PER_FORWARD = 2
"""Without those of weights; those of adapters, a small share, are left out."""


class TimedFlow(NamedTuple):
    """Transfers of one purpose over a whole step."""

    flow: Flow
    exposed_seconds: Amount


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StepTimes:
    """Times of every plan that a program stands for, side by side."""

    tokens: Amount
    """Tokens of one optimizer step over all GPUs."""
    compute_s: Amount
    launch_s: Amount
    exposed_communication_s: Amount
    bubble_s: Amount
    """What a pipeline stage waits for others while it fills and drains (``bubble_share`` of what it works)."""
    optimizer_s: Amount
    model_flop: Amount
    """Per GPU and step, no recomputation: 6 per parameter in a matrix product and token, and 12·layers·width·length
    per token for attention (Chowdhery et al., arXiv:2204.02311, appendix B). It counts active experts only, no
    embedding lookups, and the whole score matrix under a causal mask; two thirds of it where weights are frozen."""
    peak_flop_per_s: float
    timed_flows: tuple[TimedFlow, ...]
    gpus: Count
    ways: Ways
    range: Range
    """Where the measured time may lie, as shares of the predicted."""

    @property
    def step_s(self) -> Amount:
        return self.compute_s + self.launch_s + self.exposed_communication_s + self.bubble_s + self.optimizer_s

    @property
    def tokens_per_s(self) -> Amount:
        return self.tokens / self.step_s

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
    step: Node, job: Job, plan: Plan, cluster: Cluster, calibration: Calibration, excess: float = 1.0
) -> StepTimes:
    """Times of one optimizer step for every plan that *step* was built for, whose model FLOPs are *excess* times those
    of a GPU on average."""
    at, ways = rates(cluster.gpu, job.precision, calibration), Ways(cluster, plan)
    host = partial(_host_update_seconds, plan.gpus, cluster, calibration)
    compute, optimizer, forward_flop = _busy(step, at, host)
    needed = MODEL_FLOP_PER_FORWARD if job.method == "full" else FROZEN_FLOP_PER_FORWARD
    waited = waits(
        step,
        Costs(
            busy_s=lambda node: busy_seconds(node, at) + host(node),
            launch_s=lambda node: kernels(node) * at.kernel_launch_s,
            transfer_s=ways.seconds,
        ),
    )
    serial = 1 - calibration.overlap_share
    timed = tuple(
        TimedFlow(flow, calibration.overlap_share * waited.get(flow[:2], 0.0) + serial * flow.seconds)
        for flow in flows(step, ways)
    )
    launching = waited.get(LAUNCHES, 0.0)
    exposed = sum((flow.exposed_seconds for flow in timed), 0.0)
    return StepTimes(
        tokens=plan.global_batch * job.sequence_length,
        compute_s=compute,
        launch_s=launching,
        exposed_communication_s=exposed,
        bubble_s=bubble_share(plan) * (compute + launching + exposed),
        optimizer_s=optimizer,
        model_flop=needed * forward_flop / excess,
        peak_flop_per_s=at.peak_flop_per_s,
        timed_flows=timed,
        gpus=plan.gpus,
        ways=ways,
        range=calibration.time_range(likeness(plan, cluster.gpu.compute_capability)),
    )


def least_step_s(step: Node, job: Job, plan: Plan, ways: Ways, calibration: Calibration) -> Amount:
    """What a step takes at least: with launches, and all that compute does not have to wait for, hidden in full."""
    cluster = ways.cluster
    at = rates(cluster.gpu, job.precision, calibration)
    compute, optimizer, _ = _busy(step, at, partial(_host_update_seconds, plan.gpus, cluster, calibration))
    serial = 1 - calibration.overlap_share
    exposed = total(
        runs * ways.seconds(each) * (1.0 if each.waits and _is_zero(each.ahead) else serial)
        for each, runs in transfers(step)
    )
    return (1 + bubble_share(plan)) * (compute + exposed) + optimizer


def _busy(step: Node, at: Rates, host: Callable[[Node], Amount]) -> tuple[Amount, Amount, Amount]:
    """Seconds of compute and of the update, and products of forward passes with whole scores matrices."""
    compute: Amount = 0.0
    optimizer: Amount = 0.0
    forward_flop: Amount = 0.0
    for phase, times in _phases(step, 1):
        if phase.phase == "step":
            optimizer = optimizer + times * (busy_seconds(phase, at) + host(phase))
        else:
            compute = compute + times * busy_seconds(phase, at)
        if phase.phase == "forward":
            forward_flop = forward_flop + times * work(phase).whole_flop
    return compute, optimizer, forward_flop


def _host_update_seconds(gpus: Count, cluster: Cluster, calibration: Calibration, node: Node) -> Amount:
    """An optimizer on the CPU streams its states through host memory, which the ranks of a machine share."""
    parameters = _host_updated(node)
    if isinstance(parameters, int) and not parameters:
        return 0.0
    moved = parameters * calibration.cpu_adam_bytes_per_parameter * np.minimum(gpus, cluster.gpus_per_node)
    return moved / cluster.cpu_memory_bandwidth_bytes_per_s


@read_once
def _host_updated(node: Node) -> Amount:
    """Parameters that an optimizer on the CPU updates in *node*."""
    if isinstance(node, Block):
        return node.host_updated_parameters
    if isinstance(node, Repeat):
        return node.times * _host_updated(node.body)
    return total(_host_updated(step) for step in node.steps)


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
