"""Answers for programs: JSON objects and CSV, in base units."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from advisor.catalog.clusters import ClusterProfile
from advisor.cost.inference import InferenceEstimate
from advisor.cost.results import Estimate, Memory, StepTime, TrafficLine
from advisor.search.compare import Comparison
from advisor.search.gpu_types import GpuRanking
from advisor.search.results import Recommendation, row, training_columns
from advisor.specs.hardware import Gpu
from advisor.specs.model import ModelSpec
from advisor.specs.plan import Plan, Strategy
from advisor.specs.question import Input

if TYPE_CHECKING:
    from advisor.launch.files import Launch

SCHEMA = "advisor/1"

Json = dict[str, object]


def json_text(answer: Mapping[str, object]) -> str:
    """*answer* as one JSON object, readable by any strict parser: ASCII, and no NaN."""
    return json.dumps(answer, indent=2, allow_nan=False)


def csv_text(rows: Sequence[Mapping[str, object]]) -> str:
    """*rows* under a header taken from the first; empty without rows."""
    if not rows:
        return ""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def estimate_object(estimate: Estimate) -> Json:
    """One priced plan."""
    return {
        "schema": SCHEMA,
        "inputs": inputs_object(estimate.inputs),
        "model": model_object(estimate.model),
        "plan": plan_object(estimate.plan),
        "memory": _memory(estimate.memory),
        "traffic": [_traffic(line) for line in estimate.traffic],
        "time": _time(estimate.time),
        "training": training_columns(estimate.training) if estimate.training else None,
        "verdict": estimate.verdict,
        "why": estimate.why,
        "warnings": list(estimate.warnings),
    }


def inference_object(estimate: InferenceEstimate) -> Json:
    """One way to generate, priced."""
    inference, plan = estimate.inference, estimate.plan
    return {
        "schema": SCHEMA,
        "inputs": inputs_object(estimate.inputs),
        "model": {
            "name": estimate.model.name,
            "family": estimate.model.family,
            "parameters": estimate.model.parameter_count,
        },
        "plan": {
            "gpus": plan.gpus,
            "tp": plan.tensor_parallel,
            "copies": plan.copies,
            **asdict(inference),
        },
        "memory": {**_memory(estimate.memory), "kv_cache_bytes": estimate.kv_cache_bytes},
        "largest_batch": estimate.largest_batch,
        "longest_context": estimate.longest_context,
        "time": {
            "prefill": asdict(estimate.prefill),
            "decode": asdict(estimate.decode),
            "call_s": estimate.call_s,
            "new_tokens": estimate.new_tokens,
            "tokens_per_s": estimate.tokens_per_s,
        },
        "verdict": estimate.verdict,
        "why": estimate.why,
        "warnings": list(estimate.warnings),
    }


def inference_row(estimate: InferenceEstimate) -> Json:
    """The same as flat columns, without what fills the memory."""
    memory = estimate.memory
    return {
        "model": estimate.model.name,
        "gpu": estimate.cluster.gpu.name,
        "gpus": estimate.plan.gpus,
        "tp": estimate.plan.tensor_parallel,
        **asdict(estimate.inference),
        "states_bytes": memory.states_bytes,
        "kv_cache_bytes": estimate.kv_cache_bytes,
        "peak_allocated_bytes": memory.peak_allocated_bytes,
        "peak_reserved_bytes": memory.peak_reserved_bytes,
        "device_used_bytes": memory.device_used_bytes,
        "largest_batch": estimate.largest_batch,
        "longest_context": estimate.longest_context,
        "prefill_s": estimate.prefill.seconds,
        "decode_s": estimate.decode.seconds,
        "tokens_per_s": estimate.tokens_per_s,
        "verdict": estimate.verdict,
    }


def recommendation_object(recommendation: Recommendation, launch: Launch | None) -> Json:
    """The whole answer of a search; ``best`` and ``launch`` are null where nothing fits."""
    plans = [estimate_object(estimate) for estimate in recommendation.plans]
    return {
        "schema": SCHEMA,
        "headline": recommendation.headline,
        "inputs": inputs_object(recommendation.inputs),
        "model": model_object(recommendation.model),
        "best": plans[0] if plans else None,
        "plans": plans,
        "rejected": [
            {
                "plan": plan_object(rejected.plan),
                "why": rejected.why,
                "short_by_bytes": rejected.short_by_bytes,
                "remedy": rejected.remedy,
            }
            for rejected in recommendation.rejected
        ],
        "fewest_gpus": recommendation.fewest_gpus,
        "pareto": [row(estimate) for estimate in recommendation.pareto] or None,
        "launch": _launch(launch) if launch else None,
        "considered": recommendation.considered,
        "seconds": recommendation.seconds,
        "warnings": list(recommendation.warnings),
    }


def comparison_object(comparison: Comparison) -> Json:
    """Every count with its plans; a count on which nothing fits has none, and says why."""
    return {
        "schema": SCHEMA,
        "scaling": comparison.scaling,
        "inputs": inputs_object(comparison.inputs),
        "model": model_object(comparison.model),
        "fewest_gpus": comparison.fewest_gpus,
        "counts": [
            {
                "gpus": scale.cluster.gpus,
                "nodes": scale.cluster.nodes,
                "global_batch": scale.job.global_batch,
                "why_none": scale.why_none or None,
                "losses": [asdict(loss) for loss in comparison.losses(scale.plans[0])] if scale.plans else [],
                "plans": [_compared(comparison, plan) for plan in scale.plans],
            }
            for scale in comparison.scales
        ],
        "considered": comparison.considered,
        "seconds": comparison.seconds,
        "warnings": list(comparison.warnings),
    }


def comparison_rows(comparison: Comparison) -> list[Json]:
    """One row per count and strategy that fits, the best of each count first."""
    return [
        {"nodes": scale.cluster.nodes, "rank": rank, **_compared(comparison, plan)}
        for scale in comparison.scales
        for rank, plan in enumerate(scale.plans, 1)
    ]


def _compared(comparison: Comparison, plan: Estimate) -> Json:
    return {**row(plan), "speed_up": comparison.speed_up(plan), "efficiency": comparison.efficiency(plan)}


def ranking_object(ranking: GpuRanking, launch: Launch | None) -> Json:
    """Every GPU with its best plan; ``best`` and ``launch`` are null where nothing fits."""
    return {
        "schema": SCHEMA,
        "objective": ranking.objective,
        "inputs": inputs_object(ranking.inputs),
        "model": model_object(ranking.model),
        "best": estimate_object(ranking.best) if ranking.best else None,
        "gpus": [
            {
                "gpu": choice.cluster.gpu.name,
                "why_none": choice.why_none or None,
                "best": row(choice.best) if choice.best else None,
            }
            for choice in ranking.choices
        ],
        "pareto": [_on_gpu(plan) for plan in ranking.pareto] or None,
        "launch": _launch(launch) if launch else None,
        "considered": ranking.considered,
        "seconds": ranking.seconds,
        "warnings": list(ranking.warnings),
    }


def ranking_rows(ranking: GpuRanking) -> list[Json]:
    """One row per GPU that has a plan, best first."""
    return [_on_gpu(plan) for plan in ranking.plans]


def _on_gpu(plan: Estimate) -> Json:
    return {"gpu": plan.cluster.gpu.name, **row(plan)}


def launch_object(estimate: Estimate, launch: Launch) -> Json:
    """What starts one priced plan."""
    return {
        "schema": SCHEMA,
        "inputs": inputs_object(estimate.inputs),
        "model": model_object(estimate.model),
        "plan": plan_object(estimate.plan),
        "verdict": estimate.verdict,
        "why": estimate.why,
        "launch": _launch(launch),
        "warnings": list(estimate.warnings),
    }


def gpu_row(gpu: Gpu) -> Json:
    """One GPU as flat columns; rates the GPU does not have are null."""
    return {
        "name": gpu.name,
        "aliases": " ".join(gpu.aliases),
        "architecture": gpu.architecture,
        "compute_capability": gpu.compute_capability,
        "memory_bytes": gpu.memory_bytes,
        "memory_bandwidth_bytes_per_s": gpu.memory_bandwidth_bytes_per_s,
        **{f"{number}_flop_per_s": gpu.peak_flop_per_s.get(number) for number in NUMBER_FORMATS},
        "link": gpu.link,
        "host_link": gpu.host_link,
        "multiprocessors": gpu.multiprocessors,
        "power_w": gpu.power_w,
        "assumed_fields": " ".join(gpu.assumed_fields),
        "source": gpu.source,
    }


def cluster_row(cluster: ClusterProfile) -> Json:
    """One cluster as flat columns; rates are one GPU's where all of a machine are used."""
    network, topology = cluster.network(cluster.gpus_per_node), cluster.topology
    return {
        "name": cluster.name,
        "aliases": " ".join(cluster.aliases),
        "gpu": cluster.gpu.name,
        "gpus_per_node": cluster.gpus_per_node,
        "nodes": cluster.nodes,
        "link": cluster.link.name,
        "link_bytes_per_s": cluster.link.bandwidth_bytes_per_s,
        "islands": topology.title if topology else None,
        "between": topology.between.name if topology else None,
        "network": network.name if network else None,
        "network_bytes_per_s": network.bandwidth_bytes_per_s if network else None,
        "host_memory_bytes": cluster.host_memory_bytes,
        "source": cluster.source,
        "notes": cluster.notes,
    }


