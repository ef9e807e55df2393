"""One plan in every target: the same training, started by another program."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from advisor.errors import SpecError
from advisor.launch.accelerate import accelerate_environment
from advisor.launch.files import Launch, render, write
from advisor.launch.targets import TARGETS, Target
from advisor.launch.trainers.advisor import FILES
from advisor.specs.job import Job
from advisor.specs.plan import OWN_STRATEGIES, FsdpSettings, Plan, Strategy
from launch.examples import PLANS_OF_EVERY_KIND, cluster, gpu, hostile_text, jobs, model, plan, zero_plans
from launch.started import Started, started_by
from launch.test_accelerate import launcher_environment, text


def legal(target: Target, chosen: Plan) -> bool:
    return target != "deepspeed" or chosen.strategy.zero_stage is not None


def launch_by(
    target: Target,
    chosen: Plan,
    *words: str,
    nodes: int = 1,
    weights_from: str = "tiny",
    image: str | None = None,
) -> Launch:
    machines = replace(cluster(int(chosen.gpus), nodes), gpu=gpu("A100-SXM4-80GB"))
    return render(
        model(), Job(), chosen, machines, weights_from=weights_from, target=target, image=image, more_arguments=words
    )


def machine_of(target: Target) -> str:
    """The folder of the record: under Slurm each machine has its own."""
    return "0" if target == "slurm" else "."


def train_arguments(command: list[str]) -> list[str]:
    at = next(index for index, word in enumerate(command) if word.endswith("/train.py"))
    return command[at + 1 :]


every_target = pytest.mark.parametrize("target", TARGETS)
every_legal_pair = pytest.mark.parametrize(
    ("target", "kind"),
    [(target, kind) for target in TARGETS for kind, chosen in PLANS_OF_EVERY_KIND.items() if legal(target, chosen)],
)


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("kind", PLANS_OF_EVERY_KIND)
def test_the_same_plan_is_the_same_training_in_every_target(kind: str, nodes: int, tmp_path: Path) -> None:
    chosen = replace(PLANS_OF_EVERY_KIND[kind], gpus=nodes * int(PLANS_OF_EVERY_KIND[kind].gpus))
    targets = [target for target in TARGETS if legal(target, chosen)]
    launches = {target: launch_by(target, chosen, nodes=nodes) for target in targets}

    started = {target: started_by(tmp_path / target, target, launch) for target, launch in launches.items()}
    given_to_train = {tuple(train_arguments(run.command(machine_of(target)))) for target, run in started.items()}
    shared = {
        (file.name, file.text)
        for launch in launches.values()
        for file in launch.files
        if file.name in ("ds_config.json", *FILES)
    }

    assert len(given_to_train) == 1
    assert {"--micro-batch=2", "--accumulation-steps=2"} <= set(*given_to_train)
    assert len(shared) == len(FILES) + (chosen.strategy.zero_stage is not None)
    assert [told_of(target, run, tmp_path) for target, run in started.items()] == len(targets) * [meant_by(chosen)]


def meant_by(chosen: Plan) -> dict[str, Any]:
    """What each process has to be told of *chosen*, in whatever way."""
    meaning: dict[str, Any] = {"precision": "bf16", "stage": chosen.strategy.zero_stage}
    if chosen.strategy.zero_stage is not None:
        offloaded = (chosen.offload.optimizer, chosen.offload.parameters)
        meaning["batch"] = {chosen.micro_batch, chosen.accumulation_steps, chosen.global_batch}
        meaning["offload"] = [chosen.offload_to if part else None for part in offloaded]
    elif chosen.strategy.is_fsdp:
        grad_op = chosen.strategy is Strategy.FSDP_GRAD_OP
        meaning["fsdp"] = (str(chosen.fsdp.version), grad_op)
        meaning["copies"] = int(chosen.gpus) // int(chosen.shard_ranks) if chosen.strategy is Strategy.HSDP else 1
    return meaning


def told_of(target: Target, started: Started, folder: Path) -> dict[str, Any]:
    """What the processes that *started* is to start read of their plan, in accelerate's words or DeepSpeed's."""
    command, environment = started.command(machine_of(target)), started.environment(machine_of(target))
    if "--config_file" in command:
        written = Path(command[command.index("--config_file") + 1]).read_text()
        with pytest.MonkeyPatch.context() as monkeypatch:
            environment = launcher_environment(folder, written, monkeypatch)
    if environment.get("ACCELERATE_USE_DEEPSPEED") != "true":
        told: dict[str, Any] = {"precision": environment["ACCELERATE_MIXED_PRECISION"], "stage": None}
        if environment.get("ACCELERATE_USE_FSDP") == "true":
            version = environment["FSDP_VERSION"]
            # accelerate's launcher sets both; each version reads its own.
            name, grad_op = (
                ("SHARDING_STRATEGY", "shard_grad_op") if version == "1" else ("RESHARD_AFTER_FORWARD", "false")
            )
            told["fsdp"] = (version, environment[f"FSDP_{name}"].lower() == grad_op)
            told["copies"] = int(environment.get("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", 1))
        return told
    if "--deepspeed_config_file" in command:
        config = command[command.index("--deepspeed_config_file") + 1]
    else:
        config = environment["ACCELERATE_DEEPSPEED_CONFIG_FILE"]
    held = json.loads(Path(config).read_text())
    zero = held["zero_optimization"]
    sizes = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
    (precision,) = [name for name in ("bf16", "fp16") if held[name]["enabled"]]
    return {
        "precision": precision,
        "stage": zero["stage"],
        "batch": {held[name] for name in sizes},
        "offload": [zero.get(f"offload_{part}", {}).get("device") for part in ("optimizer", "param")],
    }


@given(job=jobs(), strategy=st.sampled_from(OWN_STRATEGIES), version=st.sampled_from([1, 2]))
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_other_launchers_set_what_accelerates_would(job: Job, strategy: Strategy, version: int, tmp_path: Path) -> None:
    assume(strategy is not Strategy.HSDP or version == 2)
    chosen = plan(strategy, fsdp=FsdpSettings(version=version))
    with pytest.MonkeyPatch.context() as monkeypatch:
        expected = launcher_environment(tmp_path, text(chosen, job), monkeypatch)

    ours = accelerate_environment(model(), job, chosen)

    assert {name: expected.get(name) for name in ours} == ours
    frameworks = {"ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"}
    assert ours.keys() & frameworks == expected.keys() & frameworks
    if strategy.is_fsdp:
        assert plugin_of(ours) == plugin_of(expected)


def plugin_of(environment: dict[str, str]) -> dict[str, Any]:
    """accelerate's own reading of FSDP's settings, less what only a GPU allows."""
    utils = pytest.importorskip("accelerate.utils")
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in environment.items():
            if name.startswith(("FSDP_", "ACCELERATE_")):
                monkeypatch.setenv(name, value)
        if environment["FSDP_VERSION"] == "1":
            for name in ("FSDP_SYNC_MODULE_STATES", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
                monkeypatch.setenv(name, "false")
        return {name: str(value) for name, value in vars(utils.FullyShardedDataParallelPlugin()).items()}


@every_legal_pair
@pytest.mark.parametrize("nodes", [1, 2])
def test_every_script_is_sound_bash(target: Target, kind: str, nodes: int) -> None:
    chosen = replace(PLANS_OF_EVERY_KIND[kind], gpus=nodes * int(PLANS_OF_EVERY_KIND[kind].gpus))

    for file in launch_by(target, chosen, nodes=nodes).files:
        if file.text.startswith("#!"):
            assert_sound_bash(file.text)


def assert_sound_bash(script: str) -> None:
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).stderr == ""
    if shutil.which("shellcheck"):
        checked = subprocess.run(["shellcheck", "--shell=bash", "-"], input=script, text=True, capture_output=True)
        assert checked.stdout == ""


@every_target
@given(weights_from=hostile_text, word=hostile_text, added=hostile_text)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_hostile_words_arrive_as_they_are_and_nothing_else_runs(
    target: Target, tmp_path: Path, weights_from: str, word: str, added: str
) -> None:
    chosen = plan(Strategy.ZERO2, gpus=4)
    launch = launch_by(target, chosen, word, nodes=2, weights_from=weights_from)

    added_words = [added] if target != "skypilot" else []  # whose command hands no words on
    started = started_by(tmp_path / target, target, launch, *added_words)

    assert started.result.returncode == 0, started.result.stderr
    arguments = train_arguments(started.command(machine_of(target)))
    assert f"--model={weights_from}" in arguments
    assert arguments[arguments.index("--optimizer=adamw-fused") + 1 :] == [word, *added_words]
    assert list(started.elsewhere.iterdir()) == []
    assert not list(tmp_path.rglob("pwned"))


@every_target
def test_the_same_inputs_give_the_same_bytes(target: Target) -> None:
    assert launch_by(target, plan(Strategy.ZERO3)) == launch_by(target, plan(Strategy.ZERO3))


def test_torchrun_meets_at_the_first_machine(tmp_path: Path) -> None:
    alone = started_by(tmp_path / "alone", "torchrun", launch_by("torchrun", plan()))
    together = started_by(tmp_path / "together", "torchrun", launch_by("torchrun", plan(gpus=4), nodes=2))

    assert alone.command()[:4] == ["torchrun", "--standalone", "--nproc-per-node=2", "--"]
    assert together.command()[1:9] == [
        "--nproc-per-node=2",
        "--nnodes=2",
        "--node-rank=1",
        "--rdzv-backend=c10d",
        "--rdzv-id=advisor",
        "--rdzv-endpoint=10.0.0.1:1234",
        "--rdzv-conf=is_host=0",
        "--",
    ]


def test_torchrun_understands_its_arguments(tmp_path: Path) -> None:
    run = pytest.importorskip("torch.distributed.run")
    launch = launch_by("torchrun", plan(gpus=4), "--log=log.jsonl", nodes=2)
    _, *words = started_by(tmp_path, "torchrun", launch).command()

    arguments = run.parse_args(words)
    config, _, given_to_train = run.config_from_args(arguments)

    assert arguments.training_script.endswith("/train.py")
    assert given_to_train[-1] == "--log=log.jsonl"
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node) == (2, 2, 2)
    assert (config.rdzv_backend, config.rdzv_endpoint) == ("c10d", "10.0.0.1:1234")
    assert config.rdzv_configs["is_host"] == "0"


def test_deepspeed_understands_its_arguments_and_its_hostfile(tmp_path: Path) -> None:
    runner = pytest.importorskip("deepspeed.launcher.runner")
    launch = launch_by("deepspeed", plan(Strategy.ZERO2, gpus=8), nodes=2)
    started = started_by(tmp_path, "deepspeed", launch)

    arguments = runner.parse_args(started.arguments)

    assert runner.fetch_hostfile(arguments.hostfile) == {"machine0": 4, "machine1": 4}
    assert (arguments.no_ssh, arguments.no_local_rank, arguments.node_rank) == (True, True, 1)
    assert (arguments.master_addr, arguments.master_port) == ("10.0.0.1", 1234)
    assert arguments.user_script.endswith("/train.py")


@given(chosen=zero_plans())
@settings(deadline=None, max_examples=20)
def test_one_machine_needs_no_hostfile(chosen: Plan) -> None:
    launch = launch_by("deepspeed", chosen)

    assert [file.name for file in launch.files] == ["ds_config.json", *FILES, "run.sh"]
    assert "hostfile" not in launch.files[-1].text


def test_deepspeed_takes_the_gpus_that_it_is_told_to_see(tmp_path: Path) -> None:
    launch = launch_by("deepspeed", plan(Strategy.ZERO2))

    assert Started(tmp_path, launch).arguments[:2] == ["--no_local_rank", "--num_gpus=2"]
    chosen = Started(tmp_path, launch, CUDA_VISIBLE_DEVICES="4,5")
    assert chosen.arguments[0] == "--no_local_rank"
    assert chosen.arguments[1].endswith("/train.py")
    assert chosen.environment()["CUDA_VISIBLE_DEVICES"] == "4,5"


def test_deepspeeds_launcher_starts_no_other_framework() -> None:
    with pytest.raises(SpecError, match="FSDP full shard is none of DeepSpeed's strategies; take the target accel"):
        launch_by("deepspeed", plan(Strategy.FSDP))


def test_an_unknown_target_is_refused_with_those_there_are() -> None:
    unknown: Any = "by-hand"

    with pytest.raises(SpecError, match=r"the target must be one of accelerate, .*, ray, got 'by-h"):
        launch_by(unknown, plan())


def test_slurm_starts_each_machine_by_its_own_number(tmp_path: Path) -> None:
    launch = launch_by("slurm", plan(Strategy.ZERO2, gpus=4), nodes=2)

    started = started_by(tmp_path, "slurm", launch, "--steps=7")

    assert launch.submits
    assert launch.shell() == "sbatch job.sbatch"
    assert started.result.returncode == 0, started.result.stderr
    assert started.recorded("srun").splitlines()[:2] == ["--kill-on-bad-exit=1", "--cpus-per-task=16"]
    for machine in ("0", "1"):
        command = started.command(machine)
        at = command.index("--machine_rank")
        assert command[at : at + 6] == [
            "--machine_rank",
            machine,
            "--main_process_ip",
            "node3",
            "--main_process_port",
            "24321",
        ]
        assert command[-1] == "--steps=7"


def test_a_batch_script_asks_for_whole_machines(tmp_path: Path) -> None:
    launch = render(model("org/a $(model)\nx"), Job(), plan(gpus=4), cluster(4, 2), target="slurm")
    write(launch, tmp_path)

    lines = (tmp_path / "job.sbatch").read_text().splitlines()

    # sbatch reads options only up to the first line that is neither empty nor a comment.
    assert [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")] == lines_after_sharp(lines)
    assert set(lines_after_sharp(lines)) >= {
        "--job-name=a-model-x",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--gpus-per-node=2",
        "--requeue",
    }


def lines_after_sharp(lines: list[str]) -> list[str]:
    head = lines[: next(index for index, line in enumerate(lines) if line and not line.startswith("#"))]
    return [line.removeprefix("#SBATCH ") for line in head if line.startswith("#SBATCH ")]


def test_a_batch_script_outside_of_slurm_says_what_to_do(tmp_path: Path) -> None:
    started = Started(tmp_path, launch_by("slurm", plan()), script="job.sbatch")

    assert started.result.returncode != 0
    assert "SLURM_SUBMIT_DIR: submit it with sbatch" in started.result.stderr
