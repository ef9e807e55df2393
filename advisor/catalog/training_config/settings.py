"""What a training configuration says, each value with the place that says it."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from advisor.errors import ConfigError

AUTO = "auto"
"""Left to the program that reads the file; here always such that it depends on the model."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One value, and where it stands."""

    value: Any
    place: str
    """File and key, or whose default it is."""
    written: bool = True
    """Whether a file says so; False for what a framework takes where nobody says anything."""


@dataclass(frozen=True, slots=True)
class Settings:
    """A configuration's settings by the names of flags and of the plan's fields."""

    found: Mapping[str, Setting] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def beside(self, other: Settings) -> Settings:
        """Both. Raises ConfigError where they say different things; what is written comes before any default."""
        joined = dict(self.found)
        for name, theirs in other.found.items():
            ours = joined.get(name)
            if ours and ours.written and theirs.written and ours.value != theirs.value:
                raise ConfigError(
                    f"{name} is {ours.value} by {ours.place}, but {theirs.value} by {theirs.place}; "
                    "make them agree, or leave one out"
                )
            if ours is None or not ours.written:
                joined[name] = theirs
        return Settings(joined, (*self.warnings, *other.warnings))

    def under(self, other: Settings) -> Settings:
        """Both, where *other* has the last word."""
        spoken = {name: setting for name, setting in other.found.items() if setting.written or name not in self.found}
        return Settings({**self.found, **spoken}, (*self.warnings, *other.warnings))


class Table:
    """A mapping of a file, read key by key, with errors that name both.

    Every key must be asked for or named in :meth:`refuse_others`, so that no misspelling passes in silence.
    """

    def __init__(self, file: str, held: Any, path: str = "", places: Mapping[str, str] | None = None) -> None:
        self.file, self.path = file, path
        self.places: Mapping[str, str] = {} if places is None else places
        if not isinstance(held, Mapping):
            raise ConfigError(f"{self.place()} must be a mapping of keys to values, got {_kind(held)}")
        self.held: Mapping[str, Any] = held
        self.asked: set[str] = set()

    def place(self, key: str = "") -> str:
        """File and full key; *places* has those that really stand elsewhere."""
        full = self.full(key)
        return self.places.get(full, f"{self.file}: {full}" if full else self.file)

    def full(self, key: str) -> str:
        """The key with those that lead to it."""
        return ".".join(part for part in (self.path, key) if part)

    def __contains__(self, key: str) -> bool:
        return self.held.get(key) is not None

    def raw(self, key: str) -> Any:
        """The value as it stands; None where absent or null."""
        self.asked.add(key)
        return self.held.get(key)

    def table(self, key: str) -> Table:
        """The mapping at *key*, empty where absent."""
        held = self.raw(key)
        return Table(self.file, {} if held is None else held, self.full(key), self.places)

    def count(self, key: str, least: int = 1) -> int | str | None:
        """A whole number, also as 5e8 or in quotes; ``auto``; or None where absent."""
        held = self.raw(key)
        if held is None or held == AUTO:
            return AUTO if held else None
        try:
            if isinstance(held, bool):
                raise ValueError
            number = float(held)
            if not number.is_integer() or number < least:
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            raise self.error(key, f"a whole number of at least {least}", held) from None
        return int(held) if isinstance(held, int) else int(number)

    def switch(self, key: str) -> bool | str | None:
        """A truth value, also in quotes; ``auto``; or None where absent."""
        held = self.raw(key)
        if held is None or held == AUTO:
            return AUTO if held else None
        if isinstance(held, bool):
            return held
        known = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if str(held).lower() not in known:
            raise self.error(key, "true or false", held)
        return known[str(held).lower()]

    def word(self, key: str, allowed: Mapping[str, Any] | None = None) -> Any:
        """A word, or what *allowed* has for it, whatever its case; ``auto`` and None are passed on."""
        held = self.raw(key)
        if held is None or held == AUTO:
            return held
        if not isinstance(held, (str, bool, int)):
            raise self.error(key, "a word", held)
        if allowed is None:
            return str(held)
        by_case = {name.casefold(): value for name, value in allowed.items()}
        if str(held).casefold() not in by_case:
            raise self.error(key, f"one of {', '.join(allowed)}", held)
        return by_case[str(held).casefold()]

    def error(self, key: str, expected: str, held: Any) -> ConfigError:
        return ConfigError(f"{self.place(key)} must be {expected}, got {held!r}")

    def not_modelled(self, usual: Mapping[str, Any]) -> Iterator[str]:
        """A warning for each key that changes memory and has another value than the one that is modelled."""
        for key, value in usual.items():
            held = self.raw(key)
            if held is None or held in (AUTO, value) or _same(held, value):
                continue
            modelled = "its absence" if value is None else str(value).lower()
            yield f"{self.place(key)} is not modelled; what follows assumes {modelled}"

    def refuse_others(self, harmless: tuple[str, ...]) -> None:
        """Raise ConfigError for a key that nobody asked for and that is not among the *harmless*."""
        known = self.asked | set(harmless)
        for key in self.held:
            if key not in known:
                near = difflib.get_close_matches(str(key), sorted(known), n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ConfigError(f"{self.place(str(key))} is not a known key{hint}")


def _same(held: Any, usual: Any) -> bool:
    """Equal as written: 1 and "1", true and "True"."""
    return usual is not None and str(held).casefold() == str(usual).casefold()


def _kind(held: Any) -> str:
    return "nothing" if held is None else f"{type(held).__name__} {str(held)[:40]!r}"
