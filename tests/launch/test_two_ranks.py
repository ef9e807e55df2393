"""The written files really start ranks that train together: ``run.sh``, a launcher, train.py, on gloo.

An exit code proves nothing here, so each case checks the number of processes, the classes that ran, and the loss.
"""

from __future__ import annotations

import functools
import json
import math
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
from advisor.specs.job import Job, Method
from advisor.specs.plan import Checkpointing, FsdpSettings, Offload, Strategy
from launch.examples import cluster, model, plan, write_tiny_qwen2

for package in ("torch", "transformers", "accelerate"):
    pytest.importorskip(package)

LEARNING_RATE = 3e-2
ARGUMENTS = (
    "--steps=3",
    f"--learning-rate={LEARNING_RATE}",
    "--warmup-steps=0",
    "--log=log.jsonl",
)
HARNESS = Path(__file__).with_name("cpu_ranks.py")

LAUNCHERS = {
    "accelerate": "accelerate.commands.accelerate_cli",
    "deepspeed": "deepspeed.launcher.runner",
    "torchrun": "torch.distributed.run",
}


PORTS = {"accelerate": (1, "--main_process_port"), "deepspeed": (0, "--master_port")}
"""Where a launcher is told its port, which is 29500 unless said, and how; torchrun finds a free one by itself."""


def stand_in(program: str) -> str:
    """The same launcher by the name of its command, with the harness between it and train.py, on a port of its own."""
    place, flag = PORTS.get(program, (0, ""))
    return f"""\
#!{sys.executable}
import os, sys
words = sys.argv[1:]
if {flag!r} and not any(word.startswith({flag!r}) for word in words):
    words[{place}:{place}] = [{flag!r}, os.environ["A_FREE_PORT"]]
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
    fsdp_version: int = 2
    offload: Offload = Offload.NONE

    @property
    def ranks(self) -> int:
        """Two, but HSDP of two would be DDP or FSDP."""
        return 4 if self.strategy is Strategy.HSDP else 2

    def __str__(self) -> str:
        fsdp = f"-version-{self.fsdp_version}" if self.strategy.is_fsdp else ""
        return f"{self.target}-{self.strategy.value}{fsdp}-{self.offload.value}"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model on disk whose weights are wild enough that a few steps change its loss a lot."""
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    folder = tmp_path_factory.mktemp("checkpoint")
    config = AutoConfig.from_pretrained(write_tiny_qwen2(folder), initializer_range=0.2)
    set_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@functools.cache
