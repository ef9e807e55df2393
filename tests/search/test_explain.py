"""Reasons and ways out: their numbers are true, and what they promise holds when it is done."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache

import pytest

from advisor.catalog.gpus import all_gpus
from advisor.cost.estimate import judge
from advisor.cost.results import Estimate
from advisor.search.explain import fewest_gpus, lost, won
from advisor.search.recommend import search
from advisor.search.results import Recommendation, Rejected
from advisor.search.sheet import fastest, price_sheet
from advisor.search.space import SEARCHED_CHECKPOINTING, kept_to, sheets
from advisor.specs.plan import Checkpointing, Offload, Plan, Strategy
from advisor.specs.question import Question
from search.questions import ASKED, GIB, answer, bounded, priced, question, variant_of, with_gpus, with_memory

Variant = tuple[Strategy, Offload]

every_question = pytest.mark.parametrize("name", ASKED)


def short_of_memory(found: Recommendation) -> list[Rejected]:
    return [each for each in found.rejected if each.short_by_bytes]


def numbers(text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*(?:\.\d+)?", text)]


@every_question
def test_a_strategy_that_does_not_fit_shows_its_nearest_miss_and_what_it_lacks(name: str) -> None:
    asked = ASKED[name]
    for each in short_of_memory(answer(name)):
        nearest = priced(name, each.plan)
        held = nearest.memory

        assert nearest.verdict != "fits"
        assert each.why == judge(held, asked.margin_share(each.plan))[1]
        lacking = (
            held.device_used_bytes - held.capacity_bytes * (1 - asked.margin_share(each.plan)),
            held.host_bytes - held.host_capacity_bytes,
        )
        assert each.short_by_bytes == pytest.approx(max(lacking), abs=1)
        assert f"{max(lacking) / GIB:.1f} GiB short" in each.why


@every_question
def test_no_plan_of_a_rejected_strategy_fits_or_has_a_bound_that_misses_by_less(name: str) -> None:
    asked = ASKED[name]
    share = asked.job.global_batch // asked.cluster.gpus
    for each in short_of_memory(answer(name)):
        for checkpointing in SEARCHED_CHECKPOINTING:
            for size in (size for size in range(1, share + 1) if share % size == 0):
                plan = replace(
                    each.plan, checkpointing=checkpointing, micro_batch=size, accumulation_steps=share // size
                )
                lacks = bounded(name, plan)[1]
                assert lacks >= bounded(name, each.plan)[1]
                assert lacks > 0 or priced(name, plan).verdict != "fits"


@every_question
def test_the_headline_of_what_does_not_fit_names_the_nearest_three(name: str) -> None:
    found = answer(name)
    if not found.plans:
        nearest = sorted(short_of_memory(found), key=lambda each: each.short_by_bytes)[:3]
        misses = [f"{each.plan.title} {each.short_by_bytes / GIB:.1f} GiB short" for each in nearest]

        assert f"Nearest: {', '.join(misses)}" in found.headline
        assert (found.fewest_gpus is None) == ("the fewest that would do" not in found.headline)
        assert found.fewest_gpus is None or f"{found.fewest_gpus} GPUs" in found.headline


def test_something_fits_none_of_the_questions_are_all_alike() -> None:
    """The questions hold what the tests above are about."""
    found = [answer(name) for name in ASKED]

    assert any(not each.plans for each in found)
    assert any(each.plans and short_of_memory(each) for each in found)
    assert any(not each.rejected for each in found)


@every_question
def test_each_loser_says_how_much_slower_it_is_and_what_it_costs(name: str) -> None:
    found = answer(name)
    for each in found.plans[1:]:
        best = found.plans[0]
        slower = 100 * (1 - each.time.tokens_per_s / best.time.tokens_per_s)
        more_traffic = (each.sent_bytes - best.sent_bytes) / 1e9
        saved = (best.memory.device_used_bytes - each.memory.device_used_bytes) / GIB

        assert each.why == lost(best, each)
        if slower >= 0.5:
            assert each.why.startswith(f"{slower:.0f} % slower")
        elif slower <= -0.5:
            assert each.why.startswith(f"{-slower:.0f} % faster by a model that is no finer than that")
        else:
            assert each.why.startswith("as fast")
        if each.plan.offload.optimizer and not best.plan.offload.optimizer:
            assert f"optimizer runs on the CPU for {each.time.optimizer_s:.1f} s a step" in each.why
        elif found_reason := re.search(r"(computes|waits) (\S+) s longer", each.why):
            assert float(found_reason[2]) >= 0.49 * (each.time.step_s - best.time.step_s)
        elif more_traffic > 0.05:
            assert f"{more_traffic:.1f} GB more traffic per step" in each.why
        if saved > 0.05:
            assert f"saves {saved:.1f} GiB that you do not need" in each.why
        if saved < -0.05:
            assert f"needs {-saved:.1f} GiB more" in each.why
        recomputes = each.plan.checkpointing is Checkpointing.FULL and best.plan.checkpointing is Checkpointing.NONE
        assert ("has to recompute" in each.why) == recomputes


@every_question
def test_the_winner_says_by_how_much_and_what_room_it_takes(name: str) -> None:
    found = answer(name)
    if found.plans:
        held = found.plans[0].memory

        assert found.plans[0].why == won(found.plans)
        room = f"{held.device_used_bytes / GIB:.1f} of {held.capacity_bytes / GIB:.1f} GiB per GPU"
        assert room in found.plans[0].why


def at_speed(estimate: Estimate, share: float) -> Estimate:
    """The same plan at a *share* of its speed."""
    return replace(estimate, time=replace(estimate.time, tokens_per_s=estimate.time.tokens_per_s * share))


@pytest.mark.parametrize(
    ("second_runs_at", "said"),
    [
        (0.8, "25 % faster than ZeRO-1, the next; "),
        (0.9999, "as fast as ZeRO-1 and simpler to run; "),
        (1.002, "as fast as ZeRO-1 and simpler to run; "),
        (1.025, "within 2 % of ZeRO-1 and simpler to run; "),
    ],
)
def test_why_the_first_won_over_the_second(second_runs_at: float, said: str) -> None:
    ddp, zero1 = (
        next(each for each in answer("all fit").plans if each.plan.title == title) for title in ("DDP", "ZeRO-1")
    )
    second = replace(at_speed(ddp, second_runs_at), plan=zero1.plan)

    assert won([ddp, second]).startswith(said)


def test_where_one_strategy_fits_the_reason_is_that() -> None:
    assert won(answer("all fit").plans[:1]).startswith("the only strategy that fits: ")


def test_a_loser_as_fast_and_as_large_is_at_least_more_involved() -> None:
    best = answer("all fit").plans[0]

    assert lost(best, best) == "as fast, more involved to run"


def with_a_sequence_each(asked: Question, gpus: int) -> Question:
    """The same on *gpus*, each with one sequence in a step, which takes least."""
    return replace(with_gpus(asked, gpus), job=replace(asked.job, global_batch=gpus))


def offers(asked: Question, variant: Variant) -> bool:
    """Whether a search would find a plan of *variant*."""
    plans = [plan for plan in sheets(asked) if isinstance(plan, Plan) and variant_of(plan) == variant]
    return fastest(asked, [price_sheet(asked, plan) for plan in plans]) is not None


TOO_LITTLE: dict[str, tuple[Question, Variant]] = {
    "one GPU after another": (
        question("Qwen2.5-7B", gpus=1, global_batch=1, gpu_gib=40),
        (Strategy.ZERO3, Offload.NONE),
    ),
    "pairs": (question("Qwen2.5-3B", gpus=2, global_batch=2, gpu_gib=16), (Strategy.FSDP, Offload.NONE)),
    "fours": (question("Qwen2.5-1.5B", gpus=4, global_batch=4, gpu_gib=9), (Strategy.ZERO2, Offload.NONE)),
    "machines of two": (
        question("Qwen2.5-3B", gpus=4, nodes=2, global_batch=4, gpu_gib=16),
        (Strategy.FSDP_GRAD_OP, Offload.NONE),
    ),
    "a host too small": (
        question("Qwen2.5-3B", gpus=1, global_batch=1, gpu_gib=24, host_gib=16),
        (Strategy.ZERO3, Offload.OPTIMIZER),
    ),
}


@pytest.mark.parametrize(("asked", "variant"), TOO_LITTLE.values(), ids=TOO_LITTLE)
def test_the_fewest_gpus_are_enough_and_a_machine_less_is_not(asked: Question, variant: Variant) -> None:
    fewest = fewest_gpus(asked, [variant], {})
    machine = asked.cluster.gpus_per_node

    assert fewest is not None
    assert fewest > asked.cluster.gpus
    fits = [offers(with_a_sequence_each(asked, gpus), variant) for gpus in range(machine, fewest + 1, machine)]
    assert fits == [False] * (len(fits) - 1) + [True]


def test_where_more_gpus_never_help_there_is_no_count() -> None:
    """DDP holds everything on each of them."""
    asked = question("Qwen2.5-7B", gpus=8, global_batch=8)
    ddp = next(each for each in search(asked).rejected if each.plan.title == "DDP")

    assert fewest_gpus(asked, [variant_of(ddp.plan)], {}) is None
    assert ddp.remedy is not None
    assert "GPUs" not in ddp.remedy


def test_a_larger_gpu_makes_it_fit() -> None:
    asked = question("Qwen2.5-7B", gpus=8, global_batch=8)
    ddp = next(each for each in search(asked).rejected if each.plan.title == "DDP")
    found = re.fullmatch(r"a GPU of (\d+) GiB", str(ddp.remedy))
    assert found

    larger, nearly = (search(with_memory(asked, gpu_gib=int(found[1]) - less)) for less in (0, 1))

    assert variant_of(ddp.plan) in {variant_of(each.plan) for each in larger.plans}
    assert variant_of(ddp.plan) not in {variant_of(each.plan) for each in nearly.plans}


def applied(asked: Question, remedy: str) -> Question:
    """The question after doing what *remedy* says."""
    if remedy == "--loss chunked":
        return replace(asked, job=replace(asked.job, loss="chunked"))
    for part in remedy.split(" and "):
        if found := re.fullmatch(r"--seq-len (\d+)", part):
            asked = replace(asked, job=replace(asked.job, sequence_length=int(found[1])))
        elif found := re.fullmatch(r"(\d+) GPUs(?: with --global-batch (\d+))?", part):
            batch = int(found[2] or asked.job.global_batch)
            asked = replace(with_gpus(asked, int(found[1])), job=replace(asked.job, global_batch=batch))
        elif found := re.fullmatch(r"(\d+) GiB of host memory per machine", part):
            asked = with_memory(asked, host_gib=int(found[1]))
        else:
            found = re.fullmatch(r"a GPU of (\d+) GiB", part)
            assert found, remedy
            asked = with_memory(asked, gpu_gib=int(found[1]))
    return asked


REMEDIED = {
    **ASKED,
    "70B": question("Llama-3.1-70B", gpus=8),
    "accumulating": question("Qwen2.5-3B", gpus=4, gpu_gib=22, global_batch=64),
    "long sequences": question("Qwen2.5-14B", gpus=8, gpu_gib=40, global_batch=16, seq_len=16384),
    "many logits": question("Llama-3.2-1B", gpus=1, gpu_gib=18, seq_len=8192),
}


@cache
def searched(name: str) -> Recommendation:
    return answer(name) if name in ASKED else search(REMEDIED[name])


def test_where_the_logits_are_what_is_too_much_a_loss_in_pieces_is_the_way_out() -> None:
    found = short_of_memory(searched("many logits"))

    assert {each.remedy for each in found if each.plan.offload is Offload.OPTIMIZER} == {"--loss chunked"}


@pytest.mark.parametrize("name", REMEDIED)
def test_what_a_remedy_promises_holds_when_it_is_done(name: str) -> None:
    asked = REMEDIED[name]
    for each in short_of_memory(searched(name)):
        if each.remedy is None:
            largest = max(gpu.memory_bytes for gpu in all_gpus()) // GIB
            assert not offers(with_memory(asked, gpu_gib=largest, host_gib=10**6), variant_of(each.plan))
        else:
            assert offers(applied(asked, each.remedy), variant_of(each.plan)), (each.plan.title, each.remedy)


@pytest.mark.parametrize("name", REMEDIED)
def test_the_fewest_gpus_of_the_headline_are_enough(name: str) -> None:
    found = searched(name)
    if found.fewest_gpus is not None:
        way_out = found.headline.partition("the fewest that would do: ")[2]

        assert way_out.startswith(f"{found.fewest_gpus} GPUs")
        assert search(applied(REMEDIED[name], way_out)).plans


def test_the_fewest_of_many_machines_are_found() -> None:
    """Between two doublings lie more counts than one pass prices."""
    asked = question("Llama-3.1-405B", gpus=1, global_batch=1, seq_len=256, gpu_gib=24, host_gib=10_000)
    variant = Strategy.ZERO3, Offload.NONE
    fewest = fewest_gpus(asked, [variant], {})

    assert fewest is not None
    assert 512 < fewest <= 1024
    assert offers(with_a_sequence_each(asked, fewest), variant)
    assert not offers(with_a_sequence_each(asked, fewest - 1), variant)


def test_where_no_wanted_strategy_can_run_the_job_the_headline_says_why() -> None:
    found = search(kept_to(ASKED["an encoder"], "fsdp*"))

    assert found.plans == ()
    assert found.headline.startswith(
        "Does not run: bert-base-uncased on 2 × A100-SXM4-80GB with FSDP grad-op: accelerate"
    )
