"""open-r1's ``src/open_r1/sft.py``, started as its recipes do: one accelerate YAML for each strategy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from advisor.catalog.legality import usual_fsdp_version
from advisor.catalog.trainers import Versions
from advisor.launch.trainers.hugging_face import command_line, refuse_a_bare_configuration, refuse_what_is_gone
from advisor.launch.trainers.trl import sft_arguments
from advisor.launch.trainers.words import packages_beside
from advisor.launch.training import Program, Task
from advisor.specs.plan import FsdpSettings, Offload, Plan, Strategy, zero_settings

SCRIPT = "src/open_r1/sft.py"
RECIPES = (Strategy.DDP, Strategy.FSDP, Strategy.ZERO2, Strategy.ZERO3)
"""recipes/accelerate_configs holds a YAML for each."""
EXAMPLE_DATASET = "HuggingFaceH4/Bespoke-Stratos-17k"
"""Of the script's own docstring."""


def program(task: Task, versions: Versions, more_arguments: Sequence[str]) -> Program:
    """The script of a checkout, with the plan in its arguments, which are TRL's (src/open_r1/configs.py)."""
    refuse_a_bare_configuration(task, SCRIPT)
    refuse_what_is_gone(more_arguments, versions)
    name = task.model.name.rpartition("/")[2]
    settings = {
        **sft_arguments(task, versions),
        "dataset_name": EXAMPLE_DATASET,
        "output_dir": f"data/{name}-Open-R1-Distill",
    }
    return Program(
        script=SCRIPT,
        arguments=(*command_line(settings), *more_arguments),
        usage=f"more arguments of {SCRIPT}, such as --dataset_name=NAME --max_steps=1000",
        install=f"'open-r1 @ git+https://github.com/huggingface/open-r1'{packages_beside(task.job)}",
        notes=(
            f"{SCRIPT} is open-r1's: start in a checkout of huggingface/open-r1, or let --out be one.",
            f"It trains on {EXAMPLE_DATASET} unless told otherwise: give -- --dataset_name=NAME.",
        ),
        alternatives=tuple(_by(task, strategy) for strategy in RECIPES),
    )


def _by(task: Task, strategy: Strategy) -> Plan:
    """The same batch by *strategy*."""
    return replace(
        task.plan,
        strategy=strategy,
        offload=Offload.NONE,
        offload_to="cpu",
        zero=zero_settings(strategy),
        fsdp=FsdpSettings(version=usual_fsdp_version(task.job)),
    )
