"""Fits the latencies of collectives to measured curves, and says how far off every curve is.

    python benchmarks/fit_collectives.py

Reads profiles/rates/collectives.csv: times of all-reduces, all-gathers and reduce-scatters by size. Four constants are
fitted (least mean absolute logarithmic error, every curve counting alike), by the formula of
``advisor.cost.collectives``. Bandwidths and the other latencies are what profiles/links.csv has from the largest and
smallest messages, and protocols are NCCL's own (profiles/protocols.csv). Prints for each curve the error by NCCL's
constants, by the shipped ones, by those fitted now, and with the curve left out of the fit if others know its links.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from advisor.catalog.gpus import find_gpu
from advisor.catalog.links import find_link
from advisor.catalog.profiles import profiles_folder
from advisor.cost.collectives import ROUNDS, collective_seconds, path
from advisor.specs.hardware import Cluster, Gpu, Link
from advisor.specs.plan import Group

Constants = Mapping[str, float]

OWN = {"4 x 8 B200 over EFA": "efa-p6 launch_us", "2 x 8 H100 over TCPXO": "tcpxo latency_us"}
"""Curves that alone know a constant, and so cannot be left out."""
NCCL = {
    "in_switch_latency_us": 23.0,
    "efa simple_latency_us": 14.0,
    "efa-p6 launch_us": 14.0,
    "tcpxo latency_us": 2.7,
}
"""What NCCL itself takes for latencies (src/graph/tuning.cc b647562), and other links' launch: where the fit starts."""
FIRST_STEP, LAST_STEP = 0.3, 0.02
"""By how much a constant is changed in the search for the least error."""


@dataclass(frozen=True)
class Point:
    gpus: int
    nodes: int
    collective: str
    payload_bytes: int
    seconds: float


@dataclass(frozen=True)
class Curve:
    name: str
    gpu: Gpu
    network: str
    points: tuple[Point, ...]


def main() -> None:
    every, shipped = curves(), now()
    fitted = fit(every)
    print(f"{'constant':30} {'NCCL':>8} {'shipped':>8} {'fitted':>8}")
    for name, value in shipped.items():
        print(f"{name:30} {NCCL[name]:8.3g} {value:8.3g} {fitted[name]:8.3g}")
    print(f"\n{'error of the time, mean / max':30} points          NCCL       shipped        fitted      left out")
    for curve in every:
        cells = [spread(errors(curve, constants)) for constants in (NCCL, shipped, fitted)]
        others = [each for each in every if each is not curve]
        cells.append("-" if curve.name in OWN else spread(errors(curve, fit(others))))
        print(f"{curve.name:30} {len(curve.points):6} {' '.join(f'{cell:>13}' for cell in cells)}")
    at_scale = [curve for curve in every if "H100 over EFA" in curve.name]
    print("\npredicted / measured, 256 MiB between H100 over EFA, by machines")
    for curve in at_scale:
        ratios = errors(curve, shipped) + 1
        listed = ", ".join(f"{each.nodes}: {ratio:.2f}" for each, ratio in zip(curve.points, ratios, strict=True))
        print(f"{curve.name.rpartition(' ')[2]:16} {listed}")


def spread(found: NDArray[np.float64]) -> str:
    return f"{100 * np.abs(found).mean():.1f} / {100 * np.abs(found).max():.0f} %"


def curves() -> list[Curve]:
    """The measured curves, without the points that say why they are left out."""
    with (profiles_folder() / "rates" / "collectives.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if not row["left_out"]]
    found = []
    for name in dict.fromkeys(row["curve"] for row in rows):
        own = [row for row in rows if row["curve"] == name]
        points = tuple(point(row) for row in own)
        found.append(Curve(name, find_gpu(own[0]["gpu"]), own[0]["network"] or "ib-ndr", points))
    return found


def point(row: Mapping[str, str]) -> Point:
    """A row with the time that its bus bandwidth stands for (nccl-tests, doc/PERFORMANCE.md)."""
    gpus, payload_bytes = int(row["gpus"]), int(row["payload_bytes"])
    rounds = next(rounds for kind, rounds in ROUNDS.items() if kind == row["collective"])
    seconds = rounds * (gpus - 1) / gpus * payload_bytes / (float(row["bus_gb_per_s"]) * 1e9)
    return Point(gpus, int(row["nodes"]), row["collective"], payload_bytes, seconds)


def now() -> dict[str, float]:
    """The fitted constants as the profiles have them."""
    in_switch, efa = find_link("nvlink4").in_switch, find_link("efa")
    assert in_switch
    return {
        "in_switch_latency_us": in_switch.latency_s * 1e6,
        "efa simple_latency_us": efa.latency_s * efa.protocols[-1].latency_ratio * 1e6,
        "efa-p6 launch_us": find_link("efa-p6").launch_s * 1e6,
        "tcpxo latency_us": find_link("tcpxo").latency_s * 1e6,
    }


def errors(curve: Curve, constants: Constants) -> NDArray[np.float64]:
    """Relative errors of the times of *curve*."""
    link, network = inside(find_link(curve.gpu.link), constants), outside(find_link(curve.network), constants)
    found = []
    for collective in dict.fromkeys(each.collective for each in curve.points):
        kind = next(kind for kind in ROUNDS if kind == collective)
        for gpus, nodes in dict.fromkeys((each.gpus, each.nodes) for each in curve.points):
            cluster = Cluster(
                gpu=curve.gpu,
                gpus=gpus,
                nodes=nodes,
                link=link,
                host_link=link,
                network=network,
                host_memory_bytes=0,
                cpu_memory_bandwidth_bytes_per_s=0.0,
            )
            over = path(cluster, Group(gpus))
            some = [each for each in curve.points if (each.collective, each.gpus) == (collective, gpus)]
            payload_bytes = np.array([each.payload_bytes for each in some])
            predicted_s = collective_seconds(kind, payload_bytes, 1, over)
            found += list(predicted_s / np.array([each.seconds for each in some]) - 1)
    return np.array(found)


def inside(link: Link, constants: Constants) -> Link:
    """A link inside a machine, with *constants* in place of the profiles'."""
    if link.in_switch is None:
        return link
    return replace(link, in_switch=link.in_switch._replace(latency_s=constants["in_switch_latency_us"] * 1e-6))


def outside(network: Link, constants: Constants) -> Link:
    """The same for a network."""
    latency_s = constants.get(f"{network.name} latency_us", network.latency_s * 1e6) * 1e-6
    launch_s = constants.get(f"{network.name} launch_us", network.launch_s * 1e6) * 1e-6
    *small, simple = network.protocols
    if network.name == "efa":
        simple = simple._replace(latency_ratio=constants["efa simple_latency_us"] * 1e-6 / latency_s)
    return replace(network, latency_s=latency_s, launch_s=launch_s, protocols=(*small, simple))


def fit(known: Sequence[Curve]) -> dict[str, float]:
    """Constants of least error on *known*, found one after the other with ever smaller steps."""

    def loss(constants: Constants) -> float:
        return float(np.mean([np.abs(np.log1p(errors(curve, constants))).mean() for curve in known]))

    best, least, step = dict(NCCL), loss(NCCL), FIRST_STEP
    while step > LAST_STEP:
        before = least
        for name in NCCL:
            for factor in (1 + step, 1 / (1 + step)):
                tried = {**best, name: best[name] * factor}
                if (found := loss(tried)) < least - 1e-5:
                    best, least = tried, found
        if least == before:
            step /= 2
    return best


if __name__ == "__main__":
    main()
