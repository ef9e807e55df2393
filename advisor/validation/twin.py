"""A model's small twin: the same family with fewer layers, narrower, with a smaller vocabulary, for a machine's CPU.

Head sizes, ties, biases, norms and activations stay, and DeepSpeed's buckets shrink with the largest tensor, so that it
is as large beside them as before. What is cut is named. Needs transformers, for what a configuration leaves to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from advisor.catalog.huggingface import model_from_config
from advisor.errors import AdvisorError, ConfigError
from advisor.specs.job import Job
from advisor.specs.model import ModelSpec
from advisor.specs.plan import Plan, ZeroSettings
from advisor.tracing.real_model import described, quiet, settings_of
from advisor.validation.accuracy import with_fewer_layers

TWIN_PARAMETERS = 8_000_000
"""Parameters of which a step takes a CPU core a second."""
MOST_LAYERS = 4
MOST_VOCABULARY = 4096
MOST_TOKENS = 128
"""In a sequence."""
MOST_MICRO_BATCH = 2
MOST_ACCUMULATION = 2
"""Micro-steps: a first and a last, between which all hold the same."""

WIDTHS = (
    "hidden_size",
    "intermediate_size",
    "n_inner",
    "ffn_dim",
    "word_embed_proj_dim",
    "ffn_hidden_size",
    "intermediate_size_mlp",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "q_lora_rank",
    "kv_lora_rank",
)
"""What grows with the number of heads, by transformers' names."""
WIDTH_STEP = 8
KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")


@dataclass(frozen=True, slots=True, eq=False)
class Twin:
    """What stands for a model, its job and its plans."""

    config: Mapping[str, Any]
    model: ModelSpec
    cuts: tuple[str, ...]
    """What was cut, each with both sizes; nothing where the model stands for itself."""
    share: float
    """Elements of its largest tensor over those of the model's."""
    width_share: float

    def job(self, job: Job, plan: Plan) -> Job:
        """*job* with shorter sequences, and the global batch of the twin's *plan*."""
        length = min(job.sequence_length, MOST_TOKENS, self.model.maximum_positions or MOST_TOKENS)
        return replace(job, sequence_length=length, global_batch=int(plan.global_batch))

    def plan(self, plan: Plan, ranks: int) -> Plan:
        """*plan* for so many ranks, with smaller batches and buckets."""
        return replace(
            plan,
            gpus=ranks,
            micro_batch=min(int(plan.micro_batch), MOST_MICRO_BATCH),
            accumulation_steps=min(int(plan.accumulation_steps), MOST_ACCUMULATION),
            zero=self._buckets(plan.zero),
        )

    def _buckets(self, zero: ZeroSettings) -> ZeroSettings:
        """Numbers of elements as the largest tensor shrank, and a layer's matrix's as the square of the width."""

        def cut(elements: int, share: float) -> int:
            return max(1, round(elements * share)) if elements else 0

        return replace(
            zero,
            reduce_bucket=cut(zero.reduce_bucket, self.share),
            prefetch_bucket=cut(zero.prefetch_bucket, self.share),
            max_live_parameters=cut(zero.max_live_parameters, self.share),
            max_reuse_distance=cut(zero.max_reuse_distance, self.share),
            sub_group=cut(zero.sub_group, self.share),
            persistence_threshold=cut(zero.persistence_threshold, self.width_share**2),
        )


def twin_of(
    config: Mapping[str, Any],
    model: ModelSpec,
    parameters: int = TWIN_PARAMETERS,
    fits: Callable[[Twin], bool] = lambda twin: True,
) -> Twin:
    """The largest twin of *model* with at most so many *parameters* that *fits*, or the smallest that there is.

    A model that is small enough is its own. Raises ConfigError where transformers does not know the family.
    """
    itself = Twin(config, model, (), 1.0, 1.0)
    if model.parameter_count <= parameters and fits(itself):
        return itself
    twin: Twin | None = None
    for cut, heads, all_heads in _narrower(config):
        try:
            found = model_from_config(cut, f"{model.name} twin", "a twin's configuration")
        except AdvisorError:  # not every family lets itself be cut to every width
            continue
        share = found.largest_parameter.numel / model.largest_parameter.numel
        twin = Twin(cut, found, _cuts(model, found, heads, all_heads), share, heads / all_heads)
        if found.parameter_count <= parameters and fits(twin):
            break
    if twin is None:
        raise ConfigError(f"no small twin of {model.name} can be made; give a smaller model's config.json")
    return twin


