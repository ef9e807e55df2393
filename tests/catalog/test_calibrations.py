"""A calibration says of each constant what it is and where it comes from, and refuses what it does not know."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from advisor.catalog.calibrations import (
    CALIBRATIONS_VARIABLE,
    ORIGINS,
    calibration_of,
    find_calibration,
    read_calibration,
)
from advisor.catalog.gpus import all_gpus, find_gpu
from advisor.catalog.profiles import profiles_folder
from advisor.catalog.request import resolve
from advisor.errors import ConfigError, UnknownNameError
from advisor.specs.calibration import likeness
from advisor.specs.plan import Offload, Plan, Strategy
from advisor.step.program import FusedAttention

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
        *(share for shares in found.attention_efficiency.values() for share in shares),
        found.bandwidth_efficiency,
        found.copy_efficiency,
        found.attention_narrow_share,
        found.overlap_share,
    ]

    assert all(0 < share < 1 for share in shares)


def test_ranges_contain_the_prediction() -> None:
    found = find_calibration()

    for low, high in (*found.memory_ranges.values(), *found.time_ranges.values()):
        assert low <= 1 < high


def test_the_margin_is_what_the_measured_may_lie_above_the_predicted() -> None:
    found = replace(find_calibration(), memory_ranges={"default": (0.9, 1.2), "fsdp, 9.0": (0.99, 1.01)})
    plan = Plan(strategy=Strategy.FSDP, gpus=8, micro_batch=1)

    assert found.margin_share(likeness(plan, "9.0")) == pytest.approx(0.01)
    assert found.margin_share(likeness(plan, "8.0")) == pytest.approx(0.2)
    on_host = replace(plan, strategy=Strategy.ZERO2, offload=Offload.OPTIMIZER)
    assert found.margin_share(likeness(on_host, "9.0")) == pytest.approx(0.2)


# PyTorch, aten/src/ATen/cuda/CublasHandlePool.cpp.
@pytest.mark.parametrize(
    ("capability", "mib"), [("9.0", 32), ("10.0", 32), ("12.0", 32), ("8.0", 8.125), ("7.5", 8.125)]
)
def test_the_workspace_is_larger_from_hopper_on(capability: str, mib: float) -> None:
    assert find_calibration().workspace_bytes(capability) == mib * 2**20


def test_a_generation_that_nobody_measured_gets_the_default_rate() -> None:
    found, t4, h100 = find_calibration(), find_gpu("T4"), find_gpu("H100")

    assert found.linear_share(t4) == found.matmul_efficiency["default"]
    assert list(found.attention_shares("sdpa", t4)) == found.attention_efficiency["sdpa, default"]
    assert found.linear_share(h100) == found.matmul_efficiency["9.0"]
    assert list(found.attention_shares("sdpa", h100)) == found.attention_efficiency["sdpa, 9.0"]


def test_every_gpu_has_a_share_for_every_kernel() -> None:
    found = find_calibration()

    assert all(0 < found.linear_share(gpu) < 1 for gpu in all_gpus())
    assert all(
        min(found.attention_shares(kernel, gpu)) > 0 for kernel in get_args(FusedAttention) for gpu in all_gpus()
    )


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


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of this user's calibrations, with one that was measured on an H200."""
    monkeypatch.setenv(CALIBRATIONS_VARIABLE, str(tmp_path))
    measured = {"value": {"9.0": 0.75}, "origin": "measured", "source": "a benchmark of this machine"}
    links = {"value": {"nvlink4": 4e11}, "origin": "measured", "source": "a benchmark of this machine"}
    content = {
        "name": "ours",
        "source": "this machine",
        "device": "H200-SXM-141GB",
        "based_on": "default",
        "constants": {"matmul_efficiency": measured, "link_bandwidth_bytes_per_s": links},
    }
    (tmp_path / "ours.json").write_text(json.dumps(content), encoding="utf-8")
    return tmp_path


def test_what_was_not_measured_is_as_in_the_calibration_that_it_is_based_on(own: Path) -> None:
    found, usual = find_calibration("ours"), find_calibration()

    assert (found.name, found.device) == ("ours", "H200-SXM-141GB")
    assert found.linear_share(find_gpu("H200")) == 0.75
    assert found.linear_share(find_gpu("A100")) == usual.linear_share(find_gpu("A100"))
    assert found.context_bytes == usual.context_bytes


def test_a_calibration_is_also_found_by_its_path(own: Path) -> None:
    assert find_calibration(str(own / "ours.json")).name == "ours"


def test_a_device_has_the_calibration_that_was_measured_on_it(own: Path) -> None:
    assert calibration_of("H200-SXM-141GB").name == "ours"
    assert calibration_of("A100-SXM4-80GB").name == "default"


def test_a_given_gpu_is_not_taken_for_this_machines(own: Path) -> None:
    by_name = resolve("Qwen2.5-0.5B", gpu="H200-SXM-141GB", gpus=8)
    asked = resolve("Qwen2.5-0.5B", gpu="H200-SXM-141GB", gpus=8, calibration="ours")

    assert by_name.calibration.name == "default"
    assert asked.calibration.name == "ours"
    assert next(each for each in asked.inputs if each.name == "calibration").origin == "given"


def test_a_measured_link_is_as_fast_as_it_was_measured(own: Path) -> None:
    link = resolve("Qwen2.5-0.5B", gpu="H200-SXM-141GB", gpus=8, link="nvlink4", calibration="ours").cluster.link

    assert (link.bandwidth_bytes_per_s, link.assumed, link.source) == (4e11, False, "measured: calibration ours")


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"nowhere.json cannot be read"):
        find_calibration("nowhere.json")
