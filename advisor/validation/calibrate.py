"""Measures this machine, within a minute, for the constants that predictions take from a calibration.

Single operations are timed on the first GPU, and what only the host does on the host; then recorded runs on the same
GPU correct what single operations cannot tell (:mod:`advisor.validation.fitting`). What was measured goes into a file
of this user's (:mod:`advisor.catalog.calibrations`), which predictions for this GPU use from then on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from advisor.catalog.calibrations import find_calibration, own_folder
from advisor.catalog.gpus import known_gpu
from advisor.catalog.request import as_measured, resolve
from advisor.errors import RunError, WriteError
from advisor.specs.calibration import Calibration
from advisor.specs.hardware import Gpu
from advisor.specs.question import Question
from advisor.tracing.real_model import needs_torch
from advisor.validation import rates
from advisor.validation.conformal import COVERAGE, least_count, ranges
from advisor.validation.fitting import Fit, Timed, errors, from_records, operations, residuals, share_of_peak
from advisor.validation.machine import ADAM_PARAMETERS, COPY_BYTES, sections
from advisor.validation.rates import Kind, Rate
from advisor.validation.record import write_whole
from advisor.validation.store import own, own_path

BUDGET_S = 60.0
MODEL = "Qwen2.5-1.5B"

ATTENTION: tuple[Kind, Kind] = ("attention forward", "attention backward")


@dataclass(frozen=True, kw_only=True, slots=True)
class Constant:
    """One constant of the calibration, as it was and as it is now."""

    name: str
    value: Any
    before: Any
    source: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibrated:
    """What was measured, and what follows from it."""

    device: str
    """``cpu``, or the GPU's name."""
    gpu: Gpu | None
    """The same in the catalog; None where there is none, or an unknown one."""
    rates: tuple[Rate, ...]
    constants: tuple[Constant, ...]
    fits: tuple[Fit, ...]
    skipped: tuple[str, ...]
    """What was left out, each with its reason."""
    seconds: float
    path: Path
    """Where the calibration lies."""


Tell = Callable[[str, float], None]
"""Told what is measured next, and the share of the budget that is spent."""


