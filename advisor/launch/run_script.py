"""A plan as the shell script that starts its program from any folder."""

from __future__ import annotations

from collections.abc import Sequence

from advisor.launch.training import Training, shell_word

ALLOCATOR_SETTING = ("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
"""By the name that every torch from 2.6 to 2.13 obeys: 2.9 ignores it under its newer name, PYTORCH_ALLOC_CONF, without
a word (pytorch issue 183387)."""


def run_script(training: Training, launcher: str, words: Sequence[str], settings: str = "") -> str:
    """The text of ``run.sh``, which starts the program by *launcher* with *words* before it, after *settings*, in bash.

    Paths that its user adds stay relative to the user's folder: it never changes folder.
    """
    nodes, plan, program = training.cluster.nodes, training.plan, training.program
    usage = [f"Usage: bash run.sh [{program.usage}]"]
    if nodes > 1:
        usage.append("On each machine, set NODE_RANK to its number, from 0, and MAIN_ADDRESS to the host of machine 0.")
    started = [*words, *map(shell_word, program.words), '"$@"']
    parts = [
        "#!/usr/bin/env bash\n" + header((*training.comments, *usage)),
        _preamble(launcher.split()[0], program.install),
        _several_machines(nodes) if nodes > 1 else "",
        _ALLOCATOR,
        _cpu_threads(training.cluster.gpus_per_node) if plan.offload.optimizer else "",
        settings,
        f"exec {launcher} \\\n  " + " \\\n  ".join(started) + "\n",
    ]
    return "\n".join(part for part in parts if part)


def header(lines: Sequence[str]) -> str:
    """*lines*, none of which holds a line break, as comments."""
    return "".join(f"# {line}\n" for line in lines)


def _preamble(program: str, install: str) -> str:
    return f"""\
set -euo pipefail
here="$(cd -- "$(dirname -- "${{BASH_SOURCE[0]}}")" && pwd)"
command -v {program} > /dev/null || {{
  echo "run.sh: {program} is not installed; pip install {install}" >&2
  exit 1
}}
"""


_ALLOCATOR = f"""\
# Let torch's allocator grow its segments in place. Fixed ones leave gaps between tensors of different sizes, and memory
# that is reserved but unusable counts against the GPU all the same. By its older name, which every torch obeys.
export {ALLOCATOR_SETTING[0]}="${{{ALLOCATOR_SETTING[0]}:-${{PYTORCH_ALLOC_CONF:-{ALLOCATOR_SETTING[1]}}}}}"
"""


def _several_machines(nodes: int) -> str:
    return f"""\
: "${{NODE_RANK:?set it to the number of this machine, 0 to {nodes - 1}}}"
: "${{MAIN_ADDRESS:?set it to the host name or address of machine 0}}"
MAIN_PORT="${{MAIN_PORT:-29500}}"
"""


def _cpu_threads(processes: int) -> str:
    return f"""\
# The CPU runs the optimizer, and launchers give each process a single thread or all: share the cores instead.
if [[ -z "${{OMP_NUM_THREADS:-}}" ]]; then
  threads=$(( $(nproc) / {processes} ))
  export OMP_NUM_THREADS=$(( threads > 0 ? threads : 1 ))
fi
"""
