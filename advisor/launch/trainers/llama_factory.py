"""LLaMA-Factory's ``llamafactory-cli train`` with its YAML. Names: llamafactory 0.9.5, hparams/*.py."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from advisor.catalog.adapters import usual_targets
from advisor.catalog.optimizers import packages_of
from advisor.catalog.trainers import Versions
from advisor.launch.run_script import header
from advisor.launch.trainers.hugging_face import (
    LORA_ALPHA,
    autocast,
    refuse_a_bare_configuration,
    refuse_what_is_gone,
    training_arguments,
)
from advisor.launch.trainers.words import attention_kernel, yaml_text
from advisor.launch.training import Beside, LaunchFile, OwnCommand, Program, Task, Word
from advisor.specs.job import ALL_LINEAR
from advisor.specs.plan import Checkpointing

CONFIGURATION = "llama_factory.yaml"
EXAMPLE_DATASET = "alpaca_en_demo"
"""Of the project's data folder."""

ATTENTION = {"sdpa": "sdpa", "flash": "fa2", "eager": "disabled"}


def program(task: Task, versions: Versions, more_arguments: Sequence[str]) -> Program:
    """``llamafactory/launcher.py``, which ``llamafactory-cli train`` starts by torchrun.

    run.sh starts it by torchrun itself: the command puts the words of its own together with blanks between them, and a
    path with a blank falls apart. Words of the user's are ``key=value``, which OmegaConf lays over the YAML.
    """
    refuse_a_bare_configuration(task, "llamafactory-cli")
    refuse_what_is_gone((f"--{word}" for word in more_arguments), versions)
    arguments: list[Word] = [Beside(CONFIGURATION)]
    if task.plan.strategy.zero_stage is not None:
        arguments.append(Beside("ds_config.json", "deepspeed="))
    environment = (("FORCE_TORCHRUN", "1"), ("NPROC_PER_NODE", str(task.cluster.gpus_per_node)))
    settings = _arguments(task, versions)
    return Program(
        script="llamafactory.launcher",
        is_module=True,
        arguments=(*arguments, *more_arguments),
        files=(LaunchFile(CONFIGURATION, partial(_text, task, settings)),),
        usage="more settings for the YAML, such as dataset=NAME template=NAME max_steps=1000",
        install=f"llamafactory=={versions['llamafactory']} deepspeed{packages_of(task.job)}",
        notes=(
            f"It trains on {EXAMPLE_DATASET} with the template default unless told otherwise: give -- dataset=NAME "
            "template=NAME.",
        ),
        own_command=None
        if any(len(word.split()) != 1 for word in more_arguments)
        else OwnCommand("torchrun", ("llamafactory-cli", "train"), environment=environment),
    )


def _text(task: Task, settings: dict[str, Any]) -> str:
    return header(task.comments) + yaml_text(settings)


def _arguments(task: Task, versions: Versions) -> dict[str, Any]:
    job, computes_in = task.job, autocast(task)
    trainer = training_arguments(task, versions)
    # It checkpoints by arguments of its own, unless it is told not to.
    checkpoints = {name: value for name, value in trainer.items() if "checkpointing" not in name}
    return {
        "model_name_or_path": task.weights_from,
        "stage": "sft",
        **_adapters(task),
        "do_train": True,
        "dataset": EXAMPLE_DATASET,
        "template": "default",
        "cutoff_len": job.sequence_length,
        "packing": not job.padded,
        "neat_packing": False,
        "flash_attn": ATTENTION[attention_kernel(task.model, job)],
        "disable_gradient_checkpointing": task.plan.checkpointing is not Checkpointing.FULL,
        "use_reentrant_gc": False,
        "use_unsloth": False,
        "enable_liger_kernel": False,
        "upcast_layernorm": False,
        "upcast_lmhead_output": False,
        # Else it casts what it trains to fp32, but for ZeRO-3 (model/adapter.py).
        "pure_bf16": computes_in == "no" and job.parameter_format == "bf16",
        **checkpoints,
        "output_dir": "output",
    }


def _adapters(task: Task) -> dict[str, Any]:
    """Which weights are trained. It stores four bits as numbers of the format that it computes in, as FSDP needs them
    (model/model_utils/quantization.py)."""
    job = task.job
    if job.method == "full":
        return {"finetuning_type": "full"}
    targets = job.lora_targets or usual_targets(task.model)
    adapters = {
        "finetuning_type": "lora",
        "lora_rank": job.lora_rank,
        "lora_alpha": LORA_ALPHA,
        "lora_dropout": job.lora_dropout,
        "lora_target": "all" if ALL_LINEAR in targets else ",".join(targets),
    }
    four_bits = {"quantization_bit": 4, "quantization_method": "bnb", "quantization_type": "nf4"}
    return adapters | (four_bits | {"double_quantization": True} if job.method == "qlora" else {})
