"""How long an optimizer step takes: compute, what communication adds to it, and the update.

The rule of overlap: a transfer that later work waits for costs its full time. The others hide behind the compute of
the phase they are in (one micro-step's forward, loss or backward), all links together: of the time in which both run,
``overlap_share`` is saved and the rest is lost to their slowing each other down. What is longer than the compute stands
out in full. So hiding never makes a step shorter than its compute.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from advisor.cost.collectives import Ring, ring
from advisor.cost.compute import compute_seconds, rates, work
from advisor.cost.results import StepTime, TrafficLine
from advisor.cost.traffic import Flow, flows
from advisor.specs.calibration import Calibration, Range, likeness
from advisor.specs.hardware import Cluster
from advisor.specs.job import Job
from advisor.specs.plan import Plan
from advisor.step.program import Amount, Block, Node, Sequence, blocks

NVME = "NVMe"
"""What transfers to and from it are said to go over."""
MODEL_FLOP_PER_FORWARD = 3
"""Forward, and twice as much for the gradients of inputs and weights."""


class TimedFlow(NamedTuple):
    """Transfers of one purpose over a whole step."""

    what: str
    collective: str
    link: str | None
    """The host link's name, or the NVMe; None for the ring, whose slowest stretch depends on the plan."""
    sent_bytes: Amount
    seconds: Amount
    exposed_seconds: Amount


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StepTimes:
    """Times of every plan that a program stands for, side by side."""

    tokens: Amount
    """Tokens of one optimizer step over all GPUs."""
    compute_s: Amount
    exposed_communication_s: Amount
    optimizer_s: Amount
    model_flop: Amount
    """Per GPU and step, no recomputation: 6 per parameter in a matrix product and token, and 12·layers·width·length
    per token for attention (Chowdhery et al., arXiv:2204.02311, appendix B). It counts active experts only, no
    embedding lookups, and the whole score matrix under a causal mask."""
    peak_flop_per_s: float
    timed_flows: tuple[TimedFlow, ...]
    over: Ring
    cluster: Cluster
    range: Range
    """Where the measured time may lie, as shares of the predicted."""

    @property
    def step_s(self) -> Amount:
        return self.compute_s + self.exposed_communication_s + self.optimizer_s

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
            exposed_communication_s=_pick(self.exposed_communication_s, index),
            optimizer_s=_pick(self.optimizer_s, index),
            tokens_per_s=rate,
            tokens_per_s_per_gpu=rate / _pick(self.over.ranks, index),
            mfu=flop_per_s / self.peak_flop_per_s,
            flop_per_s_per_gpu=flop_per_s,
        )

    def traffic_at(self, index: int) -> tuple[TrafficLine, ...]:
        """What one rank of the plan at *index* sends and copies; nothing where it has nobody to talk to."""
        limited_by_network = bool(_pick(self.over.network_limits, index))
        way = self.cluster.network.name if limited_by_network else self.cluster.link.name
        lines = (
            TrafficLine(
                what=flow.what,
                collective=flow.collective,
                link=flow.link or way,
                bytes_per_step=round(_pick(flow.sent_bytes, index)),
                seconds=_pick(flow.seconds, index),
                exposed_seconds=_pick(flow.exposed_seconds, index),
            )
            for flow in self.timed_flows
        )
        return tuple(line for line in lines if line.bytes_per_step)


def step_time(step: Node, job: Job, plan: Plan, cluster: Cluster, calibration: Calibration) -> StepTimes:
    """Times of one optimizer step for every plan that *step* was built for."""
    at, over = rates(cluster.gpu, job.precision, calibration), ring(cluster, plan.group("data"))
    compute: Amount = 0.0
    exposed: Amount = 0.0
    optimizer: Amount = 0.0
    model_flop: Amount = 0.0
    timed: dict[tuple[str, str], TimedFlow] = {}
    for phase, times in _phases(step, 1):
        done = work(phase)
        sent = flows(phase, over, cluster)
        seconds = compute_seconds(phase, at)
        if phase.phase == "step":
            optimizer = optimizer + times * (seconds + _host_update_seconds(phase, over, cluster, calibration))
        else:
            compute = compute + times * seconds
        if phase.phase == "forward":
            model_flop = model_flop + times * MODEL_FLOP_PER_FORWARD * done.whole_flop
        stands_out = _exposed_share(sent, seconds, calibration.overlap_share)
        for flow in sent:
            lost = flow.seconds if flow.waits else flow.seconds * stands_out
            exposed = exposed + times * lost
            _add(timed, flow, times, lost, cluster)
    return StepTimes(
        tokens=plan.global_batch * job.sequence_length,
        compute_s=compute,
        exposed_communication_s=exposed,
        optimizer_s=optimizer,
        model_flop=model_flop,
        peak_flop_per_s=at.peak_flop_per_s,
        timed_flows=tuple(timed.values()),
        over=over,
        cluster=cluster,
        range=calibration.time_range(likeness(plan, cluster.gpu.compute_capability)),
    )


def _exposed_share(sent: tuple[Flow, ...], compute_s: Amount, overlap_share: float) -> Amount:
    """Which share of the transfers that nothing waits for compute of *compute_s* does not hide."""
    if all(flow.waits for flow in sent):
        return 0.0
    hideable = sum((flow.seconds for flow in sent if not flow.waits), 0.0)
    hidden = overlap_share * np.minimum(hideable, compute_s)
    return 1 - np.divide(hidden, hideable, out=np.zeros_like(hidden), where=np.asarray(hideable) > 0)


def _host_update_seconds(phase: Node, over: Ring, cluster: Cluster, calibration: Calibration) -> Amount:
    """An optimizer on the CPU streams its states through host memory, which the ranks of a machine share."""
    parameters = sum((runs * block.host_updated_parameters for _, block, runs in blocks(phase)), 0.0)
    sharers = np.minimum(over.ranks, cluster.gpus_per_node)
    moved = parameters * calibration.cpu_adam_bytes_per_parameter * sharers
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


def _add(timed: dict[tuple[str, str], TimedFlow], flow: Flow, times: Amount, lost: Amount, cluster: Cluster) -> None:
    key = flow.what, flow.kind
    link = {
        "host-to-device": cluster.host_link.name,
        "device-to-host": cluster.host_link.name,
        "nvme-to-host": NVME,
        "host-to-nvme": NVME,
    }.get(flow.kind)
    before = timed.get(key, TimedFlow(*key, link, 0.0, 0.0, 0.0))
    timed[key] = before._replace(
        sent_bytes=before.sent_bytes + times * flow.sent_bytes,
        seconds=before.seconds + times * flow.seconds,
        exposed_seconds=before.exposed_seconds + times * lost,
    )


def _pick(amount: Amount, index: int) -> float:
    return float(np.asarray(amount).reshape(-1)[index if np.ndim(amount) else 0])
