"""What users ran into, as the model tells it: how much slower, and why."""

from __future__ import annotations

from dataclasses import replace

import pytest

from advisor.cost.estimate import estimate, plan_of, priced
from advisor.cost.memory import memory
from advisor.cost.question import program
from advisor.cost.results import Estimate
from advisor.search.recommend import recommend
from advisor.specs.hardware import Cluster
from advisor.specs.plan import Plan
from advisor.specs.question import Question


def waited_s(found: Estimate) -> float:
    return found.time.exposed_communication_s


def on(question: Question, plan: Plan, cluster: Cluster) -> Estimate:
    moved = replace(question, cluster=cluster)
    step = program(moved, plan)
    return priced(moved, plan, step, memory(step, plan, cluster, question.calibration))


# deepspeedai/DeepSpeed#5770: two machines of two A10 over 10 Gbit Ethernet take 3.5 times as long a step as one.
def test_two_machines_over_ethernet_are_slower_than_one_of_them() -> None:
    words = {"gpu": "A10", "seq_len": 1024, "global_batch": 8, "strategy": "zero3", "micro_batch": 2}
    one, two = (
        estimate("Qwen2.5-1.5B", gpus=2 * nodes, nodes=nodes, network="10gbe", **words)  # type: ignore[arg-type]
        for nodes in (1, 2)
    )

    assert two.time.tokens_per_s < one.time.tokens_per_s
    assert waited_s(two) > 0.5 * two.time.step_s
    assert max(two.traffic, key=lambda line: line.exposed_seconds).link == "10gbe"


def test_what_a_step_waits_for_over_ethernet_is_the_reason_given() -> None:
    found = recommend("Qwen2.5-1.5B", gpus=4, nodes=2, gpu="A10", network="10gbe", seq_len=1024, global_batch=8)

    assert found.headline
    assert "of a step is waiting for" in found.plans[0].why
    assert found.plans[0].why.endswith("over 10gbe")


# NVIDIA/nccl-tests#307: without peer-to-peer, messages between GPUs of a machine go through its host memory.
def test_cards_without_peer_to_peer_wait_longer_for_each_other() -> None:
    words = {"gpus": 8, "gpu": "RTX 4090", "seq_len": 1024, "strategy": "zero2", "micro_batch": 2}
    through_host, straight = (
        estimate("Qwen2.5-0.5B", link=link, **words)  # type: ignore[arg-type]
        for link in ("pcie4-no-p2p", "pcie4")
    )

    assert waited_s(through_host) > 1.8 * waited_s(straight)
    assert through_host.time.tokens_per_s < 0.8 * straight.time.tokens_per_s


@pytest.mark.parametrize(("strategy", "times"), [("ddp", 1), ("zero2", 8)])
def test_accumulation_amortises_the_all_reduce_of_ddp_but_not_that_of_zero_two(strategy: str, times: int) -> None:
    """DeepSpeed's stage 2 sends all gradients in every micro-step (stage_1_and_2.py ``average_tensor``)."""
    words = {"gpus": 8, "gpu": "RTX 4090", "seq_len": 512, "micro_batch": 1, "strategy": strategy}
    once, often = (
        estimate("Qwen2.5-0.5B", global_batch=8 * steps, **words)  # type: ignore[arg-type]
        for steps in (1, 8)
    )
    (before,), (after,) = ([line for line in found.traffic if line.what == "gradients"] for found in (once, often))

    assert after.bytes_per_step == times * before.bytes_per_step
    assert after.exposed_seconds == pytest.approx(times * before.exposed_seconds, rel=0.01)


def test_stage_three_of_a_small_model_on_many_machines_is_bound_by_latency() -> None:
    """At one sequence a GPU, messages that take no time to start would help more than ones that are sent at once."""
    question, plan = plan_of(
        "Qwen2.5-0.5B", gpus=256, nodes=32, gpu="H100", seq_len=512, global_batch=256, strategy="zero3", micro_batch=1
    )
    cluster = question.cluster
    at_once = replace(
        cluster,
        link=replace(cluster.link, latency_s=0.0, launch_s=0.0),
        network=replace(cluster.network, latency_s=0.0, launch_s=0.0),
    )
    wide = replace(
        cluster,
        link=replace(cluster.link, bandwidth_bytes_per_s=1e15),
        network=replace(cluster.network, bandwidth_bytes_per_s=1e15),
    )
    usual = on(question, plan, cluster)

    assert waited_s(usual) > 0.5 * usual.time.step_s
    assert waited_s(on(question, plan, at_once)) < waited_s(on(question, plan, wide))


def test_a_small_model_is_bound_by_launching_its_kernels() -> None:
    found = recommend("gpt2", gpus=1, gpu="H100", seq_len=128, global_batch=1)
    best = found.plans[0]

    assert best.time.launch_s > 0.25 * best.time.step_s
    assert best.why.endswith("of a step is launching kernels, which the GPU runs faster than they come")
