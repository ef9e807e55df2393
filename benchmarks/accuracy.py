"""Predicted beside traced memory, for every family of the catalog, for FSDP2 and for DeepSpeed ZeRO.

    python benchmarks/accuracy.py            # about ten minutes on two cores; needs the extra "run"
    python benchmarks/accuracy.py --quick    # one model, without DeepSpeed

Truths: the real transformers model, autograd, FSDP2 and optimizer run on fake tensors
(``advisor/validation/trace.py``), and real DeepSpeed on real tensors, one rank of four at a time
(``advisor/validation/deepspeed_rank.py``); the prediction is for the worst rank and is held against the worst of the
four. Counter: bytes of live storages. For the first two, each model is its profile cut to at most four layers, which
keeps widths, heads, vocabulary and experts as they are; DeepSpeed runs a small Qwen2. No constant is fitted to these
runs. The last lines are kept in ``benchmarks/accuracy.txt``.

Kept apart are cases in which the CPU takes another attention kernel than a GPU would: latent attention (DeepSeek) and
T5's position bias fall back to a scores matrix there. Mixtures under autocast cannot be traced on a CPU at all.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator

from advisor.catalog.profiles import model_profiles
from advisor.specs.job import Job
from advisor.specs.model import Experts, ModelSpec
from advisor.specs.plan import Checkpointing, Plan, Strategy, zero_settings
from advisor.validation.accuracy import Case, Comparison, beside, compare, score, table, with_fewer_layers
from advisor.validation.deepspeed_rank import request
from advisor.validation.trace import Trace

MOST_LAYERS = 4
ONE_OF_EACH_FAMILY = [
    "EleutherAI__gpt-neox-20b",
    "FacebookAI__roberta-base",
    "HuggingFaceTB__SmolLM3-3B",
    "Qwen__Qwen2.5-1.5B",
    "Qwen__Qwen3-0.6B",
    "Qwen__Qwen3-30B-A3B-Base",
    "allenai__OLMo-2-1124-7B",
    "bigcode__starcoder2-3b",
    "bigscience__bloom-7b1",
    "deepseek-ai__DeepSeek-V2-Lite",
    "deepseek-ai__DeepSeek-V3",
    "facebook__opt-125m",
    "google-bert__bert-base-uncased",
    "google-t5__t5-small",
    "google__flan-t5-large",
    "google__gemma-2-2b",
    "google__gemma-3-1b-it",
    "meta-llama__Llama-3.2-1B",
    "meta-llama__Llama-4-Scout-17B-16E",
    "microsoft__Phi-3-mini-4k-instruct",
    "microsoft__Phi-4-mini-instruct",
    "mistralai__Mistral-7B-v0.1",
    "mistralai__Mixtral-8x7B-v0.1",
    "openai-community__gpt2",
    "openai__gpt-oss-20b",
    "tiiuae__falcon-40b",
    "tiiuae__falcon-7b",
]
FSDP_MODELS = ("Qwen__Qwen2.5-1.5B", "meta-llama__Llama-3.1-8B", "Qwen__Qwen3-0.6B")


def one_rank(profiles: list[str]) -> Iterator[Case]:
    for profile in profiles:
        for parameter_format in ("bf16", "fp32"):
            for checkpointing in Checkpointing:
                job = Job(sequence_length=512, global_batch=2, parameter_format=parameter_format)  # type: ignore[arg-type]
                yield shrunken(
                    profile, job, Plan(strategy=Strategy.DDP, gpus=1, micro_batch=2, checkpointing=checkpointing)
                )


def sharded(profiles: list[str]) -> Iterator[Case]:
    for profile in profiles:
        for strategy in (Strategy.FSDP, Strategy.FSDP_GRAD_OP):
            for ranks in (8, 64):
                for checkpointing in Checkpointing:
                    for length in (128, 2048):
                        plan = Plan(strategy=strategy, gpus=ranks, micro_batch=1, checkpointing=checkpointing)
                        yield shrunken(profile, Job(sequence_length=length, global_batch=ranks), plan)


SMALL_QWEN2 = {
    "model_type": "qwen2",
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 8192,
}
SMALL_BUCKET = 4_000_000
DEFAULT_BUCKET = 500_000_000
DEEPSPEED_RANKS = 4


def deepspeed_cases() -> Iterator[Case]:
    for strategy in (Strategy.ZERO1, Strategy.ZERO2, Strategy.ZERO3):
        for tied in (True, False):
            for steps in (1, 2):
                for checkpointing, bucket, length in (
                    (Checkpointing.NONE, SMALL_BUCKET, 512),
                    (Checkpointing.FULL, SMALL_BUCKET, 64),
                    (Checkpointing.NONE, DEFAULT_BUCKET, 512),
                ):
                    plan = Plan(
                        strategy=strategy,
                        gpus=DEEPSPEED_RANKS,
                        micro_batch=2,
                        accumulation_steps=steps,
                        checkpointing=checkpointing,
                        zero=zero_settings(strategy, bucket),
                    )
                    job = Job(sequence_length=length, global_batch=2 * steps * DEEPSPEED_RANKS)
                    yield Case("Qwen2", SMALL_QWEN2 | {"tie_word_embeddings": tied}, job, plan)


def worst_rank(case: Case) -> Comparison:
    """The prediction beside the rank whose peak is highest."""
    # ZeRO-3 cuts every tensor evenly, so its first rank holds as much as any.
    ranks = range(DEEPSPEED_RANKS if case.plan.strategy.zero_stage != 3 else 1)
    return max(
        (beside(case.model, case.job, case.plan, _traced_rank(case, rank)) for rank in ranks),
        key=lambda comparison: comparison.true["peak"],
    )


def _traced_rank(case: Case, rank: int) -> Trace:
    asked = request(case.config, case.job, case.plan, rank)
    command = [sys.executable, "-m", "advisor.validation.deepspeed_rank", asked]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return Trace(**json.loads(printed.splitlines()[-1]))


def shrunken(profile: str, job: Job, plan: Plan) -> Case:
    """A case of a profile cut to few layers."""
    config = json.loads((model_profiles() / f"{profile}.json").read_text(encoding="utf-8"))["config"]
    return Case(profile.rpartition("__")[2], with_fewer_layers(config, MOST_LAYERS), job, plan)


def traceable(model: ModelSpec, job: Job) -> bool:
    has_experts = any(isinstance(layer.feed_forward, Experts) for layer in model.layers)
    return not (has_experts and job.parameter_format == "fp32")


def other_kernel(model: ModelSpec) -> bool:
    """Whether a CPU runs another attention kernel than a GPU."""
    attention = model.layers[0].attention
    return attention.latent is not None or (attention.additive_bias and not attention.eager_only)


def run(cases: Iterator[Case]) -> tuple[list[tuple[Case, Comparison]], list[tuple[Case, Comparison]]]:
    """Comparisons with the kernels of a GPU, and those with others."""
    alike, apart = [], []
    for case in cases:
        model = case.model
        if case.plan.strategy is Strategy.DDP and not traceable(model, case.job):
            continue
        found = compare(case)
        (apart if other_kernel(model) else alike).append((case, found))
        print(f"{100 * found.error():+8.3f} %  {case.title}", flush=True)
    return alike, apart


def main() -> None:
    logging.disable(logging.WARNING)
    quick = "--quick" in sys.argv
    alike, apart = run(one_rank(ONE_OF_EACH_FAMILY[3:4] if quick else list(ONE_OF_EACH_FAMILY)))
    scores = [*score("One rank, traced step", alike)]
    if apart:
        scores += score("One rank, where a CPU takes another attention kernel", apart)
    fsdp, _ = run(sharded(list(FSDP_MODELS[:1] if quick else FSDP_MODELS)))
    scores += score("FSDP2, rank 0 of 8 and 64", fsdp)
    if not quick:
        found = []
        for case in deepspeed_cases():
            found.append((case, worst_rank(case)))
            print(f"{100 * found[-1][1].error():+8.3f} %  {case.title}", flush=True)
        scores += score("DeepSpeed ZeRO-1/2/3, worst of 4 ranks", found)
    print("\n" + "\n".join(table(scores)))


if __name__ == "__main__":
    main()
