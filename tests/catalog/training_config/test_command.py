"""Launch commands as they stand in shell scripts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from advisor.cost.estimate import plan_of
from advisor.errors import ConfigError
from advisor.specs.plan import Checkpointing, Plan, Strategy
from advisor.specs.question import Question
from catalog.training_config.examples import ACCELERATE_ZERO, PLAIN_ZERO2, TRAINER_ZERO3, changed


@pytest.fixture(autouse=True)
def _files(tmp_path: Path) -> None:
    (tmp_path / "trainer.json").write_text(json.dumps(TRAINER_ZERO3))
    (tmp_path / "plain.json").write_text(json.dumps(PLAIN_ZERO2))
    (tmp_path / "zero3.yaml").write_text(yaml.safe_dump(ACCELERATE_ZERO))


def planned(folder: Path, script: str, **words: Any) -> tuple[Question, Plan]:
    (folder / "go.sh").write_text(script)
    return plan_of("Qwen2.5-1.5B", gpu="A100-80GB", config=str(folder / "go.sh"), **words)


def test_the_trainer_fills_what_its_json_leaves_to_it(tmp_path: Path) -> None:
    question, plan = planned(
        tmp_path,
        """#!/bin/bash
        export NGPU=4
        # deepspeed --num_gpus 2 old.py
        CUDA_VISIBLE_DEVICES=0,1,2,3 torchrun --nproc_per_node=$NGPU --master-port 29501 train.py \\
          --model_name_or_path "some model" --deepspeed trainer.json --bf16 True --optim adamw_torch \\
          --per_device_train_batch_size 2 --gradient_accumulation_steps 8 --gradient_checkpointing True "$@"
        """,
    )

    assert (plan.strategy, plan.gpus, plan.micro_batch, plan.accumulation_steps) == (Strategy.ZERO3, 4, 2, 8)
    assert plan.checkpointing is Checkpointing.FULL
    assert plan.zero.reduce_bucket == 1536 * 1536
    # The JSON has an optimizer of its own, which goes before --optim.
    assert (question.job.precision, question.job.optimizer, question.job.global_batch) == ("bf16", "adamw-fused", 64)


def test_the_trainer_s_own_batch_stands_where_its_arguments_are_silent(tmp_path: Path) -> None:
    question, plan = planned(tmp_path, "deepspeed --num_gpus 4 t.py --deepspeed trainer.json --bf16")

    assert (plan.micro_batch, plan.accumulation_steps, question.job.global_batch) == (8, 1, 32)
    micro_batch = next(each for each in question.inputs if each.name == "micro_batch")
    assert (micro_batch.origin, micro_batch.source) == ("default", "the Trainer's default")


def test_options_of_accelerate_s_launcher_lie_over_its_file(tmp_path: Path) -> None:
    question, plan = planned(
        tmp_path,
        "accelerate launch --config_file zero3.yaml --num_processes 4 --zero_stage=2 sft.py --max_length 1024 "
        "--per_device_train_batch_size 2 --gradient_checkpointing --attn_implementation flash_attention_2 2>&1 | tee l",
    )

    assert (plan.strategy, plan.gpus, plan.micro_batch) == (Strategy.ZERO2, 4, 2)
    assert plan.checkpointing is Checkpointing.FULL
    assert (question.job.sequence_length, question.job.attention) == (1024, "flash")
    sources = {each.name: each.source for each in question.inputs}
    assert sources["strategy"] == "go.sh: --zero_stage"
    assert sources["precision"] == "zero3.yaml: mixed_precision"
    assert sources["micro_batch"] == "go.sh: --per_device_train_batch_size"


@pytest.mark.parametrize(
    ("command", "gpus", "nodes"),
    [
        ("deepspeed --num_gpus 8 train.py --deepspeed plain.json", 8, 1),
        ("deepspeed --num_gpus=4 --num_nodes=2 train.py --deepspeed --deepspeed_config plain.json", 8, 2),
        ("python -m torch.distributed.run --nproc-per-node 4 --nnodes 2 train.py --deepspeed=plain.json", 8, 2),
        ("/opt/bin/accelerate launch --use_deepspeed --deepspeed_config_file plain.json --num_processes 8 t.py", 8, 1),
    ],
)
def test_each_launcher_counts_its_processes(command: str, gpus: int, nodes: int, tmp_path: Path) -> None:
    question, plan = planned(tmp_path, command)

    assert (plan.gpus, question.cluster.nodes) == (gpus, nodes)
    assert (plan.strategy, plan.zero.reduce_bucket) == (Strategy.ZERO2, 200_000_000)


def test_without_deepspeed_or_fsdp_it_is_plain_data_parallelism(tmp_path: Path) -> None:
    question, plan = planned(tmp_path, "torchrun --standalone --nproc_per_node 2 train.py --bf16")
    assert (plan.strategy, plan.gpus, question.job.precision) == (Strategy.DDP, 2, "bf16")
    assert planned(tmp_path, "python3 train.py --fp16 true")[1].gpus == 1


def test_the_trainer_s_own_fsdp_is_of_the_first_version(tmp_path: Path) -> None:
    _, plan = planned(tmp_path, 'torchrun --nproc_per_node 2 t.py --bf16 --fsdp "shard_grad_op auto_wrap"')

    assert (plan.strategy, plan.fsdp.version) == (Strategy.FSDP_GRAD_OP, 1)


def test_weights_in_bf16_stay_so_without_mixed_precision(tmp_path: Path) -> None:
    question, _ = planned(tmp_path, "torchrun --nproc_per_node 2 t.py --torch_dtype bfloat16")
    assert (question.job.precision, question.job.parameter_format) == ("bf16", "bf16")

    question, _ = planned(tmp_path, "accelerate launch --config_file zero3.yaml t.py --torch_dtype bfloat16")
    assert question.job.parameter_format == "fp32"  # DeepSpeed's masters


def test_arguments_that_differ_from_the_json_are_an_error_as_in_the_trainer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        planned(tmp_path, "deepspeed --num_gpus 8 t.py --deepspeed plain.json --per_device_train_batch_size 2")

    assert "micro_batch is 4 by plain.json: train_micro_batch_size_per_gpu" in str(caught.value)
    assert "2 by go.sh: --per_device_train_batch_size" in str(caught.value)


def test_flags_win_over_a_command(tmp_path: Path) -> None:
    question, plan = planned(tmp_path, "torchrun --nproc_per_node 2 t.py --per_device_train_batch_size 2", gpus=4)

    assert (plan.gpus, plan.micro_batch) == (4, 2)
    assert "--gpus 4 wins over 2 of go.sh: --nproc_per_node" in question.warnings


@pytest.mark.parametrize("argument", ["--torch_compile", "--use_liger_kernel True", "--use_peft", "--optim ademamix"])
def test_what_changes_memory_and_is_not_modelled_is_named(argument: str, tmp_path: Path) -> None:
    question, _ = planned(tmp_path, f"torchrun --nproc_per_node 2 t.py {argument}")

    assert any(f"go.sh: {argument.split()[0]}" in warning for warning in question.warnings)


@pytest.mark.parametrize(
    ("script", "complaint"),
    [
        ("make all", "holds no launch command"),
        ("torchrun a.py\ntorchrun b.py", "go.sh holds 2 launch commands"),
        ("torchrun --nproc_per_node 2", "go.sh: torchrun is given no program to start"),
        ("torchrun --nproc_per_node $GPUS t.py", r"go.sh: --nproc_per_node must be a whole number .* got '\$GPUS'"),
        ("deepspeed t.py --deepspeed nowhere.json", r"nowhere\.json, which go\.sh names, cannot be read"),
        ("torchrun t.py --per_device_train_batch_size two", "per_device_train_batch_size must be a whole number"),
        ("accelerate launch --config_file plain.yaml t.py", r"plain\.yaml, which go\.sh names, cannot be read"),
    ],
)
def test_what_cannot_be_read_is_told(script: str, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=complaint):
        planned(tmp_path, script)


def test_a_json_is_found_behind_a_variable_of_the_shell(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(changed(PLAIN_ZERO2, "zero_optimization.stage", 1)))
    script = 'here="$(dirname "$0")"\ndeepspeed --num_gpus 8 t.py --deepspeed "$here/ds.json"'

    _, plan = planned(tmp_path, script)

    assert plan.title == "ZeRO-1 + optimizer offload"
