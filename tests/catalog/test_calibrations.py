"""A calibration says of each constant what it is and where it comes from, and refuses what it does not know."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from advisor.catalog.calibrations import ORIGINS, find_calibration, read_calibration
from advisor.catalog.profiles import profiles_folder
from advisor.errors import ConfigError, UnknownNameError

DEFAULT = profiles_folder() / "calibrations" / "default.json"


def changed(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    content = json.loads(DEFAULT.read_text(encoding="utf-8"))
    change(content)
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_every_constant_has_an_origin_and_a_source() -> None:
    constants = json.loads(DEFAULT.read_text(encoding="utf-8"))["constants"]

    assert all(each["origin"] in ORIGINS and len(each["source"]) > 20 for each in constants.values())


def test_the_default_is_found_by_name() -> None:
    assert find_calibration().name == "default"


def test_shares_of_a_peak_lie_between_nothing_and_all_of_it() -> None:
    found = find_calibration()
    shares = [
        *found.matmul_efficiency.values(),
        *found.attention_efficiency.values(),
        found.bandwidth_efficiency,
        found.overlap_share,
        found.margin_share,
    ]

    assert all(0 < share < 1 for share in shares)


def test_ranges_contain_the_prediction() -> None:
    found = find_calibration()

    assert found.low_memory_share < 1 < found.high_memory_share
    assert found.low_time_share < 1 < found.high_time_share


# PyTorch, aten/src/ATen/cuda/CublasHandlePool.cpp.
@pytest.mark.parametrize(
    ("capability", "mib"), [("9.0", 32), ("10.0", 32), ("12.0", 32), ("8.0", 8.125), ("7.5", 8.125)]
)
def test_the_workspace_is_larger_from_hopper_on(capability: str, mib: float) -> None:
    assert find_calibration().workspace_bytes(capability) == mib * 2**20


def test_a_generation_that_nobody_measured_gets_the_default_rate() -> None:
    found = find_calibration()

    assert found.linear_share("7.5") == found.matmul_efficiency["default"]
    assert found.attention_share("7.5") == found.attention_efficiency["default"]
    assert found.linear_share("8.0") == found.matmul_efficiency["8.0"]
    assert found.attention_share("8.0") == found.attention_efficiency["8.0"]


def test_an_unknown_name_lists_near_ones() -> None:
    with pytest.raises(UnknownNameError, match="near names: default"):
        find_calibration("defalt")


def test_a_missing_constant_is_named(tmp_path: Path) -> None:
    path = changed(tmp_path, lambda content: content["constants"].pop("overlap_share"))

    with pytest.raises(ConfigError, match=r"missing constants \['overlap_share'\]"):
        read_calibration(path)


def test_an_unknown_constant_is_named(tmp_path: Path) -> None:
    path = changed(tmp_path, lambda content: content["constants"].update(overlap=content["constants"]["overlap_share"]))

    with pytest.raises(ConfigError, match=r"unknown constants \['overlap'\]"):
        read_calibration(path)


@pytest.mark.parametrize("wrong", [{"value": 1}, {"value": 1, "origin": "heard", "source": "someone"}, 0.9])
def test_a_constant_without_a_source_is_refused(tmp_path: Path, wrong: object) -> None:
    path = changed(tmp_path, lambda content: content["constants"].update(overlap_share=wrong))

    with pytest.raises(ConfigError, match="overlap_share needs a value, a source, and an origin among measured"):
        read_calibration(path)


@pytest.mark.parametrize("text", ["{", "[]", '{"constants": {}}'])
def test_a_file_that_is_no_calibration_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text, encoding="utf-8")

    with pytest.raises(ConfigError, match=r"broken.json is not a calibration"):
        read_calibration(path)
