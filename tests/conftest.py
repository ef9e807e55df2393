"""How much of each law the tests try, and whether golden files are written anew."""

from __future__ import annotations

import pytest
from hypothesis import settings

settings.register_profile("half as many examples as usual", max_examples=50)
settings.load_profile("half as many examples as usual")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="Write the files below tests/launch/golden anew instead of comparing with them; review what git shows.",
    )
