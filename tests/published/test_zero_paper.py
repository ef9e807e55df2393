"""The model states of the ZeRO paper, read from the step program of a transformer of exactly the paper's size.

The paper counts 2 bytes of weights, 2 of gradients and 12 of Adam states per parameter. Frameworks do not hold all of
it at one time, so the reading adds what stays between steps and the gradients as the update finds them. They also hold
what the paper leaves out; the last tests say what.
"""

from __future__ import annotations

from functools import cache

import pytest

from advisor.catalog.huggingface import model_from_config
from advisor.specs.job import Job
from advisor.specs.model import ModelSpec
from advisor.specs.plan import Plan, Strategy
from advisor.step.build import StepProgram, build
from advisor.step.program import Node, expand, held_after

GB = 10**9
STAGES = {0: Strategy.DDP, 1: Strategy.ZERO1, 2: Strategy.ZERO2, 3: Strategy.ZERO3}
SHAPES = {"7.5B": (7_500 * 10**6, 29, 5_000), "128B": (128 * 10**9, 98, 10_000), "1T": (10**12, 99, 25_000)}
"""Parameters, layers, hidden size."""
GRADIENTS = {
    0: ("gradients", "gradients"),
    1: ("gradients", "gradients"),
    2: ("gradients", "optimizer's gradient, rank's share"),
    3: ("gradients", "gradients, rank's share"),
}
"""Category and label of the gradients that the update works on. Stage 3 keeps them between steps, stage 2 casts them to
twice their width."""


@cache
def transformer(size: str) -> ModelSpec:
    """A Llama whose vocabulary makes its parameters come out exactly."""
    parameters, layers, hidden_size = SHAPES[size]
    shape = {
        "model_type": "llama",
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden_size // 125,
        "tie_word_embeddings": True,
        "max_position_embeddings": 2048,
    }
    # A tied Llama has hidden_size x (vocabulary + layers x (4 hidden_size + 3 width + 2) + 1) parameters.
    rows = parameters // hidden_size - 1 - layers * (4 * hidden_size + 2)
    width = (rows - 50_000) // (3 * layers)
    shape |= {"intermediate_size": width, "vocab_size": rows - 3 * layers * width}
    model = model_from_config(shape, size, "arXiv:1910.02054")
    assert model.parameter_count == parameters
    return model


def program_of(size: str, stage: int, gpus: int) -> StepProgram:
    return build(transformer(size), Job(), Plan(strategy=STAGES[stage], gpus=gpus, micro_batch=1))


def most_held(program: Node, category: str, label: str) -> int:
    """The most bytes held at once under one label."""
    held = most = 0
    for moment in expand(program):
        if (moment.block.category, moment.block.label) == (category, label):
            held += int(moment.block.net_bytes)
            most = max(most, held)
    return most


def model_states_bytes(size: str, stage: int, gpus: int) -> int:
    program = program_of(size, stage, gpus)
    kept = [line for line in held_after(program.init) if line.category in ("parameters", "optimizer")]
    gradients = most_held(program.device, *GRADIENTS[stage]) // (2 if stage == 2 else 1)
    return sum(line.size_bytes for line in kept) + gradients


def printed(value: str) -> object:
    """*value* as a table prints it: the paper rounds some numbers and cuts others off at their last digit."""
    return pytest.approx(float(value), abs=10.0 ** -len(value.partition(".")[2]))


# Rajbhandari et al., arXiv:1910.02054, figure 1: 7.5 B parameters on 64 GPUs. Without ZeRO every GPU holds what one
# GPU alone would.
@pytest.mark.parametrize(
    ("stage", "gpus", "published"), [(0, 1, "120"), (1, 64, "31.4"), (2, 64, "16.6"), (3, 64, "1.9")]
)
def test_model_states_are_those_of_figure_1(stage: int, gpus: int, published: str) -> None:
    assert model_states_bytes("7.5B", stage, gpus) / GB == printed(published)


# The same, table 1: GB per GPU for 7.5 B, 128 B and 1 T parameters.
@pytest.mark.parametrize(
    ("stage", "gpus", "published"),
    [
        (0, 1, ("120", "2048", "16000")),
        (1, 4, ("52.5", "896", "7000")),
        (1, 16, ("35.6", "608", "4750")),
        (1, 64, ("31.4", "536", "4187")),
        (1, 256, ("30.4", "518", "4046")),
        (1, 1024, ("30.1", "513", "4011")),
        (2, 4, ("41.3", "704", "5500")),
        (2, 16, ("21.6", "368", "2875")),
        (2, 64, ("16.6", "284", "2218")),
        (2, 256, ("15.4", "263", "2054")),
        (2, 1024, ("15.1", "257", "2013")),
        (3, 4, ("30", "512", "4000")),
        (3, 16, ("7.5", "128", "1000")),
        (3, 64, ("1.88", "32", "250")),
        (3, 256, ("0.47", "8", "62.5")),
        (3, 1024, ("0.12", "2", "15.6")),
    ],
)
def test_model_states_are_those_of_table_1(stage: int, gpus: int, published: tuple[str, str, str]) -> None:
    found = [model_states_bytes(size, stage, gpus) / GB for size in SHAPES]

    assert found == [printed(value) for value in published]


# What the frameworks hold beside it, for 7.5 B parameters on 64 GPUs.


def test_data_parallel_buckets_hold_every_gradient_a_second_time() -> None:
    buckets = most_held(program_of("7.5B", 0, 64).device, "buffers", "DDP buckets")

    assert buckets == 4 * transformer("7.5B").parameter_count


def test_stage_2_keeps_the_gradients_of_every_tensor_that_touches_its_share() -> None:
    model, gpus = transformer("7.5B"), 64
    largest = sorted(parameter.numel for parameter in model.parameters())[-2:]
    share = 2 * model.parameter_count / gpus

    kept = most_held(program_of("7.5B", 2, gpus).device, "gradients", "gradients of the rank's partition")

    assert share < kept < share + 2 * sum(largest)


@pytest.mark.parametrize(("stage", "label"), [(1, "gradient buckets"), (2, "gradient buckets"), (3, "gradient bucket")])
def test_deepspeed_reduces_through_a_bucket_of_fixed_size(stage: int, label: str) -> None:
    bucket = most_held(program_of("7.5B", stage, 64).device, "buffers", label)

    assert bucket == 2 * 500_000_000


# max_live_parameters bounds what is whole at once; the tensor gathered last may exceed it.
def test_stage_3_holds_gathered_weights_of_fixed_size() -> None:
    gathered = most_held(program_of("7.5B", 3, 64).device, "parameters", "gathered weights")

    assert 2 * 1_000_000_000 <= gathered <= 2 * (1_000_000_000 + transformer("7.5B").largest_parameter.numel)
