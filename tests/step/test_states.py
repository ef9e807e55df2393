"""Shares of the model states: every element is somewhere, and padding is no more than documented."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.specs.job import Job
from advisor.specs.model import Attention, FeedForward, Layer, ModelSpec, Parameter, Run
from advisor.step.offload import pinned
from advisor.step.states import adam_temporaries, flat_shard, owned_gradients, row_shards, tensor_shards

ranks_of_any_count = st.integers(1, 100)
shapes = st.lists(st.integers(1, 40), min_size=1, max_size=2).map(tuple)
parameter_lists = st.lists(shapes, min_size=1, max_size=12).map(
    lambda found: tuple(Parameter(f"p{index}", shape) for index, shape in enumerate(found))
)


def model(parameters: tuple[Parameter, ...]) -> ModelSpec:
    """A model whose tensors are *parameters*, in this order."""
    layer = Layer(
        attention=Attention(heads=1, key_value_heads=1, head_dim=2),
        feed_forward=FeedForward(width=1),
        norm="rms",
        parameters=parameters[1:],
    )
    return ModelSpec(
        name="made up",
        family="none",
        objective="causal",
        hidden_size=2,
        vocabulary_size=2,
        maximum_positions=None,
        tied_embeddings=True,
        embedding=parameters[:1],
        runs=(Run((layer,), 1),),
        final_norm=None,
        head=(),
    )


@given(st.integers(1, 10**12), ranks_of_any_count)
def test_a_flat_buffer_is_padded_to_twice_the_ranks(parameters: int, ranks: int) -> None:
    shard = flat_shard(parameters, ranks)

    assert shard % 2 == 0
    assert parameters <= shard * ranks < parameters + 2 * ranks


@given(parameter_lists, ranks_of_any_count)
def test_tensors_cut_alone_are_padded_by_less_than_a_rank_each(parameters: tuple[Parameter, ...], ranks: int) -> None:
    whole = sum(parameter.numel for parameter in parameters)

    assert whole <= tensor_shards(parameters, ranks) * ranks <= whole + len(parameters) * (ranks - 1)


@given(parameter_lists, ranks_of_any_count)
def test_tensors_cut_by_rows_are_as_torch_chunks_them(parameters: tuple[Parameter, ...], ranks: int) -> None:
    """Rank 0 gets the first of torch.chunk's pieces, of ceil(rows / ranks) rows."""
    expected = sum(len(np.zeros(each.shape)[: -(-each.shape[0] // ranks)].reshape(-1)) for each in parameters)

    assert row_shards(parameters, ranks) == expected


@pytest.mark.parametrize("share", [tensor_shards, row_shards])
@given(parameters=parameter_lists)
def test_a_share_never_grows_with_the_ranks_and_is_all_on_one(share, parameters) -> None:  # type: ignore[no-untyped-def]
    shares = share(parameters, np.arange(1, 60))

    assert shares[0] == sum(parameter.numel for parameter in parameters)
    assert (np.diff(shares) <= 0).all()


@given(parameter_lists, st.lists(ranks_of_any_count, min_size=1, max_size=6))
def test_many_rank_counts_at_once_are_each_alone(parameters: tuple[Parameter, ...], ranks: list[int]) -> None:
    counts = np.array(ranks)
    owned = owned_gradients(model(parameters), counts)

    for index, count in enumerate(ranks):
        alone = owned_gradients(model(parameters), count)
        assert tensor_shards(parameters, counts)[index] == tensor_shards(parameters, count)  # type: ignore[index]
        assert row_shards(parameters, counts)[index] == row_shards(parameters, count)  # type: ignore[index]
        for name in ("worst", "last", "worst_with_norm"):
            assert getattr(owned, name)[index] == getattr(alone, name)


@given(parameter_lists, ranks_of_any_count)
def test_a_rank_owns_the_whole_of_every_tensor_that_its_partition_touches(
    parameters: tuple[Parameter, ...], ranks: int
) -> None:
    """Held against a partition made element by element."""
    tensor_of_element = np.repeat(np.arange(len(parameters)), [each.numel for each in parameters])
    shard = int(flat_shard(len(tensor_of_element), ranks))
    partitions = [tensor_of_element[rank * shard : (rank + 1) * shard] for rank in range(ranks)]
    held, with_norm = [], []
    for partition in (each for each in partitions if len(each)):
        touched, slices = np.unique(partition, return_counts=True)
        held.append(sum(parameters[index].numel for index in touched))
        with_norm.append(held[-1] + 4 * int(slices.max()))

    owned = owned_gradients(model(parameters), ranks)

    assert owned.worst == max(held)
    assert owned.worst_with_norm == max(with_norm)
    if len(partitions[-1]):
        assert owned.last == held[-1]


def test_a_large_embedding_weighs_on_its_ranks_however_many_there_are() -> None:
    parameters = (Parameter("embedding", (1000, 10)), *(Parameter(f"p{index}", (10,)) for index in range(100)))
    owned = owned_gradients(model(parameters), np.array([1, 10, 100, 1000]))

    assert (np.asarray(owned.worst) >= 10_000).all()
    assert (np.asarray(owned.last)[-1]) <= 20


# torch 2.13, optim/adam.py: fused takes nothing, foreach a square root of every variance, a loop two tensors' worth.
@pytest.mark.parametrize(("optimizer", "taken"), [("adamw-fused", 0), ("adamw-foreach", 4000), ("adamw-loop", 2 * 400)])
def test_what_the_update_takes_depends_on_its_kernel(optimizer: str, taken: int) -> None:
    job = Job(optimizer=optimizer)  # type: ignore[arg-type]

    assert adam_temporaries(job, 1000, 100, 4) == taken


@given(st.integers(1, 2**45))
def test_pinned_memory_is_the_next_power_of_two(size_bytes: int) -> None:
    found = int(pinned(size_bytes))

    assert found.bit_count() == 1
    assert size_bytes <= found < 2 * size_bytes
