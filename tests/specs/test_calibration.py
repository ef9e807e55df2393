"""Calibrations: constants by compute capability."""

from __future__ import annotations

from dataclasses import replace

import pytest

from advisor.catalog.calibrations import find_calibration
from advisor.catalog.gpus import find_gpu

CALIBRATION = replace(
    find_calibration(),
    matmul_workspace_bytes={"9": 32, "default": 8},
    grouped_workspace_bytes={"9": 128, "default": 16},
    matmul_efficiency={"9.0": 0.5, "default": 0.25},
    attention_efficiency={
        "sdpa, 8.6": (0.75, 0.5),
        "sdpa, default": (0.125, 0.1),
        "flash, RTX 3090": (0.7, 0.6),
        "flash, default": (0.2, 0.1),
    },
)


@pytest.mark.parametrize(
    ("capability", "workspace"), [("9.0", 32), ("9.1", 32), ("8.0", 8), ("90.0", 8), ("gfx942", 8)]
)
def test_the_workspace_follows_the_major_version(capability: str, workspace: int) -> None:
    assert CALIBRATION.workspace_bytes(capability) == workspace


def test_shares_follow_the_gpus_name_before_its_whole_version() -> None:
    h100, rtx = find_gpu("H100"), find_gpu("RTX 3090")
    named = replace(CALIBRATION, matmul_efficiency={**CALIBRATION.matmul_efficiency, h100.name: 0.6})

    assert (CALIBRATION.linear_share(h100), named.linear_share(h100)) == (0.5, 0.6)
    assert (CALIBRATION.linear_share(rtx), named.linear_share(rtx)) == (0.25, 0.25)


def test_attention_has_shares_by_kernel_and_direction() -> None:
    h100, rtx = find_gpu("H100"), find_gpu("RTX 3090")

    assert CALIBRATION.attention_shares("sdpa", rtx) == (0.75, 0.5)
    assert CALIBRATION.attention_shares("sdpa", h100) == (0.125, 0.1)
    assert CALIBRATION.attention_shares("flash", rtx) == (0.7, 0.6)