NUMBER_FORMATS = ("fp32", "tf32", "fp16", "bf16", "fp8")
"""Number formats whose dense peak a GPU may have."""


def inputs_object(inputs: Iterable[Input]) -> Json:
    """Each input with its value and its origin."""
    return {
        each.name: {"value": each.value, "origin": each.origin} | ({"source": each.source} if each.source else {})
        for each in inputs
    }


def model_object(model: ModelSpec) -> Json:
    """A model by name and size."""
    return {
        "name": model.name,
        "family": model.family,
        "parameters": model.parameter_count,
        "trainable_parameters": model.trained_count,
    }


def plan_object(plan: Plan) -> Json:
    """One plan's choices."""
    return {
        "strategy": plan.strategy.value,
        "gpus": int(plan.gpus),
        "dp": int(plan.data_parallel),
        "tp": plan.tensor_parallel,
        "pp": int(plan.pipeline_parallel),
        "vpp": int(plan.virtual_stages),
        "cp": plan.context_parallel,
        "cp_exchange": plan.fsdp.context_exchange if plan.strategy.is_fsdp and plan.context_parallel > 1 else None,
        "sp": plan.ulysses_parallel,
        "sequence_parallel": plan.sequence_parallel,
        "distributed_optimizer": plan.megatron.distributed_optimizer if plan.strategy is Strategy.MEGATRON else None,
        "ep": plan.expert_parallel,
        "etp": plan.expert_tensor_parallel,
        "micro_batch": int(plan.micro_batch),
        "grad_accum": int(plan.accumulation_steps),
        "global_batch": int(plan.global_batch),
        "checkpointing": plan.checkpointing.value,
        "offload": plan.offload.value,
        "offload_to": plan.offload_to,
        "zero": asdict(plan.zero) if plan.strategy.zero_stage is not None else None,
    }


