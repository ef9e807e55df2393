"""Strategies by GPU counts: what each count is good for, how well it scales, and where the time goes that is lost."""

from __future__ import annotations

import time as clock
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from advisor.cost.question import ask
from advisor.cost.results import Estimate
from advisor.errors import SpecError
from advisor.search.contenders import contenders, why_none
from advisor.search.explain import fewest_that_would_do
from advisor.search.layouts import layout_space
from advisor.search.rank import ranked
from advisor.search.space import kept_to, micro_batches, variants
from advisor.search.words import kept_to_layout, parted
from advisor.specs.hardware import Cluster
from advisor.specs.job import Job
from advisor.specs.model import ModelSpec
from advisor.specs.plan import Checkpointing
from advisor.specs.question import Input, Question

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from advisor.catalog.request import JobWords, Words
    from advisor.search.words import CountedWords

Scaling = Literal["strong", "weak"]
"""Strong: one global batch for all counts. Weak: it grows with the count, each GPU keeping its share."""

USUAL_COUNTS = (1, 2, 4, 8, 16)
USUAL_GPUS_PER_NODE = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """One GPU count with the best plan of each strategy that fits."""

    job: Job
    cluster: Cluster
    plans: tuple[Estimate, ...]
    """Best first; empty where nothing fits."""
    why_none: str
    """Why nothing fits, or the batch does not divide; empty where there are plans."""
    too_large: bool
    """Whether memory is why."""
    considered: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """A share of a step's time that would not be there if all scaled as well as on the fewest GPUs."""

    what: str
    share: float
    """Of the step; negative where it takes less than there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The answer to: on how many GPUs, and by which strategy?"""

    model: ModelSpec
    scaling: Scaling
    inputs: tuple[Input, ...]
    """Those that hold for every count."""
    scales: tuple[Scale, ...]
    """By GPU count, fewest first."""
    fewest_beyond: int | None
    """Where nothing fits on any of the counts: the fewest GPUs above them on which something would, if found."""
    way_out: str
    """The same in words; empty where something fits or none was found."""
    seconds: float
    warnings: tuple[str, ...] = ()

    @property
    def base(self) -> Estimate | None:
        """The best plan on the fewest GPUs that fit, which the others are measured by."""
        return next((scale.plans[0] for scale in self.scales if scale.plans), None)

    @property
    def fewest_gpus(self) -> int | None:
        """The fewest GPUs of those asked about on which something fits, else the fewest above them."""
        return int(self.base.plan.gpus) if self.base else self.fewest_beyond

    @property
    def fastest(self) -> Estimate | None:
        """The best plan on the count that is fastest."""
        best = [scale.plans[0] for scale in self.scales if scale.plans]
        return max(best, key=lambda estimate: estimate.time.tokens_per_s, default=None)

    @property
    def considered(self) -> int:
        """Plans priced."""
        return sum(scale.considered for scale in self.scales)

    def speed_up(self, estimate: Estimate) -> float:
        """How many times the tokens per second of the best plan on the fewest GPUs."""
        assert self.base
        return estimate.time.tokens_per_s / self.base.time.tokens_per_s

    def efficiency(self, estimate: Estimate) -> float:
        """The same for each GPU."""
        assert self.base
        return estimate.time.tokens_per_s_per_gpu / self.base.time.tokens_per_s_per_gpu

    def losses(self, estimate: Estimate) -> tuple[Loss, ...]:
        """What costs the efficiency that *estimate* lacks, most first; the shares sum to 1 - efficiency."""
        assert self.base
        return losses(self.base, estimate)


