"""Published peak memory of a DeepSpeed run of a Hugging Face model that can be predicted as it was run.

The same source has ZeRO-3 runs with the optimizer on the CPU, from 16.3 GiB at 8 Ki tokens to 124.5 GiB at 256 Ki. They
used Liger's fused loss, which is not modelled, so they are no test of this prediction.
"""

from __future__ import annotations

from advisor.catalog.request import resolve
from advisor.cost.estimate import price
from advisor.cost.results import Memory
from advisor.specs.plan import Plan, Strategy, ZeroSettings

GIB = 2**30

# stas00/ml-engineering insights/when-to-upgrade-gpus/README.md 744d01e, with bench_decompose.py beside it: Llama-3.1-8B
# on 8 H200, ZeRO-2 with overlap_comm, one sequence of 8,192 tokens, no checkpointing, no Liger; torch 2.13, deepspeed
# 0.19.2, transformers 5.14.1. torch.cuda.max_memory_reserved of the fullest rank, printed without decimals.
PUBLISHED_GIB = 99


def predicted() -> tuple[Memory, int]:
    """The run's memory, and the bytes of its weights."""
    question = resolve("Llama-3.1-8B", gpus=8, gpu="H200", seq_len=8192, global_batch=8, attention="flash")
    overlapping = ZeroSettings(overlap_communication=True)
    estimate = price(question, Plan(strategy=Strategy.ZERO2, gpus=8, micro_batch=1, zero=overlapping))
    return estimate.memory, 2 * estimate.model.parameter_count


def test_the_run_reserved_what_is_predicted_and_less_than_its_weights_more() -> None:
    """The launch files switch on expandable segments, which the prediction is for; the run kept the plain allocator.

    There the segments of the loaded weights can stay reserved once DeepSpeed has copied them into its flat buffer, as
    activations of other sizes fill them only in part: at most 2 bytes per parameter on top. The source gives one number
    and no breakdown, so this bounds the difference of 10 GiB and does not explain it.
    """
    memory, weights_bytes = predicted()
    published_bytes = PUBLISHED_GIB * GIB

    assert memory.peak_reserved_bytes <= published_bytes <= memory.peak_reserved_bytes + weights_bytes
