"""What every target starts from, and what it gives back: one shape for all of them."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

from advisor.specs.hardware import Cluster
from advisor.specs.job import Job
from advisor.specs.model import ModelSpec
from advisor.specs.plan import Plan


class Beside(NamedTuple):
    """A word that names a file of the launch: run.sh puts its own folder before the name."""

    name: str
    before: str = ""
    """What stands before the path in the same word, such as ``--config=``."""

    def __str__(self) -> str:
        return self.before + self.name


Word = str | Beside
"""One word of a command line."""


def shell_word(word: Word) -> str:
    """*word* as it stands in run.sh, which knows its folder as ``$here``."""
    if isinstance(word, Beside):
        before = shlex.quote(word.before) if word.before else ""
        return f'{before}"$here/{word.name}"'
    return shlex.quote(word)


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


class OwnCommand(NamedTuple):
    """How a program's own command starts it on one machine, by way of accelerate or torchrun."""

    launcher: Literal["accelerate", "torchrun"]
    words: tuple[str, ...]
    """The command; the program's arguments follow."""
    config_flag: str = "--config_file"
    """What accelerate's configuration is given by."""
    before_options: tuple[str, ...] = ()
    """What stands between the arguments and that flag."""
    environment: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """A training program, as a launcher starts it on every rank."""

    script: Word
    """Its file, or with *is_module* the name of a module that Python finds itself."""
    is_module: bool = False
    arguments: tuple[Word, ...] = ()
    files: tuple[LaunchFile, ...] = ()
    """What comes with it."""
    usage: str
    """What may be added to its arguments, in words."""
    install: str
    """What ``pip install`` is given for it."""
    notes: tuple[str, ...] = ()
    """What its user has to know besides, a line each."""
    own_command: OwnCommand | None = None
    alternatives: tuple[Plan, ...] = ()
    """Plans that accelerate's configuration is written for besides, each file named after its strategy."""
    fills_auto: bool = True
    """Whether it completes a DeepSpeed JSON as transformers' Trainer does."""
    own_parallelism: bool = False
    """Whether it spreads the model over the ranks itself, and so wants no launcher but torchrun."""
    keeps_log: bool = False
    """Whether it takes ``--log=FILE``, and writes there what it measures of its steps."""

    @property
    def module_flag(self) -> tuple[str, ...]:
        """What tells accelerate, deepspeed and torchrun alike that the script is a module."""
        return ("--module",) if self.is_module else ()

    @property
    def words(self) -> tuple[Word, ...]:
        """The script and its arguments."""
        return (self.script, *self.arguments)


class Task(NamedTuple):
    """What is trained by which plan, whatever the program."""

    model: ModelSpec
    job: Job
    plan: Plan
    cluster: Cluster
    weights_from: str
    """What transformers loads the model from."""
    comments: tuple[str, ...]
    """The lines of each file's header."""
    prediction: LaunchFile | None = None
    """What was predicted, for programs that show it beside what they measure."""
    keep_auto: bool = False
    """Whether DeepSpeed's JSON leaves to transformers' Trainer what that fills in from its own arguments."""


class Training(NamedTuple):
    """A task and the program that does it: what every target repeats."""

    task: Task
    program: Program
    image: str | None = None
    """The container that each machine runs, for targets that start one."""

    @property
    def model(self) -> ModelSpec:
        return self.task.model

    @property
    def job(self) -> Job:
        return self.task.job

    @property
    def plan(self) -> Plan:
        return self.task.plan

    @property
    def cluster(self) -> Cluster:
        return self.task.cluster

    @property
    def comments(self) -> tuple[str, ...]:
        return self.task.comments


@dataclass(frozen=True, slots=True)
class Launch:
    """What starts a plan: the files, and the command to give in their folder, on each machine."""

    command: tuple[str, ...]
    environment: Mapping[str, str] = field(hash=False)
    files: tuple[LaunchFile, ...]
    notes: tuple[str, ...] = ()
    """What its user has to know besides."""
    submits: bool = False
    """Whether the command is given once and hands the job to a scheduler, which starts the machines."""
    keeps_log: bool = False
    """Whether its program takes ``--log=FILE``."""

    @property
    def command_in_place(self) -> tuple[str, ...]:
        """The command once the files are written, given in their folder: run.sh looks at the machine besides."""
        return self.command if self.submits else ("bash", "run.sh")

    def shell(self) -> str:
        """The command as one line to paste into a shell."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*settings, shlex.join(self.command)])
