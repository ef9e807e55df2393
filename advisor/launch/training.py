"""What every target starts from, and what it gives back: one shape for all of them."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

from advisor.specs.hardware import Cluster
from advisor.specs.job import Job
from advisor.specs.model import ModelSpec
from advisor.specs.plan import Plan


class Training(NamedTuple):
    """A plan with the words that every target repeats."""

    model: ModelSpec
    job: Job
    plan: Plan
    cluster: Cluster
    arguments: tuple[str, ...]
    """What train.py is given."""
    comments: tuple[str, ...]
    """The lines of each file's header."""


@dataclass(frozen=True, eq=False)
class LaunchFile:
    """A file by name and whole text, which is put together when it is first read."""

    name: str
    put_together: Callable[[], str] = field(repr=False)

    @cached_property
    def text(self) -> str:
        return self.put_together()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LaunchFile) and (self.name, self.text) == (other.name, other.text)

    def __hash__(self) -> int:
        return hash((self.name, self.text))


@dataclass(frozen=True, slots=True)
class Launch:
    """What starts a plan: the files, and the command to give in their folder, on each machine."""

    command: tuple[str, ...]
    environment: Mapping[str, str] = field(hash=False)
    files: tuple[LaunchFile, ...]
    submits: bool = False
    """Whether the command is given once and hands the job to a scheduler, which starts the machines."""

    @property
    def command_in_place(self) -> tuple[str, ...]:
        """The command once the files are written, given in their folder: run.sh looks at the machine besides."""
        return self.command if self.submits else ("bash", "run.sh")

    def shell(self) -> str:
        """The command as one line to paste into a shell."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*settings, shlex.join(self.command)])


def training_program() -> LaunchFile:
    """train.py, the same for every plan."""
    return LaunchFile("train.py", partial(Path(__file__).with_name("train.py").read_text, encoding="utf-8"))
