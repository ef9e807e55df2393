"""What can start a plan, by the names that ``--target`` takes."""

from __future__ import annotations

from typing import Literal

Target = Literal[
    "accelerate",
    "deepspeed",
    "torchrun",
    "slurm",
    "kubernetes-trainjob",
    "kubernetes-pytorchjob",
    "skypilot",
    "ray",
]

TARGETS: dict[Target, str] = {
    "accelerate": "accelerate",
    "deepspeed": "deepspeed_launcher",
    "torchrun": "torchrun",
    "slurm": "slurm",
    "kubernetes-trainjob": "kubernetes_trainjob",
    "kubernetes-pytorchjob": "kubernetes_pytorchjob",
    "skypilot": "skypilot",
    "ray": "ray",
}
"""The module beside this one whose ``launch`` makes a Launch of a Training; loaded where its target is chosen."""

DEFAULT_IMAGE = "pytorch/pytorch:2.10.0-cuda12.8-cudnn9-devel"
"""PyTorch's own, with the CUDA compiler: DeepSpeed builds kernels of its own where they are first used."""

IMAGES: dict[Target, str | None] = {
    "kubernetes-trainjob": DEFAULT_IMAGE,
    "kubernetes-pytorchjob": DEFAULT_IMAGE,
    "skypilot": None,
}
"""The targets that start a container, with the image that is assumed; None is the cloud's own."""
