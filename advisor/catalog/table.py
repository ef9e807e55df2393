"""Reads the CSV files of ``profiles/``, and looks names up in them."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from advisor.errors import ConfigError, UnknownNameError

_VENDORS = re.compile(r"nvidia|geforce|tesla|amd|instinct")


class Row:
    """One line of a CSV file; says which file, name and column a wrong cell is in."""

    def __init__(self, path: Path, cells: Mapping[str, str]) -> None:
        self.path, self.cells = path, cells

    def text(self, column: str) -> str:
        if not self.cells[column]:
            raise self._error(column, "is empty")
        return self.cells[column]

    def optional_number(self, column: str) -> float | None:
        """The number in *column*; None where the cell is empty."""
        cell = self.cells[column]
        if not cell:
            return None
        try:
            return float(cell)
        except ValueError as error:
            raise self._error(column, f"must be a number, got {cell!r}") from error

    def number(self, column: str) -> float:
        value = self.optional_number(column)
        if value is None:
            raise self._error(column, "is empty")
        return value

    def flag(self, column: str) -> bool:
        if self.cells[column] not in ("yes", "no"):
            raise self._error(column, f"must be yes or no, got {self.cells[column]!r}")
        return self.cells[column] == "yes"

    def several(self, column: str) -> tuple[str, ...]:
        """The parts of a cell that ``|`` separates."""
        return tuple(part for part in self.cells[column].split("|") if part)

    def _error(self, column: str, what: str) -> ConfigError:
        return ConfigError(f"{column} of {self.cells['name']!r} in {self.path} {what}")


def read_rows(path: Path) -> tuple[Row, ...]:
    """The lines of the CSV file at *path*, which has a header."""
    with path.open(newline="", encoding="utf-8") as file:
        return tuple(Row(path, cells) for cells in csv.DictReader(file))


def plain(name: str) -> str:
    """*name* in lower case, without its vendor, spaces and punctuation."""
    return _VENDORS.sub("", re.sub(r"[\W_]", "", name.casefold()))


def unknown_name(what: str, wanted: str, names: Iterable[str], listing: str) -> UnknownNameError:
    """The error for a name that a catalog does not hold, with near names. *listing* says what lists them all."""
    import difflib

    by_plain = {plain(name): name for name in names}
    key = plain(wanted)
    near = difflib.get_close_matches(key, by_plain, n=4, cutoff=0.5) if key else []
    near += [each for each in by_plain if key and key in each and each not in near]
    listed = f"near names: {', '.join(by_plain[each] for each in near[:5])}" if near else "no name is near"
    return UnknownNameError(f"unknown {what} {wanted!r}; {listed}; {listing} lists all")
