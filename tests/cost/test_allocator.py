"""The caching allocator: documented rules as bytes worked out by hand, and laws over any stream of tensors."""

from __future__ import annotations

from contextlib import suppress
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from advisor.cost.allocator import COMPUTE_STREAM, Action, Allocator, OutOfMemoryError, Settings, replay
from advisor.cost.pools import (
    MIN_BLOCK_BYTES,
    SMALL_BUFFER_BYTES,
    SMALL_SIZE_BYTES,
    ExpandablePool,
    Held,
    allocation_size,
    round_size,
)
from advisor.errors import AdvisorError, SpecError

MIB = 2**20
FIXED = Settings()
EXPANDABLE = Settings(expandable_segments=True)
both = pytest.mark.parametrize("setting", [FIXED, EXPANDABLE], ids=["fixed", "expandable"])


def take(tensor: str, size: float, stream: str = COMPUTE_STREAM) -> Action:
    """*size* MiB."""
    return Action(tensor, int(size * MIB), stream)


def give(tensor: str) -> Action:
    return Action(tensor, None)


def reserved(*actions: Action, setting: Settings = FIXED) -> float:
    """MiB at the end."""
    return replay(actions, setting).reserved_bytes / MIB


def allocated(*actions: Action, setting: Settings = FIXED) -> float:
    return replay(actions, setting).allocated_bytes / MIB


# round_size: at least 512 B, and multiples of it.
@pytest.mark.parametrize(("size", "block"), [(1, 512), (512, 512), (513, 1024), (MIB, MIB), (MIB + 1, MIB + 512)])
def test_requests_are_rounded_to_512_bytes(size: int, block: int) -> None:
    assert round_size(size) == block


# docs.pytorch.org/docs/2.13/notes/cuda.html: between 1024 and 2048, four divisions give 1280, 1536 and 1792.
@pytest.mark.parametrize(("size", "block"), [(1200, 1280), (1300, 1536), (1600, 1792), (1900, 2048), (1024, 1024)])
def test_sizes_may_be_rounded_to_steps_between_powers_of_two(size: int, block: int) -> None:
    """In KiB, since so few bytes are rounded to 512 B."""
    assert round_size(size * 1024, 4) == block * 1024


# get_allocation_size
@pytest.mark.parametrize(
    ("size", "segment"), [(512, 2), (MIB, 2), (MIB + 512, 20), (10 * MIB - 512, 20), (10 * MIB, 10), (11 * MIB, 12)]
)
def test_a_segment_is_of_2_or_20_mib_or_a_multiple_of_2(size: int, segment: int) -> None:
    assert allocation_size(size) == segment * MIB
    assert reserved(Action("any", size)) == segment


def test_small_requests_share_a_segment() -> None:
    """Eight of 256 KiB fill 2 MiB; the ninth needs another."""
    eight = [take(str(number), 0.25) for number in range(8)]

    assert reserved(*eight) == 2
    assert reserved(*eight, take("ninth", 0.25)) == 4


def test_small_and_large_requests_never_share() -> None:
    assert reserved(take("large", 2), take("small", 0.5)) == 20 + 2


def test_a_large_remainder_of_a_mib_goes_with_the_tensor_and_a_larger_one_does_not() -> None:
    """11 MiB of a segment of 12 leave 1 MiB, which is not more than 1 MiB; 10.5 leave 1.5 MiB."""
    assert allocated(take("unsplit", 11)) == 12
    assert allocated(take("split", 10.5)) == 10.5


def test_expandable_segments_split_exactly() -> None:
    assert allocated(take("any", 11), setting=EXPANDABLE) == 11
    assert reserved(take("any", 11), setting=EXPANDABLE) == 20


@both
def test_a_small_remainder_of_512_bytes_is_a_block(setting: Settings) -> None:
    found = replay([Action(number, MIB - 512) for number in range(2)] + [Action("rest", 1024)], setting)

    assert found.reserved_bytes == 2 * MIB
    assert found.allocated_bytes == 2 * MIB


