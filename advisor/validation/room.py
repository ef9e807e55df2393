"""Whether this machine's memory holds what a run on its CPU takes, said before anything is started."""

from __future__ import annotations

from collections.abc import Mapping

from advisor.catalog.detect import host_memory
from advisor.errors import ConfigError

GIB = 2**30


def refuse_too_large(why: str, parts: Mapping[str, int], advice: str) -> None:
    """Raise ConfigError, with the sum of *parts* in bytes, where that is more than is available here."""
    needed, available = sum(parts.values()), available_bytes()
    if available is not None and needed > available:
        terms = " + ".join(f"{what} {size / GIB:.1f} GiB" for what, size in parts.items())
        raise ConfigError(f"{why}: {terms} = {needed / GIB:.1f} GiB, {available / GIB:.1f} GiB available; {advice}")


def available_bytes() -> int | None:
    """Memory that new processes may take here; None where the system does not tell."""
    import psutil

    limits = [int(psutil.virtual_memory().available), host_memory()]
    return min((limit for limit in limits if limit is not None), default=None)
