"""A recorded CUDA memory snapshot replayed through the model of the allocator: what both say was reserved.

Snapshots are what ``torch.cuda.memory._dump_snapshot`` writes after ``torch.cuda.memory._record_memory_history()``
(torch 2.13, torch/cuda/memory.py ``_snapshot``). Reading one needs no torch.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from advisor.cost.allocator import Action, Reserved, Settings, replay
from advisor.errors import ConfigError

RESERVES = {"segment_alloc": 1, "segment_map": 1, "segment_free": -1, "segment_unmap": -1}
"""Trace entries that change what is reserved, the first of each kind for fixed segments, the other for expandable."""

Entry = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Recorded:
    """One device of a snapshot: what happened to its tensors, and what torch reserved for them."""

    actions: tuple[Action, ...]
    """Begins with the tensors that were there before the recording, by address."""
    settings: Settings
    peak_reserved_bytes: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """The peak of reserved bytes, as torch counted it and as the model does."""

    recorded: Recorded
    replayed: Reserved

    @property
    def reserved_error(self) -> float:
        """Replayed over recorded peak, less one."""
        return self.replayed.peak_reserved_bytes / self.recorded.peak_reserved_bytes - 1


def compare_snapshot(path: Path, device: int = 0) -> Comparison:
    """The snapshot in the file at *path* beside the replay of its tensors. Raises ConfigError if it is none."""
    recorded = recorded_on(read_snapshot(path), device)
    if not recorded.peak_reserved_bytes:
        raise ConfigError(f"{path} reserves nothing on device {device}; give the number of a device that was used")
    return Comparison(recorded, replay(recorded.actions, recorded.settings))


class _PlainUnpickler(pickle.Unpickler):
    """Reads dictionaries, lists, numbers and text, and refuses to make anything else."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it holds a {module}.{name}")


def read_snapshot(path: Path) -> Mapping[str, Any]:
    """The snapshot in the file at *path*. Raises ConfigError if it is none, or none with a recorded history."""
    try:
        with path.open("rb") as file:
            snapshot = _PlainUnpickler(file).load()
    except (OSError, pickle.UnpicklingError, EOFError, ValueError, IndexError) as error:
        raise ConfigError(
            f"{path} is no memory snapshot ({error}); torch.cuda.memory._dump_snapshot writes one"
        ) from None
    if not isinstance(snapshot, dict) or not {"segments", "device_traces"} <= snapshot.keys():
        raise ConfigError(f"{path} is no memory snapshot: it has no segments or no device_traces")
    return snapshot


def recorded_on(snapshot: Mapping[str, Any], device: int = 0) -> Recorded:
    """What *snapshot* says of *device*. Raises ConfigError if no history was recorded for it."""
    traces = snapshot["device_traces"]
    if device >= len(traces) or not traces[device]:
        raise ConfigError(
            f"the snapshot has no history of device {device}; call torch.cuda.memory._record_memory_history() first"
        )
    trace: list[Entry] = traces[device]
    segments = [segment for segment in snapshot["segments"] if segment.get("device", 0) == device]
    before = list(_there_before(trace, segments))
    actions = (*before, *_actions(trace))
    changes = [RESERVES.get(entry["action"], 0) * entry["size"] for entry in trace]
    reserved_before = sum(segment["total_size"] for segment in segments) - sum(changes)
    return Recorded(actions, _settings(snapshot), reserved_before + _highest(changes))


def _actions(trace: list[Entry]) -> Iterator[Action]:
    for entry in trace:
        if entry["action"] == "alloc":
            yield Action(entry["addr"], entry["size"], entry["stream"])
        elif entry["action"] == "free_completed":
            yield Action(entry["addr"], None, entry["stream"])


def _there_before(trace: list[Entry], segments: list[Entry]) -> Iterator[Action]:
    """Tensors that the recording did not see come: those that it saw go, and those still there at its end."""
    found: dict[int, Action] = {}
    seen: set[int] = set()
    for entry in trace:
        if entry["action"] == "free_completed" and entry["addr"] not in seen:
            found[entry["addr"]] = Action(entry["addr"], entry["size"], entry["stream"])
        if entry["action"] in ("alloc", "free_completed"):
            seen.add(entry["addr"])
    for segment in segments:
        for block in segment["blocks"]:
            if block["state"] == "active_allocated" and block["address"] not in seen:
                found[block["address"]] = Action(block["address"], block["requested_size"], segment["stream"])
    return iter([found[address] for address in sorted(found)])


def _settings(snapshot: Mapping[str, Any]) -> Settings:
    """How the allocator was set. torch writes -1 or a huge number where there is no limit."""
    given = snapshot.get("allocator_settings", {})
    limit = given.get("max_split_size", -1)
    divisions = given.get("roundup_power2_divisions", {})
    steps = set(divisions.values()) if isinstance(divisions, dict) else {divisions}
    if len(steps) > 1:
        raise ConfigError(f"roundup_power2_divisions differ by size, {divisions}; the model knows one for all")
    return Settings(
        expandable_segments=bool(given.get("expandable_segments", False)),
        max_split_bytes=limit if 0 < limit < 2**50 else None,
        roundup_power2_divisions=max(1, *steps) if steps else 1,
    )


def _highest(changes: list[int]) -> int:
    most = held = 0
    for change in changes:
        held += change
        most = max(most, held)
    return most
