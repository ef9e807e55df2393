"""Clusters by name, from ``profiles/clusters/``, or from one's own YAML of the same form.

    name: my-lab
    source: measured in March          # where the facts are from; only files in profiles/ have to say
    machine:
      gpu: RTX 3090                    # a name from `advisor gpus`
      gpus: 4
      link: nvlink-bridge              # inside a machine; by default the GPU's usual one
      islands: [[0, 1], [2, 3]]        # the GPUs that it joins, where it does not join all of them
      between: pcie4                   # what joins the islands
      network: 25gbe                   # between machines
      network_cards: 1                 # by default one for all GPUs of Ethernet, else one for each
      host_memory_gib: 256
      count: 2                         # how many there are; without it, as many as --nodes says

``link``, ``between`` and ``network`` name links of ``profiles/links.csv``, or are mappings ``{like: 25gbe,
gb_per_s: 2.8, latency_us: 20}`` with what is known better. ``machines`` in place of ``machine`` lists several kinds.
They may differ in links, network and memory, of which the slowest and smallest count: a collective waits for its
slowest machine. GPUs have to be the same in all, and as many.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from advisor.catalog.gpus import find_gpu
from advisor.catalog.links import find_link, find_network
from advisor.catalog.profiles import profiles_folder
from advisor.catalog.table import plain, unknown_name
from advisor.errors import AdvisorError, ConfigError, SpecError
from advisor.specs.hardware import Gpu, Link, Topology

GIB = 2**30

Given = Mapping[str, Any] | str
"""A link as a file has it: a name, or what is known better than of the link that it is like."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """One kind of machine, whole: a plan may use fewer of its GPUs."""

    gpu: Gpu
    gpus: int
    link: Link
    topology: Topology | None = None
    network_as_given: Given | None = None
    network_cards: float | None = None
    host_memory_bytes: int | None = None
    """None where nobody said."""
    count: int | None = None
    """How many there are; None for any number."""

    def network(self, gpus_per_node: int) -> Link | None:
        """The share of one of *gpus_per_node* GPUs in the network; None where nobody said which it is."""
        if self.network_as_given is None:
            return None
        return _link("network", self.network_as_given, gpus_per_node, self.network_cards, self.gpus)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterProfile:
    """What a file says of a cluster. Machines of several kinds are put together: the slowest of each counts."""

    name: str
    aliases: tuple[str, ...] = ()
    machines: tuple[Machine, ...]
    source: str = ""
    notes: str = ""

    @property
    def gpu(self) -> Gpu:
        return self.machines[0].gpu

    @property
    def gpus_per_node(self) -> int:
        return self.machines[0].gpus

    @property
    def nodes(self) -> int | None:
        """How many machines there are; None for any number."""
        counts = [each.count for each in self.machines]
        return None if None in counts else sum(each or 0 for each in counts)

    @property
    def link(self) -> Link:
        return min((each.link for each in self.machines), key=_speed)

    @property
    def topology(self) -> Topology | None:
        return self.machines[0].topology

    @property
    def host_memory_bytes(self) -> int | None:
        known = [each.host_memory_bytes for each in self.machines]
        return None if None in known else min(each or 0 for each in known)

    def network(self, gpus_per_node: int) -> Link | None:
        """The slowest network's share of one of *gpus_per_node* GPUs; None where nobody said which it is."""
        known = [each.network(gpus_per_node) for each in self.machines]
        return min((each for each in known if each), key=_speed, default=None)


def _speed(link: Link) -> tuple[float, float]:
    return link.bandwidth_bytes_per_s, -link.latency_s


def find_cluster(name: str) -> ClusterProfile:
    """The cluster that *name* says: a name or alias, whatever its case and punctuation, or a YAML file.

    Raises UnknownNameError, ConfigError for a file that cannot be read or has unknown keys, and SpecError for what
    cannot be.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        return read_cluster(path)
    key = plain(name)
    for file in _files():
        if plain(file.stem) == key:
            return read_cluster(file)
    for profile in all_clusters():
        if key in map(plain, (profile.name, *profile.aliases)):
            return profile
    names = (each for profile in all_clusters() for each in (profile.name, *profile.aliases))
    raise unknown_name("cluster", name, names, "`advisor clusters`")


@lru_cache(maxsize=1)
def all_clusters() -> tuple[ClusterProfile, ...]:
    """The clusters of ``profiles/clusters/`` by name."""
    return tuple(read_cluster(file) for file in _files())


def _files() -> list[Path]:
    return sorted((profiles_folder() / "clusters").glob("*.yaml"))


def read_cluster(path: Path) -> ClusterProfile:
    """The cluster that the YAML file at *path* describes."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        said = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; give a name from `advisor clusters`") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    try:
        return _profile(_Keys(said, "the file"), path.stem)
    except AdvisorError as error:
        raise type(error)(f"{path}: {error}") from error


