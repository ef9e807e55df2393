"""The words of a search: those of a question, and what of the plans it is kept to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from advisor.catalog.request import JobWords, Words
from advisor.errors import SpecError
from advisor.specs.layout import GivenLayout, LayoutWords
from advisor.specs.plan import Checkpointing
from advisor.specs.question import Input, Question


class SearchWords(Words, LayoutWords, total=False):
    """On given GPUs."""


class CountedWords(JobWords, LayoutWords, total=False):
    """On counts of GPUs that are compared."""


def parted(words: Mapping[str, Any]) -> tuple[LayoutWords, Words]:
    """What *words* say of layouts, and what of the question."""
    own = LayoutWords.__annotations__
    layout = {name: value for name, value in words.items() if name in own}
    asked = {name: value for name, value in words.items() if name not in own}
    return cast(LayoutWords, layout), cast(Words, asked)


def kept_to_layout(question: Question, words: LayoutWords) -> Question:
    """The same question, its search kept to what *words* say of Megatron's plans.

    Raises SpecError for words that contradict each other, or that are for another trainer.
    """
    said = {name: value for name, value in words.items() if value is not None}
    megatron = question.job.trainer == "megatron"
    if said and not megatron:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in said)
        raise SpecError(
            f"{flags}: the search over what trainer {question.job.trainer} runs finds micro-batch and checkpointing by "
            "itself and cuts no layers; give --trainer megatron to search layouts, or price one plan by estimate"
        )
    if megatron and (question.wanted.strategies or question.wanted.offload):
        raise SpecError("--strategy and --offload are not for --trainer megatron, which has plans of its own")
    checkpointing = said.get("checkpointing")
    if checkpointing is not None and checkpointing not in {each.value for each in Checkpointing}:
        known = ", ".join(each.value for each in Checkpointing)
        raise SpecError(f"--checkpointing must be one of {known}, got {checkpointing!r}")
    given = GivenLayout(
        tensor_parallel=words.get("tp"),
        sequence_parallel=words.get("sequence_parallel"),
        pipeline_parallel=words.get("pp"),
        virtual_stages=words.get("vpp"),
        context_parallel=words.get("cp"),
        expert_parallel=words.get("ep"),
        micro_batch=words.get("micro_batch"),
        checkpointing=None if checkpointing is None else Checkpointing(checkpointing),
    )
    inputs = (Input(name, value, "given") for name, value in said.items())  # type: ignore[arg-type]
    return replace(question, given_layout=given, inputs=(*question.inputs, *inputs))
