"""Recorded snapshots: a small one of torch's format, written by hand, replayed to what it says was reserved."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from advisor.cost.allocator import Action, Settings, replay
from advisor.errors import ConfigError
from advisor.validation.snapshot import compare_snapshot, read_snapshot, recorded_on

MIB = 2**20
BASE = 0x7F00_0000_0000


def entry(action: str, address: int, size: int, stream: int = 0) -> dict[str, Any]:
    return {"action": action, "addr": BASE + address, "size": size, "stream": stream, "frames": [], "time_us": 1}


def segment(address: int, size: int, *blocks: tuple[int, int, str]) -> dict[str, Any]:
    return {
        "device": 0,
        "address": BASE + address,
        "total_size": size,
        "stream": 0,
        "segment_type": "large",
        "blocks": [
            {"address": BASE + where, "size": long, "requested_size": long, "state": state}
            for where, long, state in blocks
        ],
    }


FIXED: dict[str, Any] = {
    "segments": [
        segment(0, 20 * MIB, (0, 4 * MIB, "active_allocated"), (4 * MIB, 16 * MIB, "inactive")),
        segment(64 * MIB, 32 * MIB, (64 * MIB, 32 * MIB, "inactive")),
    ],
    "device_traces": [
        [
            entry("segment_alloc", 0, 20 * MIB),
            entry("alloc", 0, 4 * MIB),
            entry("alloc", 4 * MIB, 6 * MIB),
            entry("segment_alloc", 64 * MIB, 32 * MIB),
            entry("alloc", 64 * MIB, 31 * MIB),
            entry("free_requested", 4 * MIB, 6 * MIB),
            entry("free_completed", 4 * MIB, 6 * MIB),
            entry("free_requested", 64 * MIB, 31 * MIB),
            entry("free_completed", 64 * MIB, 31 * MIB),
        ]
    ],
    "allocator_settings": {
        "max_split_size": -1,
        "expandable_segments": False,
        "roundup_power2_divisions": {"1": 0, "2": 0},
    },
}
EXPANDABLE: dict[str, Any] = {
    "segments": [segment(0, 60 * MIB, (0, 60 * MIB, "inactive"))],
    "device_traces": [
        [
            entry("segment_map", 0, 20 * MIB),
            entry("alloc", 0, 15 * MIB),
            entry("segment_map", 20 * MIB, 40 * MIB),
            entry("alloc", 15 * MIB, 40 * MIB),
            entry("free_completed", 0, 15 * MIB),
            entry("free_completed", 15 * MIB, 40 * MIB),
        ]
    ],
    "allocator_settings": {"expandable_segments": True},
}


def written(folder: Path, snapshot: object) -> Path:
    path = folder / "snapshot.pickle"
    path.write_bytes(pickle.dumps(snapshot))
    return path


@pytest.mark.parametrize(("snapshot", "reserved"), [(FIXED, 52), (EXPANDABLE, 60)], ids=["fixed", "expandable"])
def test_the_model_reserves_what_torch_recorded(tmp_path: Path, snapshot: dict[str, Any], reserved: int) -> None:
    found = compare_snapshot(written(tmp_path, snapshot))

    assert found.recorded.peak_reserved_bytes == reserved * MIB
    assert found.replayed.peak_reserved_bytes == reserved * MIB
    assert found.reserved_error == 0


def test_memory_is_free_again_when_the_freeing_is_complete() -> None:
    """Between the two entries another stream still uses it."""
    actions = recorded_on(FIXED).actions

    assert [action.size_bytes for action in actions] == [4 * MIB, 6 * MIB, 31 * MIB, None, None]


def test_settings_are_read_from_the_snapshot() -> None:
    limited = {"max_split_size": 40 * MIB, "roundup_power2_divisions": {"1": 4, "2": 4}}

    assert recorded_on(FIXED).settings == Settings()
    assert recorded_on(EXPANDABLE).settings == Settings(expandable_segments=True)
    assert recorded_on({**FIXED, "allocator_settings": limited}).settings == Settings(
        max_split_bytes=40 * MIB, roundup_power2_divisions=4
    )
    with pytest.raises(ConfigError, match="differ by size"):
        recorded_on({**FIXED, "allocator_settings": {"roundup_power2_divisions": {"1": 4, "2": 8}}})


def test_tensors_from_before_the_recording_are_there_from_the_start() -> None:
    """The history begins after the first two: one of them goes in it, and one is there at its end."""
    late = {**FIXED, "device_traces": [FIXED["device_traces"][0][3:]]}
    found = recorded_on(late)

    assert found.actions[:2] == (Action(BASE, 4 * MIB, 0), Action(BASE + 4 * MIB, 6 * MIB, 0))
    assert found.peak_reserved_bytes == 52 * MIB
    assert replay(found.actions, found.settings).peak_reserved_bytes == 52 * MIB


def test_a_snapshot_without_a_history_says_how_to_record_one() -> None:
    with pytest.raises(ConfigError, match="_record_memory_history"):
        recorded_on({**FIXED, "device_traces": [[]]})
    with pytest.raises(ConfigError, match="no history of device 1"):
        recorded_on(FIXED, device=1)


@pytest.mark.parametrize("wrong", [[1, 2], {"segments": []}])
def test_what_is_no_snapshot_is_an_error(tmp_path: Path, wrong: object) -> None:
    with pytest.raises(ConfigError, match="is no memory snapshot"):
        read_snapshot(written(tmp_path, wrong))


def test_a_file_that_would_run_code_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"it holds a pathlib\."):
        read_snapshot(written(tmp_path, {"segments": [Path("x")], "device_traces": []}))


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no memory snapshot"):
        read_snapshot(tmp_path / "nothing.pickle")
