"""Ranges around predictions from how far earlier ones were off: split conformal prediction.

A residual is what was measured over what was predicted. Of n residuals of runs alike, and nothing fitted to them, the
k-th smallest and largest hold the next one with the coverage asked for, whatever the distribution, if k counts it as
one of n + 1 (Vovk et al., Algorithmic Learning in a Random World, 2005; Lei et al., arXiv:1604.04173, theorem 2.2).
Runs are alike that share a :func:`advisor.specs.calibration.likeness` (Mondrian conformal prediction). A plan unlike
all of them gets the widest of their ranges, the extremes of groups too small for one among them: how the next group
will differ, the groups so far must say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from advisor.specs.calibration import Range

COVERAGE = 0.9
"""Share of measurements that a range is to contain."""


def least_count(coverage: float = COVERAGE) -> int:
    """Residuals that a range of *coverage* needs."""
    return math.ceil(2 / (1 - coverage) - 1e-9) - 1


def interval(residuals: Sequence[float], coverage: float = COVERAGE) -> Range:
    """The range with half of what it may miss on either side. Raises ValueError below :func:`least_count` residuals."""
    ordered = sorted(residuals)
    left_out = math.floor((len(ordered) + 1) * (1 - coverage) / 2 + 1e-9)
    if not left_out:
        raise ValueError(f"{len(ordered)} residuals for a coverage of {coverage}; it takes {least_count(coverage)}")
    return ordered[left_out - 1], ordered[-left_out]


def ranges(residuals: Mapping[str, Sequence[float]], coverage: float = COVERAGE) -> dict[str, Range]:
    """A range for every likeness with residuals enough, and ``default`` for all others.

    No range leaves out the prediction itself. Nothing where there is no likeness with residuals enough.
    """
    enough = {like: found for like, found in residuals.items() if len(found) >= least_count(coverage)}
    own = {like: _around_1(interval(found, coverage)) for like, found in enough.items()}
    if not own:
        return {}
    few = [_around_1((min(found), max(found))) for like, found in residuals.items() if like not in enough and found]
    every = [*own.values(), *few]
    return {"default": (min(low for low, _ in every), max(high for _, high in every)), **own}


def _around_1(found: Range) -> Range:
    return min(found[0], 1.0), max(found[1], 1.0)


def covered(residuals: Sequence[float], found: Range) -> int:
    """How many of *residuals* lie within a range."""
    return sum(found[0] <= each <= found[1] for each in residuals)
