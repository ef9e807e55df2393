"""How GPUs are joined, with an NVML that stands in for the driver's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from advisor.catalog import request
from advisor.catalog.detect import Detected
from advisor.catalog.gpus import find_gpu
from advisor.catalog.request import resolve
from advisor.catalog.wiring import Wiring, wiring
from advisor.errors import SpecError

SWITCH = "switch"


class NvmlError(Exception):
    """As pynvml.NVMLError."""


def stand_in(
    nvlinks: dict[int, list[int | str]] | None = None,
    generation: int = 4,
    widths: tuple[int, ...] = (16,),
    peers: bool = True,
    ancestor: int = 30,
    silent: bool = False,
) -> SimpleNamespace:
    """An NVML whose GPUs have *nvlinks* to other GPUs, by number, or to the switch. Its constants are pynvml's."""
    known = nvlinks or {}

    def far_end(gpu: int, link: int) -> int | str:
        if link >= len(known.get(gpu, [])):
            raise NvmlError("not supported")
        return known[gpu][link]

    def generation_of(gpu: int) -> int:
        if silent:
            raise NvmlError("not supported")
        return generation

    return SimpleNamespace(
        NVMLError=NvmlError,
        NVML_NVLINK_MAX_LINKS=36,
        NVML_NVLINK_DEVICE_TYPE_GPU=0,
        NVML_NVLINK_DEVICE_TYPE_SWITCH=2,
        NVML_P2P_STATUS_OK=0,
        NVML_TOPOLOGY_MULTIPLE=20,
        nvmlDeviceGetPciInfo=lambda gpu: SimpleNamespace(busId=f"00000000:{gpu + 10}:00.0".encode()),
        nvmlDeviceGetNvLinkState=lambda gpu, link: int(far_end(gpu, link) != "off"),
        nvmlDeviceGetNvLinkRemoteDeviceType=lambda gpu, link: 2 if far_end(gpu, link) == SWITCH else 0,
        nvmlDeviceGetNvLinkRemotePciInfo=lambda gpu, link: SimpleNamespace(
            busId=f"0000:{int(far_end(gpu, link)) + 10}:00.0"
        ),
        nvmlDeviceGetMaxPcieLinkGeneration=generation_of,
        nvmlDeviceGetMaxPcieLinkWidth=lambda gpu: widths[gpu % len(widths)],
        nvmlDeviceGetP2PStatus=lambda one, other, index: 0 if peers and index == 0 else 5,
        nvmlDeviceGetTopologyCommonAncestor=lambda one, other: ancestor,
    )


def found(gpus: int, **settings: Any) -> Wiring:
    answer = wiring(stand_in(**settings), range(gpus))
    assert answer
    return answer


PAIRS: dict[int, list[int | str]] = {0: [1, 1], 1: [0, 0], 2: [3], 3: [2]}


def test_bridges_make_pairs() -> None:
    link, topology = found(4, nvlinks=PAIRS).links(find_gpu("RTX 3090"))

    assert link.name == "nvlink-bridge"
    assert topology
    assert (topology.islands, topology.between.name) == (((0, 1), (2, 3)), "pcie4")


def test_a_switch_joins_all_gpus() -> None:
    wired = found(8, nvlinks={gpu: [SWITCH] * 12 for gpu in range(8)})

    link, topology = wired.links(find_gpu("A100-80GB"))
    assert wired.islands == (tuple(range(8)),)
    assert (link.name, topology) == ("nvlink3", None)


# Three bridges join all 12 links of two A100 on PCI Express, one the 4 of two RTX 3090.
@pytest.mark.parametrize(("gpu", "nvlinks", "name"), [("A100-PCIe", 12, "nvlink3"), ("RTX 3090", 4, "nvlink-bridge")])
def test_bridges_differ_in_their_links(gpu: str, nvlinks: int, name: str) -> None:
    assert found(2, nvlinks={0: [1] * nvlinks, 1: [0] * nvlinks}).links(find_gpu(gpu))[0].name == name


# DGX-1: every GPU has links to four others, and over them a way to all.
def test_a_mesh_is_one_island() -> None:
    cube: dict[int, list[int | str]] = {gpu: [gpu ^ 1, gpu ^ 2, gpu ^ 4] for gpu in range(8)}

    assert found(8, nvlinks=cube).islands == (tuple(range(8)),)


def test_a_bridge_that_is_off_joins_nothing() -> None:
    assert found(2, nvlinks={0: ["off"], 1: ["off"]}).islands == ((0,), (1,))


def test_a_gpu_that_may_not_be_used_joins_nothing() -> None:
    wired = wiring(stand_in(nvlinks=PAIRS), [1, 2])

    assert wired
    assert wired.islands == ((0,), (1,))


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "pcie4"),
        ({"generation": 3}, "pcie3"),
        ({"generation": 5}, "pcie5"),
        ({"generation": 5, "ancestor": 20}, "pcie5-switch"),
        ({"generation": 4, "ancestor": 10}, "pcie4"),
        ({"peers": False}, "pcie4-no-p2p"),
        ({"generation": 6, "peers": False}, "pcie5-no-p2p"),
        ({"generation": 2}, "pcie3"),
        ({"widths": (16, 8)}, "pcie4 x8"),
    ],
)
def test_without_nvlinks_the_bus_joins_gpus(settings: dict[str, Any], name: str) -> None:
    link, topology = found(2, **settings).links(find_gpu("RTX 4090"))

    assert (link.name, topology) == (name, None)


def test_half_the_lanes_have_half_the_rate() -> None:
    whole, half = (found(2, widths=(width,)).links(find_gpu("RTX 4090"))[0] for width in (16, 8))

    assert half.bandwidth_bytes_per_s == whole.bandwidth_bytes_per_s / 2
    assert half.assumed


def test_a_driver_that_does_not_tell_is_none() -> None:
    assert wiring(stand_in(silent=True), range(2)) is None


def test_what_joins_this_machine_s_gpus_is_taken_unless_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Detected(("NVIDIA GeForce RTX 3090",) * 4, 24 * 2**30, 2**37, found(4, nvlinks=PAIRS))
    monkeypatch.setattr(request, "detect", lambda: machine)
    inputs = {each.name: each for each in resolve("Qwen2.5-0.5B").inputs}

    assert [(inputs[name].value, inputs[name].origin) for name in ("link", "islands")] == [
        ("nvlink-bridge", "found"),
        ("[0, 1] [2, 3] over pcie4", "found"),
    ]
    assert resolve("Qwen2.5-0.5B", link="pcie4").cluster.topology is None
    assert resolve("Qwen2.5-0.5B", gpu="A100-80GB").cluster.link.name == "nvlink3"
    assert resolve("Qwen2.5-0.5B", gpus=8).cluster.link.name == "pcie4", "not this machine, which has four"
    assert resolve("Qwen2.5-0.5B", gpus=8, nodes=2).cluster.topology


def test_unlike_gpus_are_refused_unless_one_kind_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Detected(("NVIDIA GeForce RTX 3090", "NVIDIA GeForce RTX 4090"), 24 * 2**30, 2**37)
    monkeypatch.setattr(request, "detect", lambda: machine)

    with pytest.raises(
        SpecError, match=r"this machine has NVIDIA GeForce RTX 3090 and NVIDIA GeForce RTX 4090; .*--gpu"
    ):
        resolve("Qwen2.5-0.5B")
    assert resolve("Qwen2.5-0.5B", gpu="RTX 3090").cluster.gpu.name == "RTX 3090"
