"""How much of each law the tests try."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("half as many examples as usual", max_examples=50)
settings.load_profile("half as many examples as usual")
