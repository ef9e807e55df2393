"""What Kubeflow's two kinds of job have in common: one pod a machine, and the files of the launch in a ConfigMap."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from advisor.errors import SpecError
from advisor.launch.containers import files_of_each_machine, install, job_name, yaml_text
from advisor.launch.training import Launch, LaunchFile, Training

CONFIG_MAP_BYTES = 2**20
"""What a ConfigMap holds at most: Kubernetes' concepts/configuration/configmap."""

FOLDER = "/advisor"
"""Where the files are in each pod, for reading only."""
WORK = "/work"
"""Where a pod writes."""

USAGE = (
    "Usage: kubectl apply --server-side -k . in the folder of these files; kubectl delete -k . takes all of it away.",
    "More arguments of the program: as args, beside command, of each container.",
    "What is written to /work is lost with the pod until the volume called work is a persistentVolumeClaim that all",
    "  pods can write. Where a cluster has several kinds of GPU, add a nodeSelector.",
)


def launch_of(training: Training, job: LaunchFile) -> Launch:
    """``kubectl apply``, which takes *job* and the files of the launch together.

    Raises SpecError where they do not fit into one ConfigMap.
    """
    files = files_of_each_machine(training)
    size = sum(len(file.name) + len(file.text.encode()) for file in files)
    if size > CONFIG_MAP_BYTES:
        raise SpecError(
            f"the files take {size:,} bytes, a ConfigMap holds {CONFIG_MAP_BYTES:,}: shorten the arguments, or take "
            f"another target"
        )
    names = [file.name for file in files]
    kustomization = LaunchFile("kustomization.yaml", partial(_kustomization, training, names, job.name))
    command = ("kubectl", "apply", "--server-side", "-k", ".")
    return Launch(command, {}, (*files, job, kustomization), submits=True)


def _kustomization(training: Training, names: Sequence[str], job: str) -> str:
    """Fields: kustomize.config.k8s.io/v1beta1, as kubectl 1.32 (kustomize 5.5) reads them."""
    settings = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [job],
        "configMapGenerator": [{"name": job_name(training), "files": list(names)}],
        # The job names the ConfigMap in a field that kustomize does not know to change.
        "generatorOptions": {"disableNameSuffixHash": True},
    }
    return yaml_text(training, settings)


def pod(training: Training, container: str, settings: str) -> dict[str, Any]:
    """The pod of one machine, whose *container* tells run.sh by *settings*, lines of bash, which machine it is.

    No value of the plan is part of the command: Kubernetes would put variables in for what looks like one.
    """
    script = (
        "set -euo pipefail\n"
        f"{settings}"
        "# torchrun, and accelerate with it, would take these for options.\n"
        'unset RANK WORLD_SIZE MASTER_ADDR MASTER_PORT "${!PET_@}"\n'
        f"{install(training)}"
        f'exec bash {FOLDER}/run.sh "$@"\n'
    )
    return {
        "restartPolicy": "Never",
        "containers": [
            {
                "name": container,
                "image": training.image,
                "command": ["bash", "-c", script, "run.sh"],
                "workingDir": WORK,
                "env": [{"name": "HF_HOME", "value": f"{WORK}/huggingface"}],
                "resources": {"limits": {"nvidia.com/gpu": str(training.cluster.gpus_per_node)}},
                "volumeMounts": [
                    {"name": "files", "mountPath": FOLDER, "readOnly": True},
                    {"name": "work", "mountPath": WORK},
                    {"name": "shared-memory", "mountPath": "/dev/shm"},
                ],
            }
        ],
        "volumes": [
            {"name": "files", "configMap": {"name": job_name(training)}},
            {"name": "work", "emptyDir": {}},
            # NCCL's processes of one machine talk through it, and need more than the 64 MiB that a container gets.
            {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
        ],
    }
