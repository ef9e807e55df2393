"""The GPUs of ``profiles/gpus.csv``, by name or alias."""

from __future__ import annotations

from functools import lru_cache

from advisor.catalog.profiles import profiles_folder
from advisor.catalog.table import Row, plain, read_rows, unknown_name
from advisor.specs.hardware import Gpu

GIB = 2**30

NOMINAL_GB = 10**9
"""Bytes per nominal GB where no report of torch is known.

Cards whose report is known show between 0.92 (ECC in GDDR memory) and 1.00 GiB per nominal GB; 10^9 bytes, which
is 0.93 GiB, is near the low end, so that what fits here fits on the card.
"""

_FORMATS = ("fp32", "tf32", "fp16", "bf16", "fp8")


def find_gpu(name: str) -> Gpu:
    """The GPU called *name*: its name or an alias, whatever its case, spaces, dashes or vendor."""
    if found := known_gpu(name):
        return found
    raise unknown_name("GPU", name, (each for gpu in all_gpus() for each in (gpu.name, *gpu.aliases)), "`advisor gpus`")


def known_gpu(name: str) -> Gpu | None:
    """The same; None where there is none."""
    return _by_plain_name().get(plain(name))


def gpu_names() -> tuple[str, ...]:
    """The names of all GPUs, without aliases."""
    return tuple(gpu.name for gpu in all_gpus())


@lru_cache(maxsize=1)
def all_gpus() -> tuple[Gpu, ...]:
    """All GPUs in the order of the file, oldest generation first."""
    return tuple(_gpu(row) for row in read_rows(profiles_folder() / "gpus.csv"))


@lru_cache(maxsize=1)
def _by_plain_name() -> dict[str, Gpu]:
    return {plain(name): gpu for gpu in all_gpus() for name in (gpu.name, *gpu.aliases)}


def _gpu(row: Row) -> Gpu:
    reported_gib = row.optional_number("memory_reported_gib")
    memory_bytes = row.number("memory_nominal_gb") * NOMINAL_GB if reported_gib is None else reported_gib * GIB
    assumed = row.several("assumed_fields")
    if reported_gib is None and "memory_bytes" not in assumed:
        assumed += ("memory_bytes",)
    peaks = {kind: row.optional_number(f"{kind}_tflops") for kind in _FORMATS}
    return Gpu(
        name=row.text("name"),
        aliases=row.several("aliases"),
        memory_bytes=round(memory_bytes),
        memory_bandwidth_bytes_per_s=row.number("memory_bandwidth_gb_per_s") * 1e9,
        peak_flop_per_s={kind: peak * 1e12 for kind, peak in peaks.items() if peak is not None},
        link=row.text("link"),
        host_link=row.text("host_link"),
        architecture=row.text("architecture"),
        compute_capability=row.text("compute_capability"),
        multiprocessors=None if (count := row.optional_number("multiprocessors")) is None else int(count),
        power_w=row.optional_number("power_w"),
        assumed_fields=assumed,
        source=row.text("source"),
    )
