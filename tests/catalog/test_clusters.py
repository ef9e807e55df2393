"""Clusters by name and by file, and what they bring to a question."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import yaml

from advisor.catalog import clusters, request
from advisor.catalog.clusters import all_clusters, find_cluster, read_cluster
from advisor.catalog.links import find_link
from advisor.catalog.request import resolve
from advisor.catalog.table import plain
from advisor.cli.clusters import clusters as command
from advisor.cost.estimate import estimate
from advisor.errors import AdvisorError, ConfigError, SpecError, UnknownNameError
from advisor.specs.question import Input

GIB = 2**30
MODEL = "Qwen2.5-0.5B"
MACHINE: dict[str, Any] = {"gpu": "RTX 3090", "gpus": 4, "network": "25gbe", "host_memory_gib": 256}

Written = Callable[[object], Path]


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """Writes what a cluster's file says."""

    def write(said: object) -> Path:
        path = tmp_path / "lab.yaml"
        path.write_text(yaml.safe_dump(said))
        return path

    return write


def inputs(**words: Any) -> dict[str, Input]:
    return {each.name: each for each in resolve(MODEL, **words).inputs}


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("dgx-h100", "dgx-h100"),
        ("DGX H100", "dgx-h100"),
        ("p5", "p5.48xlarge"),
        ("p4d.24xlarge", "p4d.24xlarge"),
        ("Standard_ND96isr_H100_v5", "nd96isr-h100-v5"),
        ("a3-mega", "a3-megagpu-8g"),
        ("4x3090", "4x3090-nvlink-pairs"),
    ],
)
def test_a_cluster_is_found_by_its_usual_names(asked: str, name: str) -> None:
    assert find_cluster(asked).name == name


def test_every_cluster_has_a_source_a_network_and_a_name_of_its_own() -> None:
    every = all_clusters()
    names = [plain(name) for each in every for name in (each.name, *each.aliases)]

    assert len(every) == 33
    assert len(set(names)) == len(names)
    assert all(each.source and each.network(each.gpus_per_node) for each in every)


def test_a_file_is_called_as_its_cluster() -> None:
    assert all(find_cluster(each.name) == each for each in all_clusters())


def test_an_unknown_cluster_brings_near_names() -> None:
    with pytest.raises(
        UnknownNameError, match=r"unknown cluster 'dgx-h101'; near names: .*dgx-h100.*`advisor clusters`"
    ):
        find_cluster("dgx-h101")


# NVIDIA DGX A100 user guide: one 200 Gb/s card for each of 8 GPUs; a PCIe machine's two are shared by four each.
@pytest.mark.parametrize(("name", "cards_for_a_gpu"), [("dgx-a100", 1), ("8xa100-pcie-bridges", 1 / 4)])
def test_network_cards_are_those_of_the_machine(name: str, cards_for_a_gpu: float) -> None:
    network = find_cluster(name).network(8)

    assert network
    assert network.bandwidth_bytes_per_s == pytest.approx(find_link("ib-hdr").bandwidth_bytes_per_s * cards_for_a_gpu)


def test_a_file_of_one_s_own_says_what_it_knows_better(written: Written) -> None:
    known = {"like": "25gbe", "gb_per_s": 2.8, "latency_us": 20}
    profile = read_cluster(written({"machine": MACHINE | {"network": known, "link": "pcie4-no-p2p"}}))

    network = profile.network(4)
    assert (profile.name, profile.link.name, profile.host_memory_bytes) == ("lab", "pcie4-no-p2p", 256 * GIB)
    assert network
    assert (network.bandwidth_bytes_per_s, network.latency_s) == (pytest.approx(0.7e9), pytest.approx(20e-6))
    assert not network.assumed


def test_the_examples_that_are_shown_can_be_read(tmp_path: Path) -> None:
    shown = {"docstring": clusters.__doc__ or "", "help": command.help or ""}
    for name, text in shown.items():
        lines = text.splitlines()
        first = next(place for place, line in enumerate(lines) if line.strip() == "machine:")
        last = next(place for place, line in enumerate(lines) if "count: 2" in line)
        (tmp_path / f"{name}.yaml").write_text(dedent("\n".join(lines[first : last + 1])))
        profile = read_cluster(tmp_path / f"{name}.yaml")

        assert (profile.gpu.name, profile.nodes, profile.host_memory_bytes) == ("RTX 3090", 2, 256 * GIB)
        assert profile.topology
        assert profile.topology.title == "[0, 1] [2, 3]"


