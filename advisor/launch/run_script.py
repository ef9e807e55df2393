"""A plan as the arguments of train.py, and as the shell script that starts it from any folder."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from advisor.launch.training import Training
from advisor.specs.job import Job
from advisor.specs.model import ModelSpec
from advisor.specs.plan import Plan

ALLOCATOR_SETTING = ("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
"""By the name that every torch from 2.6 to 2.13 obeys: 2.9 ignores it under its newer name, PYTORCH_ALLOC_CONF, without
a word (pytorch issue 183387)."""


def train_arguments(model: ModelSpec, job: Job, plan: Plan, weights_from: str) -> tuple[str, ...]:
    """What train.py is given, each argument as one word, so that no value can be taken for a flag."""
    halves = plan.strategy.zero_stage is not None or job.method == "qlora"
    built_in = job.precision if halves else job.model_format
    flags = {
        "model": weights_from,
        "objective": model.objective,
        # DeepSpeed keeps fp32 masters beside weights in the format that it computes in, and four bits are made of that
        # format; DDP and FSDP hold the trained weights themselves.
        "weights": built_in,
        "attention": attention_kernel(model, job),
        **({"loss": job.loss} if job.loss != "full" else {}),
        **_adapters(job),
        "checkpointing": plan.checkpointing.value,
        "sequence-length": job.sequence_length,
        "micro-batch": int(plan.micro_batch),
        "accumulation-steps": int(plan.accumulation_steps),
        "optimizer": job.optimizer,
    }
    arguments = tuple(f"--{name}={value}" for name, value in flags.items())
    switches = {"--compile": job.compile, "--padded": job.padded, "--random-weights": holds_no_weights(weights_from)}
    return (*arguments, *(name for name, on in switches.items() if on))


def _adapters(job: Job) -> dict[str, object]:
    """The flags of ``--method``; nothing where every weight is trained."""
    if job.method == "full":
        return {}
    return {
        "method": job.method,
        "lora-rank": job.lora_rank,
        **({"lora-targets": ",".join(job.lora_targets)} if job.lora_targets else {}),
        **({"lora-dropout": job.lora_dropout} if job.lora_dropout else {}),
        **({"lora-weights": "as-model"} if job.parameter_format != "fp32" else {}),
    }


def attention_kernel(model: ModelSpec, job: Job) -> str:
    """The job's kernel, or eager for a model whose attention transformers computes no other way."""
    return "eager" if model.eager_only else job.attention


def holds_no_weights(weights_from: str) -> bool:
    """Whether the model is given as a bare config.json."""
    return weights_from.endswith(".json")


def run_script(training: Training, launcher: str, words: Sequence[str], settings: str = "") -> str:
    """The text of ``run.sh``, which starts train.py by *launcher* with *words* before it, after *settings*, in bash.

    Paths that its user adds stay relative to the user's folder: it never changes folder.
    """
    nodes, plan = training.cluster.nodes, training.plan
    usage = ["Usage: bash run.sh [more arguments of train.py, such as --dataset=FILE --steps=1000 --output=FOLDER]"]
    if nodes > 1:
        usage.append("On each machine, set NODE_RANK to its number, from 0, and MAIN_ADDRESS to the host of machine 0.")
    started = [*words, '"$here/train.py"', *map(shlex.quote, training.arguments), '"$@"']
    parts = [
        "#!/usr/bin/env bash\n" + header((*training.comments, *usage)),
        _preamble(launcher.split()[0]),
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


def _preamble(program: str) -> str:
    return f"""\
set -euo pipefail
here="$(cd -- "$(dirname -- "${{BASH_SOURCE[0]}}")" && pwd)"
command -v {program} > /dev/null || {{
  echo "run.sh: {program} is not installed; pip install torch transformers accelerate deepspeed" >&2
  exit 1
}}
"""


_ALLOCATOR = f"""\
# Let torch's allocator grow its segments in place. Fixed ones leave gaps between tensors of different sizes, and memory
# that is reserved but unusable counts against the GPU all the same.
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