def compare(
    model: str,
    *,
    gpus: Sequence[int] = USUAL_COUNTS,
    gpus_per_node: int = USUAL_GPUS_PER_NODE,
    scaling: Scaling = "strong",
    strategy: str | None = None,
    offload: str | None = None,
    **words: Unpack[CountedWords],
) -> Comparison:
    """The best plan of each strategy for *model* on each of the counts *gpus*.

    Counts beyond *gpus_per_node* are whole machines. Words: those of :func:`advisor.recommend` but for ``nodes``; with
    *scaling* weak, ``global_batch`` is that of the fewest GPUs. A count over which the batch does not divide is an
    answer, and so is one on which no plan of *strategy* and *offload* differs from simpler ones. Raises SpecError or
    UnknownNameError for words that make no sense.
    """
    started = clock.perf_counter()
    layout, asked = parted(words)
    counts = sorted(set(gpus))
    if gpus_per_node < 1:
        raise SpecError(f"--gpus-per-node must be at least 1, got {gpus_per_node}")
    if not counts or counts[0] < 1:
        raise SpecError(f"a comparison needs counts of at least one GPU, got {', '.join(map(str, counts)) or 'none'}")
    if scaling not in ("strong", "weak"):
        raise SpecError(f"--scaling must be strong or weak, got {scaling!r}")
    first = _question(model, counts[0], gpus_per_node, asked)
    batch = first.job.global_batch
    if scaling == "weak" and first.job.trainer != "megatron":
        micro_batches(first.job, counts[0])
    scales, question = [], first
    for count in counts:
        if scaling == "weak":
            asked = {**asked, "global_batch": batch * count // counts[0]}
        question = kept_to(_question(model, count, gpus_per_node, asked), strategy, offload)
        question = kept_to_layout(question, layout)
        scales.append(scale_of(question))
    fewest, way_out = None, ""
    if scales[-1].too_large and not any(scale.plans for scale in scales):
        fewest, way_out = fewest_that_would_do(question, {})
    return Comparison(
        model=first.model,
        scaling=scaling,
        inputs=_common_inputs(first, question),
        scales=tuple(scales),
        fewest_beyond=fewest,
        way_out=way_out,
        seconds=clock.perf_counter() - started,
        warnings=first.warnings,
    )


def _question(model: str, count: int, gpus_per_node: int, words: JobWords) -> Question:
    nodes = -(-count // gpus_per_node)
    if nodes > 1 and count % gpus_per_node:
        raise SpecError(
            f"{count} GPUs are no whole machines of {gpus_per_node}; give a multiple such as {nodes * gpus_per_node}, "
            "or another --gpus-per-node"
        )
    return ask(model, **cast("Words", {**words, "gpus": count, "nodes": nodes}))


def _common_inputs(first: Question, largest: Question) -> tuple[Input, ...]:
    """Inputs of the *largest* count that hold for all; the batch is that of the *first*."""
    gpus = largest.cluster.gpus_per_node
    changed = {"global_batch": next(each for each in first.inputs if each.name == "global_batch")}
    for each in largest.inputs:
        if each.name == "host_memory_gib" and each.origin == "assumed":
            changed[each.name] = Input("host_memory", f"{int(each.value) // gpus} GiB for each GPU", "assumed")
    return tuple(changed.get(each.name, each) for each in largest.inputs if each.name not in ("gpus", "nodes"))


def scale_of(question: Question) -> Scale:
    """The best plan of each strategy for *question*, or why there is none."""
    try:
        if question.job.trainer == "megatron":
            layout_space(question)
        else:
            micro_batches(question.job, question.cluster.gpus)
            variants(question)
    except SpecError as error:
        return Scale(
            job=question.job,
            cluster=question.cluster,
            plans=(),
            why_none=str(error),
            too_large=False,
            considered=0,
        )
    found = contenders(question)
    plans = ranked(found.best, "time")
    return Scale(
        job=question.job,
        cluster=question.cluster,
        plans=plans,
        why_none="" if plans else why_none(question, found),
        too_large=not plans and not found.beyond and bool(found.too_large),
        considered=found.considered,
    )


def losses(base: Estimate, scaled: Estimate) -> tuple[Loss, ...]:
    """Of a step of *scaled* the shares in which each GPU takes longer for a token than in *base*, most first.

    They sum to 1 - efficiency, because the parts of a step sum to its time.
    """
    before, after = _gpu_seconds_per_token(base), _gpu_seconds_per_token(scaled)
    whole = sum(after.values())
    titles = _titles(base, scaled)
    found = [
        Loss(what=titles[part], share=(after.get(part, 0.0) - before.get(part, 0.0)) / whole)
        for part in before.keys() | after.keys()
    ]
    return tuple(sorted(found, key=lambda loss: (-loss.share, loss.what)))


Part = tuple[str, str]
COMPUTING, LAUNCHING, UPDATING = ("computing", ""), ("launching kernels", ""), ("updating the weights", "")


def _gpu_seconds_per_token(estimate: Estimate) -> dict[Part, float]:
    """GPU-seconds per token of each part of a step: compute, launches, update, and each purpose that it waits for."""
    time = estimate.time
    found = {COMPUTING: time.compute_s, LAUNCHING: time.launch_s, UPDATING: time.optimizer_s}
    for line in estimate.traffic:
        part = (line.what, line.collective)
        found[part] = found.get(part, 0.0) + line.exposed_seconds
    per_token = 1 / (time.tokens_per_s_per_gpu * time.step_s)
    return {part: seconds * per_token for part, seconds in found.items()}


def _titles(base: Estimate, scaled: Estimate) -> dict[Part, str]:
    """What each part is called: a transfer by its way, compute by what makes it slower."""
    titles = {
        (line.what, line.collective): f"waiting for {line.what} ({line.collective} over {line.link})"
        for line in (*base.traffic, *scaled.traffic)
    }
    one, other = base.plan, scaled.plan
    ways = ["computing"]
    if one.checkpointing is not other.checkpointing:
        again = other.checkpointing is Checkpointing.FULL
        ways.append("activations again" if again else "no activations again")
    if one.micro_batch != other.micro_batch:
        ways.append(f"{other.micro_batch} sequences at a time in place of {one.micro_batch}")
    if one.framework != other.framework:
        ways.append(f"by {other.framework_title} in place of {one.framework_title}")
    return titles | {COMPUTING: " ".join(ways), LAUNCHING: LAUNCHING[0], UPDATING: UPDATING[0]}
