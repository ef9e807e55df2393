"""Step programs of traced recordings beside those of formulas, for every causal family of the catalog.

    python benchmarks/traced_recordings.py [NAME …]      # some ten minutes on two idle cores; needs the extra "run"

``--trace`` puts recordings of transformers' own code in the place of formulas. Where there are both they should say
the same. Each model is its profile, whole; micro-batch 2 of 512 tokens. Errors are traced over formula, less one: of
the peak of live bytes, of the step's matrix products, and of the bytes that its kernels move.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from advisor.catalog.huggingface import model_from_config
from advisor.catalog.profiles import model_profiles
from advisor.cost.compute import work
from advisor.errors import ConfigError
from advisor.specs.job import Job
from advisor.specs.model import Experts, ModelSpec
from advisor.specs.plan import Checkpointing, Plan, Strategy
from advisor.step.build import build
from advisor.step.program import fold
from advisor.step.recording import mode_of
from advisor.tracing.real_model import described
from advisor.tracing.source import TracedSource, traced_model
from advisor.validation.accuracy import without_dropout

PROFILES = (
    "EleutherAI__gpt-neox-20b",
    "HuggingFaceTB__SmolLM3-3B",
    "Qwen__Qwen2.5-1.5B",
    "Qwen__Qwen3-0.6B",
    "Qwen__Qwen3-30B-A3B-Base",
    "allenai__OLMo-2-1124-7B",
    "bigcode__starcoder2-3b",
    "bigscience__bloom-7b1",
    "deepseek-ai__DeepSeek-V2-Lite",
    "facebook__opt-125m",
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
)
LENGTH, BATCH = 512, 2


@dataclass(frozen=True, slots=True)
class Errors:
    """Traced over formula, less one."""

    title: str
    peak: float
    flop: float
    moved: float


def errors(profile: str) -> Iterator[Errors]:
    config: dict[str, Any] = json.loads((model_profiles() / f"{profile}.json").read_text())["config"]
    model = without_dropout(model_from_config(config, profile, "profiles/models"))
    source = TracedSource(described(config))
    for job, plan in cases(model):
        try:
            traced = traced_model(source, mode_of(job, job.compute_bytes), profile, "profiles/models")
            by_traces, by_formulas = build(traced, job, plan, source=source), build(model, job, plan)
        except ConfigError as error:
            print(f"{profile}, {job.parameter_format}: {error}", file=sys.stderr)
            continue
        done, expected = work(by_traces.step), work(by_formulas.step)
        yield Errors(
            f"{profile.partition('__')[2]}, {job.parameter_format}, checkpointing {plan.checkpointing.value}",
            float(fold(by_traces.device).peak_bytes / fold(by_formulas.device).peak_bytes - 1),
            float(done.whole_flop / expected.whole_flop - 1),
            float(done.moved_bytes / expected.moved_bytes - 1),
        )


def cases(model: ModelSpec) -> Iterator[tuple[Job, Plan]]:
    """One GPU in pure bf16 and with fp32 weights under autocast; a CPU cannot run mixtures under that."""
    mixture = any(isinstance(layer.feed_forward, Experts) for layer in model.described_layers)
    attention = "eager" if model.eager_only else "sdpa"
    for number_format in ("bf16",) if mixture else ("bf16", "fp32"):
        for checkpointing in (Checkpointing.NONE, Checkpointing.FULL):
            job = Job(
                sequence_length=LENGTH,
                global_batch=BATCH,
                parameter_format=number_format,  # type: ignore[arg-type]
                attention=attention,  # type: ignore[arg-type]
            )
            yield job, Plan(strategy=Strategy.DDP, gpus=1, micro_batch=BATCH, checkpointing=checkpointing)


def summary(found: Sequence[Errors]) -> str:
    worst = max(found, key=lambda each: abs(each.peak))
    return (
        f"n {len(found)}: peak off by mean {100 * sum(abs(each.peak) for each in found) / len(found):.3f} %, "
        f"max {100 * abs(worst.peak):.3f} % ({worst.title}); products by at most "
        f"{100 * max(abs(each.flop) for each in found):.3f} %, moved bytes by at most "
        f"{100 * max(abs(each.moved) for each in found):.1f} %"
    )


def main() -> None:
    wanted = sys.argv[1:]
    found = []
    for profile in PROFILES:
        if wanted and not any(word in profile for word in wanted):
            continue
        for each in errors(profile):
            found.append(each)
            print(
                f"peak {100 * each.peak:+7.3f} %  products {100 * each.flop:+7.3f} %  "
                f"moved {100 * each.moved:+6.1f} %  {each.title}",
                flush=True,
            )
    print("\n" + summary(found))


if __name__ == "__main__":
    main()
