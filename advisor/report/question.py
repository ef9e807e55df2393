"""What was asked, as every answer repeats it: the training job, the machine, and what was assumed."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from rich.text import Text

from advisor.report.numbers import parameter_count
from advisor.specs.hardware import Cluster
from advisor.specs.job import Job
from advisor.specs.model import ModelSpec
from advisor.specs.question import Input


def question_line(model: ModelSpec, job: Job, cluster: Cluster) -> str:
    """Model, GPUs and batch in one sentence."""
    machines = f" in {cluster.nodes} machines" if cluster.nodes > 1 else ""
    trained = f", {parameter_count(model.trained_count)} of them trained" if model.frozen_count else ""
    return (
        f"{model.name} ({parameter_count(model.parameter_count)} parameters{trained}) on {cluster.gpus} × "
        f"{cluster.gpu.name}{machines}: {job.global_batch} sequences of {job.sequence_length:,} tokens per step, "
        f"{job.precision}, {job.optimizer}."
    )


def assumed_line(inputs: Iterable[Input]) -> list[Text]:
    """One line with every assumed input, by the name of the flag that replaces it; none where all was given."""
    assumed = [_named(each) for each in inputs if each.origin == "assumed"]
    if not assumed:
        return []
    return [Text(f"Assumed (flags of these names change it): {', '.join(assumed)}.", style="yellow")]


def read_lines(inputs: Iterable[Input]) -> list[Text]:
    """What was read from a training configuration or a cluster's description, and what frameworks take by default."""
    lines = []
    for origin, title in (("file", "Read"), ("default", "By default")):
        by_source = groupby((each for each in inputs if each.origin == origin), lambda each: each.source)
        if said := [f"{', '.join(map(_named, some))} ({source})" for source, some in by_source]:
            lines.append(Text(f"{title}: {', '.join(said)}."))
    return lines


def _named(each: Input) -> str:
    if each.name.endswith("_gib"):
        return f"{each.name.removesuffix('_gib').replace('_', '-')} {each.value} GiB"
    return f"{each.name.replace('_', '-')} {each.value}"


def sentence(text: str) -> str:
    """*text* with a full stop at its end."""
    return text if text.endswith((".", "!", "?")) else f"{text}."
