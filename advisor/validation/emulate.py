"""One rank of many on real tensors, the other ranks not there: what it holds, phase by phase, on a CPU or on one GPU.

    python -m advisor.validation.emulate < requests
    python -m advisor.validation.emulate FOLDER

torch's fake process group lets one process be any rank of N: collectives do nothing, so losses and times mean nothing,
but DeepSpeed, FSDP2 and DDP take and free what they would. On a GPU that is with its real kernels and allocator, but
without NCCL's buffers. A plan of one GPU needs no emulation: it runs as it is, and its times are real.

The process imports the frameworks, then reads a request from every line of its input and prints one JSON object for
each: what a worker's record has (``trace``, ``measured`` and the rest), or ``out_of_memory``. On a CPU every request
gets a process of its own, forked; a GPU cannot be handed on to a fork, so a process takes one request for it. With a
folder it reads and writes there what a :mod:`~advisor.validation.worker` would; ``rank`` in its ``request.json`` says
which, if not the first. It needs the extra ``run``, and models small enough for this machine's memory.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from advisor.errors import ConfigError
from advisor.launch.deepspeed import deepspeed_json
from advisor.specs.job import Job
from advisor.specs.plan import Plan
from advisor.validation.asynchronous_io import plain_files
from advisor.validation.measured import STEPS
from advisor.validation.record import from_plain, plain
from advisor.validation.run import on_cpu
from advisor.validation.trace import Trace

Asked = tuple[Mapping[str, Any], Job, Plan, int]
"""A model's configuration, the job, the plan and the rank."""

LOCAL_ADDRESS = {"LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
"""DeepSpeed asks for an address, and nobody listens there."""

IMPORTED = ("transformers.modeling_utils", "advisor.validation.loop", "advisor.validation.meter", "deepspeed")
"""Once, before any request: for every process that is forked, and before a GPU is waited for. None makes a context."""


def trace_ranks(asked: Sequence[Asked]) -> list[Trace]:
    """One trace for each of *asked*, all from one process of this module. Raises ConfigError where a run fails."""
    lines = "".join(request(*each) + "\n" for each in asked)
    done = subprocess.run(command(), input=lines, capture_output=True, text=True, check=False, env=on_cpu())
    printed = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if len(printed) != len(asked):
        config, _, plan, _ = asked[len(printed)]
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), f"exit {done.returncode}")
        raise ConfigError(f"{plan.strategy.title} did not run {config.get('model_type')}: {last.strip()}")
    return [from_plain(Trace, json.loads(line)["trace"]) for line in printed]


def command() -> list[str]:
    """What starts a process of this module."""
    return [sys.executable, "-m", "advisor.validation.emulate"]


def request(config: Mapping[str, Any], job: Job, plan: Plan, rank: int, device: str = "cpu", steps: int = STEPS) -> str:
    """A line that asks such a process for *rank* of *plan* on *device*, ``cpu`` or ``cuda``."""
    asked = {"job": plain(job), "plan": plain(plan), "rank": rank, "device": device, "steps": steps}
    return json.dumps({"config": dict(config), **asked})


def emulate(
    config: Mapping[str, Any],
    job: Job,
    plan: Plan,
    rank: int = 0,
    device: str = "cpu",
    steps: int = STEPS,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """What *rank* of *plan*'s GPUs ran and measured here, as a worker's record has it. Once per process.

    With several ranks bytes are true, and times, losses and ``ranks`` (the one that there is) mean nothing.
    """
    import torch

    from advisor.validation.adapters import import_before_counting
    from advisor.validation.engines import built_model, by_deepspeed, by_torch, leave_out_cpu_adam
    from advisor.validation.four_bits import as_on_a_gpu
    from advisor.validation.loop import random_tokens, record_of, train
    from advisor.validation.meter import meter_of

    place = torch.device("cuda", 0) if device == "cuda" else torch.device("cpu")
    _join(plan, rank, place)
    import_before_counting(job)
    if plan.offload.optimizer and (device == "cpu" or int(plan.gpus) > 1):
        leave_out_cpu_adam()
    products = as_on_a_gpu() if job.method == "qlora" and device == "cpu" else nullcontext()
    with _nvme(plan) as plan, products, meter_of(place) as meter:
        model = built_model(config, job, plan, place)
        vocabulary = model.config.get_text_config().vocab_size
        if plan.strategy.zero_stage is not None:
            engine = by_deepspeed(model, job, plan, json.loads(deepspeed_json(job, plan)), place)
        else:
            engine = by_torch(model, job, plan, place)
        del model
        meter.built()
        ids = random_tokens(vocabulary, job, plan, rank).to(place)
        measured, losses = train(meter, engine, ids, int(plan.accumulation_steps), steps, progress)
        return record_of(measured, losses, engine, ranks=1)


def _join(plan: Plan, rank: int, device: Any) -> None:
    """Make this process *rank* of *plan*'s, the others not there; or the only one there is."""
    import torch
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from advisor.validation.engines import BACKENDS

    distributed: Any = torch.distributed
    count = int(plan.gpus)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE="1", **LOCAL_ADDRESS)
    if count == 1:
        distributed.init_process_group(BACKENDS[device.type], store=distributed.HashStore(), rank=0, world_size=1)
        return
    distributed.init_process_group("fake", rank=rank, world_size=count, store=FakeStore())
    _agree_with_rank_0()
    _keep_own_part(rank)


