"""The command line with answers made by hand behind it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from click.testing import CliRunner, Result
from report.samples import made_estimate, made_recommendation

from advisor.cli.main import cli
from advisor.cost.results import Estimate
from advisor.search.results import Recommendation

Run = Callable[..., Result]


@dataclass
class Api:
    """Stands where the search and the estimate are, answers what it holds, and keeps what it was asked."""

    recommendation: Recommendation = field(default_factory=made_recommendation)
    estimate: Estimate = field(default_factory=made_estimate)
    error: BaseException | None = None
    asked: list[dict[str, Any]] = field(default_factory=list)

    def recommend(self, **words: Any) -> Recommendation:
        self._note(words)
        return self.recommendation

    def price(self, **words: Any) -> Estimate:
        self._note(words)
        return self.estimate

    def _note(self, words: dict[str, Any]) -> None:
        self.asked.append(words)
        if self.error:
            raise self.error


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Api:
    made = Api()
    monkeypatch.setattr("advisor.search.recommend.recommend", made.recommend)
    monkeypatch.setattr("advisor.cost.estimate.estimate", made.price)
    return made


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run ``advisor`` with the given words, on a page of 80 columns unless told."""

    def invoke(*words: str, columns: int = 80) -> Result:
        monkeypatch.setenv("COLUMNS", str(columns))
        return CliRunner().invoke(cli, words, prog_name="advisor")

    return invoke
