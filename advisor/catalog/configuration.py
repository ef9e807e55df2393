"""Reads the fields of a ``config.json``: checks their types and falls back to transformers' defaults."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from advisor.errors import ConfigError


class Configuration:
    """The fields of one configuration. A missing field has the default of transformers' config class (5.23).

    The sizes that a configuration leaves to those defaults are remembered in ``defaulted``.
    """

    def __init__(self, fields: Mapping[str, object], name: str, source: str) -> None:
        self.fields, self.name, self.source = fields, name, source
        self.defaulted: dict[str, int] = {}

    def integer(self, *keys: str, default: int, minimum: int = 1) -> int:
        """A whole number under the first of *keys* that is present; null counts as missing."""
        for key in keys:
            value = self.fields.get(key)
            if value is not None:
                return self._integer(key, value, minimum)
        self.defaulted[keys[0]] = default
        return default

    def optional_integer(self, *keys: str, default: int | None = None, minimum: int = 1) -> int | None:
        """As :meth:`integer`, but null says that the model has no such thing."""
        for key in keys:
            if key in self.fields:
                value = self.fields[key]
                return None if value is None else self._integer(key, value, minimum)
        return default

    def required_integer(self, key: str) -> int:
        """A whole number without a known default."""
        if self.fields.get(key) is None:
            raise self._error(key, "is missing")
        return self._integer(key, self.fields[key], 1)

    def number(self, key: str, default: float) -> float:
        value = self.fields.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._error(key, f"must be a number, got {value!r}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.fields.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._error(key, f"must be true or false, got {value!r}")
        return value

    def text(self, key: str, default: str) -> str:
        value = self.fields.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self._error(key, f"must be text, got {value!r}")
        return value

    def texts(self, key: str, count: int) -> tuple[str, ...] | None:
        """One text for each of *count* layers; None where the field is missing."""
        value = self._per_layer(key, count)
        return None if value is None else tuple(str(each) for each in value)

    def flags(self, key: str, count: int) -> tuple[bool, ...] | None:
        """One truth value, often written 0 or 1, for each of *count* layers; None where the field is missing."""
        value = self._per_layer(key, count)
        return None if value is None else tuple(bool(each) for each in value)

    def integers(self, key: str) -> tuple[int, ...] | None:
        """A list of whole numbers of any length; None where the field is missing."""
        value = self.fields.get(key)
        if value is None:
            return None
        if not isinstance(value, list | tuple):
            raise self._error(key, f"must be a list, got {value!r}")
        return tuple(self._integer(key, each, 0) for each in value)

    def section(self, key: str) -> Configuration | None:
        """The fields nested under *key*; None where there are none."""
        value = self.fields.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self._error(key, f"must hold fields, got {value!r}")
        return Configuration(value, self.name, self.source)

    def has(self, key: str) -> bool:
        """Whether *key* is present and not null."""
        return self.fields.get(key) is not None

    def _per_layer(self, key: str, count: int) -> list[object] | None:
        value = self.fields.get(key)
        if not value:
            return None
        if not isinstance(value, list | tuple) or len(value) < count:
            raise self._error(key, f"must list one entry for each of {count} layers, got {value!r}")
        return list(value[:count])

    def _integer(self, key: str, value: object, minimum: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self._error(key, f"must be a whole number of at least {minimum}, got {value!r}")
        return value

    def _error(self, key: str, what: str) -> ConfigError:
        return ConfigError(f"{key} {what} in the configuration of {self.name} ({self.source})")


def read_json(path: Path) -> dict[str, object]:
    """The object in the JSON file at *path*."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not JSON: {error.msg} at line {error.lineno} column {error.colno}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not JSON: byte {error.start} is not UTF-8 text") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} must hold a JSON object with a configuration's fields")
    return found
