"""What this machine has: its NVIDIA GPUs, by NVML, and its host memory."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from advisor.catalog.wiring import Wiring, wiring

_DRIVER_TRACES = ("/dev/nvidiactl", "/proc/driver/nvidia", "/dev/dxg")
"""One of these exists where a driver is loaded; the last under Windows' subsystem for Linux."""

_CGROUPS = Path("/sys/fs/cgroup")


class Detected(NamedTuple):
    """The GPUs that a process started here may use, in order, and the memory that it may take."""

    gpu_names: tuple[str, ...]
    """As NVML spells them, such as NVIDIA A100-SXM4-80GB."""
    gpu_memory_bytes: int
    """The smallest GPU's memory by NVML, which counts what the driver keeps for itself."""
    host_memory_bytes: int
    """The machine's memory, or the control group's limit where that is less."""
    wiring: Wiring | None = None
    """How several GPUs are joined, where NVML tells."""


def detect() -> Detected | None:
    """What this machine has; None without an NVIDIA driver or GPU, or where the system does not tell its memory."""
    if sys.platform == "linux" and not any(os.path.exists(trace) for trace in _DRIVER_TRACES):
        return None
    host_memory_bytes = host_memory()
    gpus, joined = _gpus(os.environ.get("CUDA_VISIBLE_DEVICES"))
    if not gpus or host_memory_bytes is None:
        return None
    return Detected(
        gpu_names=tuple(gpu.name for gpu in gpus),
        gpu_memory_bytes=min(gpu.memory_bytes for gpu in gpus),
        host_memory_bytes=host_memory_bytes,
        wiring=joined,
    )


def host_memory() -> int | None:
    """Bytes of memory that processes here may take; None where the system does not tell."""
    try:
        physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
    return min([physical, *_control_group_limits(_CGROUPS, Path("/proc/self/cgroup"))])


class _Device(NamedTuple):
    handle: Any
    name: str
    uuid: str
    memory_bytes: int


def _gpus(listed: str | None) -> tuple[list[_Device], Wiring | None]:
    """The GPUs that NVML sees and ``CUDA_VISIBLE_DEVICES`` leaves, and how they are joined; none without NVML."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:
        # A broken or missing driver shows in many ways, none of which may stop an estimate for other machines.
        return [], None
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        every = [
            _Device(
                handle=handle,
                name=_text(pynvml.nvmlDeviceGetName(handle)),
                uuid=_text(pynvml.nvmlDeviceGetUUID(handle)),
                memory_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
            )
            for handle in handles
        ]
        visible = _visible(every, listed)
        return visible, wiring(pynvml, [gpu.handle for gpu in visible]) if len(visible) > 1 else None
    except pynvml.NVMLError:
        return [], None
    finally:
        pynvml.nvmlShutdown()


def _text(value: str | bytes) -> str:
    """Old releases of nvidia-ml-py answer in bytes."""
    return value.decode() if isinstance(value, bytes) else value


def _visible(gpus: Sequence[_Device], listed: str | None) -> list[_Device]:
    """The GPUs that ``CUDA_VISIBLE_DEVICES`` leaves; CUDA stops at the first entry that names none."""
    if listed is None:
        return list(gpus)
    by_entry: Mapping[str, _Device] = {str(index): gpu for index, gpu in enumerate(gpus)}
    visible: list[_Device] = []
    for entry in (part.strip() for part in listed.split(",")):
        named = by_entry.get(entry) or next((gpu for gpu in gpus if entry and gpu.uuid.startswith(entry)), None)
        if named is None:
            break
        visible.append(named)
    return visible


def _control_group_limits(root: Path, membership: Path) -> Iterable[int]:
    """Memory limits of this process's control group and of the container's root, in versions 1 and 2."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        lines = []
    groups = {parts[1]: parts[2].lstrip("/") for line in lines if len(parts := line.split(":", 2)) == 3}
    files = [
        root / "memory.max",
        root / groups.get("", "") / "memory.max",
        root / "memory" / "memory.limit_in_bytes",
        root / "memory" / groups.get("memory", "") / "memory.limit_in_bytes",
    ]
    for file in files:
        try:
            limit = file.read_text().strip()
        except OSError:
            continue
        if limit.isdigit():
            yield int(limit)
