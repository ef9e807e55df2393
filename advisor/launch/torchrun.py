"""A plan for PyTorch's launcher, which starts the processes and leaves the strategy to their environment."""

from __future__ import annotations

import shlex
from functools import partial

from advisor.launch.accelerate import accelerate_environment
from advisor.launch.deepspeed import deepspeed_json
from advisor.launch.run_script import ALLOCATOR_SETTING, run_script
from advisor.launch.training import Launch, LaunchFile, Training


def launch(training: Training) -> Launch:
    """``torchrun``, by way of run.sh, which sets what accelerate's launcher would."""
    plan, program, own = training.plan, training.program, training.program.own_command
    files = [*program.files, LaunchFile("run.sh", partial(_run_script, training))]
    if plan.strategy.zero_stage is not None and not program.own_parallelism:
        files.insert(
            0, LaunchFile("ds_config.json", partial(deepspeed_json, training.job, plan, training.task.keep_auto))
        )
    if own is None or own.launcher != "torchrun" or training.cluster.nodes > 1 or plan.offload.optimizer:
        return Launch(("bash", "run.sh"), {}, tuple(files))
    environment = dict([ALLOCATOR_SETTING, *own.environment]) | settings_of(training)
    return Launch((*own.words, *map(str, program.arguments)), environment, tuple(files))


def _run_script(training: Training) -> str:
    """Options: torch 2.13, distributed/run.py."""
    cluster = training.cluster
    words = [f"--nproc-per-node={cluster.gpus_per_node}"]
    if cluster.nodes == 1:
        words.insert(0, "--standalone")
    else:
        words += [
            f"--nnodes={cluster.nodes}",
            '--node-rank="$NODE_RANK"',
            "--rdzv-backend=c10d",
            "--rdzv-id=advisor",
            '--rdzv-endpoint="$MAIN_ADDRESS:$MAIN_PORT"',
            # Said, because torchrun's own guess compares host names, which containers and aliases mislead.
            '--rdzv-conf="is_host=$(( NODE_RANK == 0 ))"',
        ]
    # Else torchrun takes arguments of train.py that begin like two of its own options for a mistake: --log does.
    words += [*training.program.module_flag, "--"]
    return run_script(training, "torchrun", words, exports(training))


def exports(training: Training) -> str:
    """What accelerate's launcher would set, as lines of run.sh, which knows its folder as ``$here``."""
    settings = settings_of(training)
    words = {name: shlex.quote(value) for name, value in settings.items()}
    if "ACCELERATE_DEEPSPEED_CONFIG_FILE" in words:
        words["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = '"$here/ds_config.json"'
    return "".join(f"export {name}={word}\n" for name, word in words.items())


def settings_of(training: Training) -> dict[str, str]:
    """accelerate's settings; none for a program that spreads the model itself."""
    if training.program.own_parallelism:
        return {}
    return accelerate_environment(training.model, training.job, training.plan)