def test_the_best_fit_is_the_smallest_block_that_is_large_enough() -> None:
    """Free: 40 and 30 MiB. 25 go into the 30, so that 40 still find their place."""
    free = [take("a", 40), take("b", 30), give("a"), give("b")]

    assert reserved(*free, take("c", 25), take("d", 40)) == 70


def test_among_equals_the_lowest_address_is_taken() -> None:
    """Of two segments of 20 MiB the first is split; the second stays whole for another 20."""
    assert reserved(take("a", 20), take("b", 20), give("b"), give("a"), take("c", 2), take("d", 20)) == 40


@both
def test_free_neighbours_become_one(setting: Settings) -> None:
    """Two of 8 MiB in one segment: 16 fit where neither alone would do."""
    assert reserved(take("a", 8), take("b", 8), give("a"), give("b"), take("c", 16), setting=setting) == 20


def test_segments_do_not_become_one() -> None:
    assert reserved(take("a", 20), take("b", 20), give("a"), give("b"), take("c", 40)) == 80


def test_an_expandable_segment_grows_where_fixed_ones_would_not_do() -> None:
    actions = [take("a", 20), take("b", 20), give("a"), give("b"), take("c", 50)]

    assert reserved(*actions, setting=EXPANDABLE) == 60
    assert reserved(*actions) == 90


def test_pages_are_of_2_mib_for_small_and_20_mib_for_large_requests() -> None:
    assert reserved(take("a", 1.5), setting=EXPANDABLE) == 20
    assert reserved(take("a", 21), setting=EXPANDABLE) == 40
    assert reserved(take("a", 0.5), take("b", 0.75), take("c", 0.875), setting=EXPANDABLE) == 4


def test_the_free_end_of_an_expandable_segment_is_the_last_resort() -> None:
    """Free: a gap of 10 MiB, and 5 MiB at the end of the page. 4 MiB fit both, and go into the gap."""
    actions = [take("gap", 10), take("wall", 5), give("gap"), take("c", 4), take("d", 6), take("e", 5)]

    assert reserved(*actions, setting=EXPANDABLE) == 20


@both
def test_streams_have_pools_of_their_own(setting: Settings) -> None:
    """What one stream has freed serves no other."""
    assert reserved(take("a", 20), give("a"), take("b", 20, "other"), setting=setting) == 40
    assert reserved(take("a", 20), give("a"), take("b", 20), setting=setting) == 20


def test_a_full_device_gets_segments_back_that_are_free_as_a_whole() -> None:
    """Free: 20 of 20 MiB, and 10 of the 20 in the other segment. Only the first goes back for the 30."""
    actions = [take("a", 20), take("b", 9), give("a"), take("c", 30)]
    found = replay(actions, Settings(capacity_bytes=50 * MIB))

    assert (found.retries, found.reserved_bytes) == (1, 50 * MIB)
    with pytest.raises(OutOfMemoryError, match="are reserved and"):
        replay(actions, Settings(capacity_bytes=48 * MIB))


def test_a_full_device_gets_free_pages_back() -> None:
    """30 and 10 fill two pages. Of the 30 that are freed, one page is free as a whole, and goes; 40 more need two."""
    actions = [take("a", 30), take("b", 10), give("a"), take("c", 40)]
    found = replay(actions, Settings(expandable_segments=True, capacity_bytes=60 * MIB))

    assert (found.retries, found.reserved_bytes) == (1, 60 * MIB)
    assert replay(actions, EXPANDABLE).reserved_bytes == 80 * MIB


def test_pages_that_went_back_are_mapped_again_at_the_lowest_address() -> None:
    """After the first three pages went, 50 MiB need them and no others."""
    actions = [take("a", 60), take("b", 20), give("a"), take("c", 70), give("c"), take("d", 50)]
    found = replay(actions, Settings(expandable_segments=True, capacity_bytes=100 * MIB))

    assert found.retries == 1
    assert found.reserved_bytes == 100 * MIB