def _narrower(config: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], int, int]]:
    """*config* with few layers and a small vocabulary, the widest first, with its heads and those of the whole."""
    with quiet():
        settings = settings_of(described(config))
    names = getattr(settings, "attribute_map", {})

    def own(name: str) -> str:
        return str(names.get(name, name))

    def value(name: str) -> Any:
        return getattr(settings, name, None)

    # Of a model that sees or hears besides, the text part alone is trained.
    base = dict(config.get("text_config") or config)
    base[own("num_hidden_layers")] = value("num_hidden_layers")
    base = with_fewer_layers(base, MOST_LAYERS)
    base[own("vocab_size")] = min(value("vocab_size"), MOST_VOCABULARY)
    base |= {name: 0 for name in TOKEN_IDS if value(name) is not None}
    experts = max(2 * (value("num_experts_per_tok") or 1), 2 * (value("n_group") or 1))
    base |= {own(name): min(value(name), experts) for name in EXPERTS if value(name)}
    all_heads = int(value("num_attention_heads"))
    head = value("head_dim")
    for heads in range(all_heads, 0, -1):
        if heads > 1 and value("hidden_size") * heads % all_heads:
            continue
        cut = dict(base) | {own("num_attention_heads"): heads}
        for name in KEY_VALUE_HEADS:
            if value(name):
                cut[own(name)] = _dividing(heads, value(name) * heads // all_heads)
        for name in WIDTHS:
            if value(name):
                cut[own(name)] = _width(value(name) * heads // all_heads)
        if head is None and cut[own("hidden_size")] % heads:
            continue
        # Whichever of two names for one setting came later would count.
        yield {name: held for name, held in cut.items() if names.get(name) not in cut}, heads, all_heads


def _dividing(heads: int, wanted: int) -> int:
    """The most key-value heads up to *wanted* that *heads* can share evenly."""
    return next((count for count in range(wanted, 0, -1) if heads % count == 0), 1)


def _width(wanted: int) -> int:
    return max(WIDTH_STEP, wanted // WIDTH_STEP * WIDTH_STEP)


def _cuts(model: ModelSpec, twin: ModelSpec, heads: int, all_heads: int) -> tuple[str, ...]:
    sizes = (
        ("parameters", model.parameter_count, twin.parameter_count),
        ("layers", len(model.layers), len(twin.layers)),
        ("hidden size", model.hidden_size, twin.hidden_size),
        ("attention heads", all_heads, heads),
        ("vocabulary", model.vocabulary_size, twin.vocabulary_size),
    )
    return tuple(f"{what} {whole:,} → {left:,}" for what, whole, left in sizes if whole != left)


def plan_cuts(job: Job, plan: Plan, twin_job: Job, twin_plan: Plan) -> tuple[str, ...]:
    """What was cut of a job and its plan, as the twin runs them."""
    sizes = (
        ("ranks", int(plan.gpus), int(twin_plan.gpus)),
        ("tokens in a sequence", job.sequence_length, twin_job.sequence_length),
        ("micro-batch", int(plan.micro_batch), int(twin_plan.micro_batch)),
        ("accumulation steps", int(plan.accumulation_steps), int(twin_plan.accumulation_steps)),
        *(
            [("reduce bucket", plan.zero.reduce_bucket, twin_plan.zero.reduce_bucket)]
            if plan.strategy.zero_stage
            else []
        ),
    )
    return tuple(f"{what} {whole:,} → {left:,}" for what, whole, left in sizes if whole != left)
