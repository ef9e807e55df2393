"""A plan for SkyPilot, which finds and starts machines of many clouds."""

from __future__ import annotations

from functools import partial
from typing import Any

from advisor.catalog.accelerators import skypilot_accelerator
from advisor.launch.containers import files_of_each_machine, job_name, missing_files, yaml_text
from advisor.launch.training import Launch, LaunchFile, Training


def launch(training: Training) -> Launch:
    """``sky launch task.yaml``, which copies the folder to each machine and starts run.sh there.

    Raises SpecError for a GPU that SkyPilot has no name for.
    """
    accelerator = skypilot_accelerator(training.cluster.gpu.name)
    task = LaunchFile("task.yaml", partial(_task, training, accelerator))
    return Launch(("sky", "launch", "task.yaml"), {}, (*files_of_each_machine(training), task), submits=True)


def _task(training: Training, accelerator: str) -> str:
    """Fields and variables: SkyPilot 0.14, sky/task.py and sky/skylet/constants.py."""
    cluster = training.cluster
    resources: dict[str, Any] = {"accelerators": f"{accelerator}:{cluster.gpus_per_node}"}
    if training.image:
        resources["image_id"] = f"docker:{training.image}"
    return yaml_text(
        training,
        {
            "name": job_name(training),
            "workdir": ".",
            "num_nodes": cluster.nodes,
            "resources": resources,
            "setup": f"pip install --quiet {training.program.install}\n",
            "run": _RUN,
        },
        usage=(*_USAGE, *missing_files(training)),
    )


_USAGE = (
    "Usage: sky launch task.yaml, in the folder of these files. More arguments of the program: after run.sh, below.",
    "What it writes stays on the machines: mount a bucket (file_mounts) and give its path as --output.",
)

_RUN = """\
export NODE_RANK="$SKYPILOT_NODE_RANK" MAIN_ADDRESS="${SKYPILOT_NODE_IPS%%$'\\n'*}"
bash run.sh
"""
