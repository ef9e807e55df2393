"""What can start a plan, by the names that ``--target`` takes."""

from __future__ import annotations

from typing import Literal

Target = Literal["accelerate", "deepspeed", "torchrun", "slurm"]

TARGETS: dict[Target, str] = {
    "accelerate": "accelerate",
    "deepspeed": "deepspeed_launcher",
    "torchrun": "torchrun",
    "slurm": "slurm",
}
"""The module beside this one whose ``launch`` makes a Launch of a Training; loaded where its target is chosen."""
