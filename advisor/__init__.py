"""advisor: whether a training run fits, what is fastest, and what to type.

``recommend``, ``estimate`` and ``launch_files`` take the words of the command line and return frozen values.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from advisor.version import __version__

if TYPE_CHECKING:
    from advisor.cost.estimate import estimate
    from advisor.launch.files import launch_files
    from advisor.search.recommend import recommend

__all__ = ["__version__", "estimate", "launch_files", "recommend"]

_HOMES = {
    "estimate": "advisor.cost.estimate",
    "launch_files": "advisor.launch.files",
    "recommend": "advisor.search.recommend",
}


def __getattr__(name: str) -> Any:
    """Load a function's module at its first use, so that ``import advisor`` and ``advisor --help`` stay instant."""
    if name not in _HOMES:
        raise AttributeError(f"module 'advisor' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
