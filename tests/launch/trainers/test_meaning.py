"""One plan means the same to every trainer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from advisor.catalog.optimizers import optimizer_called
from advisor.catalog.trainers import trainer_profiles
from advisor.launch.files import Launch
from advisor.specs.job import Trainer
from advisor.specs.plan import Checkpointing, Offload, Plan, Strategy
from launch.examples import plan
from launch.trainers.told import TRAINERS, launch_for, text_of, told

Told = Mapping[str, Any]


def by_transformers(given_: Told, length: str) -> dict[str, Any]:
    precisions = {(True, False): "bf16", (False, True): "fp16", (False, False): "fp32"}
    return {
        "micro-batch": given_["per_device_train_batch_size"],
        "accumulation": given_["gradient_accumulation_steps"],
        "length": given_[length],
        "checkpoints": given_.get("activation_checkpointing", given_.get("gradient_checkpointing")),
        "precision": precisions[given_["bf16"], given_["fp16"]],
        "optimizer": optimizer_called(given_["optim"]),
    }


def by_llama_factory(given_: Told) -> dict[str, Any]:
    assert not given_["gradient_checkpointing"] if "gradient_checkpointing" in given_ else True
    return by_transformers(given_, "cutoff_len") | {"checkpoints": not given_["disable_gradient_checkpointing"]}


def by_axolotl(given_: Told) -> dict[str, Any]:
    renamed = {"per_device_train_batch_size": given_["micro_batch_size"], "optim": given_["optimizer"]}
    return by_transformers({**given_, **renamed}, "sequence_len")


def by_torchtitan(given_: Told) -> dict[str, Any]:
    parallelism = ("data_parallel_replicate_degree", "data_parallel_shard_degree")
    replicas, shards = (given_[f"parallelism.{degree}"] for degree in parallelism)
    at_once = replicas * shards * given_["training.local_batch_size"]
    return {
        "micro-batch": given_["training.local_batch_size"],
        "accumulation": given_["training.global_batch_size"] / at_once,
        "length": given_["training.seq_len"],
        "checkpoints": given_["activation_checkpoint.mode"] == "full",
        "precision": {"bfloat16": "bf16", "float32": "fp32"}[given_["training.mixed_precision_param"]],
        "optimizer": f"adamw-{given_['optimizer.implementation']}",
    }


def by_megatron(given_: Told) -> dict[str, Any]:
    at_once = given_["micro-batch-size"] * 2
    return {
        "micro-batch": given_["micro-batch-size"],
        "accumulation": given_["global-batch-size"] / at_once,
        "length": given_["seq-length"],
        "checkpoints": given_.get("recompute-granularity") == "full",
        "precision": "bf16" if given_["bf16"] else "fp32",
        "optimizer": "adamw-fused",
    }


def by_deepspeed(launch: Launch, strategy: Strategy) -> tuple[int | None, bool]:
    """The stage, and whether the optimizer is on the CPU, as the JSON says that its run.sh names."""
    script = text_of(launch, "run.sh")
    names = [name for name in ("ds_config.json", f"{strategy.value}.json") if f'"$here/{name}"' in script]
    if not names:
        return None, False
    zero = json.loads(text_of(launch, names[0]))["zero_optimization"]
    return zero["stage"], zero.get("offload_optimizer", {}).get("device") == "cpu"


MEANINGS: dict[Trainer, Callable[[Told], dict[str, Any]]] = {
    "hf": lambda given_: by_transformers(given_, "block_size"),
    "trl": lambda given_: by_transformers(given_, "max_length"),
    "open-r1": lambda given_: by_transformers(given_, "max_length"),
    "llama-factory": by_llama_factory,
    "axolotl": by_axolotl,
    "torchtitan": by_torchtitan,
    "megatron": by_megatron,
}


@st.composite
def plans(draw: st.DrawFn, trainer: Trainer) -> Plan:
    own = {"torchtitan": [Strategy.FSDP, Strategy.FSDP_GRAD_OP], "megatron": [Strategy.MEGATRON]}
    strategy = draw(st.sampled_from(own.get(trainer, [Strategy.ZERO1, Strategy.ZERO2, Strategy.ZERO3])))
    offloads = [Offload.NONE, Offload.OPTIMIZER] if strategy.zero_stage else [Offload.NONE]
    return plan(
        strategy,
        offload=draw(st.sampled_from(offloads)),
        micro_batch=draw(st.integers(1, 64)),
        accumulation_steps=draw(st.integers(1, 64)),
        checkpointing=draw(st.sampled_from([Checkpointing.NONE, Checkpointing.FULL])),
    )


@pytest.mark.parametrize("trainer", TRAINERS)
@given(data=st.data(), length=st.integers(1, 10**5))
@settings(max_examples=15, deadline=None)
def test_a_plan_means_the_same_to_every_trainer(trainer: Trainer, data: st.DataObject, length: int) -> None:
    chosen = data.draw(plans(trainer))

    launch = launch_for(trainer, chosen, sequence_length=length)

    said = MEANINGS[trainer](told(trainer, launch))

    assert by_deepspeed(launch, chosen.strategy) == (chosen.strategy.zero_stage, chosen.offload.optimizer)
    assert said == {
        "micro-batch": chosen.micro_batch,
        "accumulation": chosen.accumulation_steps,
        "length": length,
        "checkpoints": chosen.checkpointing is Checkpointing.FULL,
        "precision": "bf16",
        "optimizer": "adamw-fused",
    }


# What the weights are loaded in: DeepSpeed keeps masters beside weights of the compute format, DDP and FSDP the trained
# weights themselves.
@pytest.mark.parametrize(
    ("strategy", "held", "loaded", "casts"),
    [
        (Strategy.ZERO2, "fp32", "bfloat16", True),
        (Strategy.DDP, "fp32", "float32", True),
        (Strategy.FSDP, "bf16", "bfloat16", False),
    ],
)
def test_weights_are_loaded_as_the_strategy_keeps_them(strategy: Strategy, held: Any, loaded: str, casts: bool) -> None:
    given_ = told("trl", launch_for("trl", plan(strategy), parameter_format=held))

    assert (given_["dtype"], given_["bf16"]) == (loaded, casts)


def test_llama_factory_keeps_bf16_weights_only_where_it_is_told() -> None:
    pure = told("llama-factory", launch_for("llama-factory", plan(Strategy.FSDP), parameter_format="bf16"))
    mixed = told("llama-factory", launch_for("llama-factory", plan(Strategy.FSDP)))

    assert (pure["pure_bf16"], pure["bf16"], mixed["pure_bf16"], mixed["bf16"]) == (True, False, False, True)


@pytest.mark.parametrize("trainer", ["trl", "open-r1", "llama-factory", "axolotl"])
@pytest.mark.parametrize("padded", [True, False])
def test_texts_are_joined_unless_they_are_padded(trainer: Trainer, padded: bool) -> None:
    given_ = told(trainer, launch_for(trainer, plan(Strategy.ZERO2), padded=padded))

    assert given_["sample_packing" if trainer == "axolotl" else "packing"] is not padded


@pytest.mark.parametrize(
    ("trainer", "name", "kernels"),
    [
        ("trl", "attn_implementation", {"sdpa": "sdpa", "flash": "flash_attention_2", "eager": "eager"}),
        ("axolotl", "attn_implementation", {"sdpa": "sdpa", "flash": "flash_attention_2", "eager": "eager"}),
        ("llama-factory", "flash_attn", {"sdpa": "sdpa", "flash": "fa2", "eager": "disabled"}),
        ("megatron", "attention-backend", {"sdpa": "fused", "flash": "flash", "eager": "unfused"}),
    ],
)
def test_the_attention_kernel_has_each_trainers_name(trainer: Trainer, name: str, kernels: dict[str, str]) -> None:
    chosen = plan(Strategy.MEGATRON if trainer == "megatron" else Strategy.ZERO1)

    found = {each: told(trainer, launch_for(trainer, chosen, attention=each))[name] for each in kernels}

    assert found == kernels


@pytest.mark.parametrize("trainer", ["hf", "trl", "open-r1", "llama-factory", "axolotl"])
def test_every_optimizer_of_a_trainer_has_the_name_that_transformers_gives_it(trainer: Trainer) -> None:
    known = trainer_profiles()[trainer].optimizers
    key = "optimizer" if trainer == "axolotl" else "optim"

    found = [told(trainer, launch_for(trainer, plan(Strategy.ZERO1), optimizer=each))[key] for each in known]

    assert tuple(map(optimizer_called, found)) == known
