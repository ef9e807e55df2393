"""One rank of a DeepSpeed ZeRO run on real tensors, the other ranks not there: what it holds, phase by phase.

    python -m advisor.validation.deepspeed_rank '{"config": …, "job": …, "plan": …, "rank": 1}'

torch's fake process group lets one process be any rank of N: collectives do nothing, so losses mean nothing, but
DeepSpeed takes and frees what it would. The process prints the :class:`Trace` as JSON on its last line. It needs
the extra ``run`` and a model small enough for this machine's memory.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from advisor.launch.deepspeed import deepspeed_json
from advisor.specs.job import Job
from advisor.specs.plan import Checkpointing, Plan, Strategy, ZeroSettings
from advisor.validation.trace import StorageCounter, Trace, resizes_counted

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
        step_peak = max(step_peak, counter.peak_bytes)
    parameters = sum(getattr(each, "ds_numel", each.numel()) for each in engine.module.parameters())
    return Trace(parameters, states, forward_peak, after_forward, backward_peak, step_peak)


def request(config: Mapping[str, Any], job: Job, plan: Plan, rank: int) -> str:
    """What to give to this module on the command line."""
    asked = {"strategy": plan.strategy.value, "checkpointing": plan.checkpointing.value, "zero": asdict(plan.zero)}
    counts = {"gpus": plan.gpus, "micro_batch": plan.micro_batch, "accumulation_steps": plan.accumulation_steps}
    return json.dumps({"config": dict(config), "job": asdict(job), "plan": asked | counts, "rank": rank})


def main() -> None:
    logging.disable(logging.WARNING)
    asked = json.loads(sys.argv[1])
    words = asked["plan"]
    plan = Plan(
        strategy=Strategy(words.pop("strategy")),
        checkpointing=Checkpointing(words.pop("checkpointing")),
        zero=ZeroSettings(**words.pop("zero")),
        **words,
    )
    print(json.dumps(asdict(trace_rank(asked["config"], Job(**asked["job"]), plan, asked["rank"]))))


if __name__ == "__main__":
    main()
