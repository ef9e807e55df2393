"""What a trainer's files and its command tell it, by the names that it knows."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from advisor.launch.files import Launch, render
from advisor.launch.targets import Target
from advisor.specs.job import Job, Trainer
from advisor.specs.plan import Plan
from launch.examples import cluster, model

TRAINERS: tuple[Trainer, ...] = ("hf", "trl", "open-r1", "llama-factory", "axolotl", "torchtitan", "megatron")
FILES = {"trl": "sft.yaml", "llama-factory": "llama_factory.yaml", "axolotl": "axolotl.yaml"}
"""Of those that read one in YAML."""

ARGUMENTS: dict[str, set[str]] = {
    name: set(entry["arguments"].split())
    for name, entry in json.loads(Path(__file__).with_name("arguments.json").read_text(encoding="utf-8")).items()
}
"""Every argument that a program's own source has in the version that is assumed, which stands beside them."""


def job_for(trainer: Trainer, **choices: Any) -> Job:
    return Job(**{"trainer": trainer, "loss": "tiled" if trainer == "trl" else "full", **choices})


def launch_for(
    trainer: Trainer,
    plan: Plan,
    *words: str,
    weights_from: str = "tiny",
    target: Target | None = None,
    nodes: int = 1,
    **choices: Any,
) -> Launch:
    spec = model("Llama-3.1-8B" if trainer == "torchtitan" else "tiny")
    job, machines = job_for(trainer, **choices), cluster(int(plan.gpus), nodes)
    return render(spec, job, plan, machines, weights_from=weights_from, target=target, more_arguments=words)


def text_of(launch: Launch, name: str) -> str:
    return next(file.text for file in launch.files if file.name == name)


def told(trainer: Trainer, launch: Launch) -> Mapping[str, Any]:
    """Every setting by its full name."""
    if trainer in FILES:
        held = yaml.safe_load(text_of(launch, FILES[trainer]))
        assert isinstance(held, dict)
        return held
    if trainer == "torchtitan":
        tables = pytest.importorskip("tomllib").loads(text_of(launch, "torchtitan.toml"))
        return {f"{table}.{key}": value for table, held in tables.items() for key, value in held.items()}
    return dict(map(_setting, command_of(launch)))


def command_of(launch: Launch) -> list[str]:
    """The program's own arguments, as run.sh gives them: those that follow the script."""

    words = shlex.split(text_of(launch, "run.sh").partition("\nexec ")[2].replace("\\\n  ", ""))
    script = next(index for index, word in enumerate(words) if word.endswith(".py"))
    return words[script + 1 : -1]


def _setting(word: str) -> tuple[str, Any]:
    name, _, value = word.removeprefix("--").partition("=")
    try:
        return name, json.loads(value) if value else True
    except ValueError:
        return name, value
