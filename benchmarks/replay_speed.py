"""How fast the allocator's model replays, and what it adds to the price of a plan.

    python benchmarks/replay_speed.py

Actions per second: a made-up stream of a million allocations and frees. Plans: seconds of CPU time to price one, how
much of it is the replay, and how many of its moves were gone through, the best of several rounds. CPU time, so that a
busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable

from advisor.catalog.request import resolve
from advisor.cost.allocator import Action, Settings, replay
from advisor.cost.estimate import price
from advisor.cost.memory import ALLOCATOR, on_device
from advisor.cost.reserved import replayed
from advisor.specs.plan import Checkpointing, Plan, Strategy, zero_settings
from advisor.step.build import build

ACTIONS = 1_000_000
LEAST_PER_S = 500_000
SIZES = (100, 4096, 900_000, 2 * 2**20, 7 * 2**20, 33 * 2**20)
PLANS = (
    ("Qwen2.5-1.5B", Strategy.DDP, 8),
    ("Qwen2.5-1.5B", Strategy.ZERO2, 8),
    ("Llama-3.1-70B", Strategy.FSDP, 64),
    ("Llama-3.1-70B", Strategy.ZERO3, 64),
)


def stream(count: int) -> list[Action]:
    """As many tensors come as go; a thousand or so live at a time."""
    chance = random.Random(1)
    living: list[int] = []
    actions = []
    for number in range(count):
        if living and chance.random() < len(living) / 2000:
            actions.append(Action(living.pop(chance.randrange(len(living))), None))
        else:
            actions.append(Action(number, chance.choice(SIZES)))
            living.append(number)
    return actions


def cpu_s(work: Callable[[], object], rounds: int) -> float:
    """The best of *rounds*."""
    best = float("inf")
    for _ in range(rounds):
        started = time.process_time()
        work()
        best = min(best, time.process_time() - started)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each (default 5)")
    rounds = parser.parse_args().rounds
    actions = stream(ACTIONS)
    for expandable in (True, False):
        settings = Settings(expandable_segments=expandable)
        rate = len(actions) / cpu_s(lambda settings=settings: replay(actions, settings), 1)  # type: ignore[misc]
        name = "expandable segments" if expandable else "fixed segments"
        print(f"{name:20}{rate:12,.0f} actions/s  goal {LEAST_PER_S:,}: {'met' if rate >= LEAST_PER_S else 'missed'}")
    print(f"\n{'plan':40}{'price s':>9}{'replay s':>10}{'whole s':>9}{'reserved / allocated':>22}")
    for model, strategy, gpus in PLANS:
        question = resolve(model, gpus=gpus, nodes=gpus // 8, gpu="H100", global_batch=4 * gpus)
        plan = Plan(
            strategy=strategy,
            gpus=gpus,
            micro_batch=1,
            accumulation_steps=4,
            checkpointing=Checkpointing.FULL,
            zero=zero_settings(strategy),
        )
        program = on_device(build(question.model, question.job, plan), question.cluster, question.calibration)
        found = replayed(program, ALLOCATOR)
        seconds = [
            cpu_s(lambda: price(question, plan), rounds),  # noqa: B023
            cpu_s(lambda: replayed(program, ALLOCATOR), rounds),  # noqa: B023
            cpu_s(lambda: replayed(program, ALLOCATOR, whole=True), 1),  # noqa: B023
        ]
        ratio = found.peak_reserved_bytes / found.peak_allocated_bytes
        title = f"{model} {plan.title} x {gpus}"
        print(f"{title:40}{seconds[0]:9.3f}{seconds[1]:10.3f}{seconds[2]:9.3f}{ratio:22.3f}")


if __name__ == "__main__":
    main()
