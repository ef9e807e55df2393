"""run.sh is sound bash, starts from any folder, and takes no name for more than a name."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from advisor.launch.files import Launch, render, write
from advisor.launch.trainers.advisor import train_arguments
from advisor.specs.job import Job
from advisor.specs.plan import OWN_STRATEGIES, Checkpointing, Offload, Plan, Strategy
from launch.examples import PLANS_OF_EVERY_KIND, cluster, hostile_text, jobs, model, plan
from launch.started import Started


def launch_of(chosen: Plan, *, nodes: int = 1, weights_from: str = "tiny") -> Launch:
    return render(model(), Job(), chosen, cluster(int(chosen.gpus), nodes), weights_from=weights_from)


def script(launch: Launch) -> str:
    return next(file.text for file in launch.files if file.name == "run.sh")


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("kind", PLANS_OF_EVERY_KIND)
def test_every_script_is_sound_bash(kind: str, nodes: int) -> None:
    chosen = replace(PLANS_OF_EVERY_KIND[kind], gpus=nodes * int(PLANS_OF_EVERY_KIND[kind].gpus))
    text = script(launch_of(chosen, nodes=nodes))

    assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).stderr == ""
    if shutil.which("shellcheck"):
        checked = subprocess.run(["shellcheck", "-"], input=text, text=True, capture_output=True)
        assert checked.stdout == ""


def test_it_starts_from_any_folder_and_stays_in_it(tmp_path: Path) -> None:
    started = Started(tmp_path, launch_of(plan(Strategy.ZERO2)), "--steps=7", "--output=my folder")

    assert started.result.returncode == 0, started.result.stderr
    files = started.files
    assert started.arguments[:6] == [
        "launch",
        "--config_file",
        str(files / "accelerate.yaml"),
        "--deepspeed_config_file",
        str(files / "ds_config.json"),
        str(files / "train.py"),
    ]
    assert started.arguments[-2:] == ["--steps=7", "--output=my folder"]
    assert list(started.elsewhere.iterdir()) == []


def test_the_allocator_grows_its_segments_unless_the_user_says_otherwise(tmp_path: Path) -> None:
    assert Started(tmp_path, launch_of(plan())).recorded("allocator") == "expandable_segments:True"

    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        own = Started(tmp_path, launch_of(plan()), **{name: "max_split_size_mb:64"})
        assert own.recorded("allocator") == "max_split_size_mb:64"


def test_an_optimizer_on_the_cpu_gets_its_share_of_the_cores(tmp_path: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    offloaded = launch_of(plan(Strategy.ZERO2, offload=Offload.OPTIMIZER))

    assert Started(tmp_path, offloaded).recorded("threads") == str(max(1, cores // 2))
    assert Started(tmp_path, offloaded, OMP_NUM_THREADS="3").recorded("threads") == "3"
    assert Started(tmp_path, launch_of(plan(Strategy.ZERO2))).recorded("threads") == "unset"


def test_several_machines_need_a_rank_and_a_main_address(tmp_path: Path) -> None:
    launch = launch_of(plan(gpus=4), nodes=2)

    no_rank = Started(tmp_path, launch)
    no_address = Started(tmp_path, launch, NODE_RANK="1")
    started = Started(tmp_path, launch, NODE_RANK="1", MAIN_ADDRESS="10.0.0.1", MAIN_PORT="1234")

    assert no_rank.result.returncode != 0
    assert "NODE_RANK: set it to the number of this machine, 0 to 1" in no_rank.result.stderr
    assert "MAIN_ADDRESS: set it to the host name or address of machine 0" in no_address.result.stderr
    assert started.result.returncode == 0, started.result.stderr
    at = started.arguments.index("--machine_rank")
    assert started.arguments[at : at + 6] == [
        "--machine_rank",
        "1",
        "--main_process_ip",
        "10.0.0.1",
        "--main_process_port",
        "1234",
    ]


def test_a_machine_without_accelerate_is_told_what_to_install(tmp_path: Path) -> None:
    write(launch_of(plan()), tmp_path)
    bare = tmp_path / "tools"
    bare.mkdir()
    for tool in ("bash", "dirname"):
        (bare / tool).symlink_to(str(shutil.which(tool)))

    result = subprocess.run(["bash", str(tmp_path / "run.sh")], env={"PATH": str(bare)}, capture_output=True, text=True)

    assert result.returncode == 1
    assert result.stderr == (
        "run.sh: accelerate is not installed; pip install torch transformers accelerate deepspeed\n"
    )


@given(name=hostile_text, weights_from=hostile_text)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_hostile_name_arrives_as_it_is_and_nothing_else_runs(tmp_path: Path, name: str, weights_from: str) -> None:
    launch = render(model(name), Job(), plan(), cluster(), weights_from=weights_from)

    started = Started(tmp_path, launch)

    assert started.result.returncode == 0, started.result.stderr
    assert f"--model={weights_from}" in started.arguments
    assert list(started.elsewhere.iterdir()) == []
    assert not list(tmp_path.rglob("pwned"))


@given(weights_from=hostile_text)
@settings(deadline=None)
def test_the_pasted_command_splits_into_the_words_of_the_command(weights_from: str) -> None:
    launch = launch_of(plan(), weights_from=weights_from)

    setting, *words = shlex.split(launch.shell())

    assert setting == "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
    assert tuple(words) == launch.command
    assert f"--model={weights_from}" in words


@given(job=jobs(), checkpointing=st.sampled_from(Checkpointing))
@settings(deadline=None)
def test_arguments_repeat_job_and_plan(job: Job, checkpointing: Checkpointing) -> None:
    for strategy in OWN_STRATEGIES:
        arguments = train_arguments(model(), job, plan(strategy, checkpointing=checkpointing), "tiny")

        assert f"--sequence-length={job.sequence_length}" in arguments
        assert "--micro-batch=2" in arguments
        assert "--accumulation-steps=2" in arguments
        assert f"--checkpointing={checkpointing.value}" in arguments
        assert f"--attention={job.attention}" in arguments
        assert (f"--loss={job.loss}" in arguments) == (job.loss != "full")
        assert f"--optimizer={job.optimizer}" in arguments
        held = job.precision if strategy.zero_stage is not None else job.parameter_format
        assert f"--weights={held}" in arguments


def test_a_model_without_fused_attention_runs_eager() -> None:
    assert "--attention=eager" in train_arguments(model(eager_only=True), Job(attention="sdpa"), plan(), "tiny")


def test_a_bare_configuration_starts_from_random_weights() -> None:
    assert "--random-weights" in train_arguments(model(), Job(), plan(), "some/config.json")
    assert "--random-weights" not in train_arguments(model(), Job(), plan(), "some/folder")


def test_what_is_priced_compiled_is_started_compiled() -> None:
    assert "--compile" in train_arguments(model(), Job(compile=True), plan(), "tiny")
    assert "--compile" not in train_arguments(model(), Job(), plan(), "tiny")
