"""What was predicted, as the small file that train.py reads to show it beside what it measures."""

from __future__ import annotations

import json
from functools import partial

from advisor.cost.results import Estimate
from advisor.launch.training import LaunchFile


def prediction_file(estimate: Estimate) -> LaunchFile:
    """``prediction.json``: rates over all GPUs, bytes of the fullest one, and the batch that they hold for."""
    return LaunchFile("prediction.json", partial(_text, estimate))


def _text(estimate: Estimate) -> str:
    plan, cluster, time, memory = estimate.plan, estimate.cluster, estimate.time, estimate.memory
    flop_per_token = time.flop_per_s_per_gpu / time.tokens_per_s_per_gpu
    prediction = {
        "predicted_for": f"{cluster.gpus} x {cluster.gpu.name}",
        "processes": int(plan.gpus),
        "micro_batch": int(plan.micro_batch),
        "accumulation_steps": int(plan.accumulation_steps),
        "sequence_length": estimate.job.sequence_length,
        "tokens_per_s": round(time.tokens_per_s),
        "mfu": round(time.mfu, 4),
        "peak_allocated_bytes": int(memory.peak_allocated_bytes),
        "peak_reserved_bytes": int(memory.peak_reserved_bytes),
        # MFU is model FLOPs, without recomputation, over the dense peak of the number format.
        "flop_per_token": round(flop_per_token),
        "peak_flop_per_s_per_gpu": round(time.flop_per_s_per_gpu / time.mfu),
    }
    return json.dumps(prediction, indent=2) + "\n"
