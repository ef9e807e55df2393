"""transformers' example for its Trainer, ``run_clm.py``."""

from __future__ import annotations

from collections.abc import Sequence

from advisor.catalog.optimizers import packages_of
from advisor.catalog.trainers import Versions
from advisor.errors import SpecError
from advisor.launch.trainers.hugging_face import (
    built_in,
    command_line,
    in_versions,
    refuse_a_bare_configuration,
    refuse_what_is_gone,
    training_arguments,
)
from advisor.launch.training import Program, Task

SCRIPT = "run_clm.py"


def program(task: Task, versions: Versions, more_arguments: Sequence[str]) -> Program:
    """The example with the plan in its arguments: examples/pytorch/language-modeling/run_clm.py of 4.57.

    It joins texts and cuts them to blocks, and leaves the attention to transformers, which takes sdpa, or eager for the
    models that have no other.
    """
    if task.model.objective != "causal":
        raise SpecError(f"{SCRIPT} trains causal models, and {task.model.name} is a {task.model.objective} one")
    refuse_a_bare_configuration(task, SCRIPT)
    refuse_what_is_gone(more_arguments, versions)
    settings = {
        **in_versions({"model_name_or_path": task.weights_from, "dtype": built_in(task)}, versions),
        "block_size": task.job.sequence_length,
        **training_arguments(task, versions),
        "do_train": True,
        "dataset_name": "wikitext",
        "dataset_config_name": "wikitext-2-raw-v1",
        "output_dir": "output",
    }
    return Program(
        script=SCRIPT,
        arguments=(*command_line(settings), *more_arguments),
        usage=f"more arguments of {SCRIPT}, such as --train_file=FILE --max_steps=1000",
        install=f"transformers=={versions['transformers']} accelerate deepspeed datasets evaluate scikit-learn"
        + packages_of(task.job),
        notes=(
            f"{SCRIPT} is transformers' examples/pytorch/language-modeling/run_clm.py: start beside it.",
            "It trains on wikitext unless told otherwise: give -- --dataset_name=NAME.",
        ),
    )
