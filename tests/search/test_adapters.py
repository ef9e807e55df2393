"""What a search over adapters answers, and why."""

from __future__ import annotations

from advisor.search.recommend import recommend
from advisor.specs.plan import Offload, Strategy


def test_cutting_frozen_weights_loses_to_keeping_them_whole_where_links_are_slow() -> None:
    found = recommend(model="Qwen2.5-7B", gpus=8, gpu="RTX 4090", method="lora", global_batch=16, seq_len=1024)
    on_gpu = [each for each in found.plans if each.plan.offload is Offload.NONE]
    why = {each.plan.strategy.value: each.why for each in on_gpu}
    speed = {each.plan.strategy.value: each.time.tokens_per_s for each in on_gpu}

    assert found.plans[0].plan.strategy.value in ("ddp", "zero1", "zero2")
    # Eight ranks gather 15 GB of weights for forward and again for backward, and reduce next to nothing.
    for cut in ("zero3", "fsdp"):
        assert speed[cut] < 0.4 * speed["ddp"]
        assert "slower" in why[cut]
        assert "s longer for weights over pcie4-no-p2p" in why[cut]


def test_offload_of_the_states_of_adapters_saves_next_to_nothing() -> None:
    found = recommend(model="Qwen2.5-0.5B", gpus=2, gpu="A100-80GB", method="lora", global_batch=8)
    states = {(each.plan.strategy, each.plan.offload): each.memory.states_bytes for each in found.plans}

    kept, offloaded = (states[Strategy.ZERO2, each] for each in (Offload.NONE, Offload.OPTIMIZER))
    assert kept - offloaded < 0.02 * kept
