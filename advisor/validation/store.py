"""Where records lie: those of the package, and this user's own, to which every run adds a line.

The user's file is ``records.jsonl`` in the folder for data that the system names (platformdirs), or what the
environment variable ``ADVISOR_RECORDS`` names.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from advisor.catalog.profiles import own_data, profiles_folder
from advisor.errors import ConfigError, WriteError
from advisor.validation.record import Record, line, parsed, read

RECORDS_VARIABLE = "ADVISOR_RECORDS"


def own_path() -> Path:
    """The file of this user's records."""
    return own_data(RECORDS_VARIABLE, "records.jsonl")


def append(record: Record, path: Path) -> None:
    """Add *record* to the file at *path* as a whole, or raise WriteError and leave what is there as it was.

    Several processes may do so at once. A line that a crash cut short is left by itself.
    """
    text = line(record).encode() + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path) as file:
            size = os.lseek(file, 0, os.SEEK_END)
            if size and os.pread(file, 1, size - 1) != b"\n":
                text = b"\n" + text
            try:
                _write(file, text)
            except OSError:
                os.ftruncate(file, size)
                raise
    except OSError as error:
        raise WriteError(
            f"cannot add a record to {path}: {error.strerror}; free it, or name another file by {RECORDS_VARIABLE}"
        ) from error


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """*path* open for this process alone to append to."""
    import fcntl

    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file
    finally:
        os.close(file)  # which unlocks it


def _write(file: int, text: bytes) -> None:
    """All of *text*: the system may take less than it is given where space runs out."""
    while text:
        text = text[os.write(file, text) :]


def own(path: Path) -> tuple[list[Record], list[str]]:
    """The records at *path*, and a sentence for each line that is none; nothing where there is no file."""
    if not path.is_file():
        return [], []
    found, unread = [], []
    for number, text in enumerate(path.read_bytes().decode("utf-8", errors="replace").split("\n"), 1):
        if not text.strip():
            continue
        try:
            found.append(parsed(text, f"{path}:{number}"))
        except ConfigError as error:
            unread.append(f"left out: {error}")
    return found, unread


def shipped() -> Iterable[Record]:
    """The records of the package."""
    for path in sorted((profiles_folder() / "measured").glob("**/*.jsonl")):
        yield from read(path)