class _Keys:
    """A mapping of a file whose keys are taken one by one; those left over are errors."""

    def __init__(self, said: object, what: str) -> None:
        if not isinstance(said, dict):
            raise ConfigError(f"{what} must be a mapping, got {said!r}")
        self.what, self._said = what, dict(said)

    def take(self, key: str, *kinds: type, default: Any = None) -> Any:
        """The value of *key*, which has to be of one of *kinds*; *default* where it is absent."""
        if key not in self._said:
            return default
        value = self._said.pop(key)
        if not isinstance(value, kinds) or isinstance(value, bool):
            listed = " or ".join(kind.__name__ for kind in kinds)
            raise ConfigError(f"{key} of {self.what} must be {listed}, got {value!r}")
        return value

    def number(self, key: str, least: float) -> float | None:
        """A number above *least*; None where it is absent."""
        value = self.take(key, int, float)
        if value is not None and value <= least:
            raise SpecError(f"{key} of {self.what} must be above {least:g}, got {value:g}")
        return None if value is None else float(value)

    def done(self) -> None:
        if self._said:
            raise ConfigError(f"{self.what} has unknown keys {', '.join(map(str, self._said))}")


def _profile(said: _Keys, stem: str) -> ClusterProfile:
    one, several = said.take("machine", dict), said.take("machines", list)
    if (one is None) == (several is None):
        raise ConfigError("needs either machine or machines")
    machines = tuple(_machine(_Keys(each, "a machine")) for each in ([one] if several is None else several))
    if not machines:
        raise ConfigError("machines is empty")
    for each in machines[1:]:
        _alike(machines[0], each)
    profile = ClusterProfile(
        name=str(said.take("name", str, default=stem)),
        aliases=tuple(map(str, said.take("aliases", list, default=[]))),
        machines=machines,
        source=said.take("source", str, default=""),
        notes=said.take("notes", str, default=""),
    )
    said.done()
    return profile


def _alike(one: Machine, other: Machine) -> None:
    """Refuses machines that cannot share a plan."""
    if one.gpu != other.gpu:
        raise SpecError(
            f"has {one.gpu.name} and {other.gpu.name}; advisor plans for one kind of GPU: describe their machines apart"
        )
    if one.gpus != other.gpus:
        raise SpecError(f"has machines of {one.gpus} and of {other.gpus} GPUs; give all the smaller number")
    if (one.topology and one.topology.islands) != (other.topology and other.topology.islands):
        raise SpecError("has machines with other islands; give all those of the slower ones")
    if (one.count is None) != (other.count is None):
        raise SpecError("says of some machines how many there are and not of others; give each its count")


def _machine(said: _Keys) -> Machine:
    name, gpus = said.take("gpu", str), said.number("gpus", 0)
    if name is None or gpus is None:
        raise ConfigError("a machine needs gpu and gpus")
    gpu = find_gpu(name)
    link = _link("link", said.take("link", str, dict, default=gpu.link))
    islands, between = said.take("islands", list), said.take("between", str, dict)
    count, memory = said.number("count", 0), said.number("host_memory_gib", 0)
    machine = Machine(
        gpu=gpu,
        gpus=int(gpus),
        link=link,
        topology=_topology(islands, between, int(gpus)),
        network_as_given=said.take("network", str, dict),
        network_cards=said.number("network_cards", 0),
        host_memory_bytes=None if memory is None else int(memory * GIB),
        count=None if count is None else int(count),
    )
    said.done()
    machine.network(machine.gpus)
    return machine


def _topology(islands: list[Any] | None, between: Given | None, gpus: int) -> Topology | None:
    if islands is None and between is None:
        return None
    if islands is None or between is None:
        raise ConfigError("islands and between go together: the GPUs that link joins, and what joins the others")
    if not all(isinstance(each, list) and all(isinstance(gpu, int) for gpu in each) for each in islands):
        raise ConfigError(f"islands must be lists of GPU numbers such as [[0, 1], [2, 3]], got {islands!r}")
    topology = Topology(islands=tuple(tuple(each) for each in islands), between=_link("between", between))
    if topology.gpus != gpus:
        raise SpecError(
            f"islands {topology.title} hold {topology.gpus} GPUs, but the machine has {gpus}; each has to be in one"
        )
    return topology


def _link(
    what: str, given: Given, gpus_per_node: int = 1, cards: float | None = None, gpus_of_a_machine: int | None = None
) -> Link:
    """The link of profiles/links.csv that *given* names, with what it says better."""
    said = _Keys({"like": given} if isinstance(given, str) else dict(given), what)
    like = said.take("like", str)
    if like is None:
        raise ConfigError(f"{what} needs like, the link of profiles/links.csv that it resembles")
    if what == "network" and cards is not None:
        link = find_network(like, gpus_per_node, cards, gpus_of_a_machine)
    else:
        link = find_link(like, gpus_per_node)
    rate, latency = said.number("gb_per_s", 0), said.number("latency_us", -1e-9)
    said.done()
    if rate is not None:
        # What a card, or a GPU's own link, achieves: the share of a GPU in it is as that of the link that it is like.
        share = rate * 1e9 / find_link(like, 1).bandwidth_bytes_per_s
        link = replace(
            link,
            name=f"{link.name} at {rate:g} GB/s",
            bandwidth_bytes_per_s=link.bandwidth_bytes_per_s * share,
            peak_bytes_per_s=link.peak_bytes_per_s * share,
            assumed=False,
            source="given",
        )
    return link if latency is None else replace(link, latency_s=latency * 1e-6)
