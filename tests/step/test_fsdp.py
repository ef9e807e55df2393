"""FSDP's groups and flat tensors, and what the rank that accelerate's own code would be holds of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from catalog.small_configurations import SMALL
from hypothesis import given
from hypothesis import strategies as st

from advisor.catalog.huggingface import model_from_config
from advisor.specs.job import Job
from advisor.specs.model import ModelSpec, Parameter
from advisor.specs.plan import Checkpointing, FsdpSettings, Plan, Strategy
from advisor.step.build import build
from advisor.step.fsdp import FullyShardedDataParallel
from advisor.step.program import Collective, blocks, fold, phase_peaks
from advisor.step.states import flat_unit

CAUSAL = sorted(SMALL.keys() - {"bert", "roberta", "t5"})
SETTINGS = [FsdpSettings(version=version, syncs_each_micro_batch=each) for version in (1, 2) for each in (True, False)]
STRATEGIES = (Strategy.FSDP, Strategy.FSDP_GRAD_OP)


def small(family: str, **changes: Any) -> ModelSpec:
    return model_from_config({"model_type": family} | SMALL[family] | changes, family, "a test")


def plan(strategy: Strategy = Strategy.FSDP, **choices: Any) -> Plan:
    return Plan(**{"strategy": strategy, "gpus": 4, "micro_batch": 1} | choices)


def groups(model: ModelSpec) -> tuple[set[str], set[str]]:
    """Names in the tail and in the root."""
    scheme = FullyShardedDataParallel(model, Job(), plan())
    return {each.name for each in scheme.tail}, {each.name for each in scheme.root}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", CAUSAL)
def test_groups_are_those_of_accelerate(family: str, tied: bool) -> None:
    """utils/fsdp_utils.py ``fsdp2_prepare_model``: embedding, tail of final norm and head, and the root's rest."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    find_final_norm = pytest.importorskip("accelerate.utils.fsdp_utils")._find_final_norm
    model = small(family, tie_word_embeddings=tied)
    with torch.device("meta"):
        settings = transformers.AutoConfig.for_model(family, **SMALL[family], tie_word_embeddings=tied)
        real = transformers.AutoModelForCausalLM.from_config(settings)
    norm, embedding, head = find_final_norm(real), real.get_input_embeddings(), real.get_output_embeddings()
    shared = [embedding] if embedding.weight is head.weight else []
    in_tail = {id(each) for part in [norm, head, *shared] if part is not None for each in part.parameters()}
    outside = {each.name for each in (*model.embedding, *model.head)}
    tail = {name for name, each in real.named_parameters() if id(each) in in_tail}
    own = {name for name, each in real.named_parameters() if each is embedding.weight}

    assert groups(model) == (tail, outside - tail - own)


@pytest.mark.parametrize("checkpointing", list(Checkpointing))
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", ["gpt2", "deepseek_v2", "opt", "llama"])
def test_nothing_is_left_of_a_step(
    family: str, strategy: Strategy, settings: FsdpSettings, checkpointing: Checkpointing
) -> None:
    steps = np.array([1, 2, 3])
    chosen = plan(strategy, accumulation_steps=steps, checkpointing=checkpointing, fsdp=settings)

    assert not np.any(fold(build(small(family), Job(sequence_length=8), chosen).step).net_bytes)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_plans_side_by_side_are_those_alone(strategy: Strategy, settings: FsdpSettings) -> None:
    model, job = small("deepseek_v2"), Job(sequence_length=8, optimizer="adamw-loop")
    together = plan(
        strategy,
        gpus=np.array([2, 4, 7, 64]),
        micro_batch=np.array([1, 2, 1, 3]),
        accumulation_steps=np.array([3, 1, 2, 1]),
        fsdp=settings,
    )
    many = fold(build(model, job, together).device).peak_bytes

    assert [fold(build(model, job, together.at(index)).device).peak_bytes for index in range(4)] == list(many)


def test_layers_whose_neighbours_are_larger_stand_apart() -> None:
    """DeepSeek's first layers are dense; the mixtures after them are gathered while a dense one's buffer is there."""
    scheme = FullyShardedDataParallel(small("deepseek_v2"), Job(), plan())

    assert scheme.layers_apart == {0, 1, 3}


def reduced_bytes(settings: FsdpSettings, steps: int) -> float:
    chosen = plan(accumulation_steps=steps, fsdp=settings)
    return sum(
        float(transfer.payload_bytes) * float(times)
        for _, block, times in blocks(build(small("llama"), Job(sequence_length=8), chosen).step)
        for transfer in block.transfers
        if isinstance(transfer, Collective) and transfer.kind == "reduce-scatter"
    )


@pytest.mark.parametrize("version", [1, 2])
def test_gradients_are_reduced_once_a_step_or_in_every_micro_batch(version: int) -> None:
    once, always = (FsdpSettings(version=version, syncs_each_micro_batch=each) for each in (False, True))

    assert reduced_bytes(once, 3) == reduced_bytes(once, 1) == reduced_bytes(always, 1)
    assert reduced_bytes(always, 3) == 3 * reduced_bytes(always, 1)


@pytest.mark.parametrize("version", [1, 2])
def test_unreduced_gradients_of_the_whole_model_stay_in_the_half_format(version: int) -> None:
    model, job = small("llama"), Job(sequence_length=8)
    kept, reduced = (
        phase_peaks(build(model, job, plan(accumulation_steps=2, fsdp=FsdpSettings(version=version, **each))).device)
        for each in ({}, {"syncs_each_micro_batch": True})
    )
    share = kept["step"][0] - kept["step"][1]

    # Between micro-batches one holds every gradient in bf16, the other its share in fp32. No tensor here is padded.
    assert kept["loss"][1] - reduced["loss"][1] == 2 * model.parameter_count - share


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(1, 20), st.sampled_from([1, 4, 8]))
def test_a_flat_tensor_is_cut_evenly_and_starts_each_parameter_aligned(
    sizes: list[int], ranks: int, aligned: int
) -> None:
    unit = flat_unit([Parameter(f"p{index}", (size,)) for index, size in enumerate(sizes)], ranks, aligned)

    assert sum(sizes) <= unit.share * ranks < sum(sizes) + aligned * len(sizes) + ranks
    assert 0 < unit.filled <= unit.share
    assert all(0 <= piece <= size for piece, size in zip(unit.pieces, sizes, strict=True))
    assert 1 <= unit.tensors <= len(sizes)
