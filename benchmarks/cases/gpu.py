"""Runs for one GPU with some 140 GB of memory, in order of worth: what is trained, how, and over how many ranks.

A plan of one GPU runs as it is; of a plan of several, the rank that holds most is emulated. Neighbours differ in one
thing where they can: number format, strategy, ranks, length, batch, accumulation, checkpointing, loss, offload,
optimizer, kernel. A ladder climbs from a batch that is predicted to fit to one that is not, and ends where the GPU's
memory does.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from advisor.catalog.calibrations import find_calibration
from advisor.catalog.gpus import find_gpu
from advisor.catalog.models import find_model
from advisor.catalog.request import usual_cluster
from advisor.cost.memory import memory
from advisor.cost.results import Memory
from advisor.specs.job import Job
from advisor.specs.plan import Checkpointing, Offload, Plan, Strategy, zero_settings
from advisor.step.build import build
from advisor.validation.accuracy import Case, with_fewer_layers

STEPS = 7
EMULATED_STEPS = 4
"""Their times mean nothing."""
MIXTURE_LAYERS = 4
"""Of Qwen3-30B-A3B, whose states alone would not fit."""
LADDER = (
    ("device_used_bytes", 0.92),
    ("device_used_bytes", 0.99),
    ("peak_allocated_bytes", 0.97),
    ("peak_allocated_bytes", 1.04),
)
"""Shares of the GPU's memory, the first with room, the third where torch has to give cached memory back."""
MOST_ON_LADDER = 96

SMALL, MIDDLE, LARGE, LLAMA = "Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-7B", "Llama-3.2-1B"
GPT2, MIXTURE = "gpt2-medium", "Qwen3-30B-A3B-Base"


@dataclass(frozen=True, slots=True, eq=False)
class GpuCase:
    """One run."""

    id: str
    """Names it among all that there are."""
    case: Case
    steps: int
    ladder: str = ""
    """Of the rungs of one ladder none is tried once a lower one has run out of memory."""

    @property
    def emulated(self) -> bool:
        return int(self.case.plan.gpus) > 1


def id_of(name: str, job: Job, plan: Plan) -> str:
    """What tells one run from the others."""
    parts = [
        name.replace(" ", "-"),
        f"{plan.strategy.value}x{plan.gpus}",
        "bf16" if job.parameter_format == "bf16" else "autocast",
        f"s{job.sequence_length}",
        f"b{plan.micro_batch}",
        f"a{plan.accumulation_steps}" if int(plan.accumulation_steps) > 1 else "",
        plan.checkpointing.value if plan.checkpointing is not Checkpointing.NONE else "",
        job.loss if job.loss != "full" else "",
        job.attention if job.attention != "sdpa" else "",
        job.optimizer if job.optimizer != "adamw-fused" else "",
        f"bucket{plan.zero.reduce_bucket}" if plan.zero != zero_settings(plan.strategy) else "",
        f"offload-{plan.offload.value}" if plan.offload is not Offload.NONE else "",
    ]
    return ".".join(filter(None, parts)).lower()


def gpu_case(model: str, strategy: str = "ddp", gpus: int = 1, ladder: str = "", **words: Any) -> GpuCase:
    """A run of *model*. Words: fields of Job and Plan, ``layers`` to which it is cut, and ``bucket`` in elements."""
    layers, bucket = words.pop("layers", None), words.pop("bucket", None)
    own = {name: words.pop(name) for name in Job.__dataclass_fields__ if name in words}
    kind = Strategy(strategy)
    plan = Plan(
        **({"strategy": kind, "gpus": gpus, "micro_batch": 1, "zero": zero_settings(kind, bucket)} | words)  # type: ignore[arg-type]
    )
    found = find_model(model)
    config = with_fewer_layers(found.config, layers) if layers else dict(found.config)
    name = f"{found.model.name} cut to {layers} layers" if layers else found.model.name
    job = Job(**({"global_batch": int(plan.global_batch)} | own))
    case = Case(name, config, job, plan)
    fullest = replace(case, rank=int(build(case.model, job, plan).rank))
    return GpuCase(id_of(name, job, plan), fullest, EMULATED_STEPS if gpus > 1 else STEPS, ladder)


PURE: dict[str, Any] = {"parameter_format": "bf16"}
FULL: dict[str, Any] = {"checkpointing": Checkpointing.FULL}
CHUNKED: dict[str, Any] = {"loss": "chunked"}
LOW: dict[str, Any] = {"offload": Offload.OPTIMIZER}
LOWER: dict[str, Any] = {"offload": Offload.OPTIMIZER_AND_PARAMETERS}


def cases(gpu: str) -> list[GpuCase]:
    """All runs, those first that are worth most. On the ladders they depend on the memory of *gpu*."""
    every = (*_core(), *_many_ranks(), *_ladders(gpu), *_variations())
    return list({one.id: one for one in every}.values())  # two rungs of a ladder may be one batch


