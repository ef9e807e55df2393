"""A plan for DeepSpeed's own launcher."""

from __future__ import annotations

from functools import partial

from advisor.errors import SpecError
from advisor.launch.deepspeed import deepspeed_json
from advisor.launch.run_script import run_script
from advisor.launch.torchrun import exports
from advisor.launch.training import Launch, LaunchFile, Training


def launch(training: Training) -> Launch:
    """``deepspeed``, by way of run.sh, with a hostfile where there are several machines.

    Raises SpecError for a plan that is none of DeepSpeed's.
    """
    plan, nodes = training.plan, training.cluster.nodes
    if plan.strategy.zero_stage is None:
        raise SpecError(f"{plan.title} is none of DeepSpeed's strategies; take the target accelerate or torchrun")
    files = [LaunchFile("ds_config.json", partial(deepspeed_json, training.job, plan, training.task.keep_auto))]
    if nodes > 1:
        files.append(LaunchFile("hostfile", partial(_hostfile, nodes, training.cluster.gpus_per_node)))
    files += [*training.program.files, LaunchFile("run.sh", partial(_run_script, training))]
    return Launch(("bash", "run.sh"), {}, tuple(files))


def _hostfile(nodes: int, slots: int) -> str:
    machines = "".join(f"machine{rank} slots={slots}\n" for rank in range(nodes))
    return f"# The names are labels: run.sh starts each machine by its number, without ssh.\n{machines}"


def _run_script(training: Training) -> str:
    """Options: deepspeed 0.19.8, launcher/runner.py.

    Several machines start without ssh, each by a command of its own: by pdsh, deepspeed would hand the arguments to
    another shell with no more than double quotes around them (launcher/multinode_runner.py ``parse_user_args``).
    """
    if training.cluster.nodes == 1:
        words = ["--no_local_rank", '"${gpus[@]}"', *training.program.module_flag]
        return run_script(training, "deepspeed", words, f"{_gpus(training.cluster.gpus)}\n{exports(training)}")
    words = [
        "--no_local_rank",
        '--hostfile="$here/hostfile"',
        "--no_ssh",
        '--node_rank="$NODE_RANK"',
        '--master_addr="$MAIN_ADDRESS"',
        '--master_port="$MAIN_PORT"',
        *training.program.module_flag,
    ]
    return run_script(training, "deepspeed", words, exports(training))


def _gpus(count: int) -> str:
    return f"""\
# Given a number, deepspeed takes the first GPUs of the machine, whichever it was told to see.
gpus=(--num_gpus={count})
[[ -z "${{CUDA_VISIBLE_DEVICES:-}}" ]] || gpus=()
"""
