"""Links and networks, in base units per GPU."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.catalog.links import all_links, find_link, find_network
from advisor.catalog.table import plain
from advisor.errors import SpecError, UnknownNameError
from advisor.specs.hardware import ONE_PROTOCOL


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

    assert len(set(names)) == len(names) == 39
    assert all(find_link(link.name) == link for link in all_links())


def test_an_unknown_link_brings_near_names() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown link 'nvlink9'; near names: nvlink.*links\.csv lists all"):
        find_link("nvlink9")


# ml-engineering, network/README.md: 16 GiB all-reduce over 8 H200 with rings, 367.6 GB/s of 450.
def test_a_measured_link_has_the_measured_bus_bandwidth() -> None:
    link = find_link("nvlink4")

    assert (link.bandwidth_bytes_per_s, link.peak_bytes_per_s, link.assumed) == (367.6e9, 450e9, False)


# ml-engineering, network/README.md: a 32 KiB all-reduce over 8 H200 takes 40 us: 14 steps after the launch.
def test_a_small_message_takes_the_launch_and_its_steps() -> None:
    link = find_link("nvlink4")

    assert link.launch_s + 14 * link.latency_s == pytest.approx(40e-6, rel=0.02)


@pytest.mark.parametrize(
    ("name", "protocols"),
    [("nvlink4", ["LL", "LL128", "Simple"]), ("pcie4", ["LL", "Simple"]), ("efa", ["LL", "Simple"])],
)
def test_larger_messages_take_protocols_with_more_latency_and_bandwidth(name: str, protocols: list[str]) -> None:
    found = find_link(name).protocols

    assert [each.name for each in found] == protocols
    assert [each.latency_ratio for each in found] == sorted(each.latency_ratio for each in found)
    assert [each.bandwidth_share for each in found] == sorted(each.bandwidth_share for each in found)
    assert found[-1].bandwidth_share == 1


def test_a_link_to_the_host_has_one_protocol() -> None:
    assert find_link("host-pcie4").protocols == ONE_PROTOCOL


@pytest.mark.parametrize(
    ("cards", "used", "expected"),
    [
        (1, 8, 1 / 8),  # all share one
        (8, 8, 1),
        (8, 2, 1),  # a GPU drives the card beside it and no other
        (1, 2, 1 / 2),
        (2, 8, 1 / 4),
        (2, 1, 1),
        (16, 8, 2),
    ],
)
def test_network_cards_are_divided_among_the_gpus_that_are_used(cards: int, used: int, expected: float) -> None:
    found = find_network("ib-hdr", used, cards, gpus_of_a_machine=8)

    assert found.bandwidth_bytes_per_s == pytest.approx(24e9 * expected)


@pytest.mark.parametrize(("gpus", "cards"), [(0, 1), (8, 0), (8, -1)])
def test_a_network_without_cards_or_gpus_is_refused(gpus: int, cards: int) -> None:
    with pytest.raises(SpecError, match=f"needs GPUs and network cards, got {gpus} and {cards}"):
        find_network("ib-hdr", gpus, cards)


def test_what_is_achieved_stays_below_the_wire() -> None:
    assert all(0.1 < link.bandwidth_bytes_per_s / link.peak_bytes_per_s < 1 for link in all_links())


# NVIDIA/nccl#495: 75 GB/s over 2 machines of 8 A100 with a 100 Gb/s NIC for each GPU.
def test_a_network_s_rate_is_one_gpu_s_share_of_the_bus_bandwidth() -> None:
    assert 8 * find_link("roce-100").bandwidth_bytes_per_s == pytest.approx(75e9, rel=0.01)


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