def test_the_slowest_of_unequal_machines_counts(written: Written) -> None:
    kinds = [
        MACHINE | {"count": 2, "network": "ib-hdr", "network_cards": 4},
        MACHINE | {"count": 1, "network": "100gbe", "host_memory_gib": 128},
    ]
    profile = read_cluster(written({"machines": kinds}))

    network = profile.network(4)
    assert network
    assert (network.name, profile.nodes, profile.host_memory_bytes) == ("100gbe", 3, 128 * GIB)


@pytest.mark.parametrize(
    ("said", "kind", "message"),
    [
        (
            {"machines": [MACHINE, MACHINE | {"gpu": "RTX 4090"}]},
            SpecError,
            "has RTX 3090 and RTX 4090; advisor plans for one kind of GPU",
        ),
        ({"machines": [MACHINE, MACHINE | {"gpus": 2}]}, SpecError, "machines of 4 and of 2 GPUs"),
        ({"machines": [MACHINE, MACHINE | {"count": 2}]}, SpecError, "of some machines how many there are"),
        (
            {"machines": [MACHINE, MACHINE | {"islands": [[0, 1, 2, 3]], "between": "pcie4"}]},
            SpecError,
            "machines with other islands",
        ),
        (
            {"machine": MACHINE | {"gpus": 8, "islands": [[0, 1, 2]], "between": "pcie4"}},
            SpecError,
            r"islands \[0, 1, 2\] hold 3 GPUs, but the machine has 8",
        ),
        ({"machine": MACHINE | {"islands": [[0, 1], [1, 2, 3]], "between": "pcie4"}}, SpecError, "GPU 1 is in 2 of"),
        ({"machine": MACHINE | {"islands": [[0, 1]]}}, ConfigError, "islands and between go together"),
        (
            {"machine": MACHINE | {"islands": "0-3", "between": "pcie4"}},
            ConfigError,
            "islands of a machine must be list",
        ),
        ({"machine": MACHINE | {"islands": [["a"]], "between": "pcie4"}}, ConfigError, "must be lists of GPU numbers"),
        ({"machine": MACHINE | {"link": "nvlink9"}}, UnknownNameError, "unknown link 'nvlink9'"),
        ({"machine": MACHINE | {"gpu": "RTX 9090"}}, UnknownNameError, "unknown GPU 'RTX 9090'"),
        (
            {"machine": MACHINE | {"network": {"like": "25gbe", "gb_per_s": -1}}},
            SpecError,
            "gb_per_s of network must be above 0, got -1",
        ),
        ({"machine": MACHINE | {"network": {"gb_per_s": 1}}}, ConfigError, "network needs like"),
        (
            {"machine": MACHINE | {"network": {"like": "25gbe", "rate": 1}}},
            ConfigError,
            "network has unknown keys rate",
        ),
        ({"machine": MACHINE | {"network_cards": 0}}, SpecError, "network_cards of a machine must be above 0, got 0"),
        ({"machine": MACHINE | {"gpus": "four"}}, ConfigError, "gpus of a machine must be int or float, got 'four'"),
        ({"machine": {"gpus": 4}}, ConfigError, "a machine needs gpu and gpus"),
        ({"machine": MACHINE | {"nics": 1}}, ConfigError, "a machine has unknown keys nics"),
        ({"machine": MACHINE, "kind": "lab"}, ConfigError, "the file has unknown keys kind"),
        ({"machine": MACHINE, "machines": [MACHINE]}, ConfigError, "needs either machine or machines"),
        ({"machines": []}, ConfigError, "machines is empty"),
        ({"machines": ["dgx"]}, ConfigError, "a machine must be a mapping, got 'dgx'"),
        ([1], ConfigError, "the file must be a mapping"),
    ],
)
def test_a_cluster_that_cannot_be_is_refused_in_one_line(
    written: Written, said: object, kind: type[AdvisorError], message: str
) -> None:
    with pytest.raises(kind, match=message) as refusal:
        read_cluster(written(said))

    assert re.match(r"^\S*lab\.yaml: ", str(refusal.value))
    assert "\n" not in str(refusal.value)


def test_a_file_that_is_not_there_or_no_yaml_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml cannot be read: No such file"):
        find_cluster(str(tmp_path / "absent.yaml"))
    (tmp_path / "broken.yaml").write_text("machine: [")
    with pytest.raises(ConfigError, match=r"broken\.yaml is no YAML"):
        find_cluster(str(tmp_path / "broken.yaml"))


