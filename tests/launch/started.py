"""A launch started for real, with stand-ins for the launchers that record what they are given."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from advisor.launch.files import Launch, write

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
}


class Started:
    """One run of a launch's script, by default run.sh, and what its launcher was given."""

    def __init__(self, folder: Path, launch: Launch, *words: str, script: str = "run.sh", **environment: str) -> None:
        tools, self.record, self.elsewhere = folder / "tools", folder / "record", folder / "elsewhere"
        for made in (tools, self.record, self.elsewhere):
            made.mkdir(parents=True, exist_ok=True)
        for name, text in STAND_INS.items():
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        self.files = folder / "launch 'files' $HOME"
        write(launch, self.files, force=True)
        known = {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "RECORD": str(self.record)}
        self.result = subprocess.run(
            ["bash", str(self.files / script), *words],
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
