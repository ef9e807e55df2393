"""Weights in four bits, beside what bitsandbytes and peft really hold and save on a CPU.

What a GPU's product makes of a weight for itself alone is inside one operator, and not seen here.
"""

from __future__ import annotations

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


def model_in_four_bits() -> Any:
    """What ``train.py`` loads and prepares, made of random weights."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    from advisor.launch.train import add_adapters
    from advisor.tracing.real_model import described, real_model, settings_of

    model = real_model(settings_of(described(CONFIG)), described(CONFIG), torch.bfloat16, "sdpa")
    settings = {"compress_statistics": True, "quant_type": "nf4"}
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
            held = Linear4bit(module.in_features, module.out_features, True, torch.bfloat16, **settings)
            held.weight = Params4bit(module.weight.data, requires_grad=False, **settings)
            held.bias = module.bias
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, held.to("cpu"))
    model.is_loaded_in_4bit = True
    return add_adapters(model, JOB.lora_rank, JOB.lora_targets)


def parts_of(weight: Any) -> list[Any]:
    """A weight with all that it takes to read it."""
    state = getattr(weight, "quant_state", None)
    beside = [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code] if state else []
    return [weight, *beside]


@pytest.mark.filterwarnings("ignore")
def test_weights_in_four_bits_hold_and_save_what_is_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    from advisor.tracing.counter import StorageCounter

    # peft asks whether a GPU's autocast is on, and here it is the CPU's.
    of_device = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device="cpu": of_device(device))
    built = model_in_four_bits()
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
