"""Weights in four bits, beside what bitsandbytes and peft really hold and save on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from advisor.catalog.adapters import as_trained
from advisor.catalog.huggingface import model_from_config
from advisor.specs.job import Job
from advisor.specs.plan import Plan, Strategy
from advisor.step.build import build
from advisor.step.program import fold, phase_peaks, then
from advisor.step.schemes import scheme_of

torch = pytest.importorskip("torch")
for package in ("transformers", "peft", "bitsandbytes"):
    pytest.importorskip(package)

CONFIG = {
    "model_type": "qwen2",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
JOB = Job(method="qlora", sequence_length=128, global_batch=2, lora_rank=4, lora_targets=("all-linear",))
PLAN = Plan(strategy=Strategy.DDP, gpus=1, micro_batch=2)


def model_in_four_bits(*, packed: bool) -> Any:
    """What ``train.py`` loads and prepares, made of random weights; *packed* where it is cut over ranks."""
    from advisor.tracing.real_model import described, real_model, settings_of
    from advisor.validation.adapters import with_adapters
    from advisor.validation.four_bits import in_four_bits

    model = real_model(settings_of(described(CONFIG)), described(CONFIG), torch.bfloat16, "sdpa")
    return with_adapters(in_four_bits(model, torch.bfloat16, packed=packed), JOB, widens=not packed)


def parts_of(weight: Any) -> list[Any]:
    """A weight with all that it takes to read it."""
    state = getattr(weight, "quant_state", None)
    beside = [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code] if state else []
    return [weight, *beside]


@pytest.fixture
def gpu() -> Iterator[None]:
    from advisor.validation.adapters import import_before_counting
    from advisor.validation.four_bits import as_on_a_gpu

    import_before_counting(JOB)
    with as_on_a_gpu():
        yield


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("gpu")
def test_weights_in_four_bits_hold_and_save_what_is_predicted() -> None:
    from advisor.tracing.counter import StorageCounter

    built = model_in_four_bits(packed=False)
    ids = torch.zeros(2, JOB.sequence_length, dtype=torch.long)

    def loss() -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return built(input_ids=ids, labels=ids).loss

    loss()  # after which biases have their format
    with StorageCounter() as counter:
        counter.include([each for weight in built.parameters() for each in parts_of(weight)])
        counter.include([*built.buffers(), ids])
        before = counter.live_bytes
        kept = loss()
        saved = counter.live_bytes - before
    assert kept.isfinite()

    model = as_trained(model_from_config(CONFIG, "tiny", "test"), JOB)
    moments_and_counters = 8 * model.trained_count + 4 * len(model.trained)
    held = int(fold(then(*scheme_of(model, JOB, PLAN).states())).net_bytes) - moments_and_counters
    parts = [each for weight in built.parameters() for each in parts_of(weight)]
    assert sum(each.numel() * each.element_size() for each in parts) == held

    phases = phase_peaks(build(model, JOB, PLAN).device_without_scratch)
    predicted = int(phases["loss"][1]) - int(phases["init"][1])
    labels = 3 * 8 * ids.numel()  # here the ids themselves, and what the loss makes of them is gone
    assert saved == pytest.approx(predicted - labels, rel=0.001)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("gpu")
def test_fsdp_cuts_what_is_packed_and_a_step_holds_what_is_predicted() -> None:
    from advisor.tracing.counter import StorageCounter, resizes_counted
    from advisor.validation.accuracy import predicted
    from advisor.validation.sharding import fully_sharded, ranks_of

    plan = Plan(strategy=Strategy.FSDP, gpus=4, micro_batch=2)
    with ranks_of(plan) as mesh, StorageCounter() as counter, resizes_counted(counter):
        built = model_in_four_bits(packed=True)
        fully_sharded(built, mesh, JOB, plan)
        counter.include([*built.buffers()])
        before = counter.live_bytes
        ids = torch.zeros(2, JOB.sequence_length, dtype=torch.long)
        with counter.phase():
            loss = built(input_ids=ids, labels=ids.clone()).loss
        forward = counter.peak_bytes
        with counter.phase():
            loss.backward()
        backward = counter.peak_bytes

    model = as_trained(model_from_config(CONFIG, "tiny", "test"), JOB)
    found = predicted(model, JOB, plan)
    moments_and_counters = found["between steps"] - before
    assert moments_and_counters == 8 * model.trained_count // 4 + 4 * len(model.trained)
    for measured, counter_name in ((forward, "peak in forward"), (backward, "peak in backward")):
        assert measured == pytest.approx(found[counter_name] - moments_and_counters, rel=0.001)
