"""TRL's ``trl sft`` with its YAML."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from advisor.catalog.optimizers import packages_of
from advisor.catalog.trainers import Versions
from advisor.launch.run_script import header
from advisor.launch.trainers.hugging_face import (
    ATTENTION,
    LORA_ALPHA,
    built_in,
    in_versions,
    refuse_a_bare_configuration,
    refuse_what_is_gone,
    training_arguments,
)
from advisor.launch.trainers.words import attention_kernel, yaml_text
from advisor.launch.training import Beside, LaunchFile, OwnCommand, Program, Task
from advisor.specs.job import ALL_LINEAR

CONFIGURATION = "sft.yaml"
EXAMPLE_DATASET = "trl-lib/Capybara"
"""Of TRL's own scripts/sft.py."""


def program(task: Task, versions: Versions, more_arguments: Sequence[str]) -> Program:
    """``trl/scripts/sft.py``, which ``trl sft`` starts by accelerate."""
    refuse_a_bare_configuration(task, "trl sft")
    refuse_what_is_gone(more_arguments, versions)
    settings = {**sft_arguments(task, versions), "dataset_name": EXAMPLE_DATASET, "output_dir": "output"}
    return Program(
        script="trl.scripts.sft",
        is_module=True,
        arguments=("--config", Beside(CONFIGURATION), *more_arguments),
        files=(LaunchFile(CONFIGURATION, partial(_text, task, settings)),),
        usage="more arguments of trl sft, such as --dataset_name=NAME --max_steps=1000",
        install=f"trl=={versions['trl']} deepspeed{packages_of(task.job)}",
        notes=(f"It trains on {EXAMPLE_DATASET} unless told otherwise: give -- --dataset_name=NAME.",),
        own_command=OwnCommand("accelerate", ("trl", "sft"), config_flag="--accelerate_config"),
    )


def _text(task: Task, settings: dict[str, Any]) -> str:
    return header(task.comments) + yaml_text(settings)


def sft_arguments(task: Task, versions: Versions) -> dict[str, Any]:
    """What SFTConfig and ModelConfig are told, by its name in *versions*: TRL 1.16, trainer/sft_config.py."""
    job = task.job
    return {
        **in_versions({"model_name_or_path": task.weights_from, "dtype": built_in(task)}, _older(versions)),
        "attn_implementation": ATTENTION[attention_kernel(task.model, job)],
        **in_versions(
            {
                "max_length": job.sequence_length,
                "packing": not job.padded,
                # Joined and cut, as the plan counts tokens; the default would need kernels for several texts in a row.
                "packing_strategy": "wrapped",
                "padding_free": False,
                "loss_type": "nll",
                "activation_offloading": False,
            },
            versions,
        ),
        **_adapters(task, versions),
        **training_arguments(task, versions),
    }


def _adapters(task: Task, versions: Versions) -> dict[str, Any]:
    """What ModelConfig is told of them; nothing where every weight is trained."""
    job = task.job
    if job.method == "full":
        return {}
    adapters = {
        "use_peft": True,
        "lora_r": job.lora_rank,
        "lora_alpha": LORA_ALPHA,
        "lora_dropout": job.lora_dropout,
        **({"lora_target_modules": _targets(job.lora_targets)} if job.lora_targets else {}),
    }
    if job.method == "lora":
        return adapters
    # FSDP cuts weights in four bits only where they are stored as numbers of the format that it computes in.
    four_bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "use_bnb_nested_quant": True}
    return adapters | four_bits | in_versions({"bnb_4bit_quant_storage": built_in(task)}, versions)


def _targets(names: tuple[str, ...]) -> list[str]:
    """*names* as ModelConfig takes them, which makes a word of a list of one: to peft a pattern of whole names."""
    if ALL_LINEAR in names:
        return [ALL_LINEAR]
    return list(names) if len(names) > 1 else [rf".*\.{re.escape(names[0])}"]


def _older(versions: Versions) -> Versions:
    """Only TRL decides what ModelConfig's flags are called."""
    return {"trl": versions["trl"]}
