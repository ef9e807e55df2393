"""Questions to search, on machines whose memory and links a test can choose."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

from advisor.catalog.request import resolve
from advisor.cost.estimate import price
from advisor.cost.memory import footprint
from advisor.cost.question import program
from advisor.cost.results import Estimate
from advisor.cost.schedule import step_time
from advisor.search.recommend import search
from advisor.search.results import Recommendation
from advisor.search.sheet import shortfall
from advisor.specs.hardware import Cluster, Link
from advisor.specs.plan import Offload, Plan, Strategy
from advisor.specs.question import Question

GIB = 2**30


def question(
    model: str = "Qwen2.5-0.5B", *, gpu_gib: float | None = None, host_gib: float | None = None, **words: Any
) -> Question:
    """What *words* ask of A100s, each with *gpu_gib* of memory, in machines with *host_gib*."""
    found = resolve(model, **{"gpu": "A100-80GB", **words})
    return with_memory(found, gpu_gib=gpu_gib, host_gib=host_gib)


def with_memory(asked: Question, *, gpu_gib: float | None = None, host_gib: float | None = None) -> Question:
    cluster = asked.cluster
    if gpu_gib is not None:
        cluster = replace(cluster, gpu=replace(cluster.gpu, memory_bytes=int(gpu_gib * GIB)))
    if host_gib is not None:
        cluster = replace(cluster, host_memory_bytes=int(host_gib * GIB))
    return replace(asked, cluster=cluster)


def with_gpus(asked: Question, gpus: int) -> Question:
    """The same on more or fewer machines of the same kind."""
    return replace(asked, cluster=replace(asked.cluster, gpus=gpus, nodes=gpus // asked.cluster.gpus_per_node))


def with_free_communication(asked: Question) -> Question:
    """Links and host memory so fast that nothing is lost to them."""

    def free(link: Link) -> Link:
        return replace(link, bandwidth_bytes_per_s=1e30, peak_bytes_per_s=1e30, latency_s=0.0)

    cluster: Cluster = replace(
        asked.cluster,
        link=free(asked.cluster.link),
        host_link=free(asked.cluster.host_link),
        network=free(asked.cluster.network),
        cpu_memory_bandwidth_bytes_per_s=1e30,
    )
    return replace(asked, cluster=cluster)


def variant_of(plan: Plan) -> tuple[Strategy, Offload]:
    return plan.strategy, plan.offload


ASKED: dict[str, Question] = {
    "all fit": question(gpus=4, global_batch=16, seq_len=512),
    "some fit": question(gpus=4, global_batch=16, seq_len=512, gpu_gib=7),
    "offload fits": question("Qwen2.5-1.5B", gpus=4, global_batch=16, seq_len=512, gpu_gib=9.5),
    "little fits": question("Qwen2.5-7B", gpus=4, global_batch=16, gpu_gib=10),
    "nothing fits": question("Qwen2.5-3B", gpus=2, global_batch=8, gpu_gib=24, host_gib=16),
    "one GPU": question(gpus=1, global_batch=4, seq_len=256, gpu_gib=10),
    "two machines": question("Qwen2.5-3B", gpus=8, nodes=2, global_batch=24, gpu_gib=24),
    "three GPUs": question("gpt2", gpus=3, global_batch=18, seq_len=256, gpu_gib=6),
    "an encoder": question("bert-base-uncased", gpus=2, global_batch=8, seq_len=128),
    "a mixture": question("gpt-oss-20b", gpus=8, global_batch=8, seq_len=512, gpu_gib=60),
    "pure bf16": question(gpus=2, global_batch=8, seq_len=512, param_dtype="bf16", gpu_gib=8),
    "fp16": question(gpus=2, global_batch=8, seq_len=512, gpu="T4"),
}


@cache
def answer(name: str) -> Recommendation:
    """What the search says to the question called *name*."""
    return search(ASKED[name])


@cache
def priced(name: str, plan: Plan) -> Estimate:
    """The price of *plan* for the question called *name*."""
    return price(ASKED[name], plan)


@cache
def bounded(name: str, plan: Plan) -> tuple[float, float]:
    """Tokens per second of *plan* for the question called *name*, and the bytes that it lacks at least."""
    asked = ASKED[name]
    step = program(asked, plan)
    held = footprint(step, plan, asked.cluster, asked.calibration)
    timed = step_time(step.step, asked.job, plan, asked.cluster, asked.calibration)
    return float(timed.tokens_per_s), float(shortfall(held, asked.cluster, asked.margin_share(plan)))
