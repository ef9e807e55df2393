"""A script of the user's own, which only the launcher and its configuration are written for."""

from __future__ import annotations

from collections.abc import Sequence

from advisor.launch.training import Program, Task


def names_a_script(words: Sequence[str]) -> bool:
    """Whether *words* begin with a Python file rather than with an argument."""
    return bool(words) and words[0].endswith(".py") and not words[0].startswith("-")


def program(task: Task, words: Sequence[str]) -> Program:
    """The script that *words* begin with, and the rest of them as its arguments."""
    script, *arguments = words
    plan, job = task.plan, task.job
    return Program(
        script=script,
        arguments=tuple(arguments),
        usage=f"more arguments of {script}",
        install="torch accelerate deepspeed",
        notes=(
            f"{script} decides for itself what the launcher does not: it has to take micro-batch {plan.micro_batch}, "
            f"{plan.accumulation_steps} accumulation steps, {job.sequence_length} tokens, {job.optimizer}, "
            f"checkpointing {plan.checkpointing.value}.",
        ),
    )
