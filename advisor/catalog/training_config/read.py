"""A file to the settings it means, whatever its format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from advisor.catalog.training_config.accelerate import JsonReader, from_accelerate
from advisor.catalog.training_config.command import from_command, is_command
from advisor.catalog.training_config.deepspeed import from_deepspeed
from advisor.catalog.training_config.settings import Settings
from advisor.errors import ConfigError


def read_config(path: str | Path) -> Settings:
    """The settings of a DeepSpeed JSON, an accelerate YAML, or a script with one launch command.

    Files that it names are read as well, relative to its own folder. Raises ConfigError for a file that cannot be
    read, a key that is unknown or has a value of another kind, and values that contradict each other.
    """
    path = Path(path)
    text = _text(path)
    json_at = _reader(path, _json)
    if path.suffix == ".json":
        return from_deepspeed(path.name, _json(path, text))
    if path.suffix in (".yaml", ".yml"):
        return from_accelerate(path.name, _yaml(path, text), json_at)
    if is_command(text):
        return from_command(path.name, text, json_at, _reader(path, _yaml))
    raise ConfigError(
        f"{path} is no DeepSpeed JSON (.json), no accelerate YAML (.yaml) and holds no launch command "
        "(accelerate launch, deepspeed, torchrun, python)"
    )


def _reader(path: Path, parse: Any) -> JsonReader:
    """Reads a file that *path* names: as given, beside it, or beside it by what follows a variable of the shell."""

    def at(named: str) -> tuple[str, Any]:
        places = [path.parent / named, Path(named)]
        if named.startswith("$"):
            places = [path.parent / named.partition("/")[2]]
        found = next((place for place in places if place.is_file()), places[0])
        return found.name, parse(found, _text(found, named_by=path.name))

    return at


def _text(path: Path, named_by: str = "") -> str:
    by = f", which {named_by} names," if named_by else ""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"{path}{by} cannot be read: {reason}") from error


def _json(path: Path, text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=lambda pairs: _without_twins(path, pairs))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is no JSON: {error}") from error


def _without_twins(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """DeepSpeed refuses a key that stands twice (runtime/config_utils.py ``dict_raise_error_on_duplicate_keys``)."""
    held = dict(pairs)
    if len(held) < len(pairs):
        names = [name for name, _ in pairs]
        twins = sorted({name for name in names if names.count(name) > 1})
        raise ConfigError(f"{path}: {', '.join(twins)} stands twice")
    return held


def _yaml(path: Path, text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
