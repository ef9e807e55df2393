"""How the GPUs of this machine are joined, as NVML tells it: NVLinks, PCI Express and peer-to-peer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from advisor.catalog.links import find_link
from advisor.specs.hardware import Gpu, Link, Topology

READ = 0
"""``NVML_P2P_CAPS_INDEX_READ`` of nvml.h; nvidia-ml-py 13 has a tuple under that name."""
WIDE_BRIDGE = 12
"""NVLinks of an A100 or H100 on PCI Express that its bridges join to another, as many as an A100 has to a switch; an
RTX 3090 or A6000 has 4."""
WHOLE_WIDTH = 16
"""Lanes of a slot as profiles/links.csv has them."""


class Wiring(NamedTuple):
    """What joins the GPUs of one machine, by their place among those that may be used."""

    islands: tuple[tuple[int, ...], ...]
    """GPUs with a way over NVLink to each other; one by one where there is none."""
    nvlinks: int
    """How many NVLinks work on the GPU that has the most."""
    pcie_generation: int
    pcie_width: int
    """Lanes of the narrowest slot."""
    peer_to_peer: bool
    """Whether every two GPUs reach each other's memory."""
    behind_switches: bool
    """Whether the way between every two GPUs stays within PCIe switches, off the host bridges."""

    def links(self, gpu: Gpu) -> tuple[Link, Topology | None]:
        """The link between these GPUs, all of model *gpu*, and the islands that it joins if it does not join all."""
        if all(len(island) == 1 for island in self.islands):
            return self._pcie(), None
        usual = find_link(gpu.link)
        wide = self.nvlinks >= WIDE_BRIDGE
        joined = usual if usual.kind == "nvlink" else find_link("nvlink3" if wide else "nvlink-bridge")
        if len(self.islands) == 1:
            return joined, None
        return joined, Topology(islands=self.islands, between=self._pcie())

    def _pcie(self) -> Link:
        generation = min(max(self.pcie_generation, 3), 6)
        if not self.peer_to_peer:
            link = find_link(f"pcie{min(generation, 5)}-no-p2p")
        else:
            link = find_link("pcie5-switch" if generation == 5 and self.behind_switches else f"pcie{generation}")
        share = self.pcie_width / WHOLE_WIDTH
        if share >= 1:
            return link
        return replace(
            link,
            name=f"{link.name} x{self.pcie_width}",
            bandwidth_bytes_per_s=link.bandwidth_bytes_per_s * share,
            peak_bytes_per_s=link.peak_bytes_per_s * share,
            assumed=True,
        )


def wiring(pynvml: Any, handles: Sequence[Any]) -> Wiring | None:
    """What NVML tells of the GPUs with these *handles*; None where it does not tell, as in some virtual machines."""
    try:
        places = {_bus(pynvml.nvmlDeviceGetPciInfo(handle)): place for place, handle in enumerate(handles)}
        remotes = [_remotes(pynvml, handle) for handle in handles]
        pairs = [(one, other) for place, one in enumerate(handles) for other in handles[:place]]
        return Wiring(
            islands=_islands(remotes, places),
            nvlinks=max(len(each) for each in remotes),
            pcie_generation=min(pynvml.nvmlDeviceGetMaxPcieLinkGeneration(handle) for handle in handles),
            pcie_width=min(pynvml.nvmlDeviceGetMaxPcieLinkWidth(handle) for handle in handles),
            peer_to_peer=all(
                pynvml.nvmlDeviceGetP2PStatus(one, other, READ) == pynvml.NVML_P2P_STATUS_OK for one, other in pairs
            ),
            behind_switches=all(
                pynvml.nvmlDeviceGetTopologyCommonAncestor(one, other) <= pynvml.NVML_TOPOLOGY_MULTIPLE
                for one, other in pairs
            ),
        )
    except pynvml.NVMLError:
        return None


SWITCH = "switch"
"""Stands for the switch among the far ends of NVLinks."""


def _remotes(pynvml: Any, handle: Any) -> list[str]:
    """The far ends of a GPU's working NVLinks: bus addresses of GPUs, or the switch."""
    found = []
    for link in range(pynvml.NVML_NVLINK_MAX_LINKS):
        try:
            if not pynvml.nvmlDeviceGetNvLinkState(handle, link):
                continue
            kind = pynvml.nvmlDeviceGetNvLinkRemoteDeviceType(handle, link)
            if kind == pynvml.NVML_NVLINK_DEVICE_TYPE_SWITCH:
                found.append(SWITCH)
            elif kind == pynvml.NVML_NVLINK_DEVICE_TYPE_GPU:
                found.append(_bus(pynvml.nvmlDeviceGetNvLinkRemotePciInfo(handle, link)))
        except pynvml.NVMLError:
            # NVML says so of each link that the GPU does not have.
            continue
    return found


def _bus(info: Any) -> str:
    """A bus address, whatever NVML's release: newer ones write the domain with more digits."""
    text = info.busId.decode() if isinstance(info.busId, bytes) else str(info.busId)
    return text.casefold().lstrip("0")


def _islands(remotes: Sequence[list[str]], places: dict[str, int]) -> tuple[tuple[int, ...], ...]:
    """GPUs that NVLinks join, directly, over others, or by the switch."""
    switched = {place for place, ends in enumerate(remotes) if SWITCH in ends}
    near = [
        {places[end] for end in ends if end in places} | (switched if SWITCH in ends else set()) for ends in remotes
    ]
    left, islands = set(range(len(remotes))), []
    while left:
        island, found = set[int](), {min(left)}
        while found:
            island |= found
            found = {
                end for place in found for end in near[place] | (switched if place in switched else set())
            } - island
        islands.append(tuple(sorted(island)))
        left -= island
    return tuple(islands)