def _core() -> Iterator[GpuCase]:
    """One of each kind."""
    yield gpu_case(MIDDLE, **PURE)
    yield gpu_case(MIDDLE)
    for strategy in ("fsdp", "zero2", "zero3", "ddp", "zero1"):
        yield gpu_case(MIDDLE, strategy, 8)
    for strategy in ("zero2", "zero3", "fsdp"):
        yield gpu_case(MIDDLE, strategy)
    yield gpu_case(MIDDLE, micro_batch=4, **FULL)
    yield gpu_case(SMALL, sequence_length=1024, micro_batch=8)
    yield gpu_case(LARGE, **PURE)
    yield gpu_case(LLAMA, micro_batch=2)
    yield gpu_case(GPT2, sequence_length=1024, micro_batch=4)
    yield gpu_case(MIXTURE, layers=MIXTURE_LAYERS, micro_batch=2, **PURE)
    yield gpu_case(MIDDLE, sequence_length=8192, **PURE, **CHUNKED)
    yield gpu_case(MIDDLE, sequence_length=16384, **PURE, **FULL, **CHUNKED)
    yield gpu_case(MIDDLE, "zero2", 8, **LOW)
    yield gpu_case(MIDDLE, "zero3", 8, **LOWER)


def _many_ranks() -> Iterator[GpuCase]:
    """4 and 64 ranks, and the larger model."""
    for strategy in ("fsdp", "zero3", "zero1", "zero2", "ddp"):
        yield gpu_case(MIDDLE, strategy, 64)
    yield gpu_case(LARGE, "fsdp", 8, sequence_length=4096, **FULL)
    yield gpu_case(LARGE, "zero3", 8, micro_batch=2, **FULL)
    yield gpu_case(LARGE, "fsdp", 64, micro_batch=4, **FULL)
    yield gpu_case(LLAMA, "fsdp", 4, micro_batch=4)
    yield gpu_case(LLAMA, "zero3", 4, micro_batch=4)
    yield gpu_case(LLAMA, "zero2", 4, micro_batch=2)
    yield gpu_case(LLAMA, "ddp", 4, micro_batch=2)
    yield gpu_case(GPT2, "fsdp", 8, sequence_length=1024, micro_batch=8)
    yield gpu_case(GPT2, "zero2", 8, sequence_length=1024, micro_batch=8)
    yield gpu_case(MIXTURE, "fsdp", 8, layers=MIXTURE_LAYERS, micro_batch=2, **FULL)


def _ladders(gpu: str) -> Iterator[GpuCase]:
    """Batches up to the first that the GPU cannot hold."""
    yield from _ladder(gpu, gpu_case(LARGE, ladder="pure bf16", sequence_length=512, **PURE))
    yield from _ladder(gpu, gpu_case(MIDDLE, ladder="autocast", sequence_length=1024))
    yield from _ladder(gpu, gpu_case(LLAMA, "fsdp", 8, ladder="FSDP", **FULL))


def _ladder(gpu: str, least: GpuCase) -> Iterator[GpuCase]:
    """The largest batches that are predicted to take no more than each share of the memory."""
    case = least.case

    def plan_of(batch: int) -> Plan:
        return replace(case.plan, micro_batch=batch)

    @lru_cache
    def held(batch: int) -> Memory:
        plan = plan_of(batch)
        cluster = usual_cluster(find_gpu(gpu), int(plan.gpus))
        return memory(build(case.model, case.job, plan, case.rank), plan, cluster, find_calibration())

    for counter, share in LADDER:
        batches = range(1, MOST_ON_LADDER)
        most = share * held(1).capacity_bytes
        batch = bisect_right(batches, most, key=lambda each: getattr(held(each), counter))
        plan = plan_of(max(1, batch))
        job = replace(case.job, global_batch=int(plan.global_batch))
        rung = replace(case, plan=plan, job=job)
        yield GpuCase(id_of(case.name, job, plan), rung, EMULATED_STEPS, least.ladder)


def _variations() -> Iterator[GpuCase]:
    """The same questions with other settings, one at a time."""
    yield gpu_case(MIDDLE, accumulation_steps=2)
    for strategy in ("fsdp", "zero2", "zero3", "zero1"):
        yield gpu_case(MIDDLE, strategy, 8, accumulation_steps=2)
    yield gpu_case(MIDDLE, "zero1")
    yield gpu_case(MIDDLE, "zero0")
    yield gpu_case(MIDDLE, "fsdp-grad-op", 8)
    yield gpu_case(MIDDLE, "zero2", 8, bucket=50_000_000)
    yield gpu_case(MIDDLE, "zero3", 8, bucket=50_000_000)
    yield gpu_case(MIDDLE, "zero1", 8, **LOW)
    yield gpu_case(MIDDLE, "zero3", 8, **LOW)
    yield gpu_case(MIDDLE, sequence_length=512, **PURE)
    yield gpu_case(MIDDLE, sequence_length=8192, **FULL)
    yield gpu_case(MIDDLE, optimizer="adamw-foreach")
    yield gpu_case(MIDDLE, attention="eager", sequence_length=1024)
    yield gpu_case(MIDDLE, micro_batch=8, **PURE)
    yield gpu_case(SMALL, sequence_length=512, micro_batch=16)
    yield gpu_case(SMALL, micro_batch=8, **FULL, **CHUNKED)
    yield gpu_case(LLAMA, sequence_length=8192, **PURE)
    yield gpu_case(LARGE, sequence_length=4096, micro_batch=2, **PURE, **FULL, **CHUNKED)
    yield gpu_case(GPT2, sequence_length=1024, micro_batch=16, **FULL)
    yield gpu_case(MIXTURE, layers=MIXTURE_LAYERS, sequence_length=4096, **FULL)
