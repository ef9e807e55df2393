"""Megatron's programs: activations and states as papers and Megatron's documentation count them, and the laws."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from advisor.catalog.models import find_model
from advisor.errors import SpecError
from advisor.specs.job import Job
from advisor.specs.megatron import MegatronSettings
from advisor.specs.model import ModelSpec, Run
from advisor.specs.plan import Checkpointing, Plan, Strategy
from advisor.step.build import StepProgram, build
from advisor.step.megatron import stage_steps
from advisor.step.megatron_recording import megatron_mode, source_of
from advisor.step.megatron_shard import is_of_expert, stage_of
from advisor.step.moves import moves
from advisor.step.program import Collective, blocks, expand, fold
from advisor.step.tape import Event
from advisor.validation.published import gpt
from step.catalog_models import PROFILES, model_of
from step.test_moves import walked

STATISTICS_BYTES = 16
"""Per token and layer: means and deviations of two LayerNorms in fp32, which the papers do not count."""


@cache
def gpt_model(layers: int = 4, width: int = 256, heads: int = 8, shared: int = 8, tied: str = "yes") -> ModelSpec:
    row = {
        "model": "gpt",
        "layers": layers,
        "hidden": width,
        "heads": heads,
        "key_value_heads": shared,
        "feed_forward": 4 * width,
        "vocabulary": 1024,
        "positions": 512,
        "tied": tied,
        "dropout": 0.1,
        "source": "",
    }
    return gpt({name: str(value) for name, value in row.items()})


def plan_of(**choices: Any) -> Plan:
    usual: dict[str, Any] = {"strategy": Strategy.MEGATRON, "gpus": 8, "micro_batch": 1}
    return Plan(**(usual | choices))


def left_by(*events: tuple[Event, ...]) -> int:
    signs = {"take": 1, "give": -1}
    return sum(signs.get(event.kind, 0) * event.size_bytes for each in events for event in each)


def kept_by_a_layer(model: ModelSpec, job: Job, plan: Plan) -> float:
    """Bytes per token of the sequence that one layer of *model* keeps for backward on one rank."""
    chunk = stage_of(model, job, plan, 0).chunks[0]
    recomputed, selective = plan.checkpointing is not Checkpointing.NONE, plan.checkpointing is Checkpointing.SELECTIVE
    mode = megatron_mode(job, plan)
    found = source_of(plan).layer(chunk.runs[0][0], model.hidden_size, mode, recomputed, selective)
    return left_by(found.forward) / mode.sequence_length


# Korthikanti et al., arXiv:2205.05198, equations 1, 2 and 4, section 5 and table 2: bytes per token and layer of a GPT
# model whose feed-forward is 4h wide, over sbh.
@pytest.mark.parametrize("tensor", [1, 2, 8])
@pytest.mark.parametrize("length", [128, 512])
def test_activations_of_a_layer_are_those_of_the_paper(tensor: int, length: int) -> None:
    model = gpt_model()
    width, heads = model.hidden_size, 8
    job = Job(sequence_length=length, attention="eager")
    scores = 5 * heads * length / width

    def kept(**choices: Any) -> float:
        return kept_by_a_layer(model, job, plan_of(tensor_parallel=tensor, **choices))

    assert kept() == width * (10 + (24 + scores) / tensor) + STATISTICS_BYTES
    assert kept(sequence_parallel=True) == (width * (34 + scores) + STATISTICS_BYTES) / tensor
    assert kept(checkpointing=Checkpointing.FULL) == 2 * width
    assert kept(sequence_parallel=True, checkpointing=Checkpointing.SELECTIVE) == pytest.approx(
        (34 * width + STATISTICS_BYTES) / tensor
    )


# The same, section 4.3: embedding dropout sbh, the last layernorm and the output layer's input 2sbh each, fp32 logits
# 4sbv, all cut. Besides, per token: two ids of 8 bytes at the embedding and a byte for tokens of other ranks' rows; at
# the head a target and its mask (9), the norm's statistics (8) and, until it is summed, the loss (4).
@pytest.mark.parametrize("tensor", [1, 4])
def test_embedding_and_logits_are_those_of_the_paper(tensor: int) -> None:
    model, job = gpt_model(), Job(sequence_length=128)
    plan = plan_of(tensor_parallel=tensor, sequence_parallel=True)
    (chunk,), mode, source = stage_of(model, job, plan, 0).chunks, megatron_mode(job, plan), source_of(plan)
    embedding, head = source.embedding(chunk.ends, mode, False), source.head(chunk.ends, mode, False)
    width, vocabulary = model.hidden_size, model.vocabulary_size

    stream = 2 * width / tensor
    assert left_by(embedding.forward) / 128 - stream == width / tensor + 16 + (tensor > 1)
    assert left_by(head.forward, head.loss) / 128 + stream == (4 * width + 4 * vocabulary + 8) / tensor + 13
    assert left_by(head.forward, head.loss, head.loss_backward, head.backward) == 0


# FlashAttention-2 keeps its inputs, its output and an fp32 number per head and token (arXiv:2307.08691, section 3.1);
# of several sequences, its output lies as the next product reads it, too.
@pytest.mark.parametrize(("shared", "micro_batch", "joint"), [(8, 1, 3), (8, 4, 3), (2, 1, 1.5), (2, 4, 1.5)])
def test_fused_attention_keeps_what_it_read_and_wrote(shared: int, micro_batch: int, joint: float) -> None:
    model, job = gpt_model(shared=shared), Job(sequence_length=128, attention="flash")
    width = model.hidden_size

    kept = kept_by_a_layer(model, job, plan_of(micro_batch=micro_batch))

    again = 2 if micro_batch > 1 else 0
    assert kept == width * (28 + 2 * joint + again) + 4 * 8 + STATISTICS_BYTES


# Megatron-LM docs, dist_optimizer: bytes per parameter, with d data-parallel ranks.
@pytest.mark.parametrize(
    ("precision", "distributed", "ranks", "bytes_per_parameter"),
    [("bf16", True, 4, 6 + 12 / 4), ("bf16", False, 4, 18), ("fp16", True, 4, 4 + 16 / 4), ("fp16", False, 4, 20)],
)
def test_states_are_those_of_megatron_s_documentation(
    precision: Any, distributed: bool, ranks: int, bytes_per_parameter: float
) -> None:
    own = MegatronSettings(distributed_optimizer=distributed, overlaps_weights=distributed, fuses_gradient_sums=False)
    plan = plan_of(gpus=2 * ranks, tensor_parallel=2, megatron=own)
    model, job = gpt_model(), Job(sequence_length=128, precision=precision)
    program = build(model, job, plan)
    held = sum(parameter.numel for parameter in stage_of(model, job, plan, 0).parameters)

    # fp16 gradients become fp32 ones while the optimizer steps.
    update = fold(program.step.steps[-1]).peak_bytes  # type: ignore[union-attr]
    assert (fold(program.init).net_bytes + update) / held == pytest.approx(bytes_per_parameter, rel=1e-3)


# arXiv:2104.04473, equation 2: P = 12·l·h²·(1 + 13/(12h) + (V + s)/(12·l·h)); the last norm has 2h more.
@pytest.mark.parametrize(("stages", "virtual"), [(1, 1), (2, 1), (2, 2), (4, 2)])
def test_all_stages_together_have_the_paper_s_parameters(stages: int, virtual: int) -> None:
    model, layers, width = gpt_model(layers=8), 8, 256
    plan = plan_of(pipeline_parallel=stages, virtual_stages=virtual, accumulation_steps=stages)
    held = [stage_of(model, Job(), plan, number).parameters for number in range(stages)]

    total = sum(parameter.numel for each in held for parameter in each)

    copied = 1024 * width * (stages > 1)
    assert total == 12 * layers * width**2 + 13 * layers * width + (1024 + 512) * width + 2 * width + copied


# megatron-core 0.16.1, transformer/transformer_block.py get_num_layers_to_build: 61 layers of DeepSeek-V3 are 3, 2 and
# 14 times 4; without those numbers they divide over no pipeline.
def test_uneven_stages_have_the_model_between_them() -> None:
    model, own = find_model("DeepSeek-V3").model, MegatronSettings(first_stage_layers=3, last_stage_layers=2)
    plan = plan_of(gpus=128, pipeline_parallel=16, expert_parallel=8, megatron=own)
    stages = [stage_of(model, Job(), plan, number) for number in range(16)]

    assert [sum(int(repeats) for _, repeats in stage.chunks[0].runs) for stage in stages] == [3, *14 * [4], 2]
    own_experts = sum(each.numel for stage in stages for each in stage.parameters if is_of_expert(each))
    total = sum(each.numel for stage in stages for each in stage.parameters)
    padding = 2 * model.hidden_size * (-model.vocabulary_size % 128)
    assert total + 7 * own_experts == model.parameter_count + padding


def test_stages_share_out_the_parameters_of_every_model_that_megatron_can_train() -> None:
    plan, job, supported = plan_of(pipeline_parallel=2), Job(sequence_length=512), 0
    for model in map(model_of, PROFILES):
        try:
            held = [stage_of(model, job, plan, number).parameters for number in (0, 1)]
        except SpecError:
            continue
        supported += 1
        padding = -model.vocabulary_size % 128
        # A tied matrix is on both stages; an embedding that is not has its own on each.
        copies, padded = (1, 2) if model.tied_embeddings else (0, 2)
        total = sum(parameter.numel for each in held for parameter in each)
        assert total - model.parameter_count == model.hidden_size * (copies * model.vocabulary_size + padded * padding)
    assert supported > 50


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"tensor_parallel": 3, "gpus": 3}, "8 attention heads do not divide over tensor_parallel 3"),
        ({"tensor_parallel": 4}, "2 key-value heads do not divide over tensor_parallel 4"),
        ({"pipeline_parallel": 8}, "4 layers do not divide over 8 stages x 1 = 8 runs"),
        ({"context_parallel": 8}, "does not divide into 2 x context_parallel 8 = 16 parts"),
        ({"tensor_parallel": 8, "sequence_parallel": True}, "1001 tokens of a sequence do not divide over"),
    ],
)
def test_what_does_not_divide_is_refused_with_the_arithmetic(sizes: dict[str, int], reason: str) -> None:
    shared = 8 if "sequence_parallel" in sizes else 2

    with pytest.raises(SpecError, match=reason):
        build(gpt_model(shared=shared), Job(sequence_length=1001), plan_of(**sizes))


@pytest.mark.parametrize(
    ("own", "counts", "reason"),
    [
        ({"first_stage_layers": 1}, {"pipeline_parallel": 4}, "divide over 4 stages x 1 = 4 runs, 1 of them for those"),
        ({"first_stage_layers": 1}, {"pipeline_parallel": 2, "virtual_stages": 2}, "need a pipeline that is not inter"),
        ({"last_stage_layers": 1}, {}, "need a pipeline that is not interleaved"),
        ({"deferred_micro_batches": 1}, {}, "only pipelines have a while"),
        ({"optimizer_instances": 3}, {}, "8 data ranks do not divide into 3 instances of the optimizer"),
    ],
)
def test_settings_that_a_plan_has_no_use_for_are_refused(own: Any, counts: Any, reason: str) -> None:
    plan = plan_of(**{"accumulation_steps": 4, **counts}, megatron=MegatronSettings(**own))

    # 8 layers, of which 7 do not divide over 3 stages.
    with pytest.raises(SpecError, match=reason):
        build(gpt_model(layers=8), Job(sequence_length=128), plan)


def test_context_parallelism_needs_a_fused_kernel() -> None:
    with pytest.raises(SpecError, match="take --attention flash"):
        build(gpt_model(), Job(sequence_length=512, attention="eager"), plan_of(context_parallel=2))


# With a pipeline, first and last stage have the tied matrix each and add up its gradients, in fp32.
@pytest.mark.parametrize("stage", [0, 3])
def test_stages_that_share_an_embedding_add_up_its_gradients(stage: int) -> None:
    plan = plan_of(pipeline_parallel=4, gpus=4, accumulation_steps=4)
    (found,) = (
        each
        for _, block, _ in blocks(build(gpt_model(), Job(sequence_length=128), plan, stage).step)
        for each in block.transfers
        if each.what == "gradient of the embedding"
    )

    assert isinstance(found, Collective)
    assert found.payload_bytes == 1024 * 256 * 4


@pytest.mark.parametrize(
    ("name", "job", "reason"),
    [
        ("bert-base-uncased", Job(), "only causal models"),
        ("gemma-2-2b", Job(), "embedding or head does more"),
        ("gpt-oss-20b", Job(), "attention is not modelled|experts with biases"),
        ("Llama-4-Scout-17B-16E", Job(), "only those of its choice|embedding or head|norms of queries"),
        ("Qwen2.5-0.5B", Job(precision="fp32"), "take --precision bf16"),
        ("Qwen2.5-0.5B", Job(optimizer="adamw-loop"), "take --optimizer adamw-fused"),
        ("Qwen2.5-0.5B", Job(loss="fused"), "leave --loss full"),
    ],
)
def test_what_megatron_s_gpt_model_does_not_do_is_refused(name: str, job: Job, reason: str) -> None:
    with pytest.raises(SpecError, match=reason):
        build(find_model(name).model, job, plan_of())


@st.composite
def cuts(draw: st.DrawFn) -> Plan:
    stages = draw(st.sampled_from([1, 2, 4]))
    virtual = draw(st.sampled_from([1, 2])) if stages > 1 else 1
    context, tensor = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 4]))
    return plan_of(
        gpus=stages * context * tensor * draw(st.integers(1, 3)),
        micro_batch=draw(st.integers(1, 3)),
        accumulation_steps=stages * draw(st.integers(1, 3)) if virtual > 1 else draw(st.integers(1, 6)),
        checkpointing=draw(st.sampled_from(Checkpointing)),
        tensor_parallel=tensor,
        sequence_parallel=draw(st.booleans()),
        pipeline_parallel=stages,
        virtual_stages=virtual,
        context_parallel=context,
        megatron=MegatronSettings(
            fuses_gradient_sums=draw(st.booleans()),
            pipeline_schedule=draw(st.sampled_from(["1f1b", "gpipe"])) if virtual == 1 else "1f1b",
        ),
    )


MODELS = st.sampled_from(["gpt", "Llama-3.1-8B", "Qwen3-8B"])


def small(name: str, layers: int = 8) -> ModelSpec:
    if name == "gpt":
        return gpt_model(layers=layers)
    model = find_model(name).model
    return replace(model, runs=(Run(model.runs[0].layers, layers),))


def programs(name: str, plan: Plan, attention: Any) -> list[StepProgram]:
    job = Job(sequence_length=128, attention=attention)
    ranks = int(plan.gpus) // plan.pipeline_parallel
    return [build(small(name), job, plan, number * ranks) for number in range(plan.pipeline_parallel)]


@settings(max_examples=25, deadline=None)
@given(MODELS, cuts(), st.sampled_from(["flash", "eager"]))
def test_every_tensor_that_goes_was_there_and_three_readings_agree(name: str, plan: Plan, attention: str) -> None:
    assume(attention == "flash" or plan.context_parallel == 1)
    for program in programs(name, plan, attention):
        held: dict[object, list[int]] = {}
        walked(moves(program, program.init), held)
        states = {each: sum(sizes) for each, sizes in held.items() if sizes}
        extent = fold(program.step)
        most = max(moment.before_bytes + moment.block.peak_bytes for moment in expand(program.step))

        assert extent.net_bytes == 0
        assert extent.peak_bytes == most == walked(moves(program, program.step), held)
        assert {each: sum(sizes) for each, sizes in held.items() if sizes} == states


@settings(max_examples=25, deadline=None)
@given(MODELS, cuts())
def test_the_fullest_rank_is_that_of_the_fullest_stage(name: str, plan: Plan) -> None:
    peaks = [fold(program.device).peak_bytes for program in programs(name, plan, "flash")]

    found = build(small(name), Job(sequence_length=128, attention="flash"), plan)

    assert fold(found.device).peak_bytes == max(peaks)
    assert peaks[int(found.rank) // (int(plan.gpus) // plan.pipeline_parallel)] == max(peaks)


@settings(max_examples=25, deadline=None)
@given(cuts(), st.sampled_from(["flash", "eager"]))
def test_what_is_cut_or_recomputed_never_takes_more(plan: Plan, attention: Any) -> None:
    job = Job(sequence_length=128, attention=attention)

    def peak(changed: Plan) -> Any:
        return fold(build(small("gpt"), job, changed).step).peak_bytes

    assume(plan.sequence_parallel and (attention == "flash" or plan.context_parallel == 1))
    assert peak(plan) <= peak(replace(plan, sequence_parallel=False))
    assert peak(plan) <= peak(replace(plan, tensor_parallel=1, gpus=plan.gpus // plan.tensor_parallel))


# The input of the output matrix and the gradient of its logits, in bf16, for each of the micro-batches.
def test_deferred_gradients_of_the_output_matrix_keep_what_they_are_computed_from() -> None:
    model, job = gpt_model(tied="no"), Job(sequence_length=128, attention="flash")
    usual = plan_of(pipeline_parallel=2, gpus=2, accumulation_steps=4)
    deferring = replace(usual, megatron=MegatronSettings(deferred_micro_batches=2))

    more = [
        fold(build(model, job, deferring, rank).step).peak_bytes - fold(build(model, job, usual, rank).step).peak_bytes
        for rank in (0, 1)
    ]

    assert more == [0, 2 * 2 * 128 * (1024 + 256)]


# megatron-core 0.16.1, parallel_state.py: 8 data-parallel ranks in 2 instances cut the states over 4.
def test_instances_of_the_optimizer_cut_states_over_fewer_ranks() -> None:
    model, job = gpt_model(), Job(sequence_length=128)

    held = [
        fold(build(model, job, plan_of(megatron=MegatronSettings(optimizer_instances=count))).init).net_bytes
        for count in (1, 2)
    ]

    parameters = sum(parameter.numel for parameter in stage_of(model, job, plan_of(), 0).parameters)
    assert held[1] - held[0] == pytest.approx(12 * parameters * (1 / 4 - 1 / 8), rel=1e-3)


def test_many_plans_at_once_are_each_plan_s_own() -> None:
    counts = {"gpus": [8, 4, 8], "micro_batch": [2, 3, 5], "accumulation_steps": [1, 2, 7]}
    model, job = gpt_model(), Job(sequence_length=128, attention="flash")
    together = plan_of(tensor_parallel=2, **{name: np.array(values) for name, values in counts.items()})

    found = build(model, job, together)

    for index in range(3):
        alone = build(model, job, together.at(index))
        assert fold(found.device).peak_bytes[index] == fold(alone.device).peak_bytes  # type: ignore[index]
        assert fold(found.init).net_bytes[index] == fold(alone.init).net_bytes  # type: ignore[index]


@pytest.mark.parametrize("virtual", [1, 2])
@pytest.mark.parametrize("name", ["gpt", "Llama-3.1-8B"])
def test_many_pipelines_at_once_are_each_plan_s_own(name: str, virtual: int) -> None:
    stages, batch = np.array([[2], [4]]), np.array([2, 3])
    plan = plan_of(
        gpus=8,
        tensor_parallel=2,
        micro_batch=batch,
        accumulation_steps=4 * batch,
        pipeline_parallel=stages,
        virtual_stages=virtual,
    )
    model, job = small(name), Job(sequence_length=128)
    (together,) = stage_steps(model, job, [plan])

    for index, (pipeline, size) in enumerate(product(range(2), range(2))):
        single = plan.at(index)
        alone = [each for each in stage_steps(model, job, [single])[0] if np.all(each.exists)]
        here = [each for each in together if np.broadcast_to(each.exists, (2, 1))[pipeline, 0]]
        assert len(here) == len(alone) == min(3, int(single.pipeline_parallel))
        for one, many in zip(alone, here, strict=True):
            assert np.broadcast_to(many.number, (2, 1))[pipeline, 0] == one.number
            for reading in (lambda found: found.states, lambda found: found.step):
                peaks = np.broadcast_to(fold(reading(many)).peak_bytes, (2, 2))
                assert peaks[pipeline, size] == fold(reading(one)).peak_bytes


def test_a_rank_of_a_pipeline_is_laid_out_for_one_plan() -> None:
    plan = plan_of(pipeline_parallel=2, micro_batch=np.array([1, 2]))

    with pytest.raises(SpecError, match="laid out for one plan at a time"):
        build(gpt_model(), Job(), plan)


def sent(program: StepProgram) -> dict[tuple[str, str], float]:
    """Payloads of a step by group and kind."""
    found: dict[tuple[str, str], float] = {}
    for _, block, times in blocks(program.step):
        for each in block.transfers:
            assert isinstance(each, Collective)
            key = each.group, each.kind
            found[key] = found.get(key, 0) + float(times * each.payload_bytes)
    return found


# Shoeybi et al., arXiv:1909.08053, section 3: two all-reduces of the stream a layer and pass; one more of the embedding
# forwards and of its gradient's counterpart at the head. Full recomputation sends the forward ones again.
@pytest.mark.parametrize(("checkpointing", "each"), [(Checkpointing.NONE, 4), (Checkpointing.FULL, 6)])
def test_tensor_parallel_all_reduces_are_those_of_the_paper(checkpointing: Checkpointing, each: int) -> None:
    plan = plan_of(tensor_parallel=4, micro_batch=2, accumulation_steps=3, checkpointing=checkpointing)
    stream = 2 * 128 * 256 * 2 * 3

    found = sent(build(gpt_model(), Job(sequence_length=128), plan))

    assert found["tensor", "all-reduce"] == stream * (4 * each + 3)


# arXiv:2205.05198, section 4.2.2: all-gathers and reduce-scatters carry what the all-reduces did, and backward gathers
# the inputs of a layer's two products, and of the head's, once more.
def test_sequence_parallel_sends_the_same_and_gathers_inputs_again() -> None:
    plan = plan_of(tensor_parallel=4, sequence_parallel=True)
    stream = 128 * 256 * 2

    found = sent(build(gpt_model(), Job(sequence_length=128), plan))

    assert found["tensor", "reduce-scatter"] == stream * (4 * 4 + 2 + 1)
    assert found["tensor", "all-gather"] == stream * (4 * (4 + 2) + 2)


def test_stages_pass_the_stream_on_and_its_gradient_back() -> None:
    plan = plan_of(pipeline_parallel=4, virtual_stages=2, accumulation_steps=8, gpus=4)
    job, stream = Job(sequence_length=128), 128 * 256 * 2

    found = [sent(build(gpt_model(layers=8, tied="no"), job, plan, rank)) for rank in range(4)]

    # Each of 8 runs of layers but the last one sends forwards, and each but the first one backwards.
    assert sum(each["pipeline", "send-receive"] for each in found) == 8 * 2 * 7 * stream


# Liu et al., arXiv:2310.01889, section 3: keys and values of local tokens go round the ring.
def test_context_parallel_keys_and_values_go_round_the_ring() -> None:
    plan = plan_of(context_parallel=4, gpus=4)
    keys_and_values = 2 * (512 // 4) * 256 * 2

    found = sent(build(gpt_model(), Job(sequence_length=512), plan))

    assert found["context", "send-receive"] == 4 * (1 + 2) * 3 * keys_and_values


# The distributed optimizer: fp32 sums are reduce-scattered and bf16 weights gathered over data and context ranks.
@pytest.mark.parametrize("distributed", [True, False])
def test_gradients_and_weights_are_exchanged_once_a_step(distributed: bool) -> None:
    own = MegatronSettings(distributed_optimizer=distributed, overlaps_weights=distributed)
    plan = plan_of(tensor_parallel=2, accumulation_steps=4, megatron=own)
    model, job = gpt_model(), Job(sequence_length=128)
    held = sum(parameter.numel for parameter in stage_of(model, job, plan, 0).parameters)

    found = sent(build(model, job, plan))

    if distributed:
        assert found["data", "reduce-scatter"] == pytest.approx(4 * held, rel=1e-3)
        assert found["data", "all-gather"] == pytest.approx(2 * held, rel=1e-3)
    else:
        assert found["data", "all-reduce"] == 4 * held


def test_the_stage_with_the_logits_sets_the_pace() -> None:
    plan, job = plan_of(pipeline_parallel=2, accumulation_steps=4), Job(sequence_length=128)
    model = replace(gpt_model(tied="no"), vocabulary_size=100_000)
    first, last = build(model, job, plan, 0), build(model, job, plan, 7)

    assert fold(first.pace).peak_bytes == fold(last.step).peak_bytes != fold(first.step).peak_bytes