def test_oversize_blocks_are_not_split_and_serve_only_oversize_requests() -> None:
    """With blocks of 30 MiB and more unsplit, 2 MiB may not use the free 40, and 25 more fit those for 35."""
    unsplit = Settings(max_split_bytes=30 * MIB)

    assert reserved(take("a", 40), give("a"), take("b", 2), setting=unsplit) == 60
    assert reserved(take("a", 40), give("a"), take("b", 2)) == 40
    assert allocated(take("a", 40), give("a"), take("b", 35), setting=unsplit) == 40
    assert reserved(take("a", 60), give("a"), take("b", 40), setting=unsplit) == 100


def test_a_full_device_gets_oversize_blocks_back_first() -> None:
    limited = Settings(max_split_bytes=30 * MIB, capacity_bytes=120 * MIB)
    found = replay([take("a", 60), take("b", 20), give("b"), give("a"), take("c", 90)], limited)

    assert (found.retries, found.reserved_bytes) == (0, 110 * MIB)


@pytest.mark.parametrize("wrong", [{"max_split_bytes": 20 * MIB}, {"roundup_power2_divisions": 3}])
def test_settings_that_torch_refuses_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(SpecError):
        Settings(**wrong)


def test_tensors_come_before_they_go_and_only_once() -> None:
    with pytest.raises(AdvisorError, match="'a' is freed but was not allocated"):
        replay([give("a")], FIXED)
    with pytest.raises(AdvisorError, match="'a' is allocated twice"):
        replay([take("a", 1), take("a", 1)], FIXED)


sizes = st.one_of(
    st.integers(1, 4096), st.integers(1, 2 * MIB), st.integers(1, 64 * MIB), st.sampled_from([MIB, MIB + 1, 10 * MIB])
)
choices = st.lists(
    st.one_of(st.tuples(sizes, st.sampled_from(["compute", "other"])), st.integers(0, 50)), min_size=1, max_size=60
)
any_settings = st.builds(
    Settings,
    expandable_segments=st.booleans(),
    max_split_bytes=st.sampled_from([None, 21 * MIB, 40 * MIB]),
    roundup_power2_divisions=st.sampled_from([1, 2, 8]),
)


def actions_of(chosen: list[tuple[int, str] | int]) -> list[Action]:
    """Each pair comes as a tensor; each number makes one of the living go."""
    living: list[Action] = []
    found: list[Action] = []
    for number, each in enumerate(chosen):
        if isinstance(each, tuple):
            living.append(Action(number, *each))
            found.append(living[-1])
        elif living:
            gone = living.pop(each % len(living))
            found.append(Action(gone.tensor, None, gone.stream))
    return found


def everything_freed(actions: list[Action]) -> list[Action]:
    gone = {action.tensor for action in actions if action.size_bytes is None}
    return [
        *actions,
        *(Action(action.tensor, None) for action in actions if action.size_bytes and action.tensor not in gone),
    ]


def most_asked_for(actions: list[Action]) -> int:
    """Bytes of all tensors that live at a time, at most."""
    living: dict[object, int] = {}
    most = 0
    for action in actions:
        if action.size_bytes is None:
            del living[action.tensor]
        else:
            living[action.tensor] = action.size_bytes
        most = max(most, sum(living.values()))
    return most


@settings(deadline=None)
@given(choices, any_settings)
def test_what_is_reserved_holds_what_is_allocated_and_that_what_was_asked_for(
    chosen: list[tuple[int, str] | int], setting: Settings
) -> None:
    actions = actions_of(chosen)
    found = replay(actions, setting)

    assert found.peak_reserved_bytes >= found.peak_allocated_bytes >= most_asked_for(actions)
    assert found.peak_reserved_bytes >= found.reserved_bytes >= found.allocated_bytes
    assert found.reserved_bytes % SMALL_BUFFER_BYTES == 0


