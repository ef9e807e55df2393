"""Links and networks, in base units per GPU."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.catalog.links import all_links, find_link
from advisor.catalog.table import plain
from advisor.errors import SpecError, UnknownNameError


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("nvlink4", "nvlink4"),
        ("NVLink 4", "nvlink4"),
        ("ib-ndr", "ib-ndr"),
        ("InfiniBand NDR", "ib-ndr"),
        ("IB_HDR", "ib-hdr"),
        ("efa", "efa"),
        ("100GbE", "100gbe"),
        ("25gbe", "25gbe"),
        ("10gbe", "10gbe"),
        ("PCIe 4.0", "pcie4"),
        ("pcie", "pcie4"),
    ],
)
def test_a_link_is_found_by_its_usual_names(asked: str, name: str) -> None:
    assert find_link(asked).name == name


def test_no_two_links_share_a_name() -> None:
    names = [plain(link.name) for link in all_links()]

    assert len(set(names)) == len(names) == 37
    assert all(find_link(link.name) == link for link in all_links())


def test_an_unknown_link_brings_near_names() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown link 'nvlink9'; near names: nvlink.*links\.csv lists all"):
        find_link("nvlink9")


# ml-engineering, network/README.md: 16 GiB all-reduce over 8 H200 with rings, 367.6 GB/s of 450.
def test_a_measured_link_has_the_measured_bus_bandwidth() -> None:
    link = find_link("nvlink4")

    assert (link.bandwidth_bytes_per_s, link.peak_bytes_per_s, link.assumed) == (367.6e9, 450e9, False)
    assert link.latency_s == pytest.approx(40e-6 / 14, rel=0.02)


def test_what_is_achieved_stays_below_the_wire() -> None:
    assert all(0.1 < link.bandwidth_bytes_per_s / link.peak_bytes_per_s < 1 for link in all_links())


# ml-engineering, network/README.md: 381.8 GB/s over 4 machines of 8 B200 with a 400 Gb/s NIC for each GPU.
def test_a_network_s_rate_is_one_gpu_s_share_of_the_bus_bandwidth() -> None:
    assert 8 * find_link("efa-p6").bandwidth_bytes_per_s == pytest.approx(381.8e9, rel=0.001)


@given(st.sampled_from(all_links()), st.integers(1, 16))
def test_gpus_divide_only_what_they_share(link: object, gpus_per_node: int) -> None:
    name = link.name  # type: ignore[attr-defined]
    alone, among = find_link(name, 1), find_link(name, gpus_per_node)
    share = gpus_per_node if name in ("100gbe", "25gbe", "10gbe") else 1

    assert among.bandwidth_bytes_per_s == pytest.approx(alone.bandwidth_bytes_per_s / share)
    assert among.peak_bytes_per_s == pytest.approx(alone.peak_bytes_per_s / share)
    assert among.latency_s == alone.latency_s


def test_a_machine_without_gpus_is_refused() -> None:
    with pytest.raises(SpecError, match="at least one GPU, got gpus_per_node 0"):
        find_link("10gbe", 0)
