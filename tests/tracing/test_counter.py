"""The counter of live storages, against tensors whose lives are known."""

from __future__ import annotations

from collections.abc import Callable

import pytest

torch = pytest.importorskip("torch")

from advisor.tracing.counter import StorageCounter, resizes_counted  # noqa: E402 - imports torch

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


def test_the_ledger_names_what_is_held_at_the_highest_moment() -> None:
    with StorageCounter() as counter:
        weights = mebibytes(4)
        counter.mark([weights], "parameters")
        counter.forget_log()
        table = torch.zeros(7, MIB, dtype=torch.uint8)
        kept = mebibytes(2)
        del table, kept
        ledger = dict(counter.ledger(lambda held: "logits" if held.shape == (7, MIB) else "temporaries"))

    assert ledger == {"parameters": 4 * MIB, "logits": 7 * MIB, "temporaries": 2 * MIB}


def test_what_a_gpu_run_keeps_on_the_host_is_left_out() -> None:
    with StorageCounter() as counter:
        step = mebibytes(1)
        counter.leave_out([step])
        assert counter.live_bytes == 0
        del step
        assert counter.live_bytes == 0


def profiled_peak(run: Callable[[], object]) -> int:
    """The most that *run* held above its start, by the allocation events of torch's profiler: no mode is active."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        highest = max(highest, live)
    return highest


def test_the_counter_agrees_with_the_profiler_s_allocations() -> None:
    """A small real model, forward and backward; a tensor used twice has its gradients summed."""
    torch.manual_seed(0)
    width, tokens = 64, 256
    first, second = (torch.nn.Linear(width, width, bias=False) for _ in range(2))
    x = torch.randn(tokens, width)

    def run() -> None:
        hidden = first(x)
        (second(hidden).tanh() * hidden + hidden.sigmoid()).sum().backward()
        for layer in (first, second):
            layer.weight.grad = None

    run()
    profiled = profiled_peak(run)
    with StorageCounter() as counter:
        counter.include([x, first.weight, second.weight])
        with counter.phase():
            before = counter.live_bytes
            counter.in_backward = True
            run()
            counter.in_backward = False
        counted = counter.peak_bytes - before

    # The profiler sees what torch allocates in blocks of 64 B.
    assert abs(counted - profiled) <= 64 * 16
