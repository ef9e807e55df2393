"""A question, resolved: which model, job and cluster are meant, and where each input came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from advisor.specs.calibration import Calibration
from advisor.specs.hardware import Cluster
from advisor.specs.job import Job
from advisor.specs.model import ModelSpec

Origin = Literal["given", "found", "assumed", "file", "default"]
"""``given``: by a flag or an argument. ``found``: on this machine. ``assumed``: because nobody said. ``file``: read
from a training configuration. ``default``: what a framework takes where that configuration is silent."""


@dataclass(frozen=True, slots=True)
class Input:
    """One resolved input as it is shown: what was taken, and where it came from."""

    name: str
    value: str | int | float
    origin: Origin
    source: str = ""
    """File and key, or whose default it is, for the last two origins."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What is asked, in full."""

    model: ModelSpec
    weights_from: str
    """What transformers loads the model from: a Hub id, a folder, or a file that holds only its configuration."""
    config: Mapping[str, object] = field(default_factory=dict)
    """The fields of its ``config.json``."""
    job: Job
    cluster: Cluster
    calibration: Calibration
    margin_share: float
    """Share of device memory that is to stay free."""
    inputs: tuple[Input, ...]
    warnings: tuple[str, ...] = ()