def _agree_with_rank_0() -> None:
    """Let DeepSpeed take what this rank is about to gather for what rank 0 gathers, which is not there to say it."""
    try:
        checks: Any = import_module("deepspeed.runtime.zero.utils")
    except ImportError:
        return  # without DeepSpeed there is nothing to agree on
    checks.assert_lst_len_same_as_other_ranks = lambda own: None
    checks.get_lst_from_rank0 = lambda own: own


def _keep_own_part(rank: int) -> None:
    """Let a reduce-scatter hand this rank's part of its own tensor back, as if the others had sent zeros.

    The fake group leaves the output as it was allocated (FakeProcessGroup.hpp ``_reduce_scatter_base``), and what lies
    there by chance makes weights that are no numbers. Nothing is allocated here.
    """
    import torch.distributed as distributed

    from advisor.validation.engines import keep_own_part

    reduce_scatter = distributed.reduce_scatter_tensor

    def with_own_part(output: Any, input: Any, *arguments: Any, **words: Any) -> Any:
        keep_own_part(output, input, rank)
        return reduce_scatter(output, input, *arguments, **words)

    distributed.reduce_scatter_tensor = with_own_part


@contextmanager
def _nvme(plan: Plan) -> Iterator[Plan]:
    """*plan* with a folder of this machine for an NVMe, to which DeepSpeed gets without libaio."""
    if not plan.swaps:
        yield plan
        return
    with tempfile.TemporaryDirectory(prefix="advisor-nvme-") as folder, plain_files():
        yield replace(plan, offload_settings=replace(plan.offload_settings, nvme_path=folder))


def answer(asked: Mapping[str, Any]) -> str:
    """What the request *asked* gets, as JSON."""
    import torch

    job, plan = from_plain(Job, asked["job"]), from_plain(Plan, asked["plan"])
    try:
        return json.dumps(emulate(asked["config"], job, plan, asked["rank"], asked["device"], asked["steps"]))
    except torch.OutOfMemoryError as error:
        return json.dumps({"out_of_memory": str(error)})


def in_folder(folder: Path) -> None:
    """Do what the files in *folder* ask, and leave ``progress<N>.json`` and ``rank<N>.json`` there."""
    from advisor.validation.worker import end_with, progress_in, write

    config, asked = (json.loads((folder / name).read_text()) for name in ("config.json", "request.json"))
    rank, steps, device = int(asked.get("rank", 0)), int(asked.get("steps", STEPS)), asked.get("device", "cpu")
    end_with(float(asked["timeout_s"]))
    job, plan = from_plain(Job, asked["job"]), from_plain(Plan, asked["plan"])
    write(
        folder / f"rank{rank}.json", emulate(config, job, plan, rank, device, steps, progress_in(folder, rank, steps))
    )


def main() -> None:
    logging.disable(logging.WARNING)
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # nothing is compiled here, and DeepSpeed's Muon would import the compiler
    if len(sys.argv) > 1:
        in_folder(Path(sys.argv[1]))
        os._exit(0)  # threads of NCCL or gloo can outlive the group
    for module in IMPORTED:
        with suppress(ImportError):  # of DeepSpeed, without which there are DDP and FSDP
            import_module(module)
    import torch

    for line in sys.stdin:
        asked = json.loads(line)
        if asked["device"] == "cuda":
            print(answer(asked), flush=True)
            os._exit(0)
        torch.set_num_threads(1)
        # A process is one rank of one run, and DeepSpeed keeps much that is global.
        child = os.fork()
        if not child:
            print(answer(asked), flush=True)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            sys.exit(1)


if __name__ == "__main__":
    main()
