"""Numbers as a person reads them. Base units go in; GiB is 2^30 bytes, GB is 10^9."""

from __future__ import annotations

from collections.abc import Sequence
from math import floor, log10

GIB = 2**30
GB = 10**9


def gib(size_bytes: float) -> str:
    """Bytes as GiB to three digits, at most two decimals: ``41.2 GiB``, ``1,024 GiB``."""
    return f"{aligned([size_bytes / GIB])[0]} GiB"


def seconds(duration_s: float) -> str:
    """A duration to three digits: ``1.23 s``, ``85.1 ms``."""
    if 0 < abs(duration_s) < 0.9995:
        return f"{_significant(1000 * duration_s)} ms"
    return f"{_significant(duration_s)} s"


def rate(per_second: float) -> str:
    """A rate to three digits, with thousands set apart: ``106,000``."""
    return _significant(per_second)


def significant(value: float) -> str:
    """A quantity to three digits, with thousands set apart: ``28.4``, ``1,330,000``."""
    return _significant(value)


def spelled(hours: float) -> str:
    """Hours as days from two days on, as minutes below one hour, in between as they are: ``12.5 days``."""
    if hours >= 48:
        return f"{_significant(hours / 24)} days"
    return f"{_significant(hours)} hours" if hours >= 1 else f"{_significant(60 * hours)} minutes"


def percent(share: float) -> str:
    """A share of one as whole percent, or with a decimal below ten: ``48 %``, ``3.5 %``."""
    decimals = 0 if abs(share) >= 0.0995 else 1
    return f"{100 * share:.{decimals}f} %"


def parameter_count(parameters: int) -> str:
    """A number of parameters to three digits: ``1.54 B``, ``124 M``."""
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if parameters >= 0.9995 * size:
            return f"{_significant(parameters / size)} {unit}"
    return str(parameters)


def aligned(values: Sequence[float], *, significant: int = 3, most_decimals: int = 2) -> list[str]:
    """*values* with one number of decimals for all, enough to show *significant* digits of the smallest."""
    smallest = min((abs(value) for value in values if value), default=1.0)
    decimals = min(most_decimals, _decimals(smallest, significant))
    return [f"{value:,.{decimals}f}" for value in values]


def bar(share: float, width: int) -> str:
    """*share* of one as a bar of *width* characters, full where it is one or more."""
    filled = min(width, round(share * width))
    return "█" * filled + "░" * (width - filled)


def _significant(value: float, digits: int = 3) -> str:
    if not value:
        return "0"
    rounded = float(f"{value:.{digits - 1}e}")
    return f"{rounded:,.{_decimals(rounded, digits)}f}"


def _decimals(value: float, significant: int) -> int:
    return max(0, significant - 1 - floor(log10(abs(value))))
