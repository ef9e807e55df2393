"""One rank of a DeepSpeed ZeRO run on real tensors, the other ranks not there: what it holds, phase by phase.

    python -m advisor.validation.deepspeed_rank '{"config": …, "job": …, "plan": …, "rank": 1}'
    python -m advisor.validation.deepspeed_rank - < requests

torch's fake process group lets one process be any rank of N: collectives do nothing, so losses mean nothing, but
DeepSpeed takes and frees what it would. The process prints the :class:`Trace` as JSON on its last line; with ``-`` it
reads a request from every line of its input and prints one such line for each, having imported torch and DeepSpeed
once. It needs the extra ``run`` and a model small enough for this machine's memory.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from advisor.errors import ConfigError
from advisor.launch.deepspeed import deepspeed_json
from advisor.specs.job import Job
from advisor.specs.plan import Checkpointing, Plan, Strategy, ZeroSettings
from advisor.tracing.counter import StorageCounter, resizes_counted
from advisor.validation.trace import Trace

STEPS = 3
"""ZeRO-3 records its trace in the first step, and Adam's moments are made in it."""


def trace_rank(config: Mapping[str, Any], job: Job, plan: Plan, rank: int) -> Trace:
    """The last of three optimizer steps as *rank* of *plan*'s GPUs sees it. Once per process."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(plan.gpus), LOCAL_RANK="0", DS_ACCELERATOR="cpu")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
    import torch
    import torch.distributed as distributed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", rank=rank, world_size=int(plan.gpus), store=FakeStore())
    import deepspeed
    import transformers

    deepspeed.init_distributed(dist_backend="gloo")
    settings = dict(config)
    built = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    built.use_cache = False
    with StorageCounter() as counter, resizes_counted(counter):
        factory: Any = transformers.AutoModelForCausalLM
        model = factory.from_config(built, dtype=torch.bfloat16)
        model.train()
        if plan.checkpointing is Checkpointing.FULL:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=json.loads(deepspeed_json(job, plan)))[0]
        ids = torch.zeros(int(plan.micro_batch), job.sequence_length, dtype=torch.long)
        for _ in range(STEPS):
            found = _optimizer_step(counter, engine, ids, plan)
    return found


def _optimizer_step(counter: StorageCounter, engine: Any, ids: Any, plan: Plan) -> Trace:
    states = counter.live_bytes - ids.untyped_storage().nbytes()
    forward_peak = backward_peak = step_peak = after_forward = 0
    for _ in range(int(plan.accumulation_steps)):
        with counter.phase():
            loss = engine(input_ids=ids, labels=ids.clone()).loss
        forward_peak, after_forward = max(forward_peak, counter.peak_bytes), counter.live_bytes
        with counter.phase():
            counter.in_backward = True
            engine.backward(loss)
            counter.in_backward = False
        backward_peak = max(backward_peak, counter.peak_bytes)
        del loss
        with counter.phase():
            engine.step()
        # Before the last micro-step, this call only counts.
        step_peak = counter.peak_bytes
    parameters = sum(getattr(each, "ds_numel", each.numel()) for each in engine.module.parameters())
    return Trace(parameters, states, forward_peak, after_forward, backward_peak, step_peak)


Asked = tuple[Mapping[str, Any], Job, Plan, int]
"""A model's configuration, the job, the plan and the rank."""


def request(config: Mapping[str, Any], job: Job, plan: Plan, rank: int) -> str:
    """What to give to this module on the command line."""
    asked = {"strategy": plan.strategy.value, "checkpointing": plan.checkpointing.value, "zero": asdict(plan.zero)}
    counts = {"gpus": plan.gpus, "micro_batch": plan.micro_batch, "accumulation_steps": plan.accumulation_steps}
    return json.dumps({"config": dict(config), "job": asdict(job), "plan": asked | counts, "rank": rank})


def trace_ranks(asked: Sequence[Asked]) -> list[Trace]:
    """One trace for each of *asked*, all from one process of this module. Raises ConfigError where a run fails."""
    lines = "".join(request(*each) + "\n" for each in asked)
    command = [sys.executable, "-m", __name__, "-"]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=False)
    printed = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if len(printed) != len(asked):
        raise ConfigError(f"DeepSpeed ran {len(printed)} of {len(asked)} cases:\n{done.stderr[-2000:]}")
    return [Trace(**json.loads(line)) for line in printed]


def answer(line: str) -> str:
    """The trace that *line* requests, as JSON."""
    asked = json.loads(line)
    words = asked["plan"]
    plan = Plan(
        strategy=Strategy(words.pop("strategy")),
        checkpointing=Checkpointing(words.pop("checkpointing")),
        zero=ZeroSettings(**words.pop("zero")),
        **words,
    )
    return json.dumps(asdict(trace_rank(asked["config"], Job(**asked["job"]), plan, asked["rank"])))


def main() -> None:
    logging.disable(logging.WARNING)
    os.environ["DS_ACCELERATOR"] = "cpu"
    if sys.argv[1] != "-":
        print(answer(sys.argv[1]))
        return
    # Imported, and DeepSpeed's collectives loaded, once for every process that is forked below.
    import torch
    import transformers  # noqa: F401
    from deepspeed.comm.torch import build_shm_op

    torch.set_num_threads(1)
    build_shm_op()

    for line in sys.stdin:
        # A process is one rank of one run, and DeepSpeed keeps much that is global.
        child = os.fork()
        if not child:
            print(answer(line), flush=True)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            sys.exit(1)


if __name__ == "__main__":
    main()