def calibrate(
    *,
    model: str = MODEL,
    name: str | None = None,
    nvme: str | None = None,
    device: str | None = None,
    budget_s: float = BUDGET_S,
    tell: Tell = lambda what, share: None,
) -> Calibrated:
    """Measure this machine and write a calibration, called *name*, or after the GPU.

    Products and attention have the sizes that *model* gives them. *nvme* is a folder on the disk that offloading would
    use. Needs the extra ``run``. Raises ConfigError without torch, WriteError where the file cannot be written.
    """
    needs_torch("advisor calibrate")
    import torch

    started = time.monotonic()
    used = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    named = torch.cuda.get_device_name(0) if used.type == "cuda" else "cpu"
    gpu = known_gpu(named) if used.type == "cuda" else None
    question = resolve(model, gpu=gpu.name if gpu else "A100-80GB", gpus=1)
    found: list[Rate] = []
    skipped: list[str] = []
    for what, measure in sections(used, question, nvme):
        spent = (time.monotonic() - started) / budget_s
        if spent >= 1:
            skipped.append(f"{what}: {budget_s:.0f} s were over")
            continue
        tell(what, spent)
        try:
            found += measure(started + budget_s - time.monotonic())
        except (RunError, RuntimeError, OSError) as error:
            skipped.append(f"{what}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
    tell("records", 1.0)
    before = find_calibration()
    gpus = torch.cuda.device_count() if used.type == "cuda" else 1
    constants = _constants(found, gpu, gpus, before)
    fits: list[Fit] = []
    if gpu:
        fits, ranged = _by_records(gpu, _with(before, constants), question)
        constants = _merged(constants, [*map(_fitted(before), fits), *_ranged(ranged, before)])
    label = name or (gpu.name.lower() if gpu else "host")
    path = own_folder() / f"{label}.json"
    _write(path, label, gpu, named, constants, found)
    return Calibrated(
        device=named,
        gpu=gpu,
        rates=tuple(found),
        constants=tuple(constants),
        fits=tuple(fits),
        skipped=tuple(skipped),
        seconds=time.monotonic() - started,
        path=path,
    )


def _constants(found: Sequence[Rate], gpu: Gpu | None, gpus: int, before: Calibration) -> list[Constant]:
    """What single operations say."""
    by_kind: dict[str, list[Rate]] = {}
    for each in found:
        by_kind.setdefault(each.kind, []).append(each)
    host = [each for each in by_kind.get("copy", []) if each.sizes["size_bytes"] == COPY_BYTES["cpu"]]
    values: dict[str, tuple[Any, str]] = {}
    if host:
        bandwidth = host[0].bytes_per_s / gpus
        values["host_bandwidth_bytes_per_s_per_gpu"] = bandwidth, "a copy within host memory, over the machine's GPUs"
        adam = [each for each in by_kind.get("adamw", []) if each.sizes["parameters"] == ADAM_PARAMETERS["cpu"]]
        if adam:
            per_parameter = adam[0].seconds * host[0].bytes_per_s / ADAM_PARAMETERS["cpu"]
            values["cpu_adam_bytes_per_parameter"] = per_parameter, "torch's fused AdamW on the host, at that bandwidth"
    disk = [each.bytes_per_s for kind in ("disk write", "disk read") for each in by_kind.get(kind, [])]
    if disk:
        values["nvme_bandwidth_bytes_per_s_per_gpu"] = min(disk) / gpus, "the slower of writing and reading a file"
    if gpu:
        values |= _of_gpu(by_kind, gpu, before)
    return [
        Constant(name=name, value=_rounded(value), before=getattr(before, name), source=source)
        for name, (value, source) in values.items()
    ]


def _of_gpu(by_kind: Mapping[str, list[Rate]], gpu: Gpu, before: Calibration) -> dict[str, tuple[Any, str]]:
    values: dict[str, tuple[Any, str]] = {}
    at = before
    copies = [each for each in by_kind.get("copy", []) if each.sizes["size_bytes"] == COPY_BYTES["cuda"]]
    if copies:
        share = copies[0].bytes_per_s / gpu.memory_bandwidth_bytes_per_s
        others = before.bandwidth_efficiency * share / before.copy_efficiency
        at = replace(before, copy_efficiency=share, bandwidth_efficiency=others)
        values["copy_efficiency"] = share, "a copy of 1 GiB within device memory"
        values["bandwidth_efficiency"] = others, "as far below that copy as usual"
    if by_kind.get("launch"):
        values["kernel_launch_s"] = by_kind["launch"][0].seconds, "additions of one number, one after the other"
    some = [each for rates_of_kind in by_kind.values() for each in rates_of_kind]
    if products := operations(gpu, "product", some):
        values["matmul_efficiency"] = {gpu.name: share_of_peak(products, at)}, _missed(products, at)
    passes = [each for kind in ATTENTION if (each := operations(gpu, kind, some))]
    if len(passes) == len(ATTENTION):
        said = "; ".join(f"{kind}: {_missed(each, at)}" for kind, each in zip(ATTENTION, passes, strict=True))
        values["attention_efficiency"] = {f"sdpa, {gpu.name}": [share_of_peak(each, at) for each in passes]}, said
    links: dict[str, float] = {}
    pinned = [
        each.bytes_per_s
        for kind in ("host to device", "device to host")
        for each in by_kind.get(kind, [])
        if each.sizes["memory"] == "pinned"
    ]
    if pinned:
        links[gpu.host_link] = min(pinned)
    # A switch that reduces lends an all-reduce more than the rate of a ring, which a link is known by.
    gathered = by_kind.get("all-gather", [])
    if gathered:
        links[gpu.link] = max(gathered, key=lambda each: each.moved_bytes).bytes_per_s
    if links:
        values["link_bandwidth_bytes_per_s"] = links, "copies of pinned memory; the largest all-gather"
    return values


def _missed(timed: Timed, calibration: Calibration) -> str:
    """How far off the share that fits best is."""
    missed = errors(timed, share_of_peak(timed, calibration), calibration)
    return f"{missed.size} operations, errors mean {missed.mean():.1%}, max {missed.max():.1%}"


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return float(f"{value:.4g}")


def _with(before: Calibration, constants: Sequence[Constant]) -> Calibration:
    """*before* with what was measured in its place."""
    values: dict[str, Any] = {
        each.name: {**each.before, **each.value} if isinstance(each.value, dict) else each.value for each in constants
    }
    return replace(before, **values)


def _by_records(
    gpu: Gpu, calibration: Calibration, question: Question
) -> tuple[list[Fit], dict[str, dict[str, list[float]]]]:
    """What this user's runs on *gpu* say beside that."""
    ran = [each for each in own(own_path())[0] if each.true and known_gpu(each.device) == gpu]
    cluster = replace(
        question.cluster,
        link=as_measured(question.cluster.link, calibration),
        host_link=as_measured(question.cluster.host_link, calibration),
    )
    fits = from_records(ran, gpu, cluster, calibration)
    fitted = _with(calibration, [_fitted(calibration)(each) for each in fits])
    return fits, residuals(ran, cluster, fitted)


def _fitted(before: Calibration) -> Callable[[Fit], Constant]:
    def constant(fit: Fit) -> Constant:
        said = f"{fit.runs} recorded runs, errors left out mean {fit.mean_error:.1%}, max {fit.max_error:.1%}"
        return Constant(name=fit.constant, value=fit.value, before=getattr(before, fit.constant), source=said)

    return constant


def _ranged(found: Mapping[str, Mapping[str, Sequence[float]]], before: Calibration) -> list[Constant]:
    said = f"split conformal, {COVERAGE:.0%}, from recorded runs on this GPU, {least_count()} or more of a kind"
    return [
        Constant(
            name=name,
            value={like: list(each) for like, each in own_ranges.items() if like != "default"},
            before=getattr(before, name),
            source=said,
        )
        for name, residuals in found.items()
        if (own_ranges := ranges(residuals))
    ]


def _merged(first: Sequence[Constant], later: Sequence[Constant]) -> list[Constant]:
    """What *later* says in place of *first*."""
    return list({each.name: each for each in (*first, *later)}.values())


def _write(
    path: Path, label: str, gpu: Gpu | None, device: str, constants: Sequence[Constant], found: Sequence[Rate]
) -> None:
    made = datetime.now(timezone.utc).isoformat(timespec="seconds")
    content = {
        "name": label,
        "source": f"measured on {device} by advisor calibrate, {made}",
        "device": gpu.name if gpu else None,
        "based_on": "default",
        "constants": {
            each.name: {"value": each.value, "origin": "measured", "source": f"{each.source}, {made[:10]}"}
            for each in constants
        },
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(content, indent=2) + "\n")
        rates.write(path.with_suffix(".rates"), device, found)
    except OSError as error:
        raise WriteError(f"cannot write {path}: {error.strerror}; ADVISOR_CALIBRATIONS names another folder") from error
