"""The counter of live storages, against tensors whose lives are known."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from advisor.validation.trace import StorageCounter, resizes_counted  # noqa: E402 - imports torch

MIB = 2**20


def mebibytes(count: int) -> object:
    return torch.zeros(count * MIB, dtype=torch.uint8)


def test_what_lives_is_counted_until_its_last_reference_goes() -> None:
    with StorageCounter() as counter:
        first = mebibytes(3)
        second = mebibytes(2)
        assert counter.live_bytes == 5 * MIB
        view = first[:10]  # type: ignore[index]
        del first, second
        assert counter.live_bytes == 3 * MIB
        del view
        assert (counter.live_bytes, counter.peak_bytes) == (0, 5 * MIB)


def test_each_phase_has_its_own_peak() -> None:
    with StorageCounter() as counter:
        kept = mebibytes(1)
        with counter.phase():
            mebibytes(8)
            assert counter.peak_bytes == 9 * MIB
        with counter.phase():
            mebibytes(2)
            assert counter.peak_bytes == 3 * MIB
        del kept


def test_a_storage_that_is_resized_counts_as_it_is() -> None:
    with StorageCounter() as counter, resizes_counted(counter):
        tensor = mebibytes(4)
        tensor.untyped_storage().resize_(0)  # type: ignore[attr-defined]
        assert counter.live_bytes == 0
        tensor.untyped_storage().resize_(MIB)  # type: ignore[attr-defined]
        assert counter.live_bytes == MIB
    assert torch.UntypedStorage.resize_.__qualname__ != "resizes_counted.<locals>.resize"


def test_two_gradients_of_one_tensor_are_summed_in_place_as_without_the_counter() -> None:
    """A dispatch mode makes autograd add out of place; the counter undoes that."""
    x = torch.zeros(MIB, requires_grad=True)
    with StorageCounter() as counter:
        output = (x * 2 + x * 3).sum()
        counter.in_backward = True
        with counter.phase():
            before = counter.live_bytes
            output.backward()
        counter.in_backward = False
        peak = counter.peak_bytes - before
        assert counter.live_bytes - before == 4 * MIB

    # The gradients through the two products, and no third for their sum; the loss's own is a number of 4 bytes.
    assert peak == 2 * 4 * MIB + 4
