"""What NVML and the system tell about this machine, with an NVML that stands in for the driver's."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from advisor.catalog import detect as detection
from advisor.catalog.detect import Detected, detect, host_memory

MEMORY_BYTES = 80 * 2**30


class NvmlError(Exception):
    """As pynvml.NVMLError."""


def stand_in(*names: str | bytes, broken_at: str = "") -> SimpleNamespace:
    """An NVML with GPUs called *names*, whose function *broken_at* fails."""

    def failing(function: str, answer: object) -> object:
        def call(*_: object) -> object:
            if function == broken_at:
                raise NvmlError("driver not loaded")
            return answer(*_) if callable(answer) else answer

        return call

    def untold(handle: int) -> object:
        raise NvmlError("not supported")

    answers = {
        "nvmlInit": None,
        "nvmlShutdown": None,
        "nvmlDeviceGetCount": len(names),
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetName": lambda handle: names[handle],
        "nvmlDeviceGetUUID": lambda handle: f"GPU-{handle}abc",
        "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(total=MEMORY_BYTES - handle),
        "nvmlDeviceGetPciInfo": untold,
    }
    return SimpleNamespace(NVMLError=NvmlError, **{name: failing(name, answer) for name, answer in answers.items()})


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes this machine look as if a driver were loaded."""
    monkeypatch.setattr(detection, "_DRIVER_TRACES", (str(tmp_path),))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.usefixtures("driver")
def test_gpus_and_memory_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", stand_in("NVIDIA H100 PCIe", b"NVIDIA H100 PCIe"))

    # This NVML tells nothing of how they are joined.
    assert detect() == Detected(
        gpu_names=("NVIDIA H100 PCIe", "NVIDIA H100 PCIe"),
        gpu_memory_bytes=MEMORY_BYTES - 1,
        host_memory_bytes=host_memory() or 0,
    )


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize(
    ("visible", "seen"),
    [("2,0", ("c", "a")), ("GPU-1", ("b",)), ("0,7,1", ("a",)), ("0,-1", ("a",)), (" 1 ", ("b",))],
)
def test_cuda_visible_devices_chooses_gpus(
    visible: str, seen: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", stand_in("a", "b", "c"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = detect()

    assert found is not None
    assert found.gpu_names == seen


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize("hidden", ["", "-1", "9"])
def test_hidden_gpus_are_not_there(hidden: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", stand_in("a"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)

    assert detect() is None


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize("function", ["nvmlInit", "nvmlDeviceGetCount", "nvmlDeviceGetName", "nvmlDeviceGetMemoryInfo"])
def test_a_driver_that_fails_is_no_driver(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", stand_in("a", broken_at=function))

    assert detect() is None


@pytest.mark.usefixtures("driver")
def test_without_nvml_s_library_there_are_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)

    assert detect() is None


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere NVML itself is asked")
def test_without_a_driver_the_answer_is_quick_and_loads_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(detection, "_DRIVER_TRACES", (str(tmp_path / "absent"),))
    monkeypatch.setitem(sys.modules, "pynvml", stand_in("a", broken_at="nvmlInit"))
    start = time.perf_counter()

    assert detect() is None
    assert time.perf_counter() - start < 0.030


def test_host_memory_is_at_most_the_machine_s() -> None:
    found = host_memory()

    assert found is not None
    assert 2**28 < found < 2**50


@pytest.mark.parametrize(
    ("file", "membership"),
    [
        ("memory.max", "0::/"),
        ("jobs/7/memory.max", "0::/jobs/7"),
        ("memory/memory.limit_in_bytes", "4:memory:/"),
        ("memory/jobs/7/memory.limit_in_bytes", "9:name=systemd:/\n4:memory:/jobs/7"),
    ],
)
def test_a_control_group_s_limit_is_read(file: str, membership: str, tmp_path: Path) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text("1073741824\n")
    (tmp_path / "cgroup").write_text(membership)

    assert 2**30 in detection._control_group_limits(tmp_path, tmp_path / "cgroup")


def test_a_control_group_without_a_limit_has_none(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("max\n")

    assert list(detection._control_group_limits(tmp_path, tmp_path / "absent")) == []


def test_a_system_that_does_not_tell_its_memory_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> int:
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr("os.sysconf", unknown)

    assert host_memory() is None