def _memory(memory: Memory) -> Json:
    return {
        "capacity_bytes": memory.capacity_bytes,
        "states_bytes": memory.states_bytes,
        "peak_allocated_bytes": memory.peak_allocated_bytes,
        "peak_reserved_bytes": memory.peak_reserved_bytes,
        "device_used_bytes": memory.device_used_bytes,
        "low_bytes": memory.low_bytes,
        "high_bytes": memory.high_bytes,
        "peak_phase": memory.peak_phase,
        "peak_label": memory.peak_label,
        "rank": memory.rank,
        "fullest_rank": memory.fullest,
        "allocator": memory.allocator,
        "cache_releases": memory.cache_releases,
        "ledger": [_line(*line) for line in memory.ledger],
        "timeline": [
            {"phase": phase.phase, "bytes": phase.peak_bytes, "end_bytes": phase.end_bytes} for phase in memory.timeline
        ],
        "host_bytes": memory.host_bytes,
        "host_capacity_bytes": memory.host_capacity_bytes,
        "host_ledger": [_line(*line) for line in memory.host_ledger],
        "nvme_bytes": memory.nvme_bytes,
        "nvme_capacity_bytes": memory.nvme_capacity_bytes,
        "nvme_ledger": [_line(*line) for line in memory.nvme_ledger],
    }


def _line(category: str, label: str, size_bytes: int) -> Json:
    return {"category": category, "label": label, "bytes": size_bytes}


def _traffic(line: TrafficLine) -> Json:
    return {
        "what": line.what,
        "collective": line.collective,
        "link": line.link,
        "bytes_per_step": line.bytes_per_step,
        "seconds": line.seconds,
        "exposed_seconds": line.exposed_seconds,
    }


def _time(time: StepTime) -> Json:
    return {
        "step_s": time.step_s,
        "low_s": time.low_s,
        "high_s": time.high_s,
        "compute_s": time.compute_s,
        "launch_s": time.launch_s,
        "bubble_s": time.bubble_s,
        "exposed_comm_s": time.exposed_communication_s,
        "optimizer_s": time.optimizer_s,
        "tokens_per_s": time.tokens_per_s,
        "tokens_per_s_per_gpu": time.tokens_per_s_per_gpu,
        "mfu": time.mfu,
        "tflops_per_gpu": time.flop_per_s_per_gpu / 1e12,
    }


def _launch(launch: Launch) -> Json:
    return {
        "command": launch.command,
        "env": dict(launch.environment),
        "files": [{"name": file.name, "text": file.text} for file in launch.files],
    }