def test_a_cluster_brings_its_hardware_and_says_so() -> None:
    found = inputs(cluster="4x3090", nodes=2)

    assert (found["cluster"].value, found["cluster"].origin) == ("4x3090-nvlink-pairs", "given")
    named = ("gpu", "gpus", "link", "islands", "network")
    assert [found[name].value for name in named] == [
        "RTX 3090",
        8,
        "nvlink-bridge",
        "[0, 1] [2, 3] over pcie4",
        "10gbe",
    ]
    assert {found[name].origin for name in named} == {"file"}
    assert {found[name].source for name in named} == {"cluster 4x3090-nvlink-pairs"}
    assert found["host_memory_gib"].origin == "assumed"


def test_words_win_over_the_cluster() -> None:
    question = resolve(
        MODEL, cluster="4x3090", gpu="RTX A6000", link="pcie4", network="100gbe", nodes=2, host_memory=99
    )
    found = {each.name: each for each in question.inputs}

    assert [found[name].origin for name in ("gpu", "link", "network", "host_memory_gib")] == ["given"] * 4
    assert (question.cluster.gpu.name, question.cluster.link.name) == ("RTX A6000", "pcie4")
    assert question.cluster.topology is None
    assert question.cluster.host_memory_bytes == 99 * GIB


@pytest.mark.parametrize(
    ("words", "gpus", "nodes"),
    [
        ({}, 8, 1),
        ({"nodes": 3}, 24, 3),
        ({"gpus": 32}, 32, 4),
        ({"gpus": 4}, 4, 1),
        ({"gpus": 8, "nodes": 2}, 8, 2),
    ],
)
def test_gpus_and_machines_follow_from_each_other(words: dict[str, int], gpus: int, nodes: int) -> None:
    cluster = resolve(MODEL, cluster="dgx-h100", **words).cluster  # type: ignore[arg-type]

    assert (cluster.gpus, cluster.nodes) == (gpus, nodes)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            {"gpus": 8, "nodes": 1},
            "8 GPUs on 1 machines are more than the 4 that each 4x4090-pcie has; give --nodes 2 or at most --gpus 4",
        ),
        ({"gpus": 6}, "6 GPUs do not fill machines of 4, as 4x4090-pcie has; give --nodes too"),
    ],
)
def test_more_gpus_than_a_machine_has_are_refused(words: dict[str, int], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        resolve(MODEL, cluster="4x4090", **words)  # type: ignore[arg-type]


def test_more_machines_than_a_cluster_has_are_refused(written: Written) -> None:
    path = str(written({"machine": MACHINE | {"count": 2}}))

    assert resolve(MODEL, cluster=path).cluster.gpus == 8
    with pytest.raises(SpecError, match="3 machines are more than the 2 of lab; give fewer --nodes"):
        resolve(MODEL, cluster=path, nodes=3)


def test_a_cluster_that_is_named_is_not_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request, "detect", lambda: pytest.fail("asked this machine"))

    assert resolve(MODEL, cluster="dgx-a100").cluster.gpu.name == "A100-SXM4-80GB"


def test_a_network_that_nobody_said_is_assumed(written: Written) -> None:
    said = {key: value for key, value in MACHINE.items() if key != "network"}
    found = inputs(cluster=str(written({"machine": said})), nodes=2)

    assert (found["network"].value, found["network"].origin) == ("ib-hdr", "assumed")


def step_seconds(cluster: str, **words: Any) -> float:
    return estimate(MODEL, cluster=cluster, strategy="zero2", micro_batch=1, **words).time.step_s


# deepspeedai/DeepSpeed#5770: 2 machines of 2 A10 over 10 Gb/s Ethernet were 3.5 times slower than one of them.
def test_a_second_machine_over_ten_gigabit_ethernet_makes_a_step_slower() -> None:
    assert step_seconds("2xa10-10gbe", nodes=2) > 1.5 * step_seconds("2xa10-10gbe", nodes=1)


def test_a_step_waits_for_pci_express_without_peer_to_peer() -> None:
    assert step_seconds("4x4090-pcie") > step_seconds("4x4090-pcie", link="pcie4")


def test_a_step_waits_for_the_bus_between_bridged_pairs() -> None:
    assert step_seconds("4x3090-nvlink-pairs") > step_seconds("4x3090-nvlink-pairs", link="nvlink-bridge")
