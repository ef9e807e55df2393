"""What flags and a training configuration say together: flags win and say so, batch sizes are made to agree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from advisor.catalog.training_config.deepspeed import SIZES, WIDTH_SIZES, ZERO_PLUS
from advisor.catalog.training_config.settings import AUTO, Setting, Settings
from advisor.errors import ConfigError, SpecError
from advisor.specs.plan import FsdpSettings, OffloadSettings, Strategy, ZeroSettings, zero_settings
from advisor.specs.question import Input

FLAG = "flag"
"""Place of what the user typed."""

FIELDS = {"bucket_size": "reduce_bucket"}
"""Words whose setting has another name: the plan's field."""


def settle(read: Settings, words: Mapping[str, Any]) -> Settings:
    """*read* with the flags *words* in it; each that replaces another value is warned of."""
    found = dict(read.found)
    warnings = list(read.warnings)
    for word, value in words.items():
        name = FIELDS.get(word, word)
        if value is None:
            continue
        old = found.get(name)
        if old and old.written and old.value != value:
            warnings.append(f"--{word.replace('_', '-')} {value} wins over {old.value} of {old.place}")
        found[name] = Setting(value, FLAG)
        if word == "strategy" and old and old.value != value:
            # What the file's own strategy would have taken by default says nothing of another.
            found = {key: each for key, each in found.items() if each.written or key not in ZERO_FIELDS}
    return Settings(_with_gpus(_unmixed(found)), tuple(warnings))


ZERO_FIELDS = (*SIZES, "overlap_communication", "gradient_format", *ZERO_PLUS)


def _unmixed(found: dict[str, Setting]) -> dict[str, Setting]:
    """``mixed_precision: no`` of DDP and FSDP computes in the format of the weights, fp32 unless told otherwise."""
    weights, precision = found.get("param_dtype"), found.get("precision")
    zero = "strategy" in found and str(found["strategy"].value).startswith("zero")
    if weights and precision and precision.place != FLAG and precision.value == "fp32" and not zero:
        return {**found, "precision": replace(precision, value=weights.value)}
    return found


def _with_gpus(found: dict[str, Setting]) -> dict[str, Setting]:
    """The GPU count follows where all three batch sizes are known and nobody says it."""
    sizes = [found.get(name) for name in ("global_batch", "micro_batch", "grad_accum")]
    if "gpus" in found or any(each is None for each in sizes):
        return found
    total, micro, steps = (int(each.value) for each in sizes if each)
    if total % (micro * steps):
        raise ConfigError(
            f"{_said('global_batch', found)} is no multiple of {_said('micro_batch', found)} x "
            f"{_said('grad_accum', found)} = {micro * steps}, on whatever number of GPUs"
        )
    place, cut = found["global_batch"].place, sequence_ranks(found)
    gpus = Setting(
        cut * total // (micro * steps), f"{place} / micro-batch {micro} / {steps} steps" if place != FLAG else FLAG
    )
    return {**found, "gpus": gpus}


def sequence_ranks(found: Mapping[str, Setting]) -> int:
    """How many ranks share each sequence."""
    return int(found["cp"].value if "cp" in found else 1) * int(found["sp"].value if "sp" in found else 1)


