"""The third reading: tensors one by one, handed over without being freed, and as many bytes as fold says."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest

from advisor.specs.job import Job, LossKernel
from advisor.specs.plan import OWN_STRATEGIES, Checkpointing, Offload, Plan, Strategy, zero_settings
from advisor.step.build import StepProgram, build
from advisor.step.ddp import bucket_sizes
from advisor.step.moves import Move, Moves, Rounds, moves
from advisor.step.program import NOTHING, Block, Node, blocks, fold, hold, phase, release, repeat, scratch, then
from advisor.step.schemes import scheme_of
from advisor.step.tape import Event
from step.catalog_models import PROFILES, model_of, shallow

MIB = 2**20


def moves_in(node: Node, **said: object) -> tuple[Moves, ...]:
    return moves(StepProgram(init=NOTHING, step=node, host=NOTHING, host_once=NOTHING, **said), node)  # type: ignore[arg-type]


def test_what_is_held_comes_and_what_is_released_goes_by_its_label() -> None:
    found = moves_in(then(hold("weights", "parameters", 8), release("weights", "parameters", 8)))

    assert found == (Move("take", "weights", 8), Move("give bytes", "weights", 8))


def test_what_a_block_needs_for_a_while_is_there_before_what_stays() -> None:
    passing, kept, gone = moves_in(Block("cast", "buffers", net_bytes=4, peak_bytes=10))

    assert isinstance(passing, Move)
    assert isinstance(gone, Move)
    assert (passing.kind, passing.size_bytes, gone.kind, gone.size_bytes) == ("take", 6, "give", 6)
    assert passing.name == gone.name
    assert kept == Move("take", "cast", 4)


def test_a_lump_is_taken_as_the_tensors_that_it_is_made_of() -> None:
    found = moves_in(hold("weights", "parameters", 8), tensor_sizes={"weights": lambda: [5, 3]})

    assert found == (Move("take", "weights", 5), Move("take", "weights", 3))


def test_a_part_of_a_lump_is_one_tensor() -> None:
    assert moves_in(hold("weights", "parameters", 4), tensor_sizes={"weights": lambda: [5, 3]}) == (
        Move("take", "weights", 4),
    )


def test_a_label_comes_from_its_stream() -> None:
    found = moves_in(then(hold("gathered", "parameters", 8), scratch("sum", 2)), streams={"gathered": "all-gather"})

    assert [move.stream for move in found if isinstance(move, Move)] == ["all-gather", "compute", "compute"]


def recorded(size: int, sequences: int = 1) -> Block:
    """A tensor that is made and freed, as a tape tells of it."""
    taken = Event("take", "weight gradient", "gradients", size, sequences > 1, storage=3)
    events = (taken, taken._replace(kind="give"))
    return Block("weight gradient", "gradients", 0, sequences * size, events=events, sequences=sequences)


def test_what_was_recorded_of_a_sequence_is_as_large_as_there_are_sequences() -> None:
    assert moves_in(recorded(6, sequences=4)) == (Move("take", 3, 24), Move("give", 3, 24))


def test_a_gradient_that_is_handed_over_is_kept_and_not_freed() -> None:
    found = moves_in(then(recorded(6), hold("gradients", "gradients", 6)))

    assert found == (Move("take", 3, 6), Move("keep", 3, 6, to="gradients"))


def test_another_size_is_another_tensor() -> None:
    found = moves_in(then(recorded(6), hold("gradients", "gradients", 5)))

    assert [move.kind for move in found if isinstance(move, Move)] == ["take", "give", "take"]


def test_repeats_stay_loops_unless_they_run_once_or_never() -> None:
    body = scratch("sum", 2)
    twice = moves_in(repeat(body, 2))

    assert twice == (Rounds(moves_in(body), 2),)
    assert moves_in(repeat(body, 1)) == moves_in(body)
    assert moves_in(repeat(body, 0)) == ()
    assert moves_in(phase("forward", body)) == (Rounds(moves_in(body), 1),)


def single(found: Iterable[Moves]) -> Iterator[Move]:
    """All moves, rounds unrolled."""
    for part in found:
        if isinstance(part, Rounds):
            for _ in range(part.times):
                yield from single(part.body)
        else:
            yield part


def walked(found: Iterable[Moves], held: dict[object, list[int]]) -> int:
    """Go through *found*, in which every tensor that goes was there with that size; the most bytes more than before."""
    more = most = 0
    for move in single(found):
        if move.kind != "keep":
            more += move.size_bytes if move.kind == "take" else -move.size_bytes
            most = max(most, more)
        stack = held.setdefault(move.name, [])
        if move.kind == "take":
            stack.append(move.size_bytes)
        elif move.kind == "give bytes":
            left = move.size_bytes
            while left > 0:
                left -= stack.pop()
            if left:
                stack.append(-left)
        else:
            assert stack.pop(-1 - move.newer) == move.size_bytes
            if move.kind == "keep":
                held.setdefault(move.to, []).append(move.size_bytes)
    return most


VARIANTS = [(strategy, Offload.NONE) for strategy in OWN_STRATEGIES] + [
    (Strategy.ZERO2, Offload.OPTIMIZER),
    (Strategy.ZERO3, Offload.OPTIMIZER_AND_PARAMETERS),
]


def plan_of(variant: tuple[Strategy, Offload], checkpointing: Checkpointing) -> Plan:
    strategy, offload = variant
    return Plan(
        strategy=strategy,
        offload=offload,
        gpus=8,
        micro_batch=2,
        accumulation_steps=3,
        checkpointing=checkpointing,
        zero=zero_settings(strategy),
    )


@pytest.mark.parametrize("profile", PROFILES)
def test_every_tensor_that_goes_was_there_and_as_many_bytes_come_as_fold_says(profile: str) -> None:
    for variant in VARIANTS:
        for checkpointing in Checkpointing:
            plan = plan_of(variant, checkpointing)
            program = build(shallow(model_of(profile)), Job(sequence_length=128), plan)
            held: dict[object, list[int]] = {}
            walked(moves(program, program.init), held)
            states = {name: sum(sizes) for name, sizes in held.items() if sizes}

            assert walked(moves(program, program.step), held) == fold(program.step).peak_bytes, plan.title
            assert sum(states.values()) == fold(program.init).net_bytes
            assert {name: sum(sizes) for name, sizes in held.items() if sizes} == states, plan.title


@pytest.mark.parametrize("loss", ["chunked", "fused"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_loss_in_pieces_is_as_many_bytes_as_fold_says(variant: tuple[Strategy, Offload], loss: LossKernel) -> None:
    model = shallow(model_of("meta-llama__Llama-3.1-8B"))
    program = build(model, Job(sequence_length=128, loss=loss), plan_of(variant, Checkpointing.NONE))
    held: dict[object, list[int]] = {}
    walked(moves(program, program.init), held)

    assert walked(moves(program, program.step), held) == fold(program.step).peak_bytes


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_a_strategy_says_of_labels_is_about_labels_that_it_uses(variant: tuple[Strategy, Offload]) -> None:
    model, plan = model_of("meta-llama__Llama-3.1-8B"), plan_of(variant, Checkpointing.NONE)
    program = build(model, Job(sequence_length=128), plan)
    labels: dict[str, Block] = {}
    for _, block, _ in blocks(program.device):
        labels.setdefault(block.label, block)

    assert set(program.streams) <= set(labels)
    for label, sizes in program.tensor_sizes.items():
        assert sum(sizes()) == labels[label].net_bytes, label
    assert program.tensor_sizes.keys() == scheme_of(model, Job(), plan).tensor_sizes.keys()


@pytest.mark.parametrize("sizes", [[4 * MIB] * 40, [1, 2 * MIB, 30 * MIB, 24 * MIB, 1, 1], [MIB // 2] * 9, []])
def test_buckets_are_those_that_torch_makes(sizes: list[int]) -> None:
    torch = pytest.importorskip("torch")
    import torch.distributed as distributed

    gradients = [torch.empty(size, dtype=torch.uint8, device="meta") for size in sizes]
    indices, _ = distributed._compute_bucket_assignment_by_size(gradients, [MIB, 25 * MIB]) if sizes else ([], None)

    assert bucket_sizes(sizes) == [sum(sizes[index] for index in bucket) for bucket in indices]
