"""A launch started for real, with stand-ins for the launchers that record what they are given."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from advisor.launch.files import Launch, write
from advisor.launch.targets import Target

RECORDER = """\
#!/bin/sh
printf '%s\\0' "${0##*/}" "$@" > "$RECORD/arguments"
printf '%s' "$PYTORCH_CUDA_ALLOC_CONF" > "$RECORD/allocator"
printf '%s' "${OMP_NUM_THREADS:-unset}" > "$RECORD/threads"
env -0 > "$RECORD/environment"
"""

# Two machines of a Slurm job: each task sees its own number, and keeps its own record.
SRUN = """\
#!/bin/bash
printf '%s\\n' "$@" > "$RECORD/srun"
while [[ "$1" == --* ]]; do shift; done
for machine in 0 1; do
  mkdir -p "$RECORD/$machine"
  SLURM_NODEID=$machine SLURM_PROCID=$machine RECORD="$RECORD/$machine" "$@" || exit
done
"""
SCONTROL = """\
#!/bin/sh
[ "$1 $2 $3" = "show hostnames node[3,7]" ] && printf 'node3\\nnode7\\n'
"""
STAND_INS = {
    "accelerate": RECORDER,
    "deepspeed": RECORDER,
    "torchrun": RECORDER,
    "srun": SRUN,
    "scontrol": SCONTROL,
    "pip": '#!/bin/sh\nprintf "%s " "$@" > "$RECORD/pip"\n',
}

# Ray's names for a single process, and a program that records what it is given.
RAY = {
    "ray/__init__.py": """\
import os
def init(runtime_env):
    os.environ.update(runtime_env["env_vars"])
""",
    "ray/train/__init__.py": """\
def ScalingConfig(num_workers, use_gpu):
    assert use_gpu
    return num_workers
""",
    "ray/train/torch.py": """\
import os
class TorchTrainer:
    def __init__(self, function, train_loop_config, scaling_config):
        self.function, self.config = function, train_loop_config
        os.environ["RAY_WORKERS"] = str(scaling_config)
    def fit(self):
        self.function(self.config)
""",
    "torch.py": "def set_num_threads(count): ...\n",
}
PROGRAM = """\
import os, pathlib, sys
record = pathlib.Path(os.environ["RECORD"])
record.joinpath("arguments").write_bytes("\\0".join(["python", *sys.argv, ""]).encode())
record.joinpath("environment").write_bytes("".join(f"{k}={v}\\0" for k, v in os.environ.items()).encode())
"""

MACHINE = {"NODE_RANK": "1", "MAIN_ADDRESS": "10.0.0.1", "MAIN_PORT": "1234"}
"""What a user says on the second of two machines."""
ENVIRONMENTS: dict[str, dict[str, str]] = {
    "slurm": {"SLURM_JOB_NODELIST": "node[3,7]", "SLURM_JOB_ID": "4321", "SLURM_CPUS_ON_NODE": "16"},
    "kubernetes-trainjob": {
        "PET_NODE_RANK": "1",
        "PET_MASTER_ADDR": "10.0.0.1",
        "PET_MASTER_PORT": "1234",
        "PET_NNODES": "2",
        "PET_NPROC_PER_NODE": "auto",
    },
    "kubernetes-pytorchjob": {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "1234",
        "PET_NNODES": "2",
    },
    "skypilot": {"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "MAIN_PORT": "1234"},
    "ray": {},
}
"""What a scheduler says to the second of two machines."""
JOBS = {"kubernetes-trainjob": "trainjob.yaml", "kubernetes-pytorchjob": "pytorchjob.yaml", "skypilot": "task.yaml"}


def started_by(folder: Path, target: Target, launch: Launch, *words: str) -> Started:
    """*launch* as its target would start it, on the second of two machines."""
    files = folder / FILES
    write(launch, files, force=True)
    environment = ENVIRONMENTS.get(target, MACHINE)
    command = ["bash", str(files / "run.sh")]
    if target == "slurm":
        command, environment = ["bash", str(files / "job.sbatch")], environment | {"SLURM_SUBMIT_DIR": str(files)}
    elif target.startswith("kubernetes"):
        command = [word.replace("/advisor/", f"{shlex.quote(str(files))}/") for word in container(launch)["command"]]
    elif target == "skypilot":
        run = documents(launch, "task.yaml")[0]["run"]
        command = ["bash", "-c", f"cd {shlex.quote(str(files))}\n{run}"]
    elif target == "ray":
        for name, text in RAY.items():
            (folder / "python" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "python" / name).write_text(text)
        write(Launch((), {}, tuple(file for file in launch.files if file.name != "train.py")), files, force=True)
        (files / "train.py").write_text(PROGRAM)
        environment = {"PYTHONPATH": str(folder / "python"), "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, str(files / "ray_train.py")]
    return Started(folder, launch, *words, command=command, **environment)


def documents(launch: Launch, name: str) -> list[Any]:
    """What the YAML file called *name* holds."""
    return list(yaml.safe_load_all(next(file.text for file in launch.files if file.name == name)))


def container(launch: Launch) -> Mapping[str, Any]:
    """The container of each pod of a Kubernetes job."""
    spec = documents(launch, next(file.name for file in launch.files if file.name in JOBS.values()))[0]["spec"]
    if "pytorchReplicaSpecs" in spec:
        pods = [replica["template"]["spec"] for replica in spec["pytorchReplicaSpecs"].values()]
    else:
        pods = [job["template"]["spec"]["template"]["spec"] for job in spec["template"]["spec"]["replicatedJobs"]]
    assert all(pod == pods[0] for pod in pods)
    (only,) = pods[0]["containers"]
    assert isinstance(only, dict)
    return only


FILES = "launch 'files' $HOME"


class Started:
    """One run of a launch's script, by default run.sh, and what its launcher was given."""

    def __init__(
        self,
        folder: Path,
        launch: Launch,
        *words: str,
        script: str = "run.sh",
        command: list[str] | None = None,
        **environment: str,
    ) -> None:
        tools, self.record, self.elsewhere = folder / "tools", folder / "record", folder / "elsewhere"
        for made in (tools, self.record, self.elsewhere):
            made.mkdir(parents=True, exist_ok=True)
        for name, text in STAND_INS.items():
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        self.files = folder / FILES
        if command is None:
            write(launch, self.files, force=True)
            command = ["bash", str(self.files / script)]
        known = {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "RECORD": str(self.record)}
        self.result = subprocess.run(
            [*command, *words],
            cwd=self.elsewhere,
            env=known | environment,
            capture_output=True,
            text=True,
        )

    @property
    def arguments(self) -> list[str]:
        return self.command()[1:]

    def command(self, machine: str = ".") -> list[str]:
        """The launcher that ran, and its arguments."""
        return self._words("arguments", machine)

    def environment(self, machine: str = ".") -> dict[str, str]:
        return dict(word.split("=", 1) for word in self._words("environment", machine))

    def _words(self, name: str, machine: str) -> list[str]:
        return (self.record / machine / name).read_bytes().decode().split("\0")[:-1]

    def recorded(self, name: str) -> str:
        return (self.record / name).read_text()
