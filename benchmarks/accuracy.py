"""Predicted beside traced memory, for every family of the catalog and for FSDP2.

    python benchmarks/accuracy.py            # about two minutes on two cores; needs the extra "run"
    python benchmarks/accuracy.py --quick    # one model of each truth

Truth: the real transformers model, autograd, FSDP2 and optimizer run on fake tensors (``advisor/validation/trace.py``).
Counter: bytes of live storages. Each model is its profile cut to at most four layers, which keeps widths, heads,
vocabulary and experts as they are. Nothing is fitted to these runs.

Kept apart are cases in which the CPU takes another attention kernel than a GPU would: latent attention (DeepSeek) and
T5's position bias fall back to a scores matrix there. Mixtures under autocast cannot be traced on a CPU at all.
"""

from __future__ import annotations

import json
import logging
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from advisor.catalog.huggingface import model_from_config
from advisor.catalog.profiles import model_profiles
from advisor.specs.job import Job
from advisor.specs.model import Experts, ModelSpec
from advisor.specs.plan import Checkpointing, Plan, Strategy
from advisor.validation.accuracy import Comparison, compare

LAYER_SETTINGS = ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers")
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


@dataclass(frozen=True, slots=True)
class Case:
    """One comparison to make."""

    profile: str
    job: Job
    plan: Plan

    @property
    def title(self) -> str:
        weights = "autocast" if self.job.parameter_format == "fp32" and self.plan.strategy is Strategy.DDP else "bf16"
        return (
            f"{self.profile.split('__')[1]}, {self.plan.strategy.value} x {self.plan.gpus}, {weights}, "
            f"checkpointing {self.plan.checkpointing.value}, {self.plan.micro_batch} x {self.job.sequence_length}"
        )


def one_rank(profiles: list[str]) -> Iterator[Case]:
    for profile in profiles:
        for parameter_format in ("bf16", "fp32"):
            for checkpointing in Checkpointing:
                job = Job(sequence_length=512, global_batch=2, parameter_format=parameter_format)  # type: ignore[arg-type]
                yield Case(
                    profile, job, Plan(strategy=Strategy.DDP, gpus=1, micro_batch=2, checkpointing=checkpointing)
                )


def sharded(profiles: list[str]) -> Iterator[Case]:
    for profile in profiles:
        for strategy in (Strategy.FSDP, Strategy.FSDP_GRAD_OP):
            for ranks in (8, 64):
                for checkpointing in Checkpointing:
                    for length in (128, 2048):
                        plan = Plan(strategy=strategy, gpus=ranks, micro_batch=1, checkpointing=checkpointing)
                        yield Case(profile, Job(sequence_length=length, global_batch=ranks), plan)


def shrunken(profile: str) -> tuple[dict[str, Any], ModelSpec]:
    """A profile's configuration cut to few layers, and the catalog's model of it."""
    config = dict(json.loads((model_profiles() / f"{profile}.json").read_text())["config"])
    for name in LAYER_SETTINGS:
        if name in config:
            config[name] = min(config[name], MOST_LAYERS)
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:MOST_LAYERS]
    if "first_k_dense_replace" in config:
        config["first_k_dense_replace"] = min(1, config["first_k_dense_replace"])
    return config, model_from_config(config, profile, "profiles/models")


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
        config, model = shrunken(case.profile)
        if case.plan.strategy is Strategy.DDP and not traceable(model, case.job):
            continue
        found = compare(config, model, case.job, case.plan)
        (apart if other_kernel(model) else alike).append((case, found))
        print(f"{100 * found.peak_error:+8.3f} %  {case.title}", flush=True)
    return alike, apart


def summary(title: str, found: list[tuple[Case, Comparison]]) -> str:
    errors = [abs(comparison.peak_error) for _, comparison in found]
    states = [abs(comparison.states_bytes[0] - comparison.states_bytes[1]) for _, comparison in found]
    saved = [abs(comparison.saved_error) for _, comparison in found]
    worst = max(found, key=lambda pair: abs(pair[1].peak_error))
    return (
        f"{title}: n {len(found)}, peak error mean {100 * statistics.mean(errors):.3f} %, "
        f"max {100 * max(errors):.3f} % ({worst[0].title}); "
        f"saved for backward mean {100 * statistics.mean(saved):.2f} %, max {100 * max(saved):.2f} %; "
        f"states off by at most {max(states):,} B"
    )


def main() -> None:
    logging.disable(logging.WARNING)
    quick = "--quick" in sys.argv
    alike, apart = run(one_rank(ONE_OF_EACH_FAMILY[3:4] if quick else list(ONE_OF_EACH_FAMILY)))
    lines = [summary("One rank, traced step", alike)]
    if apart:
        lines.append(summary("One rank, where a CPU takes another attention kernel", apart))
    fsdp, _ = run(sharded(list(FSDP_MODELS[:1] if quick else FSDP_MODELS)))
    lines.append(summary("FSDP2, rank 0 of 8 and 64", fsdp))
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
