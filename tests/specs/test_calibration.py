"""Calibrations: constants by compute capability."""

from __future__ import annotations

from dataclasses import replace

import pytest

from advisor.catalog.calibrations import find_calibration

CALIBRATION = replace(
    find_calibration(),
    matmul_workspace_bytes={"9": 32, "default": 8},
    matmul_efficiency={"9.0": 0.5, "default": 0.25},
    attention_efficiency={"8.6": 0.75, "default": 0.125},
)


@pytest.mark.parametrize(
    ("capability", "workspace"), [("9.0", 32), ("9.1", 32), ("8.0", 8), ("90.0", 8), ("gfx942", 8)]
)
def test_the_workspace_follows_the_major_version(capability: str, workspace: int) -> None:
    assert CALIBRATION.workspace_bytes(capability) == workspace


@pytest.mark.parametrize(("capability", "linear", "attention"), [("9.0", 0.5, 0.125), ("8.6", 0.25, 0.75)])
def test_shares_follow_the_whole_version(capability: str, linear: float, attention: float) -> None:
    assert CALIBRATION.linear_share(capability) == linear
    assert CALIBRATION.attention_share(capability) == attention
