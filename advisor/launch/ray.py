"""A plan for a Ray cluster: a job whose driver starts one process a GPU by Ray Train."""

from __future__ import annotations

from functools import partial

from advisor.launch.containers import missing_files
from advisor.launch.deepspeed import deepspeed_json
from advisor.launch.run_script import ALLOCATOR_SETTING, header
from advisor.launch.torchrun import settings_of
from advisor.launch.training import Beside, Launch, LaunchFile, Training, Word

DRIVER = "ray_train.py"


def launch(training: Training) -> Launch:
    """``ray job submit``, which copies the folder to each machine."""
    files = [*training.program.files, LaunchFile(DRIVER, partial(_driver, training))]
    if training.plan.strategy.zero_stage is not None and not training.program.own_parallelism:
        files.insert(
            0,
            LaunchFile("ds_config.json", partial(deepspeed_json, training.job, training.plan, training.task.keep_auto)),
        )
    command = ("ray", "job", "submit", "--working-dir", ".", "--", "python", DRIVER)
    return Launch(command, {}, tuple(files), submits=True)


_USAGE = (
    "Usage: ray job submit --working-dir . -- python ray_train.py [more arguments of the program], in the folder of",
    "  these files, with RAY_ADDRESS set to the cluster's dashboard, such as http://127.0.0.1:8265.",
    "Paths are those of the cluster's machines: give --output and --log as absolute ones that all of them see.",
)


def _driver(training: Training) -> str:
    """Names: ray 2.60, ray/train/torch and ray/train/v2.

    Ray has told each process its rank, and its process group is there, when the program starts.
    """
    program, plan, cluster = training.program, training.plan, training.cluster
    environment = dict([ALLOCATOR_SETTING]) | settings_of(training)
    beside = {}
    if "ACCELERATE_DEEPSPEED_CONFIG_FILE" in environment:
        beside["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = Beside(environment.pop("ACCELERATE_DEEPSPEED_CONFIG_FILE"))
    lines = [
        *(f"    os.environ[{name!r}] = {_python(word)}" for name, word in beside.items()),
        *([_CPU_THREADS.format(processes=cluster.gpus_per_node)] if plan.offload.optimizer else []),
        f"    sys.argv = [{', '.join(map(_python, program.words))}, *more_arguments]",
        f"    runpy.run_{'module' if program.is_module else 'path'}({_python(program.script)}, run_name='__main__')",
    ]
    settings = "".join(f"    {name!r}: {_python(value)},\n" for name, value in environment.items())
    needed = f"Needed on each machine: pip install 'ray[train]' {program.install}"
    return _DRIVER.format(
        header=header((*training.comments, needed, *_USAGE, *missing_files(training))),
        environment=settings,
        os="import os\n" if beside or plan.offload.optimizer else "",
        torch="import torch\n" if plan.offload.optimizer else "",
        lines="\n".join(lines),
        processes=cluster.gpus,
    )


def _python(word: Word) -> str:
    """*word* as a Python expression; a file of the launch is looked for where Ray has put the folder."""
    if isinstance(word, Beside):
        path = f"str(here / {word.name!a})"
        return f"{word.before!a} + {path}" if word.before else path
    return ascii(word)


_CPU_THREADS = """\
    # The CPU runs the optimizer: each process takes its share of the cores, not the one that Ray leaves it.
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // {processes}))"""

_DRIVER = """\
{header}
import importlib.util
{os}import runpy
import sys
from pathlib import Path

import ray
{torch}from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer

# What accelerate's launcher would set, and the allocator's segments that grow in place: fixed ones leave gaps, which
# count against the GPU.
ENVIRONMENT = {{
{environment}}}


def train(settings):
    here = Path(importlib.util.find_spec("ray_train").origin).parent
    more_arguments = settings["more_arguments"]
    sys.path.insert(0, str(here))
{lines}


if __name__ == "__main__":
    ray.init(runtime_env={{"env_vars": ENVIRONMENT}})
    TorchTrainer(
        train,
        train_loop_config={{"more_arguments": sys.argv[1:]}},
        scaling_config=ScalingConfig(num_workers={processes}, use_gpu=True),
    ).fit()
"""
