"""A question, resolved: which model, job and cluster are meant, and where each input came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from advisor.specs.calibration import Calibration, likeness
from advisor.specs.hardware import Cluster
from advisor.specs.job import Job
from advisor.specs.layout import GivenLayout
from advisor.specs.model import ModelSpec
from advisor.specs.plan import Offload, Plan
from advisor.specs.training import Training

Origin = Literal["given", "found", "assumed", "file", "default"]
"""``given``: by a flag or an argument. ``found``: on this machine. ``assumed``: because nobody said. ``file``: read
from a training configuration or a cluster's description. ``default``: what a framework takes where that configuration
is silent."""


@dataclass(frozen=True, slots=True)
class Input:
    """One resolved input as it is shown: what was taken, and where it came from."""

    name: str
    value: str | int | float
    origin: Origin
    source: str = ""
    """File and key, or whose default it is, for the last two origins."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What a search is kept to; nothing said is no limit."""

    strategies: tuple[str, ...] = ()
    """Names of strategies, or patterns of names such as ``zero*``."""
    offload: Offload | None = None


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
    given_margin_share: float | None = None
    """Share of device memory that is to stay free; None leaves it to the calibration."""
    training: Training | None = None
    wanted: Wanted = Wanted()
    given_layout: GivenLayout = field(default_factory=GivenLayout)
    """What of the plan a search keeps to."""
    inputs: tuple[Input, ...]
    warnings: tuple[str, ...] = ()

    def margin_share(self, plan: Plan) -> float:
        """Share of device memory that is to stay free beside *plan*."""
        if self.given_margin_share is not None:
            return self.given_margin_share
        return self.calibration.margin_share(likeness(plan, self.cluster.gpu.compute_capability))
