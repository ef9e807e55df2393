"""A plan for Kubernetes by Kubeflow Trainer v2: a TrainJob, with the TrainingRuntime that describes its pods."""

from __future__ import annotations

from functools import partial

from advisor.launch.containers import job_name, machine_settings, missing_files, yaml_text
from advisor.launch.kubernetes import USAGE, launch_of, pod
from advisor.launch.training import Launch, LaunchFile, Training


def launch(training: Training) -> Launch:
    """``kubectl apply`` of a TrainJob whose pods each start run.sh."""
    return launch_of(training, LaunchFile("trainjob.yaml", partial(_trainjob, training)))


def _trainjob(training: Training) -> str:
    """Fields that trainer.kubeflow.org/v1alpha1 has in Trainer 2.0 to 2.3.

    The names of the job and its container, the label, and the variables are those of the Torch plugin
    (pkg/runtime/framework/plugins/torch/torch.go), which sets the variables where the TrainJob has a ``trainer``.
    """
    name, nodes = job_name(training), training.cluster.nodes
    machine = pod(training, "node", machine_settings("PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT"))
    runtime = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainingRuntime",
        "metadata": {"name": name},
        "spec": {
            "mlPolicy": {"numNodes": nodes, "torch": {}},
            "template": {
                "spec": {
                    "replicatedJobs": [
                        {
                            "name": "node",
                            "template": {
                                "metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}},
                                "spec": {"backoffLimit": 0, "template": {"spec": machine}},
                            },
                        }
                    ]
                }
            },
        },
    }
    job = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"name": name},
        "spec": {
            "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": name},
            "trainer": {"numNodes": nodes},
        },
    }
    return yaml_text(training, runtime, job, usage=(*USAGE, *missing_files(training)))
