"""Which program does a task: the trainer's, or a script of the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from advisor.catalog.trainers import Versions
from advisor.launch.trainers import own
from advisor.launch.training import Program, Task
from advisor.specs.job import Trainer

MODULES: dict[Trainer, str] = {
    "advisor": "advisor",
    "hf": "hf",
    "trl": "trl",
    "open-r1": "open_r1",
    "llama-factory": "llama_factory",
    "axolotl": "axolotl",
    "torchtitan": "torchtitan",
    "megatron": "megatron",
}
"""The module beside this one whose ``program`` makes a Program of a Task; loaded where its trainer is chosen."""


def program_of(task: Task, versions: Versions, more_arguments: Sequence[str]) -> Program:
    """The program of the job's trainer, told in the words of its *versions*, and after them *more_arguments*.

    Where those begin with a script, it is that one with the rest of them. Raises SpecError for a task that the
    trainer's flags cannot express.
    """
    if own.names_a_script(more_arguments):
        return own.program(task, more_arguments)
    program = import_module(f"advisor.launch.trainers.{MODULES[task.job.trainer]}").program
    made = program(task, versions, more_arguments)
    assert isinstance(made, Program)
    return made