@settings(deadline=None)
@given(choices, any_settings)
def test_once_all_is_freed_the_same_again_reserves_no_more(
    chosen: list[tuple[int, str] | int], setting: Settings
) -> None:
    """The same sequence from the same segments: after two rounds nothing new is needed in a third."""
    once = everything_freed(actions_of(chosen))
    found = replay(once, setting)

    assert found.allocated_bytes == 0
    if setting.expandable_segments:
        assert replay([*once, *once], setting).peak_reserved_bytes == found.peak_reserved_bytes


@settings(deadline=None)
@given(choices, any_settings)
def test_blocks_in_use_never_overlap_and_lie_in_what_is_reserved(
    chosen: list[tuple[int, str] | int], setting: Settings
) -> None:
    allocator = Allocator(setting)
    living: dict[object, Held] = {}
    for tensor, size, stream in actions_of(chosen):
        if size is None:
            allocator.free(living.pop(tensor))
        else:
            living[tensor] = allocator.allocate(size, allocator.pools_of(stream))
        assert_apart(list(living.values()))
        assert sum(block[2] for block in living.values()) == allocator.allocated <= allocator.reserved


def assert_apart(blocks: list[Held]) -> None:
    """No two share an address, and no free block is in use."""
    for pool in {id(block[0]): block[0] for block in blocks}.values():
        used = [(block[1], block[1] + block[2]) for block in blocks if block[0] is pool]
        free = [(address, address + size) for address, size in pool.sizes.items()]
        ranges = sorted([*used, *free])
        assert all(first[1] <= second[0] for first, second in pairwise(ranges))
        assert all(size % MIN_BLOCK_BYTES == 0 and address % MIN_BLOCK_BYTES == 0 for address, size in used)
        assert sorted(key >> 50 for key in pool.free) == sorted(pool.sizes.values())
        assert all((block[2] <= SMALL_SIZE_BYTES) == pool.small for block in blocks if block[0] is pool)


@settings(deadline=None)
@given(choices, any_settings, st.integers(1, 10))
def test_a_smaller_device_is_never_overfilled(
    chosen: list[tuple[int, str] | int], setting: Settings, tenths: int
) -> None:
    """It serves all requests within its capacity or says that it cannot, and never where there was room for all."""
    actions = actions_of(chosen)
    roomy = replay(actions, setting)
    capacity = roomy.peak_reserved_bytes * tenths // 10
    limited = Settings(
        expandable_segments=setting.expandable_segments,
        max_split_bytes=setting.max_split_bytes,
        roundup_power2_divisions=setting.roundup_power2_divisions,
        capacity_bytes=capacity,
    )
    try:
        found = replay(actions, limited)
    except OutOfMemoryError:
        assert tenths < 10
        return
    assert found.peak_reserved_bytes <= capacity
    assert found.peak_allocated_bytes >= most_asked_for(actions)
    if tenths == 10:
        assert found == roomy


@settings(deadline=None)
@given(st.lists(st.just(0) | st.integers(1, 40), min_size=10, max_size=60), st.integers(50, 140), st.randoms())
def test_pages_that_are_mapped_are_those_that_are_counted(chosen: list[int], capacity: int, chance: Random) -> None:
    """A number takes as many MiB of a device that is soon full, and 0 gives one of the living back."""
    allocator = Allocator(Settings(expandable_segments=True, capacity_bytes=capacity * MIB))
    pools = allocator.pools_of(COMPUTE_STREAM)
    living: list[Held] = []
    for size in chosen:
        if size:
            with suppress(OutOfMemoryError):
                living.append(allocator.allocate(size * MIB, pools))
        elif living:
            allocator.free(living.pop(chance.randrange(len(living))))
        mapped = [pool.mapped_end - sum(pool.unmapped.values()) for pool in pools if isinstance(pool, ExpandablePool)]
        assert sum(mapped) == allocator.reserved <= capacity * MIB
        assert_apart(living)
