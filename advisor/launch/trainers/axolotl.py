"""``axolotl train`` with its YAML. Names: axolotl 0.19, utils/schemas/*.py."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from advisor.catalog.optimizers import optimizer_profiles
from advisor.catalog.trainers import Versions
from advisor.launch.run_script import header
from advisor.launch.trainers.hugging_face import ATTENTION, UPDATES, refuse_a_bare_configuration
from advisor.launch.trainers.words import attention_kernel, packages_beside, yaml_text
from advisor.launch.training import Beside, LaunchFile, OwnCommand, Program, Task, Word
from advisor.specs.plan import Checkpointing

CONFIGURATION = "axolotl.yaml"
EXAMPLE_DATASET = {"path": "mhenrichsen/alpaca_2k_test", "type": "alpaca"}
"""Of the project's examples."""


def program(task: Task, versions: Versions, more_arguments: Sequence[str]) -> Program:
    """``axolotl/cli/train.py``, which ``axolotl train`` starts by accelerate."""
    refuse_a_bare_configuration(task, "axolotl")
    arguments: list[Word] = [Beside(CONFIGURATION)]
    if task.plan.strategy.zero_stage is not None:
        arguments.append(Beside("ds_config.json", "--deepspeed="))
    settings = _settings(task)
    return Program(
        script="axolotl.cli.train",
        is_module=True,
        arguments=(*arguments, *more_arguments),
        files=(LaunchFile(CONFIGURATION, partial(_text, task, settings)),),
        usage="more options of axolotl train, such as --max-steps=1000",
        install=f"'axolotl[deepspeed]=={versions['axolotl']}'{packages_beside(task.job)}",
        notes=(f"It trains on {EXAMPLE_DATASET['path']}: name your own under datasets in {CONFIGURATION}.",),
        own_command=OwnCommand("accelerate", ("axolotl", "train"), before_options=("--launcher=accelerate", "--")),
    )


def _text(task: Task, settings: dict[str, Any]) -> str:
    return header(task.comments) + yaml_text(settings)


def _settings(task: Task) -> dict[str, Any]:
    job, plan = task.job, task.plan
    checkpoints = plan.checkpointing is Checkpointing.FULL
    fused = job.loss == "fused"
    return {
        "base_model": task.weights_from,
        "datasets": [EXAMPLE_DATASET],
        "val_set_size": 0.0,
        "sequence_len": job.sequence_length,
        "sample_packing": not job.padded,
        "pad_to_sequence_len": True,
        # Micro-batch x sequence, instead of all of them in one row.
        "multipack_real_batches": True,
        "micro_batch_size": int(plan.micro_batch),
        "gradient_accumulation_steps": int(plan.accumulation_steps),
        "gradient_checkpointing": checkpoints,
        **({"gradient_checkpointing_kwargs": {"use_reentrant": False}} if checkpoints else {}),
        "bf16": job.precision == "bf16",
        "fp16": job.precision == "fp16",
        "tf32": False,
        "optimizer": optimizer_profiles()[job.optimizer].optim,
        **UPDATES,
        "attn_implementation": ATTENTION[attention_kernel(task.model, job)],
        "torch_compile": False,
        "auto_find_batch_size": False,
        "ddp_find_unused_parameters": False,
        **(_FUSED_LOSS if fused else {}),
        "output_dir": "output",
    }


_FUSED_LOSS: dict[str, Any] = {
    "plugins": ["axolotl.integrations.liger.LigerPlugin"],
    "liger_fused_linear_cross_entropy": True,
    "liger_rope": False,
    "liger_rms_norm": False,
    "liger_glu_activation": False,
    "liger_layer_norm": False,
}
"""Liger's loss without its other kernels: axolotl 0.19, integrations/liger/args.py."""
