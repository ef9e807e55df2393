"""The words of a search: those of a question, and what of the plans it is kept to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from advisor.catalog.request import JobWords, Words
from advisor.specs.layout import LayoutWords


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
