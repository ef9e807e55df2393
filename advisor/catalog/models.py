"""Finds a model by name: a profile, a folder, a ``config.json``, or a Hub id."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from advisor.catalog.configuration import read_json
from advisor.catalog.huggingface import model_from_config
from advisor.catalog.profiles import model_profiles
from advisor.errors import ConfigError, UnknownNameError
from advisor.specs.model import ModelSpec

VARIANT_WORDS = frozenset({"2507", "base", "chat", "dpo", "hf", "instruct", "it", "meta", "pt", "sft", "thinking"})
"""Words in a name that tell how a model was trained, or who published it, but not its shape."""

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True, slots=True)
class FoundConfiguration:
    """A model's configuration, and what the user should know about how it was found."""

    config: Mapping[str, object]
    name: str
    source: str
    weights_from: str
    """What transformers loads its weights from: a Hub id, a folder, or a file that holds only the configuration."""
    note: str | None = None

    @property
    def model(self) -> ModelSpec:
        """The model as its family's function describes it."""
        return model_from_config(self.config, self.name, self.source)


@dataclass(frozen=True, slots=True)
class ModelRow:
    """One line of the table of models."""

    name: str
    family: str
    parameters: int
    layers: int
    hidden_size: int
    vocabulary_size: int
    maximum_positions: int | None


def find_model(name_or_path: str) -> FoundConfiguration:
    """The configuration of the model called *name_or_path*.

    In this order: a folder with a ``config.json`` or such a file, a profile, a profile of the same shape under
    another variant's name, the Hub's local cache, the Hub.
    """
    wanted = name_or_path.strip()
    # os.path answers no where pathlib raises, as for names too long for a file.
    path = Path(os.path.expanduser(wanted))
    if os.path.isfile(path / "config.json"):
        return _from_file(path / "config.json", path.resolve().name, str(path.resolve()))
    if os.path.isfile(path):
        name = path.resolve().parent.name if path.name == "config.json" else path.stem
        return _from_file(path, name, str(path.resolve()))
    if _looks_like_a_path(wanted):
        missing = f"{wanted} holds no config.json" if os.path.isdir(path) else f"there is no file {wanted}"
        raise UnknownNameError(f"{missing}; give a folder with a config.json, such a file, or a model's name")
    if profile := _profiles().get(wanted.casefold()):
        return _from_profile(profile)
    if profile := _variant(wanted) or _completed(wanted):
        found = _from_profile(profile)
        note = f"{wanted} has the shape of {found.name}, whose configuration was taken"
        organisation, _, name = _name(profile).partition("/")
        shortened = name.casefold().startswith(f"{wanted.casefold().rpartition('/')[2]}-")
        weights_from = f"{organisation}/{name if shortened else wanted.rpartition('/')[2]}"
        return replace(found, weights_from=weights_from, note=note)
    return _from_hub(wanted)


def model_names() -> tuple[str, ...]:
    """The names of all profiles, with their organisations."""
    return tuple(_name(path) for path in _profile_files())


def model_index() -> tuple[ModelRow, ...]:
    """All profiles as a table."""
    return tuple(
        ModelRow(
            name=model.name,
            family=model.family,
            parameters=model.parameter_count,
            layers=len(model.layers),
            hidden_size=model.hidden_size,
            vocabulary_size=model.vocabulary_size,
            maximum_positions=model.maximum_positions,
        )
        for model in (_from_profile(path).model for path in _profile_files())
    )


@lru_cache(maxsize=1)
def _profile_files() -> tuple[Path, ...]:
    return tuple(sorted(model_profiles().glob("*.json"), key=lambda path: path.name.casefold()))


@lru_cache(maxsize=1)
def _profiles() -> dict[str, Path]:
    """Profiles by their names in lower case, with and without organisation."""
    found: dict[str, Path] = {}
    for path in _profile_files():
        organisation, _, name = path.stem.casefold().partition("__")
        found[f"{organisation}/{name}"] = found[name] = path
    return found


def _name(path: Path) -> str:
    return path.stem.replace("__", "/", 1)


def _from_profile(path: Path) -> FoundConfiguration:
    profile = read_json(path)
    config, source = profile.get("config"), profile.get("source")
    if not isinstance(config, dict) or not isinstance(source, str):
        raise ConfigError(f"{path} needs the fields source and config")
    return FoundConfiguration(config, _name(path).partition("/")[2], source, weights_from=_name(path))


def _from_file(path: Path, name: str, weights_from: str) -> FoundConfiguration:
    return FoundConfiguration(read_json(path), name, str(path), weights_from)


def _looks_like_a_path(wanted: str) -> bool:
    return wanted.startswith((".", "/", "~")) or wanted.endswith(".json") or wanted.count("/") > 1


def _variant(wanted: str) -> Path | None:
    """The profile that differs from *wanted* in the fewest variant words and in nothing else."""
    organisation, _, name = wanted.casefold().rpartition("/")
    shape, words = _split(name)
    candidates: list[tuple[int, str, Path]] = []
    for path in _profile_files():
        its_organisation, _, its_name = path.stem.casefold().partition("__")
        its_shape, its_words = _split(its_name)
        if shape == its_shape and organisation in ("", its_organisation):
            candidates.append((len(words ^ its_words), its_name, path))
    return min(candidates)[2] if candidates else None


def _completed(wanted: str) -> Path | None:
    """The only profile whose name begins with the words of *wanted*, such as Mixtral-8x7B-v0.1 for Mixtral-8x7B."""
    organisation, _, name = wanted.casefold().rpartition("/")
    found = [
        path
        for path in _profile_files()
        if path.stem.casefold().partition("__")[2].startswith(f"{name}-")
        and organisation in ("", path.stem.casefold().partition("__")[0])
    ]
    return found[0] if len(found) == 1 else None


def _split(name: str) -> tuple[tuple[str, ...], frozenset[str]]:
    """A name's words that tell the shape, in order, and those that tell the variant."""
    words = name.split("-")
    return tuple(word for word in words if word not in VARIANT_WORDS), frozenset(words) & VARIANT_WORDS


def _from_hub(wanted: str) -> FoundConfiguration:
    if not _HUB_ID.fullmatch(wanted):
        raise UnknownNameError(f"{wanted!r} is neither a model's name nor a Hub id; {_near(wanted)}")
    from advisor.catalog.hub import config_file

    path = config_file(wanted, _near(wanted))
    return FoundConfiguration(
        read_json(path), wanted.rpartition("/")[2], f"config.json of {wanted} on the Hub", weights_from=wanted
    )


def _near(wanted: str) -> str:
    """The profiles whose names come nearest, as a clause of an error message."""
    import difflib

    name = wanted.casefold().rpartition("/")[2]
    names = {_name(path).partition("/")[2].casefold(): _name(path).partition("/")[2] for path in _profile_files()}
    near = [names[each] for each in difflib.get_close_matches(name, names, n=4, cutoff=0.6)]
    if not near:
        near = [names[each] for each in _sharing_a_word(name, names)]
    listed = f"near names: {', '.join(near)}" if near else "no name is near"
    return f"{listed}; `advisor models` lists all"


def _sharing_a_word(name: str, names: dict[str, str]) -> Iterator[str]:
    words = [word for word in re.split(r"[-_.\d]+", name) if len(word) > 2]
    matching = (each for each in names if any(word in each for word in words))
    return (each for _, each in zip(range(4), matching, strict=False))
