"""A plan for Kubernetes by Kubeflow's Training Operator v1: a PyTorchJob."""

from __future__ import annotations

from functools import partial
from typing import Any

from advisor.launch.containers import job_name, machine_settings, missing_files, yaml_text
from advisor.launch.kubernetes import USAGE, launch_of, pod
from advisor.launch.training import Launch, LaunchFile, Training


def launch(training: Training) -> Launch:
    """``kubectl apply`` of a PyTorchJob whose pods each start run.sh."""
    return launch_of(training, LaunchFile("pytorchjob.yaml", partial(_pytorchjob, training)))


def _pytorchjob(training: Training) -> str:
    """Fields: kubeflow.org/v1 of the Training Operator 1.9.

    The container's name and the variables, by which a pod is a rank of its own, are those of
    pkg/controller.v1/pytorch/envvar.go.
    """
    machine = pod(training, "pytorch", machine_settings("RANK", "MASTER_ADDR", "MASTER_PORT"))

    def pods(count: int) -> dict[str, Any]:
        return {"replicas": count, "restartPolicy": "Never", "template": {"spec": machine}}

    nodes = training.cluster.nodes
    job = {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": job_name(training)},
        "spec": {
            "runPolicy": {"cleanPodPolicy": "None", "backoffLimit": 0},
            "pytorchReplicaSpecs": {"Master": pods(1)} | ({"Worker": pods(nodes - 1)} if nodes > 1 else {}),
        },
    }
    return yaml_text(training, job, usage=(*USAGE, *missing_files(training)))
