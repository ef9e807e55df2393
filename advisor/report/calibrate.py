"""What a machine measured of itself, and the constants that follow: to read, and for programs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from advisor.report.machine import SCHEMA, Json
from advisor.report.tables import Column, faint, fitting, list_of, section, table_of
from advisor.validation.calibrate import Calibrated, Constant
from advisor.validation.rates import Rate


def calibration_report(found: Calibrated, *, width: int) -> list[RenderableType]:
    """The whole answer for a page of *width* columns."""
    parts: list[RenderableType] = [
        Text(f"Calibrated {found.device} in {found.seconds:.0f} s: {len(found.constants)} constants.", style="bold")
    ]
    if found.constants:
        parts += section("Constants", _constants(found, width), *_sources(found.constants))
    if found.rates:
        parts += section("Measured", _rates(found.rates, width))
    if found.fits:
        parts += section("From recorded runs", _fits(found, width))
    parts += [Text(), faint(_use(found))]
    return parts


def _use(found: Calibrated) -> str:
    where = f"Written to {found.path}. "
    if found.gpu:
        return where + f"Predictions for a {found.gpu.name} found here use it; elsewhere, --calibration names it."
    if found.device == "cpu":
        return where + "No GPU was measured: the host's constants are used where --calibration names it."
    return where + f"The catalog does not know {found.device}, so only the host's constants follow."


def _entries(found: Calibrated) -> Iterator[tuple[str, Any, Any]]:
    """Each constant's entries: name, before, now."""
    for each in found.constants:
        if not isinstance(each.value, Mapping):
            yield each.name, each.before, each.value
            continue
        for key, value in each.value.items():
            yield f"{each.name}, {key}", each.before.get(key, each.before.get("default")), value


def _constants(found: Calibrated, width: int) -> RenderableType:
    entries = list(_entries(found))
    columns = [
        Column(header="Constant", cells=[name for name, _, _ in entries], justify="left"),
        Column(header="Before", cells=[_number(before) for _, before, _ in entries], rank=1),
        Column(header="Measured", cells=[_number(value) for _, _, value in entries]),
    ]
    return table_of(fitting(columns, width)[0])


def _sources(constants: tuple[Constant, ...]) -> list[RenderableType]:
    return [Text(), list_of([(each.name, each.source) for each in constants])]


def _number(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, (list, tuple)):
        return " to ".join(_number(each) for each in value)
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def _rates(found: tuple[Rate, ...], width: int) -> RenderableType:
    columns = [
        Column(header="Operation", cells=[each.kind for each in found], justify="left"),
        Column(header="Sizes", cells=[_sizes(each) for each in found], justify="left", rank=1),
        Column(header="Time\nms", cells=[f"{1e3 * each.seconds:.3f}" for each in found]),
        Column(header="TFLOP/s", cells=[f"{each.flop_per_s / 1e12:.2f}" if each.flop else "" for each in found]),
        Column(header="GB/s", cells=[f"{each.bytes_per_s / 1e9:.2f}" if each.moved_bytes else "" for each in found]),
    ]
    return table_of(fitting(columns, width)[0])


def _sizes(rate: Rate) -> str:
    said = {"size_bytes": "{:,} B", "ranks": "{} ranks", "parameters": "{:,} parameters"}
    if {"m", "n", "k"} <= rate.sizes.keys():
        return "{m} x {n} x {k} {number_format}".format(**rate.sizes)
    return ", ".join(said.get(name, name.replace("_", " ") + " {}").format(each) for name, each in rate.sizes.items())


def _fits(found: Calibrated, width: int) -> RenderableType:
    columns = [
        Column(header="Constant", cells=[each.constant for each in found.fits], justify="left"),
        Column(header="Runs", cells=[str(each.runs) for each in found.fits]),
        Column(header="Error\nbefore", cells=[f"{each.mean_error_before:.1%}" for each in found.fits], rank=1),
        Column(header="Mean error,\none left out", cells=[f"{each.mean_error:.1%}" for each in found.fits]),
        Column(header="Highest", cells=[f"{each.max_error:.1%}" for each in found.fits]),
    ]
    return table_of(fitting(columns, width)[0])


def calibration_rows(found: Calibrated) -> list[dict[str, object]]:
    """One row a rate, in base units."""
    return [_rate_object(each) | {"sizes": _sizes(each)} for each in found.rates]


def _rate_object(rate: Rate) -> dict[str, object]:
    return {
        "kind": rate.kind,
        "sizes": dict(rate.sizes),
        "seconds": rate.seconds,
        "flop_per_s": rate.flop_per_s if rate.flop else None,
        "bytes_per_s": rate.bytes_per_s if rate.moved_bytes else None,
    }


def calibration_object(found: Calibrated) -> Json:
    """The same as one object."""
    return {
        "schema": SCHEMA,
        "device": found.device,
        "gpu": found.gpu.name if found.gpu else None,
        "seconds": found.seconds,
        "path": str(found.path),
        "constants": {
            each.name: {"value": each.value, "before": each.before, "origin": "measured", "source": each.source}
            for each in found.constants
        },
        "fits": [
            {
                "constant": each.constant,
                "value": each.value,
                "runs": each.runs,
                "mean_error": each.mean_error,
                "max_error": each.max_error,
                "mean_error_before": each.mean_error_before,
            }
            for each in found.fits
        ],
        "rates": [_rate_object(each) for each in found.rates],
        "skipped": list(found.skipped),
    }
