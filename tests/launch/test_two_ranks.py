"""The written files really start two ranks that train together: ``run.sh``, a launcher, train.py, on gloo.

An exit code proves nothing here, so each case checks the number of processes, the classes that ran, and the loss.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from advisor.launch.deepspeed import GRADIENT_CLIPPING
from advisor.launch.files import render, write
from advisor.launch.targets import Target
from advisor.specs.job import Job
from advisor.specs.plan import Checkpointing, Strategy
from launch.examples import cluster, model, plan, write_tiny_qwen2

for package in ("torch", "transformers", "accelerate"):
    pytest.importorskip(package)

LEARNING_RATE = 3e-2
ARGUMENTS = (
    "--steps=3",
    f"--learning-rate={LEARNING_RATE}",
    "--warmup-steps=0",
    "--log=log.jsonl",
    "--output=output",
)
HARNESS = Path(__file__).with_name("cpu_ranks.py")

LAUNCHERS = {
    "accelerate": "accelerate.commands.accelerate_cli",
    "deepspeed": "deepspeed.launcher.runner",
    "torchrun": "torch.distributed.run",
}


def stand_in(program: str) -> str:
    """The same launcher by the name of its command, with the harness between it and train.py."""
    return f"""\
#!{sys.executable}
import os, sys
words = sys.argv[1:]
at = next(index for index, word in enumerate(words) if word.endswith("train.py"))
launcher = [sys.executable, "-m", {LAUNCHERS[program]!r}]
os.execv(sys.executable, [*launcher, *words[:at], {str(HARNESS)!r}, *words[at:]])
"""


@dataclass(frozen=True)
class Expected:
    strategy: Strategy
    distributed_type: str
    engine: str
    optimizer: str
    target: Target = "accelerate"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model on disk whose weights are wild enough that a few steps change its loss a lot."""
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    folder = tmp_path_factory.mktemp("checkpoint")
    config = AutoConfig.from_pretrained(write_tiny_qwen2(folder), initializer_range=0.2)
    set_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected_losses(checkpoint: Path) -> list[float]:
    """The same training by hand: one process, fp32, the batches of both ranks one after another."""
    import torch
    from transformers import AutoModelForCausalLM

    built = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(built.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    ranks = [torch.Generator().manual_seed(rank) for rank in range(2)]
    losses = []
    for _ in range(3):
        total = 0.0
        for generator in ranks * 2:  # two micro-batches a step
            tokens = torch.randint(256, (2, 32), generator=generator)
            loss = built(input_ids=tokens, labels=tokens).loss / 4
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(built.parameters(), GRADIENT_CLIPPING)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


@pytest.mark.parametrize(
    "expected",
    [
        Expected(Strategy.DDP, "MULTI_GPU", "DistributedDataParallel", "AdamW"),
        Expected(Strategy.FSDP, "FSDP", "FSDPQwen2ForCausalLM", "AdamW"),
        Expected(Strategy.ZERO1, "DEEPSPEED", "DeepSpeedEngine", "DeepSpeedZeroOptimizer"),
        Expected(Strategy.ZERO2, "DEEPSPEED", "DeepSpeedEngine", "DeepSpeedZeroOptimizer"),
        Expected(Strategy.ZERO3, "DEEPSPEED", "DeepSpeedEngine", "DeepSpeedZeroOptimizer_Stage3"),
        Expected(Strategy.ZERO0, "DEEPSPEED", "DeepSpeedEngine", "FP16_UnfusedOptimizer", "deepspeed"),
    ],
    ids=lambda expected: f"{expected.target}-{expected.strategy.value}",
)
def test_two_ranks_of_the_planned_kind_train_as_one_would(
    expected: Expected, checkpoint: Path, expected_losses: list[float], tmp_path: Path
) -> None:
    if expected.strategy.zero_stage is not None:
        pytest.importorskip("deepspeed")
    chosen = plan(expected.strategy, checkpointing=Checkpointing.FULL)
    launch = render(
        model(), Job(sequence_length=32), chosen, cluster(), weights_from=str(checkpoint), target=expected.target
    )
    write(launch, tmp_path / "run")

    description, *steps = finish(tmp_path / "here", [start(tmp_path, "here")])

    assert description["processes"] == 2
    assert description["distributed_type"] == expected.distributed_type
    assert description["engine"] == expected.engine
    assert description["optimizer"] == expected.optimizer
    assert description["base_optimizer"] == "AdamW"
    assert expected_losses[0] - expected_losses[2] > 0.15  # else equal losses would prove little
    # bf16 keeps 8 bits of a loss of 6.
    assert [step["loss"] for step in steps] == pytest.approx(expected_losses, abs=0.03)
    saved = load_weights(tmp_path / "here" / "output")
    assert saved["model.embed_tokens.weight"].shape == (256, 32)
    # Some frameworks save the tied head beside the embedding. The rest: 12 tensors a layer (3 biases), embedding, norm.
    assert len(saved.keys() - {"lm_head.weight"}) == 26


@pytest.mark.parametrize(
    ("target", "strategy", "engine"),
    [("accelerate", Strategy.ZERO2, "DeepSpeedEngine"), ("torchrun", Strategy.FSDP, "FSDPQwen2ForCausalLM")],
)
def test_two_machines_find_each_other(target: Target, strategy: Strategy, engine: str, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    config = write_tiny_qwen2(tmp_path / "model")
    launch = render(
        model(),
        Job(sequence_length=32),
        plan(strategy),
        cluster(nodes=2),
        weights_from=str(config),
        target=target,
    )
    write(launch, tmp_path / "run")
    port = free_port()

    # Both machines are this one: each starts one of the two processes.
    started = [
        start(tmp_path, f"machine{rank}", NODE_RANK=str(rank), MAIN_ADDRESS="127.0.0.1", MAIN_PORT=port)
        for rank in range(2)
    ]
    description, *steps = finish(tmp_path / "machine0", started)

    assert description["processes"] == 2
    assert description["engine"] == engine
    assert len(steps) == 3
    assert not (tmp_path / "machine1" / "log.jsonl").exists()  # only the first process of all keeps the log


def start(folder: Path, name: str, *more_arguments: str, **settings: str) -> subprocess.Popen[str]:
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    for program in LAUNCHERS:
        (tools / program).write_text(stand_in(program))
        (tools / program).chmod(0o755)
    own = folder / name
    own.mkdir()
    return subprocess.Popen(
        ["bash", str(folder / "run" / "run.sh"), *ARGUMENTS, *more_arguments],
        env=os.environ
        | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        | settings,
        cwd=own,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(folder: Path, started: list[subprocess.Popen[str]]) -> list[dict[str, Any]]:
    """Waits, and returns the log that was written in *folder*."""
    try:
        for process in started:
            output, _ = process.communicate(timeout=120)
            assert process.returncode == 0, output[-4000:]
    finally:
        for process in started:
            process.kill()
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def load_weights(folder: Path) -> Any:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")
