"""What targets have in common that start each machine elsewhere, from an image, by run.sh."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

from advisor.launch.accelerate import launch as by_accelerate
from advisor.launch.torchrun import launch as by_torchrun
from advisor.launch.training import LaunchFile, Training


def files_of_each_machine(training: Training) -> tuple[LaunchFile, ...]:
    """run.sh and all that it reads."""
    return (by_torchrun(training) if training.program.own_parallelism else by_accelerate(training)).files


def machine_settings(rank: str, address: str, port: str) -> str:
    """Lines of bash: what run.sh asks for, from the variables in which a scheduler says it."""
    return f'export NODE_RANK="${rank}" MAIN_ADDRESS="${address}" MAIN_PORT="${port}"\n'


def install(training: Training) -> str:
    """A line of bash that installs what the program needs beside the image's torch."""
    packages = [word for word in shlex.split(training.program.install) if word != "torch"]
    # Images that use the system's Python would refuse.
    return f"PIP_BREAK_SYSTEM_PACKAGES=1 pip install --quiet {shlex.join(packages)}\n"


def missing_files(training: Training) -> tuple[str, ...]:
    """Lines for a header: what the files of the launch name but do not bring to other machines."""
    program, weights_from = training.program, training.task.weights_from
    lines = []
    if weights_from.endswith(".json") or weights_from.startswith((".", "/", "~")):
        lines.append("The model is given as a path: it has to be there on each machine.")
    if isinstance(program.script, str) and not program.is_module:
        lines.append("The script is not one of these files: it has to be there on each machine.")
    return tuple(lines)


def job_name(training: Training) -> str:
    """``train-`` and the last part of the model's name, as a DNS label short enough to be part of another."""
    last = training.model.name.rpartition("/")[2].lower()
    return f"train-{re.sub('[^a-z0-9]+', '-', last)[:30]}".strip("-")


def yaml_text(training: Training, *documents: Mapping[str, Any], usage: tuple[str, ...] = ()) -> str:
    """*documents* below a header."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Writes texts of several lines as such, and what occurs twice twice."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    Dumper.add_representer(str, text)
    header = "".join(f"# {line}\n" for line in (*training.comments, *usage))
    return header + yaml.dump_all(documents, Dumper=Dumper, sort_keys=False, width=120)
