"""Two ranks that are killed go on from their last checkpoint as if nothing had been."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from advisor.launch.files import render, write
from advisor.launch.targets import Target
from advisor.specs.job import Job
from advisor.specs.plan import Strategy
from launch.examples import cluster, model, plan
from launch.test_two_ranks import finish, start

psutil = pytest.importorskip("psutil")
for package in ("torch", "transformers", "accelerate"):
    pytest.importorskip(package)

DROPS_OUT = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 256,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": 0.2,
}
"""GPT-2 drops a tenth of its activations, so that equal losses need equal random numbers."""


@pytest.mark.parametrize(
    ("target", "strategy", "engine"),
    [
        ("accelerate", Strategy.FSDP_GRAD_OP, "FSDPGPT2LMHeadModel"),
        ("deepspeed", Strategy.ZERO3, "DeepSpeedEngine"),
    ],
)
def test_killed_ranks_resume_with_the_losses_of_ranks_that_were_not(
    target: Target, strategy: Strategy, engine: str, tmp_path: Path
) -> None:
    if strategy.zero_stage is not None:
        pytest.importorskip("deepspeed")
    config = tmp_path / "config.json"
    config.write_text(json.dumps(DROPS_OUT))
    launch = render(
        model(family="gpt2"),
        Job(sequence_length=32),
        plan(strategy),
        cluster(),
        weights_from=str(config),
        target=target,
    )
    write(launch, tmp_path / "run")
    checkpoints = f"--output={tmp_path / 'output'}"

    # A pipe for a log: each step waits there until it is read, and the sixth, before the second checkpoint, for ever.
    os.mkfifo(tmp_path / "pipe")
    killed = start(tmp_path, "killed", "--steps=100", "--save-every=3", checkpoints, f"--log={tmp_path / 'pipe'}")
    try:
        uninterrupted = [read_one(tmp_path / "pipe", killed) for _ in range(6)]
    finally:
        kill(killed)
    description, *resumed = finish(
        tmp_path / "resumed", [start(tmp_path, "resumed", "--steps=5", "--resume=auto", checkpoints)]
    )

    assert (description["processes"], description["engine"]) == (2, engine)
    assert [record.get("step") for record in uninterrupted] == [None, 1, 2, 3, 4, 5]
    assert [record["step"] for record in resumed] == [4, 5]
    assert [record["loss"] for record in resumed] == [record["loss"] for record in uninterrupted[-2:]]


def read_one(pipe: Path, writer: subprocess.Popen[str]) -> dict[str, Any]:
    """The next line of *pipe*, which *writer* lives to write."""
    descriptor = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    line = b""
    try:
        while not line.endswith(b"\n"):
            assert writer.poll() is None, writer.communicate()[0][-4000:]
            select.select([descriptor], [], [], 0.1)
            with contextlib.suppress(BlockingIOError):
                line += os.read(descriptor, 4096)
            if not line:
                time.sleep(0.01)  # a pipe that nobody has opened yet counts as ready
    finally:
        os.close(descriptor)
    record: dict[str, Any] = json.loads(line)
    return record


def kill(started: subprocess.Popen[str]) -> None:
    """It and all that it started, without a warning."""
    own = psutil.Process(started.pid)
    for process in [*own.children(recursive=True), own]:
        process.send_signal(signal.SIGKILL)
    started.communicate()
