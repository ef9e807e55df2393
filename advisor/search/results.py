"""What a search answers: the best plan, the best of each strategy, and the reason why each other lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from advisor.cost.results import Estimate, Input, TrainingCost
from advisor.specs.hardware import Cluster
from advisor.specs.job import Job
from advisor.specs.model import ModelSpec
from advisor.specs.plan import Plan
from advisor.specs.training import CURRENCY

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejected:
    """A strategy none of whose plans will do: its nearest miss, the reason, and the cheapest way out."""

    plan: Plan
    why: str
    short_by_bytes: int
    """Device or host memory that the nearest miss lacks; 0 where memory is not the reason."""
    remedy: str | None
    """The cheapest change that would make it fit; None where none was found."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recommendation:
    """The answer to: does it fit, what is fastest?"""

    model: ModelSpec
    job: Job
    cluster: Cluster
    inputs: tuple[Input, ...]
    plans: tuple[Estimate, ...]
    """The best plan that fits of each strategy and offload, best first; empty where nothing fits."""
    rejected: tuple[Rejected, ...]
    headline: str
    """The verdict in one line."""
    fewest_gpus: int | None
    """Where nothing fits: the fewest GPUs of this kind on which something would; None if not found."""
    considered: int
    """Plans priced."""
    seconds: float
    """Time the search took."""
    warnings: tuple[str, ...] = ()
    pareto: tuple[Estimate, ...] = ()
    """Of all plans considered those that none beats in time and memory, fastest first; empty where not asked for."""

    @property
    def best(self) -> Estimate | None:
        return self.plans[0] if self.plans else None

    def to_frame(self) -> pandas.DataFrame:
        """One row per plan, best first, in base units."""
        import pandas

        return pandas.DataFrame([row(estimate) for estimate in self.plans])


def row(estimate: Estimate) -> dict[str, str | int | float | None]:
    """One plan as flat columns in base units, with those of the whole training where there is one."""
    plan, memory, time = estimate.plan, estimate.memory, estimate.time
    columns: dict[str, str | int | float | None] = {
        "strategy": plan.strategy.value,
        "offload": plan.offload.value,
        "gpus": int(plan.gpus),
        "dp": int(plan.data_parallel),
        "tp": plan.tensor_parallel,
        "pp": int(plan.pipeline_parallel),
        "vpp": int(plan.virtual_stages),
        "cp": plan.context_parallel,
        "sp": plan.ulysses_parallel,
        "ep": plan.expert_parallel,
        "sequence_parallel": plan.sequence_parallel,
        "micro_batch": int(plan.micro_batch),
        "accumulation_steps": int(plan.accumulation_steps),
        "checkpointing": plan.checkpointing.value,
        "verdict": estimate.verdict,
        "states_bytes": memory.states_bytes,
        "peak_allocated_bytes": memory.peak_allocated_bytes,
        "peak_reserved_bytes": memory.peak_reserved_bytes,
        "device_used_bytes": memory.device_used_bytes,
        "low_bytes": memory.low_bytes,
        "high_bytes": memory.high_bytes,
        "host_bytes": memory.host_bytes,
        "traffic_bytes": sum(line.bytes_per_step for line in estimate.traffic),
        "step_s": time.step_s,
        "exposed_communication_s": time.exposed_communication_s,
        "tokens_per_s": time.tokens_per_s,
        "mfu": time.mfu,
        "why": estimate.why,
    }
    if estimate.training:
        columns |= training_columns(estimate.training)
    return columns


def training_columns(training: TrainingCost) -> dict[str, str | int | float | None]:
    """A whole training run as flat columns, in hours, US dollars and kilowatt-hours."""
    price = training.price
    return {
        "tokens": training.tokens,
        "steps": training.steps,
        "hours": training.hours,
        "low_hours": training.low_hours,
        "high_hours": training.high_hours,
        "gpu_hours": training.gpu_hours,
        "cost": training.cost_usd,
        "low_cost": training.low_cost_usd,
        "high_cost": training.high_cost_usd,
        "currency": CURRENCY if price else None,
        "price_per_gpu_hour": price.usd_per_gpu_hour if price else None,
        "price_source": price.source if price else None,
        "energy_kwh": training.energy_kwh,
    }
