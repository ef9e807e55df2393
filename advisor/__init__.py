"""advisor: whether a training run fits, what is fastest, and what to type.

``recommend``, ``rank_gpus``, ``compare``, ``limits``, ``largest_models``, ``estimate``, ``estimate_inference``,
``launch_files`` and ``validate`` take the words of the command line and return frozen values; ``read_records`` returns
what ``validate`` recorded.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from advisor.version import __version__

if TYPE_CHECKING:
    from advisor.cost.estimate import estimate
    from advisor.cost.inference import estimate_inference
    from advisor.launch.files import launch_files
    from advisor.search.compare import compare
    from advisor.search.gpu_types import rank_gpus
    from advisor.search.limits import largest_models, limits
    from advisor.search.recommend import recommend
    from advisor.validation.campaign import validate
    from advisor.validation.recorded import read_records

__all__ = [
    "__version__",
    "compare",
    "estimate",
    "estimate_inference",
    "largest_models",
    "launch_files",
    "limits",
    "rank_gpus",
    "read_records",
    "recommend",
    "validate",
]

_HOMES = {
    "compare": "advisor.search.compare",
    "estimate": "advisor.cost.estimate",
    "estimate_inference": "advisor.cost.inference",
    "largest_models": "advisor.search.limits",
    "launch_files": "advisor.launch.files",
    "limits": "advisor.search.limits",
    "rank_gpus": "advisor.search.gpu_types",
    "read_records": "advisor.validation.recorded",
    "recommend": "advisor.search.recommend",
    "validate": "advisor.validation.campaign",
}


def __getattr__(name: str) -> Any:
    """Load a function's module at its first use, so that ``import advisor`` and ``advisor --help`` stay instant."""
    if name not in _HOMES:
        raise AttributeError(f"module 'advisor' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