def batch(found: Mapping[str, Setting], gpus: int) -> Settings:
    """Global batch, micro-batch and accumulation steps of *gpus* with different sequences; nothing if no file has any.

    Those that are missing follow as in deepspeed 0.19.8, runtime/config.py ``_set_batch_related_parameters``; of three
    that disagree, one that no flag gave is made to fit, and without flags it is an error.
    """
    warnings: list[str] = []
    sizes = {name: found[name] for name in ("global_batch", "micro_batch", "grad_accum") if name in found}
    known = {name: each for name, each in sizes.items() if each.written}
    usual = {name: each for name, each in sizes.items() if not each.written}
    if not usual and all(each.place == FLAG for each in known.values()):
        return Settings()
    flags = [name for name, each in known.items() if each.place == FLAG]
    if len(known) == 3 and not _agree(known, gpus):
        loose = [name for name in ("global_batch", "grad_accum", "micro_batch") if name not in flags]
        if not flags:
            raise ConfigError(
                f"{_said('global_batch', known)} is not {gpus} GPUs x {_said('micro_batch', known)} x "
                f"{_said('grad_accum', known)} = {gpus * known['micro_batch'].value * known['grad_accum'].value}"
            )
        given = " and ".join(_said(name, known) for name in flags)
        warnings.append(f"{_said(loose[0], known)} gives way to {given}")
        del known[loose[0]]
    follows = "follows from the others"
    total, micro, steps = (known.get(name) for name in ("global_batch", "micro_batch", "grad_accum"))
    if steps is None and micro is None:
        micro = usual.get("micro_batch")
    if total is None:
        micro = micro or usual.get("micro_batch") or Setting(1, "assumed", written=False)
        steps = steps or usual.get("grad_accum") or Setting(1, "DeepSpeed's and accelerate's default", written=False)
        total = Setting(gpus * micro.value * steps.value, follows, written=False)
    elif micro is None:
        steps = steps or Setting(1, "DeepSpeed's default", written=False)
        micro = Setting(_share(total, gpus * steps.value, known), follows, written=False)
    elif steps is None:
        steps = Setting(_share(total, gpus * micro.value, known), follows, written=False)
    return Settings({"global_batch": total, "micro_batch": micro, "grad_accum": steps}, tuple(warnings))


def _agree(known: Mapping[str, Setting], gpus: int) -> bool:
    product = gpus * known["micro_batch"].value * known["grad_accum"].value
    return bool(known["global_batch"].value == product)


def _share(total: Setting, divisor: int, known: Mapping[str, Setting]) -> int:
    share, left = divmod(int(total.value), divisor)
    if left or not share:
        raise SpecError(
            f"{_said('global_batch', known)} does not divide by {divisor}, the sequences that its GPUs and the other "
            "batch size make at once"
        )
    return share


def _said(name: str, found: Mapping[str, Setting]) -> str:
    setting = found[name]
    return f"{name} {setting.value} ({'given' if setting.place == FLAG else setting.place})"


def zero_of(found: Mapping[str, Setting], strategy: Strategy, width: int, precision: str) -> ZeroSettings:
    """DeepSpeed's settings, those left to ``auto`` filled from the model's *width*.

    transformers 5.23, integrations/deepspeed.py ``trainer_config_finalize``; accelerate 1.15, accelerator.py.
    """
    usual = zero_settings(strategy)
    if strategy.zero_stage is None:
        bucket = found.get("reduce_bucket")
        return replace(usual, reduce_bucket=bucket.value) if bucket and bucket.place == FLAG else usual
    fields_of = [name for name in ZERO_FIELDS if name not in ZERO_PLUS or strategy is Strategy.ZERO3_PLUS]
    chosen = {name: filled(name, found[name].value, width) for name in fields_of if name in found}
    if chosen.get("gradient_format") == precision:
        chosen["gradient_format"] = None
    return replace(usual, **chosen)


def filled(name: str, value: Any, width: int) -> Any:
    """*value*, or what stands for ``auto`` in a model of *width*."""
    if value != AUTO or name not in WIDTH_SIZES:
        return value
    return {
        "reduce_bucket": width * width,
        "prefetch_bucket": int(0.9 * width * width),
        "persistence_threshold": 10 * width,
    }[name]


def offload_settings_of(found: Mapping[str, Setting]) -> OffloadSettings:
    named = {each.name for each in fields(OffloadSettings)}
    return OffloadSettings(**{name: found[name].value for name in found if name in named})


def fsdp_of(found: Mapping[str, Setting]) -> FsdpSettings:
    named = {"version": found.get("fsdp_version"), "shard_ranks": found.get("shard_ranks")}
    named["context_exchange"] = found.get("cp_exchange")
    return FsdpSettings(**{name: setting.value for name, setting in named.items() if setting})


def shown(found: Mapping[str, Setting], width: int) -> list[Input]:
    """What was settled, as inputs: where each value came from."""
    inputs = []
    for name, setting in found.items():
        if setting.place == FLAG:
            inputs.append(Input(name, setting.value, "given"))
            continue
        value = filled(name, setting.value, width)
        source = setting.place if value == setting.value else f"{setting.place} auto, for a width of {width}"
        inputs.append(Input(name, value, "file" if setting.written else "default", source))
    return inputs
