"""A plan for Slurm: a batch script around run.sh."""

from __future__ import annotations

import re
from functools import partial

from advisor.launch.containers import files_of_each_machine
from advisor.launch.run_script import header
from advisor.launch.training import Launch, LaunchFile, Training


def launch(training: Training) -> Launch:
    """``sbatch job.sbatch``, which starts run.sh once on each machine."""
    script = LaunchFile("job.sbatch", partial(_job, training))
    return Launch(("sbatch", "job.sbatch"), {}, (*files_of_each_machine(training), script), submits=True)


def _job(training: Training) -> str:
    """Options and variables: Slurm 22.05, sbatch(1) and srun(1)."""
    cluster = training.cluster
    options = {
        "job-name": _name(training.model.name),
        "nodes": cluster.nodes,
        # One launcher a machine; it starts the processes of that machine's GPUs.
        "ntasks-per-node": 1,
        "gpus-per-node": cluster.gpus_per_node,
        # Else the one task gets one core and a core's share of the memory.
        "exclusive": None,
        "mem": 0,
        "requeue": None,
        "open-mode": "append",
    }
    settings = "".join(f"#SBATCH --{name}{'' if value is None else f'={value}'}\n" for name, value in options.items())
    return "#!/usr/bin/env bash\n" + settings + header((*training.comments, *_USAGE)) + _SCRIPT


_USAGE = (
    "Usage: sbatch [options] job.sbatch [more arguments of train.py], in the folder of these files, which all machines",
    "  have to see.",
    "A requeued job starts again from the first step; with --output=FOLDER --save-every=STEPS --resume=auto, train.py",
    "  goes on from its last checkpoint.",
)

_SCRIPT = """
set -euo pipefail
# Slurm runs a copy of this file elsewhere, in the folder of the submission.
cd -- "${SLURM_SUBMIT_DIR:?submit it with sbatch}"
hosts="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
export MAIN_ADDRESS="${hosts%%$'\\n'*}"
# Another port for each job, in case two share a machine one after the other.
export MAIN_PORT="${MAIN_PORT:-$(( 20000 + SLURM_JOB_ID % 10000 ))}"
# In single quotes: each machine's task puts in its own number, not the first machine's.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" \\
  bash -c 'NODE_RANK="$SLURM_NODEID" exec bash run.sh "$@"' run.sh "$@"
"""


def _name(model: str) -> str:
    """The last part of *model*'s name, in characters that no shell and no tool of Slurm's reads anything into."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", model.rpartition("/")[2]).strip("-") or "train"
