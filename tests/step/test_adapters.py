"""What frozen weights and adapters leave out of a step, and what they add."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.catalog.adapters import as_trained
from advisor.catalog.models import find_model
from advisor.errors import SpecError
from advisor.specs.job import Job
from advisor.specs.model import Parameter
from advisor.specs.plan import Checkpointing, FsdpSettings, Offload, Plan, Strategy, zero_settings
from advisor.step.build import StepProgram, build
from advisor.step.operators import linear
from advisor.step.program import Collective, Node, Sequence, blocks, fold, held_after, peak_of, then
from advisor.step.recording import FORMULAS, Mode
from advisor.step.schemes import scheme_of
from advisor.step.tape import Weight
from advisor.step.weights import weights_of

MODEL = find_model("Qwen2.5-0.5B").model
STRATEGIES = (Strategy.DDP, Strategy.ZERO1, Strategy.ZERO2, Strategy.ZERO3, Strategy.FSDP, Strategy.FSDP_GRAD_OP)
OFFLOADED = ((Strategy.ZERO2, Offload.OPTIMIZER), (Strategy.ZERO3, Offload.OPTIMIZER_AND_PARAMETERS))
LENGTH = 128
FEED_FORWARD_WIDTH = 4864


def job(**said: Any) -> Job:
    return Job(**{"method": "lora", "sequence_length": LENGTH, "global_batch": 8, **said})


def plan(strategy: Strategy, gpus: int = 4, **said: Any) -> Plan:
    return Plan(strategy=strategy, gpus=gpus, **{"micro_batch": 1, "zero": zero_settings(strategy), **said})


def program(asked: Job, chosen: Plan) -> StepProgram:
    return build(as_trained(MODEL, asked), asked, chosen)


def payloads(found: StepProgram, kind: str) -> int:
    """Bytes of all messages of that *kind* in a step."""
    return sum(
        int(runs * each.payload_bytes)
        for _, block, runs in blocks(found.step)
        for each in block.transfers
        if isinstance(each, Collective) and each.kind == kind
    )


def saved_bytes(trained: bool, input_needs_gradient: bool, keeps_inputs: bool = False) -> int:
    """What a product of 10 tokens by a matrix of 8 x 16 keeps for backward."""
    parameter = replace(MODEL.head[0], name="proj.weight", shape=(8, 16), trained=trained)
    tape = Mode(2, 2, 10, "sdpa", keeps_inputs=keeps_inputs).tape()
    x = tape.input(10 * 16, 2, "x")
    if not input_needs_gradient:
        x.node = None
    graph = linear(tape, x, weights_of((parameter,), 2, 2).take(8, 16)).node
    del x
    held: dict[int, int] = {}
    for event in tape.events:
        if event.kind == "take":
            held[event.storage] = event.size_bytes
        elif event.kind == "give":
            del held[event.storage]
    assert (graph is not None) == (trained or input_needs_gradient)
    return sum(held.values())


def test_a_product_with_a_frozen_weight_does_not_keep_its_input() -> None:
    assert saved_bytes(trained=True, input_needs_gradient=True) == 10 * 16 * 2
    assert saved_bytes(trained=False, input_needs_gradient=True) == 0
    assert saved_bytes(trained=False, input_needs_gradient=False) == 0


def test_deepspeed_s_own_product_keeps_its_input_whatever_is_trained() -> None:
    assert saved_bytes(trained=False, input_needs_gradient=True, keeps_inputs=True) == 10 * 16 * 2
    assert saved_bytes(trained=False, input_needs_gradient=False, keeps_inputs=True) == 0


def test_vectors_are_claimed_by_the_modules_that_own_them() -> None:
    names = ("self_attn.q_proj.weight", "self_attn.q_proj.bias", "input_layernorm.weight", "input_layernorm.bias")
    shapes = ((8, 8), (8,), (8,), (8,))
    weights = weights_of(tuple(map(Parameter, names, shapes)), 2, 2)

    assert weights.take(8).parameter.name == "input_layernorm.weight"
    assert claimed(weights.bias(8)) == "input_layernorm.bias"
    assert weights.take(8, 8).parameter.name == "self_attn.q_proj.weight"
    assert claimed(weights.bias(8)) == "self_attn.q_proj.bias"
    assert not weights.unclaimed


def claimed(weight: Weight | None) -> str:
    assert weight is not None
    return weight.parameter.name


@pytest.mark.parametrize("checkpointing", [Checkpointing.NONE, Checkpointing.FULL], ids=lambda each: each.value)
def test_backward_comes_by_no_frozen_weight_that_stands_before_what_is_trained(checkpointing: Checkpointing) -> None:
    model, mode = as_trained(MODEL, job(lora_targets=("o_proj",))), Mode(2, 2, LENGTH, "sdpa", adapter_bytes=2)
    checkpointed = checkpointing is Checkpointing.FULL
    first, second = (
        {each.name for each in FORMULAS.layer(layer, model.hidden_size, mode, checkpointed).unpassed}
        for layer in model.described_layers[:2]
    )

    before = {f"self_attn.{name}_proj.{kind}" for name in "qkv" for kind in ("weight", "bias")}
    before |= {"input_layernorm.weight", "self_attn.o_proj.base_layer.weight"}
    assert first == (set() if checkpointed else before)
    assert second == set()


@pytest.mark.parametrize(
    ("method", "strategy"),
    [
        *((method, each) for method in ("lora", "qlora") for each in STRATEGIES),
        *(("dora", each) for each in (Strategy.DDP, Strategy.ZERO2, Strategy.FSDP)),
    ],
    ids=str,
)
@pytest.mark.parametrize("checkpointing", [Checkpointing.NONE, Checkpointing.FULL], ids=lambda each: each.value)
def test_a_step_gives_back_all_that_it_takes(method: str, strategy: Strategy, checkpointing: Checkpointing) -> None:
    chosen = plan(strategy, accumulation_steps=2, checkpointing=checkpointing)
    found = program(job(method=method, lora_targets=("all-linear",)), chosen)

    assert int(fold(found.step).net_bytes) == 0


@given(rank=st.integers(1, 32), bf16=st.booleans())
def test_one_gpu_holds_frozen_weights_in_half_and_what_is_trained_with_its_moments(rank: int, bf16: bool) -> None:
    asked = job(lora_rank=rank, parameter_format="bf16" if bf16 else "fp32", optimizer="adamw-foreach")
    model = as_trained(MODEL, asked)
    states = then(*scheme_of(model, asked, plan(Strategy.DDP, gpus=1)).states())

    assert fold(states).net_bytes == 2 * model.frozen_count + (6 if bf16 else 12) * model.trained_count


def test_ddp_sends_the_gradients_of_adapters_alone() -> None:
    asked = job()

    assert payloads(program(asked, plan(Strategy.DDP)), "all-reduce") == 4 * as_trained(MODEL, asked).trained_count


@pytest.mark.parametrize("strategy", [Strategy.FSDP, Strategy.ZERO3], ids=lambda each: each.value)
def test_cut_weights_are_gathered_in_every_micro_step_though_they_are_frozen(strategy: Strategy) -> None:
    once, twice = (program(job(), plan(strategy, accumulation_steps=steps)) for steps in (1, 2))
    model = as_trained(MODEL, job())

    assert payloads(once, "all-gather") > 2 * model.frozen_count
    assert payloads(twice, "all-gather") > 1.9 * payloads(once, "all-gather")
    assert payloads(once, "reduce-scatter") < 0.02 * payloads(once, "all-gather")


def test_frozen_weights_halve_the_products_of_backward() -> None:
    def flop(asked: Job) -> float:
        whole = build(as_trained(MODEL, asked), asked, plan(Strategy.DDP, gpus=1)).step
        return float(sum(runs * each.flop for _, block, runs in blocks(whole) for each in block.matmuls))

    # Forward 1, backward 2 or 1; adapters and attention, whose products stay, move the ratio.
    assert 0.64 < flop(job(lora_rank=1)) / flop(Job(sequence_length=LENGTH, global_batch=8)) < 0.70


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda each: each.value)
def test_adapters_take_less_than_training_every_weight(strategy: Strategy) -> None:
    full = Job(sequence_length=LENGTH, global_batch=8)
    small = zero_settings(strategy, reduce_bucket=1_000_000)

    few = peak_of(program(job(), plan(strategy, zero=small)).device_without_scratch)
    all_of_them = peak_of(build(MODEL, full, plan(strategy, zero=small)).device_without_scratch)
    assert few.size_bytes < 0.7 * all_of_them.size_bytes


def test_weights_in_four_bits_take_little_more_than_four_bits() -> None:
    model = as_trained(MODEL, job(method="qlora"))
    linear = [each for each in model.frozen if each.held == "four bits"]
    held = sum(each.held_bytes(4, 2) for each in linear)
    elements = sum(each.numel for each in linear)

    # A byte for 64 scales and four for 64 x 256 of these (Dettmers et al., section 3: 0.127 bits a weight), and tables.
    assert 8 * held / elements == pytest.approx(4 + 0.127, abs=0.01)
    assert {each.name for each in linear}.isdisjoint({"lm_head.weight", "model.embed_tokens.weight"})


def test_four_bits_hold_less_between_steps_and_compute_longer() -> None:
    half, four_bits = (program(job(method=method), plan(Strategy.DDP, gpus=1)) for method in ("lora", "qlora"))

    assert fold(four_bits.init).net_bytes < fold(half.init).net_bytes
    assert moved(four_bits) > moved(half)


def moved(found: StepProgram) -> float:
    return float(sum(runs * block.moved_bytes for _, block, runs in blocks(found.step)))


@pytest.mark.parametrize("strategy", [Strategy.FSDP, Strategy.ZERO3], ids=lambda each: each.value)
def test_weights_in_four_bits_are_cut_and_what_it_takes_to_read_them_is_not(strategy: Strategy) -> None:
    asked = job(method="qlora", optimizer="adamw-foreach")
    model = as_trained(MODEL, asked)

    def held(gpus: int) -> dict[str, int]:
        states = then(*scheme_of(model, asked, plan(strategy, gpus=gpus)).states())
        return {line.label: line.size_bytes for line in held_after(states)}

    few, many = held(2), held(64)
    assert few["scales of weights in four bits"] == many["scales of weights in four bits"] == model.scale_bytes
    four_bits = [each for each in model.frozen if each.held == "four bits"]
    cut = sum(each.numel // 2 if each in four_bits else 2 * each.numel for each in model.frozen)
    assert few["weights, rank's share"] == pytest.approx(cut / 2 + 2 * model.trained_count, rel=0.01)


def test_a_product_in_four_bits_leaves_its_weight_whole_to_backward_under_zero_three_even_with_checkpoints() -> None:
    asked = job(method="qlora", lora_targets=("all-linear",))
    frees_soon = replace(
        zero_settings(Strategy.ZERO3), prefetch_bucket=0, max_reuse_distance=0, persistence_threshold=0
    )
    whole = program(asked, plan(Strategy.ZERO3, zero=frees_soon, checkpointing=Checkpointing.FULL))

    packed = sum(each.numel // 2 for each in as_trained(MODEL, asked).frozen if each.held == "four bits")
    forward = held_after(parts(whole.step)[0])
    assert {line.label: line.size_bytes for line in forward}["gathered weights seen by backward"] == packed


def parts(step: Node) -> tuple[Node, ...]:
    """The phases of a step of one micro-batch."""
    assert isinstance(step, Sequence)
    assert isinstance(step.steps[0], Sequence)
    return step.steps[0].steps


def test_weights_in_four_bits_are_not_moved_to_the_host() -> None:
    with pytest.raises(SpecError, match="--method qlora with parameter offload is not modelled"):
        program(job(method="qlora"), plan(Strategy.ZERO3, offload=Offload.OPTIMIZER_AND_PARAMETERS))


def test_dora_trains_a_length_for_each_output_and_norms_a_whole_weight_besides() -> None:
    plain, with_lengths = (as_trained(MODEL, job(method=method)) for method in ("lora", "dora"))
    adapted = [each for each in plain.frozen if ".base_layer.weight" in each.name]
    assert with_lengths.trained_count - plain.trained_count == sum(each.shape[0] for each in adapted)

    # The sum of weights in fp32 four times over: the adapter's, the weight's, the scaled one's and the sum itself.
    found = program(job(method="dora", lora_targets=("down_proj",)), plan(Strategy.DDP, gpus=1))
    label = "weight norm of DoRA"
    norms = [block for _, block, _ in blocks(found.step) if block.label == label and block.net_bytes > 0]
    assert max(int(block.peak_bytes) for block in norms) > 4 * 4 * MODEL.hidden_size * FEED_FORWARD_WIDTH


def test_dora_under_zero_three_is_refused() -> None:
    with pytest.raises(SpecError, match="--method dora with ZeRO-3, whose weights peft reads outside"):
        program(job(method="dora"), plan(Strategy.ZERO3))


@pytest.mark.parametrize(("strategy", "offload"), OFFLOADED, ids=str)
def test_the_host_holds_the_optimizer_states_of_what_is_trained_alone(strategy: Strategy, offload: Offload) -> None:
    asked = job()
    model, found = as_trained(MODEL, asked), program(asked, plan(strategy, offload=offload))
    held = {line.label: line.size_bytes for line in held_after(found.host)}

    # fp32 weights and two moments over four ranks, each tensor or all of them padded.
    optimizer = held["master weights"] + held["Adam moments"]
    assert optimizer == pytest.approx(12 * model.trained_count / 4, rel=0.001)
    frozen_bytes = 2 * MODEL.parameter_count / 4 * offload.parameters
    assert held.get("frozen weights, rank's share", 0) == pytest.approx(frozen_bytes, rel=0.001)
    assert int(fold(found.step).net_bytes) == 0


def test_hsdp_sums_the_gradients_of_adapters_alone_over_its_replicas() -> None:
    asked = job()
    found = program(asked, plan(Strategy.HSDP, gpus=4, fsdp=FsdpSettings(shard_ranks=2)))

    share = payloads(found, "reduce-scatter") / 2
    assert payloads(found, "all-reduce") == pytest.approx(share, rel=0.001)
    assert payloads(found, "all-reduce") == pytest.approx(as_trained(MODEL, asked).trained_count, rel=0.01)


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        (plan(Strategy.ZERO3, offload=Offload.OPTIMIZER, offload_to="nvme"), "offload to NVMe"),
        (plan(Strategy.FSDP, fsdp=FsdpSettings(version=1)), "FSDP1"),
        (plan(Strategy.ZERO0), "DeepSpeed stage 0"),
        (plan(Strategy.MEGATRON), "Megatron"),
    ],
    ids=["nvme", "fsdp1", "zero0", "megatron"],
)
def test_what_has_no_terms_for_frozen_weights_is_refused(chosen: Plan, said: str) -> None:
    with pytest.raises(SpecError, match=f"--method lora with {said} is not modelled"):
        program(job(), chosen)


def test_fsdp_cuts_four_bits_out_of_host_memory_and_zero_three_out_of_the_gpu_s() -> None:
    asked = job(method="qlora")
    model = as_trained(MODEL, asked)
    whole = sum(2 * each.stored_numel for each in model.frozen)

    sharded, zero = (program(asked, plan(strategy, gpus=64)) for strategy in (Strategy.FSDP, Strategy.ZERO3))
    assert fold(sharded.host).peak_bytes == whole + model.scale_bytes
    assert fold(sharded.init).peak_bytes < whole < fold(zero.init).peak_bytes
