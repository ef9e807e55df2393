"""A plan as DeepSpeed's JSON. Every value is resolved: ``auto`` would leave it to whichever program reads the file.

``auto`` stays only where it is asked for, and only for what transformers' Trainer takes from its own arguments.
"""

from __future__ import annotations

import json
from typing import Any

from advisor.specs.job import Job
from advisor.specs.plan import OffloadSettings, Plan, ZeroSettings

GRADIENT_CLIPPING = 1.0
"""Largest gradient norm, as in train.py."""

# DeepSpeed builds its CPU optimizer from the JSON alone. train.py sets the learning rate of every step anew; the rest
# are the defaults that train.py and torch.optim.AdamW share.
ADAMW: dict[str, Any] = {"lr": 2e-5, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}

# Dynamic loss scaling with the values of deepspeed 0.19.8, runtime/precision_config.py.
_LOSS_SCALING = {
    "loss_scale": 0,
    "initial_scale_power": 16,
    "loss_scale_window": 1000,
    "hysteresis": 2,
    "min_loss_scale": 1,
}


_TRAINERS_OWN = (
    ("train_batch_size",),
    ("train_micro_batch_size_per_gpu",),
    ("gradient_accumulation_steps",),
    ("gradient_clipping",),
    ("bf16", "enabled"),
    ("fp16", "enabled"),
    *(("optimizer", "params", name) for name in ADAMW),
)
"""What TrainingArguments say too: transformers 5.23, integrations/deepspeed.py ``trainer_config_process``.

Sizes in elements it would choose by the model's width: they stay what was priced.
"""


def deepspeed_json(job: Job, plan: Plan, keep_auto: bool = False) -> str:
    """The text of ``ds_config.json`` for a ZeRO plan, with *keep_auto* for transformers' Trainer to complete.

    Keys: deepspeed 0.19.8, runtime/config.py, runtime/precision_config.py and runtime/zero/config.py.
    """
    settings: dict[str, Any] = {
        "train_batch_size": int(plan.global_batch),
        "train_micro_batch_size_per_gpu": int(plan.micro_batch),
        "gradient_accumulation_steps": int(plan.accumulation_steps),
        "gradient_clipping": GRADIENT_CLIPPING,
        "bf16": _bf16(job),
        "fp16": {"enabled": True, **_LOSS_SCALING} if job.precision == "fp16" else {"enabled": False},
        # Said here because it selects DeepSpeed's optimizer class, and what gradients take.
        "data_types": {"grad_accum_dtype": plan.zero.gradient_format or job.precision},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": _zero_optimization(plan),
    }
    if plan.ulysses_parallel > 1:
        # For the model that is built before DeepSpeed knows its groups (runtime/config.py).
        settings["sequence_parallel_size"] = plan.ulysses_parallel
    if plan.offload.optimizer:
        settings["optimizer"] = {"type": "AdamW", "params": dict(ADAMW)}
    if plan.swaps:
        settings["aio"] = _aio(plan.offload_settings)
    if keep_auto:
        for path in _TRAINERS_OWN:
            _leave_to_the_trainer(settings, path)
    return json.dumps(settings, indent=2) + "\n"


def _leave_to_the_trainer(settings: dict[str, Any], path: tuple[str, ...]) -> None:
    *sections, key = path
    for section in sections:
        if section not in settings:
            return
        settings = settings[section]
    settings[key] = "auto"


def _bf16(job: Job) -> dict[str, bool]:
    enabled = {"enabled": job.precision == "bf16"}
    if job.parameter_format == "bf16":
        return enabled | {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    return enabled


def _zero_optimization(plan: Plan) -> dict[str, Any]:
    zero, stage = plan.zero, plan.strategy.zero_stage
    settings: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": zero.reduce_bucket,
        "overlap_comm": zero.overlap_communication,
    }
    if stage == 3:
        settings |= _stage3(zero)
    if zero.is_plus:
        settings |= _plus(zero)
    return settings | _offload(plan)


def _stage3(zero: ZeroSettings) -> dict[str, Any]:
    return {
        "sub_group_size": zero.sub_group,
        "stage3_prefetch_bucket_size": zero.prefetch_bucket,
        "stage3_param_persistence_threshold": zero.persistence_threshold,
        "stage3_max_live_parameters": zero.max_live_parameters,
        "stage3_max_reuse_distance": zero.max_reuse_distance,
        # Without it, saving the trained model fails.
        "stage3_gather_16bit_weights_on_model_save": True,
    }


def _plus(zero: ZeroSettings) -> dict[str, Any]:
    return {
        "zero_hpz_partition_size": zero.hpz_partition,
        "zero_quantized_weights": zero.quantized_weights,
        "zero_quantized_gradients": zero.quantized_gradients,
    }


def _offload(plan: Plan) -> dict[str, Any]:
    """Keys: deepspeed 0.19.8, runtime/zero/offload_config.py."""
    offload, held = plan.offload, plan.offload_settings
    place: dict[str, Any] = {"device": plan.offload_to, "pin_memory": held.pins}
    optimizer, parameters = dict(place), dict(place)
    if plan.swaps:
        optimizer |= {"nvme_path": held.nvme_path, "buffer_count": held.optimizer_buffers}
        parameters |= {
            "nvme_path": held.nvme_path,
            "buffer_count": held.parameter_buffers,
            "buffer_size": held.parameter_buffer,
            "max_in_cpu": held.max_in_host,
        }
    settings: dict[str, Any] = {}
    if offload.optimizer:
        settings["offload_optimizer"] = optimizer
    if offload.parameters:
        settings["offload_param"] = parameters
    return settings


def _aio(held: OffloadSettings) -> dict[str, Any]:
    """Keys and other defaults: deepspeed 0.19.8, runtime/swap_tensor/constants.py."""
    return {
        "block_size": held.block_bytes,
        "queue_depth": 8,
        "intra_op_parallelism": held.threads,
        "single_submit": False,
        "overlap_events": True,
    }
