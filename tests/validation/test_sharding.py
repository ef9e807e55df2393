"""One rank of several, predicted and traced: FSDP2's groups, FSDP1's flat tensors and DDP's buckets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from advisor.specs.job import Job
from advisor.specs.plan import Checkpointing, FsdpSettings, Plan, Strategy
from advisor.validation.accuracy import Case, compare

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

pytestmark = pytest.mark.filterwarnings("ignore")

ERROR = 0.001
RANK_BYTES = 4
"""Of a mesh's list of ranks, which lies on the host; cutting it in two shows it to the counter."""

QWEN2 = {
    "model_type": "qwen2",
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 8192,
}
GPT2 = {"model_type": "gpt2", "n_embd": 512, "n_layer": 3, "n_head": 8, "vocab_size": 8192, "n_positions": 512}
MIXTURE = QWEN2 | {
    "model_type": "qwen3_moe",
    "head_dim": 64,
    "num_hidden_layers": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 512,
    "mlp_only_layers": [0],
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def case(config: dict[str, Any], strategy: Strategy, version: int = 2, synced: bool = False, **choices: Any) -> Case:
    of_job = {name: choices.pop(name) for name in ("parameter_format", "optimizer") if name in choices}
    shards = choices.pop("shard_ranks", None)
    plan = Plan(
        **{"strategy": strategy, "gpus": 4, "micro_batch": 1} | choices,
        fsdp=FsdpSettings(version=version, syncs_each_micro_batch=synced, shard_ranks=shards),
    )
    return Case("a small model", config, Job(sequence_length=512, **of_job), plan)


GRAD_OP, FULL, DDP = Strategy.FSDP_GRAD_OP, Strategy.FSDP, Strategy.DDP
TIED, UNTIED = QWEN2 | {"tie_word_embeddings": True}, QWEN2 | {"tie_word_embeddings": False}
CASES = {
    "an embedding that its tail shares": case(TIED, FULL),
    "an embedding of its own": case(UNTIED, GRAD_OP, gpus=2),
    "position tables in the root": case(GPT2, FULL, gpus=8),
    "a dense layer before mixtures": case(MIXTURE, FULL),
    "uneven cuts": case(UNTIED, FULL, gpus=7, accumulation_steps=3),
    "more ranks than rows": case(TIED, FULL, gpus=200),
    "gradients that wait": case(TIED, GRAD_OP, accumulation_steps=3, parameter_format="bf16"),
    "gradients that do not wait": case(UNTIED, FULL, accumulation_steps=2, synced=True, optimizer="adamw-loop"),
    "recomputed layers": case(UNTIED, FULL, checkpointing=Checkpointing.FULL, optimizer="adamw-foreach"),
    "two replicas": case(UNTIED, Strategy.HSDP, gpus=8, shard_ranks=4),
    "replicas with tied embeddings": case(TIED, Strategy.HSDP, gpus=6, shard_ranks=2, accumulation_steps=3),
    "replicas in one format": case(UNTIED, Strategy.HSDP, gpus=8, shard_ranks=2, parameter_format="bf16"),
    "replicas in sync": case(TIED, Strategy.HSDP, gpus=8, shard_ranks=4, accumulation_steps=2, synced=True),
    "version 1": case(UNTIED, FULL, version=1, accumulation_steps=2, optimizer="adamw-loop"),
    "version 1 with whole weights": case(TIED, GRAD_OP, version=1, gpus=7, accumulation_steps=3),
    "version 1 in sync": case(MIXTURE, FULL, version=1, parameter_format="bf16", accumulation_steps=2, synced=True),
    "buckets": case(UNTIED, DDP, accumulation_steps=2, optimizer="adamw-foreach"),
    "buckets in half precision": case(TIED, DDP, parameter_format="bf16", checkpointing=Checkpointing.FULL),
}


@pytest.mark.parametrize("name", CASES)
def test_a_rank_is_predicted_in_every_phase(name: str) -> None:
    found = compare(CASES[name])
    plan = CASES[name].plan
    counted = plan.gpus * RANK_BYTES if plan.strategy is Strategy.HSDP else 0

    assert found.difference_bytes("between steps") == -counted
    assert abs(found.error("end of forward")) < ERROR
    assert abs(found.error("peak in forward")) < ERROR
    assert abs(found.error("peak in backward")) < ERROR
    assert abs(found.error("peak in step")) < ERROR


def test_a_process_is_left_without_ranks() -> None:
    compare(CASES["an embedding of its own"])

    assert not torch.distributed.is_initialized()
