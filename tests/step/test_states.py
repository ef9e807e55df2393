"""Shares of the model states: every element is somewhere, and padding is no more than documented."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.specs.job import Job
from advisor.specs.model import Parameter
from advisor.step.offload import pinned
from advisor.step.states import adam_temporaries, row_shards, tensor_shards

ranks_of_any_count = st.integers(1, 100)
shapes = st.lists(st.integers(1, 40), min_size=1, max_size=2).map(tuple)
parameter_lists = st.lists(shapes, min_size=1, max_size=12).map(
    lambda found: tuple(Parameter(f"p{index}", shape) for index, shape in enumerate(found))
)


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
    for share in (tensor_shards, row_shards):
        together = share(parameters, np.array(ranks))

        assert [int(each) for each in np.asarray(together)] == [share(parameters, count) for count in ranks]


# torch 2.13, optim/adam.py: fused takes nothing, foreach a square root of every variance, a loop two tensors' worth
# beside one of the tensor before: 400 + 2 x 350.
@pytest.mark.parametrize(("optimizer", "taken"), [("adamw-fused", 0), ("adamw-foreach", 4000), ("adamw-loop", 4400)])
def test_what_the_update_takes_depends_on_its_kernel(optimizer: str, taken: int) -> None:
    job = Job(optimizer=optimizer)  # type: ignore[arg-type]

    assert adam_temporaries(job, lambda: (250, 400, 350), 4) == taken


@given(st.integers(1, 2**45))
def test_pinned_memory_is_the_next_power_of_two(size_bytes: int) -> None:
    found = int(pinned(size_bytes))

    assert found.bit_count() == 1
    assert size_bytes <= found < 2 * size_bytes
