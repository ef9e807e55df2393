"""What generating is predicted to hold, beside what transformers' own ``generate`` holds.

    python benchmarks/generation.py                  # recorded truths beside the present model; seconds
    python benchmarks/generation.py --measure        # run them anew and record them; minutes, needs the extra "run"

Each case is a model of the catalog with few layers and a small vocabulary, so that weights do not hide the rest, run
by ``generate`` on fake tensors with the operators of a GPU (``advisor/validation/generated.py``): the prompt at once,
then token after token. Counter: live bytes of tensors. No constant is fitted to them. What was true lies in
``profiles/measured/generation.csv``.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

from advisor.catalog.huggingface import model_from_config
from advisor.catalog.profiles import model_profiles, profiles_folder
from advisor.specs.inference import Inference, InferencePlan
from advisor.step.inference import generation
from advisor.step.program import fold, phase_peaks

RECORDED = profiles_folder() / "measured" / "generation.csv"
LAYERS, VOCABULARY = 4, 8192
LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers")
BY_LAYER = ("layer_types", "no_rope_layers")
"""Fields with an entry for each layer."""


@dataclass(frozen=True, slots=True)
class Case:
    """A call of ``generate``."""

    model: str
    layers: int
    batch: int
    prompt: int
    context: int
    attention: str = "sdpa"
    cache: str = "bf16"

    @property
    def config(self) -> dict[str, Any]:
        """The model's profile with fewer layers and a smaller vocabulary."""
        found: dict[str, Any] = json.loads((model_profiles() / f"{self.model}.json").read_text())["config"]
        for part in (found, found.get("text_config") or {}):
            if "vocab_size" in part:
                part |= {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
            part |= {key: self.layers for key in LAYER_KEYS if key in part}
            part |= {key: part[key][: self.layers] for key in BY_LAYER if part.get(key)}
            if part.get("moe_layers"):
                part["moe_layers"] = [number for number in part["moe_layers"] if number < self.layers]
        return found

    @property
    def inference(self) -> Inference:
        return Inference(
            batch=self.batch,
            prompt=self.prompt,
            context=self.context,
            attention=self.attention,  # type: ignore[arg-type]
            fp8_cache=self.cache == "fp8",
            static_cache=self.cache == "static",
        )

    @property
    def title(self) -> str:
        cache = f", {self.cache} cache" if self.cache != "bf16" else ""
        return (
            f"{self.model.partition('__')[2]}, {self.batch} x {self.prompt} of {self.context}, {self.attention}{cache}"
        )


@dataclass(frozen=True, slots=True)
class Held:
    """Live bytes."""

    weights_bytes: int
    """Parameters and buffers."""
    prefill_peak_bytes: int
    decode_peak_bytes: int
    prompt_cache_bytes: int
    """Keys and values after the prompt."""
    cache_bytes: int
    """The same after the last pass."""

    @property
    def peak_bytes(self) -> int:
        return max(self.prefill_peak_bytes, self.decode_peak_bytes)


CASES = (
    Case("EleutherAI__gpt-neox-20b", 4, 2, 256, 259),
    Case("HuggingFaceTB__SmolLM3-3B", 4, 2, 512, 514),
    Case("Qwen__Qwen2.5-0.5B", 4, 1, 256, 257),
    Case("Qwen__Qwen2.5-0.5B", 4, 8, 512, 520),
    Case("Qwen__Qwen2.5-0.5B", 4, 2, 256, 259, "eager"),
    Case("Qwen__Qwen2.5-0.5B", 4, 2, 256, 259, "sdpa", "fp8"),
    Case("Qwen__Qwen3-8B", 4, 4, 1024, 1028),
    Case("Qwen__Qwen3-8B", 4, 4, 1024, 1028, "sdpa", "fp8"),
    Case("Qwen__Qwen3-8B", 4, 4, 1024, 1028, "sdpa", "static"),
    Case("Qwen__Qwen3-30B-A3B-Base", 4, 2, 256, 259),
    Case("allenai__OLMo-2-1124-7B", 4, 2, 256, 259),
    Case("bigcode__starcoder2-3b", 4, 1, 4104, 4107),
    Case("bigscience__bloom-7b1", 4, 2, 256, 259),
    Case("deepseek-ai__DeepSeek-V2-Lite", 4, 2, 256, 259),
    Case("deepseek-ai__DeepSeek-V3", 4, 2, 128, 130),
    Case("facebook__opt-1.3b", 4, 2, 256, 259),
    Case("google__gemma-2-2b", 4, 2, 512, 514),
    Case("google__gemma-2-2b", 4, 1, 4104, 4107),
    Case("google__gemma-3-1b-it", 6, 2, 256, 259),
    Case("google__gemma-3-1b-it", 6, 2, 1024, 1030),
    Case("google__gemma-3-1b-it", 6, 2, 1024, 1030, "sdpa", "static"),
    Case("meta-llama__Llama-3.2-1B", 4, 1, 4096, 4098),
    Case("meta-llama__Llama-3.1-8B", 4, 4, 512, 640),
    Case("meta-llama__Llama-4-Scout-17B-16E", 4, 2, 256, 259),
    Case("microsoft__Phi-3-mini-4k-instruct", 4, 2, 2048, 2052),
    Case("microsoft__Phi-4-mini-instruct", 4, 2, 256, 259),
    Case("mistralai__Mistral-7B-v0.1", 4, 1, 4104, 4107),
    Case("mistralai__Mistral-7B-v0.1", 4, 2, 512, 516, "sdpa", "static"),
    Case("mistralai__Mixtral-8x7B-v0.1", 4, 2, 256, 259),
    Case("openai-community__gpt2", 4, 2, 256, 259),
    Case("openai__gpt-oss-20b", 4, 2, 256, 259),
    Case("tiiuae__falcon-40b", 4, 2, 256, 259),
    Case("tiiuae__falcon-7b", 4, 2, 256, 259),
)


def predicted(case: Case) -> Held:
    """What the step program says, without what only a GPU takes."""
    model = model_from_config(case.config, case.model, "the case's configuration")
    found = generation(model, case.inference, InferencePlan(gpus=1))
    peaks = phase_peaks(found.program.device_without_scratch)
    return Held(
        weights_bytes=int(fold(found.program.init).net_bytes),
        prefill_peak_bytes=int(peaks["prefill"][0]),
        decode_peak_bytes=int(peaks["decode"][0]),
        prompt_cache_bytes=int(found.prompt_cache_bytes),
        cache_bytes=int(found.cache_bytes),
    )


def measured(case: Case) -> Held:
    """What ``generate`` holds."""
    from advisor.validation.generated import trace_generation

    found = trace_generation(case.config, case.inference)
    return Held(**{each.name: getattr(found, each.name) for each in fields(Held)})


def recorded() -> Iterator[tuple[Case, Held]]:
    """The cases that were run, with what was true."""
    with RECORDED.open(newline="") as file:
        for row in csv.DictReader(file):
            numbers = {name: int(text) if text.isdigit() else text for name, text in row.items()}
            yield (
                Case(**{each.name: numbers[each.name] for each in fields(Case)}),  # type: ignore[arg-type]
                Held(**{each.name: numbers[each.name] for each in fields(Held)}),  # type: ignore[arg-type]
            )


def measure() -> None:
    found = [(case, measured(case)) for case in CASES]
    with RECORDED.open("w", newline="") as file:
        names = [each.name for kind in (Case, Held) for each in fields(kind)]
        writer = csv.DictWriter(file, fieldnames=names, lineterminator="\n")
        writer.writeheader()
        for case, held in found:
            writer.writerow({**asdict(case), **asdict(held)})


def table() -> str:
    """Errors of each case, and of all of them."""
    rows = []
    lines = [f"{'':64}   cache bytes   peak in prefill   in decode   peak beside weights"]
    for case, true in recorded():
        said = predicted(case)
        prefill, decode = (
            getattr(said, name) / getattr(true, name) - 1 for name in ("prefill_peak_bytes", "decode_peak_bytes")
        )
        beside = (said.peak_bytes - said.weights_bytes) / (true.peak_bytes - true.weights_bytes) - 1
        rows.append((abs(said.peak_bytes / true.peak_bytes - 1), abs(beside), abs(prefill), abs(decode)))
        off = said.cache_bytes - true.cache_bytes, said.prompt_cache_bytes - true.prompt_cache_bytes
        lines.append(
            f"{case.title:64}   {max(map(abs, off)):9,} B   {prefill:+14.3%}   {decode:+8.3%}   {beside:+17.3%}"
        )
    for name, column in zip(("peak", "beside weights", "prefill", "decode"), zip(*rows, strict=True), strict=True):
        lines.append(f"{name:16} mean {sum(column) / len(column):.3%}, max {max(column):.3%}, n {len(column)}")
    return "\n".join(lines)


if __name__ == "__main__":
    if "--measure" in sys.argv:
        measure()
    print(table())