def expected_losses(checkpoint: Path, ranks: int = 2) -> list[float]:
    """The same training by hand: one process, fp32, the batches of all ranks one after another."""
    import torch
    from transformers import AutoModelForCausalLM

    built = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(built.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    generators = [torch.Generator().manual_seed(rank) for rank in range(ranks)]
    losses = []
    for _ in range(3):
        total = 0.0
        for generator in generators * 2:  # two micro-batches a step
            tokens = torch.randint(256, (2, 32), generator=generator)
            loss = built(input_ids=tokens, labels=tokens).loss / (2 * ranks)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(built.parameters(), GRADIENT_CLIPPING)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    assert losses[0] - losses[2] > 0.15  # else equal losses would prove little
    return losses


def assert_as_one_process(steps: list[dict[str, Any]], checkpoint: Path, ranks: int = 2) -> None:
    # bf16 keeps 8 bits of a loss of 6.
    assert [step["loss"] for step in steps] == pytest.approx(expected_losses(checkpoint, ranks), abs=0.03)


@pytest.mark.parametrize(
    "expected",
    [
        Expected(Strategy.DDP, "MULTI_GPU", "DistributedDataParallel", "AdamW"),
        Expected(Strategy.HSDP, "FSDP", "FSDPQwen2ForCausalLM", "AdamW"),
        Expected(Strategy.FSDP, "FSDP", "FullyShardedDataParallel", "AdamW", fsdp_version=1),
        Expected(Strategy.ZERO3, "DEEPSPEED", "DeepSpeedEngine", "DeepSpeedZeroOptimizer_Stage3"),
        Expected(Strategy.ZERO0, "DEEPSPEED", "DeepSpeedEngine", "FP16_UnfusedOptimizer", "deepspeed"),
        Expected(Strategy.ZERO1, "DEEPSPEED", "DeepSpeedEngine", "DeepSpeedZeroOptimizer", "deepspeed"),
        Expected(Strategy.ZERO2, "DEEPSPEED", "DeepSpeedEngine", "DeepSpeedZeroOptimizer", "deepspeed"),
    ],
    ids=str,
)
def test_ranks_of_the_planned_kind_train_as_one_would(expected: Expected, checkpoint: Path, tmp_path: Path) -> None:
    if expected.strategy.zero_stage is not None:
        pytest.importorskip("deepspeed")
    steps = run_as(expected, checkpoint, tmp_path, base_optimizer="AdamW")

    assert_as_one_process(steps, checkpoint, expected.ranks)
    assert_whole(tmp_path / "here" / "output")


@pytest.mark.parametrize(
    "expected",
    [
        Expected(
            Strategy.ZERO2,
            "DEEPSPEED",
            "DeepSpeedEngine",
            "DeepSpeedZeroOptimizer",
            "deepspeed",
            offload=Offload.OPTIMIZER,
        ),
        Expected(
            Strategy.ZERO3,
            "DEEPSPEED",
            "DeepSpeedEngine",
            "DeepSpeedZeroOptimizer_Stage3",
            "deepspeed",
            offload=Offload.OPTIMIZER_AND_PARAMETERS,
        ),
    ],
    ids=str,
)
def test_two_ranks_start_with_what_is_offloaded(expected: Expected, checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")

    steps = run_as(expected, checkpoint, tmp_path, base_optimizer="DeepSpeedCPUAdam")

    # The harness leaves its kernel out, which takes a compiler, so that later losses would say nothing.
    assert steps[0]["loss"] == pytest.approx(expected_losses(checkpoint)[0], abs=0.03)
    assert all(math.isfinite(step["loss"]) for step in steps)


def run_as(expected: Expected, checkpoint: Path, folder: Path, base_optimizer: str) -> list[dict[str, Any]]:
    """The steps of ranks that are what is *expected*."""
    chosen = plan(
        expected.strategy,
        gpus=expected.ranks,
        checkpointing=Checkpointing.FULL,
        offload=expected.offload,
        fsdp=FsdpSettings(version=expected.fsdp_version, shard_ranks=2 if expected.ranks == 4 else None),
    )
    launch = render(
        model(),
        Job(sequence_length=32),
        chosen,
        cluster(expected.ranks),
        weights_from=str(checkpoint),
        target=expected.target,
    )
    write(launch, folder / "run")

    description, *steps = finish(folder / "here", [start(folder, "here", "--output=output")])

    assert description["processes"] == expected.ranks
    assert description["distributed_type"] == expected.distributed_type
    assert description["engine"] == expected.engine
    assert description["optimizer"] == expected.optimizer
    assert description["base_optimizer"] == base_optimizer
    return steps


@pytest.mark.parametrize(
    ("strategy", "method"),
    [(Strategy.ZERO3, "lora"), (Strategy.FSDP, "qlora")],
    ids=["adapters under ZeRO-3", "adapters beside four bits under FSDP2"],
)
def test_two_ranks_train_adapters_and_nothing_else(
    strategy: Strategy, method: Method, checkpoint: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    for package in ("peft", "deepspeed", "bitsandbytes"):
        pytest.importorskip(package)
    job = Job(sequence_length=32, method=method, lora_rank=4)
    launch = render(
        model(), job, plan(strategy, checkpointing=Checkpointing.FULL), cluster(), weights_from=str(checkpoint)
    )
    write(launch, tmp_path / "run")

    description, *steps = finish(tmp_path / "here", [start(tmp_path, "here", "--output=output")])

    assert (description["processes"], description["model"]) == (2, "Qwen2ForCausalLM")
    assert all(math.isfinite(step["loss"]) for step in steps)
    assert len({step["loss"] for step in steps}) == 3
    saved = load_file(tmp_path / "here" / "output" / "adapter_model.safetensors")
    # Two layers, queries and values, two matrices; the outer ones start at zero.
    assert len(saved) == 8
    outer = [weights for name, weights in saved.items() if "lora_B" in name]
    assert [each.shape[1] for each in outer] == 4 * [4]
    assert all(each.abs().max() > 0 for each in outer)


@pytest.mark.parametrize(
    ("target", "strategy", "engine"),
    [("accelerate", Strategy.ZERO2, "DeepSpeedEngine"), ("torchrun", Strategy.FSDP, "FSDPQwen2ForCausalLM")],
)
def test_two_machines_find_each_other(
    target: Target, strategy: Strategy, engine: str, checkpoint: Path, tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed")
    launch = render(
        model(),
        Job(sequence_length=32),
        plan(strategy),
        cluster(nodes=2),
        weights_from=str(checkpoint),
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
    assert_as_one_process(steps, checkpoint)
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
        | {"A_FREE_PORT": free_port()}
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


def assert_whole(folder: Path) -> None:
    """transformers finds every weight of the model in *folder*."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    saved = load_file(folder / "model.safetensors")
    loaded, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)

    # Some frameworks save the tied head beside the embedding. The rest: 12 tensors a layer (3 biases), embedding, norm.
    assert len(saved.keys() - {"lm_head.weight"}) == 26
    assert not told["missing_keys"]
    assert loaded.get_input_embeddings().weight.shape == (256, 32)
