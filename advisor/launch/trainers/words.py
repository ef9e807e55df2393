"""What the words of a job mean to training programs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from advisor.catalog.optimizers import packages_of
from advisor.specs.job import Job
from advisor.specs.model import ModelSpec


def attention_kernel(model: ModelSpec, job: Job) -> str:
    """The job's kernel, or eager for a model whose attention transformers computes no other way."""
    return "eager" if model.eager_only else job.attention


def holds_no_weights(weights_from: str) -> bool:
    """Whether the model is given as a bare config.json."""
    return weights_from.endswith(".json")


def packages_beside(job: Job) -> str:
    """What ``pip install`` is given for what *job* asks for, after the program's own packages."""
    of_method = {"full": "", "lora": "peft", "dora": "peft", "qlora": "peft bitsandbytes"}[job.method]
    of_loss = "liger-kernel" if job.loss == "fused" else ""
    named = dict.fromkeys(f"{of_method} {of_loss} {packages_of(job)}".split())
    return "".join(f" {each}" for each in named)


def yaml_text(settings: Mapping[str, Any]) -> str:
    """*settings* as YAML, in their order."""
    import yaml

    return yaml.safe_dump(dict(settings), sort_keys=False, width=1000)
