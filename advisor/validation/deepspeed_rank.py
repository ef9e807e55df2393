"""One rank of a DeepSpeed ZeRO run on real tensors, the other ranks not there: what it holds, phase by phase.

    python -m advisor.validation.deepspeed_rank < requests

torch's fake process group lets one process be any rank of N: collectives do nothing, so losses mean nothing, but
DeepSpeed takes and frees what it would. The process reads a request from every line of its input and prints one
:class:`Trace` as JSON for each, having imported torch and DeepSpeed once. It needs the extra ``run`` and models small
enough for this machine's memory.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace
from typing import Any

from advisor.errors import ConfigError
from advisor.launch.deepspeed import deepspeed_json
from advisor.specs.job import Job
from advisor.specs.plan import Plan
from advisor.validation.asynchronous_io import plain_files
from advisor.validation.record import from_plain, plain
from advisor.validation.run import on_cpu
from advisor.validation.trace import Trace

Asked = tuple[Mapping[str, Any], Job, Plan, int]
"""A model's configuration, the job, the plan and the rank."""


def trace_ranks(asked: Sequence[Asked]) -> list[Trace]:
    """One trace for each of *asked*, all from one process of this module. Raises ConfigError where a run fails."""
    lines = "".join(_request(*each) + "\n" for each in asked)
    done = subprocess.run(
        [sys.executable, "-m", __name__], input=lines, capture_output=True, text=True, check=False, env=on_cpu()
    )
    printed = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if len(printed) != len(asked):
        config = asked[len(printed)][0]
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), f"exit {done.returncode}")
        raise ConfigError(f"DeepSpeed did not run {config.get('model_type')}: {last.strip()}")
    return [from_plain(Trace, json.loads(line)) for line in printed]


def _request(config: Mapping[str, Any], job: Job, plan: Plan, rank: int) -> str:
    return json.dumps({"config": dict(config), "job": plain(job), "plan": plain(plan), "rank": rank})


def trace_rank(config: Mapping[str, Any], job: Job, plan: Plan, rank: int) -> Trace:
    """The last of three optimizer steps as *rank* of *plan*'s GPUs sees it. Once per process."""
    import torch
    import torch.distributed as distributed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from advisor.validation.engines import built_model, by_deepspeed
    from advisor.validation.loop import trace_of, train
    from advisor.validation.meter import meter_of

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(plan.gpus), LOCAL_RANK="0")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
    distributed.init_process_group("fake", rank=rank, world_size=int(plan.gpus), store=FakeStore())
    _agree_with_rank_0()
    if plan.offload.optimizer:
        leave_out_cpu_adam()
    device = torch.device("cpu")
    with _nvme(plan) as plan, meter_of(device) as meter:
        model = built_model(config, job, plan, device)
        engine = by_deepspeed(model, job, json.loads(deepspeed_json(job, plan)), device)
        del model
        ids = torch.zeros(int(plan.micro_batch), job.sequence_length, dtype=torch.long)
        return trace_of(train(meter, engine, ids, int(plan.accumulation_steps))[0], engine)


def _agree_with_rank_0() -> None:
    """Let DeepSpeed take what this rank is about to gather for what rank 0 gathers, which is not there to say it."""
    checks: Any = import_module("deepspeed.runtime.zero.utils")
    checks.assert_lst_len_same_as_other_ranks = lambda own: None
    checks.get_lst_from_rank0 = lambda own: own


def leave_out_cpu_adam() -> None:
    """Spare a compiler: DeepSpeedCPUAdam's kernel works in place, and takes and frees nothing.

    ops/adam/cpu_adam.py makes the moments, and asks which processor this is for a warning alone.
    """
    from deepspeed.ops.op_builder import CPUAdamBuilder

    def nothing(*_: object) -> None:
        """Updates no weights."""

    kernel = SimpleNamespace(create_adam=nothing, adam_update=nothing, destroy_adam=nothing)
    CPUAdamBuilder.load = lambda self, verbose=True: kernel
    processor: Any = import_module("cpuinfo")
    processor.get_cpu_info = dict


@contextmanager
def _nvme(plan: Plan) -> Iterator[Plan]:
    """*plan* with a folder of this machine for an NVMe, to which DeepSpeed gets without libaio."""
    if not plan.swaps:
        yield plan
        return
    with tempfile.TemporaryDirectory(prefix="advisor-nvme-") as folder, plain_files():
        yield replace(plan, offload_settings=replace(plan.offload_settings, nvme_path=folder))


def _answer(line: str) -> str:
    """The trace that *line* requests, as JSON."""
    asked = json.loads(line)
    job, plan = from_plain(Job, asked["job"]), from_plain(Plan, asked["plan"])
    return json.dumps(plain(trace_rank(asked["config"], job, plan, asked["rank"])))


def main() -> None:
    logging.disable(logging.WARNING)
    # Imported once for every process that is forked below.
    import deepspeed  # noqa: F401
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        # A process is one rank of one run, and DeepSpeed keeps much that is global.
        child = os.fork()
        if not child:
            print(_answer(line), flush=True)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            sys.exit(1)


if __name__ == "__main__":
    main()
