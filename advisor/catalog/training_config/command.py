"""The command that starts a run, as it stands in a shell script: launcher, configuration files, program, arguments.

Only the words of one command are read. Nothing is run: a value that only the shell knows is an error where it matters.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from advisor.catalog.optimizers import optimizer_called
from advisor.catalog.training_config.accelerate import PRECISIONS, JsonReader, from_accelerate
from advisor.catalog.training_config.deepspeed import FORMATS, from_deepspeed
from advisor.catalog.training_config.settings import Setting, Settings, Table
from advisor.errors import ConfigError
from advisor.specs.job import LossKernel

Launcher = str

STARTS: tuple[tuple[tuple[str, ...], Launcher], ...] = (
    (("accelerate", "launch"), "accelerate"),
    (("accelerate-launch",), "accelerate"),
    (("-m", "accelerate.commands.launch"), "accelerate"),
    (("deepspeed",), "deepspeed"),
    (("torchrun",), "torchrun"),
    (("-m", "torch.distributed.run"), "torchrun"),
    (("-m", "torch.distributed.launch"), "torchrun"),
)
"""First words of a command and the launcher that they call."""

PYTHON = re.compile(r"(.*/)?python[0-9.]*")

SHELL = re.compile(r"(\d?>|<|\||&|;)")
"""How a word begins with which the shell ends a command, or sends its output elsewhere."""

FLAGS_WITHOUT_VALUE = frozenset(
    (
        "use_deepspeed",
        "use_fsdp",
        "tpu",
        "cpu",
        "debug",
        "force_multi",
        "m",
        "module",
        "multi_gpu",
        "no_local_rank",
        "no_python",
        "quiet",
        "standalone",
    )
)
"""Launcher flags after which the next word is the program, not a value."""

COUNTS: dict[str, tuple[str, ...]] = {
    "micro_batch": ("per_device_train_batch_size", "micro_batch", "micro_batch_size"),
    "grad_accum": ("gradient_accumulation_steps", "accumulation_steps", "grad_accum"),
    "seq_len": (
        "max_length",
        "max_seq_length",
        "max_seq_len",
        "cutoff_len",
        "sequence_length",
        "seq_length",
        "seq_len",
        "block_size",
        "model_max_length",
    ),
    "galore_rank": ("galore_rank",),
}
"""Names of flags, and the arguments by which training programs know them: transformers' TrainingArguments and examples,
TRL, LLaMA-Factory, and the program that this package writes."""

TRAINER_DEFAULTS = {"micro_batch": 8, "grad_accum": 1}
"""What the Trainer fills ``auto`` with where its arguments are silent (transformers 5.23, training_args.py)."""

ATTENTION = {
    "sdpa": "sdpa",
    "eager": "eager",
    "flash": "flash",
    "flash_attention_2": "flash",
    "flash_attention_3": "flash",
}

PROGRAM_UNMODELLED: dict[str, Any] = {
    "torch_compile": False,
    "use_liger_kernel": False,
    "use_liger": False,
    "use_peft": False,
    "config": None,
    "load_in_4bit": False,
    "load_in_8bit": False,
    "packing": False,
    "padding_free": False,
    "neftune_noise_alpha": None,
    "group_by_length": False,
}
"""Arguments of such programs that change memory."""


@dataclass(frozen=True, slots=True)
class Command:
    """One launch command, taken apart."""

    launcher: Launcher
    options: Mapping[str, str]
    """The launcher's, without dashes and with underscores; ``true`` where a flag has no value."""
    program: Mapping[str, str]
    """The training program's, likewise."""


def is_command(text: str) -> bool:
    """Whether *text* holds a launch command."""
    return any(_launcher_at(words) for words in _lines(text))


def from_command(file: str, text: str, json_at: JsonReader, yaml_at: JsonReader) -> Settings:
    """What the launch command of a script means."""
    command = _command(file, text)
    yaml_path, json_path = _configuration_files(file, command)
    found: dict[str, Setting] = {}
    warnings: list[str] = []
    if command.launcher == "accelerate":
        settings = _through_accelerate(file, command, yaml_path, json_at, yaml_at)
    else:
        settings = Settings(_processes(file, command))
    if json_path:
        settings = settings.under(from_deepspeed(*json_at(json_path)))
    program = Table(file, command.program, "", _Flags(file))
    _program(program, found, settings, warnings)
    said = Settings(found, tuple(warnings))
    from_json = "strategy" in settings.found and str(settings.found["strategy"].value).startswith("zero")
    # The Trainer refuses arguments that differ from DeepSpeed's JSON; elsewhere the program has the last word.
    return settings.beside(said) if from_json else settings.under(said)


class _Flags(dict[str, str]):
    """Places of command-line flags: the script and the flag with its dashes."""

    def __init__(self, file: str) -> None:
        super().__init__()
        self.file = file

    def get(self, key: str, default: Any = None) -> str:
        return f"{self.file}: --{key}"


def _lines(text: str) -> list[list[str]]:
    """The words of each line, continued lines joined and variables that the script sets put in."""
    joined = re.sub(r"\\\r?\n", " ", text)
    variables: dict[str, str] = {}
    lines = []
    for line in joined.splitlines():
        try:
            words = shlex.split(_expanded(line, variables), comments=True)
        except ValueError:
            continue  # a line of some other construct, whose quotes end elsewhere
        for word in words[1:] if words[:1] == ["export"] else words:
            name, equals, value = word.partition("=")
            if not equals or not name.isidentifier():
                break
            if not re.search(r"\$\(|`", value):
                variables[name] = value
        lines.append(words)
    return lines


def _expanded(line: str, variables: Mapping[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        name, default = match["name"] or match["plain"], match["default"]
        return variables.get(name, default if default is not None else match[0])

    return re.sub(r"\$(?:\{(?P<name>\w+)(?::?-(?P<default>[^}]*))?\}|(?P<plain>\w+))", value, line)


def _launcher_at(words: list[str]) -> tuple[Launcher, int] | None:
    """The launcher that *words* call, and where its options begin."""
    for index, word in enumerate(words):
        if word in ("-v", "which", "echo", "pip", "install"):
            return None
        name = word.rpartition("/")[2]
        for start, launcher in STARTS:
            if (name, *words[index + 1 : index + len(start)]) == start:
                return launcher, index + len(start)
        if PYTHON.fullmatch(word) and words[index + 1 : index + 2] and words[index + 1].endswith(".py"):
            return "python", index + 1
    return None


def _command(file: str, text: str) -> Command:
    calls = [(found, words) for words in _lines(text) if (found := _launcher_at(words))]
    if len(calls) != 1:
        raise ConfigError(
            f"{file} holds {len(calls)} launch commands; give a file with one of accelerate launch, deepspeed, "
            "torchrun or python"
        )
    (launcher, start), words = calls[0]
    ends = [index for index, word in enumerate(words) if SHELL.match(word)]
    rest = [word for word in words[start : min(ends, default=None)] if word not in ("$@", "$*")]
    program = _program_at(rest)
    if program is None:
        raise ConfigError(f"{file}: {launcher} is given no program to start")
    return Command(launcher, _options(rest[:program]), _options(rest[program + 1 :]))


def _program_at(words: list[str]) -> int | None:
    """Where the training program stands: the first word that is neither a flag nor a flag's value."""
    skip = False
    for index, word in enumerate(words):
        if skip:
            skip = False
            continue
        if not word.startswith("-"):
            return index
        name = word.lstrip("-").replace("-", "_")
        skip = "=" not in word and name not in FLAGS_WITHOUT_VALUE
    return None


def _options(words: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    name = ""
    for word in words:
        if word.startswith("-") and not re.fullmatch(r"-[0-9.e-]+", word):
            name, equals, value = word.lstrip("-").partition("=")
            name = name.replace("-", "_")
            found[name] = value if equals else "true"
            name = "" if equals else name
        elif name:
            found[name] = word if found[name] == "true" else f"{found[name]} {word}"
    return found


def _configuration_files(file: str, command: Command) -> tuple[str | None, str | None]:
    """Paths of the accelerate YAML and the DeepSpeed JSON that the command names."""
    named = [
        (table, key)
        for table, key in (
            (command.options, "deepspeed_config_file"),
            (command.program, "deepspeed"),
            (command.program, "deepspeed_config"),
        )
        if table.get(key, "true") != "true"
    ]
    if len(named) > 1:
        raise ConfigError(
            f"{file} names two DeepSpeed files: {' and '.join(table[key] for table, key in named)}; keep one"
        )
    json_path = named[0][0][named[0][1]] if named else None
    return command.options.get("config_file"), json_path


def _through_accelerate(
    file: str, command: Command, yaml_path: str | None, json_at: JsonReader, yaml_at: JsonReader
) -> Settings:
    """The YAML with the launcher's own options over it, as accelerate lays them."""
    name, held = yaml_at(yaml_path) if yaml_path else (file, {})
    if not isinstance(held, Mapping):
        raise ConfigError(f"{name} must be a mapping of keys to values")
    laid = dict(held)
    places = {}
    for option, value in command.options.items():
        key = OPTION_KEYS.get(option)
        if key is None and option.startswith("fsdp_"):
            key = f"fsdp_config.{option}"
        if key is None:
            continue
        block, _, inner = key.rpartition(".")
        if block:
            laid[block] = {**(laid.get(block) or {}), inner: value}
        else:
            laid[key] = value
        places[key] = f"{file}: --{option}"
    for option, kind in (("use_deepspeed", "DEEPSPEED"), ("use_fsdp", "FSDP"), ("multi_gpu", "MULTI_GPU")):
        if command.options.get(option) == "true":
            laid["distributed_type"] = kind
            places["distributed_type"] = f"{file}: --{option}"
    if command.options.get("deepspeed_config_file"):
        laid["deepspeed_config"] = {
            key: value for key, value in (laid.get("deepspeed_config") or {}).items() if key != "deepspeed_config_file"
        } | {"deepspeed_config_file": command.options["deepspeed_config_file"]}
    if not yaml_path and "distributed_type" not in laid:
        laid["distributed_type"] = "MULTI_GPU"
    return from_accelerate(name, laid, json_at, places)


OPTION_KEYS = {
    "num_processes": "num_processes",
    "num_machines": "num_machines",
    "mixed_precision": "mixed_precision",
    "zero_stage": "deepspeed_config.zero_stage",
    "offload_optimizer_device": "deepspeed_config.offload_optimizer_device",
    "offload_param_device": "deepspeed_config.offload_param_device",
    "gradient_accumulation_steps": "deepspeed_config.gradient_accumulation_steps",
}
"""Options of ``accelerate launch`` and the keys of the YAML that they stand for."""


def _processes(file: str, command: Command) -> dict[str, Setting]:
    """How many processes torchrun, deepspeed or python start, and plain data parallelism for want of more."""
    options = Table(file, command.options, "", _Flags(file))
    found: dict[str, Setting] = {}
    keys = {"deepspeed": ("num_gpus", "num_nodes"), "torchrun": ("nproc_per_node", "nnodes")}.get(command.launcher)
    if keys:
        each, machines = options.raw(keys[0]), options.raw(keys[1])
        if machines is not None:
            found["nodes"] = Setting(options.count(keys[1]), options.place(keys[1]))
        if each is not None and each not in ("gpu", "auto", "cuda"):
            nodes = int(found["nodes"].value) if "nodes" in found else 1
            found["gpus"] = Setting(int(options.count(keys[0]) or 1) * nodes, options.place(keys[0]))
    else:
        found["gpus"] = Setting(1, f"{file}: python starts one process")
    found["strategy"] = Setting("ddp", f"{file}: {command.launcher} without DeepSpeed or FSDP", written=False)
    return found


def _program(program: Table, found: dict[str, Setting], settings: Settings, warnings: list[str]) -> None:
    """The training program's own arguments."""
    for name, keys in COUNTS.items():
        for key in keys:
            if (value := program.count(key)) is not None:
                found[name] = Setting(value, program.place(key))
    if program.held.get("deepspeed", "true") != "true":  # the Trainer's own argument names a file
        for name, value in TRAINER_DEFAULTS.items():
            found.setdefault(name, Setting(value, "the Trainer's default", written=False))
    _formats(program, found, settings)
    for key in ("optim", "optimizer"):
        kind = program.word(key)
        # A block in DeepSpeed's JSON comes first (transformers 5.23, ``deepspeed_optim_sched``).
        if kind is not None and "optimizer" not in settings.found:
            if (known := optimizer_called(kind)) is None:
                warnings.append(f"{program.place(key)} {kind} is not modelled; what follows assumes adamw-fused")
            found["optimizer"] = Setting(known or "adamw-fused", program.place(key))
    for key in ("attn_implementation", "attention"):
        if (kernel := program.word(key)) is not None:
            if kernel not in ATTENTION:
                warnings.append(f"{program.place(key)} {kernel} is not modelled; what follows assumes sdpa")
            found["attention"] = Setting(ATTENTION.get(kernel, "sdpa"), program.place(key))
    if (kind := program.word("loss")) in get_args(LossKernel):
        found["loss"] = Setting(kind, program.place("loss"))
    for key in ("gradient_checkpointing", "activation_checkpointing"):
        if isinstance(checkpoints := program.switch(key), bool):
            found["checkpointing"] = Setting("full" if checkpoints else "none", program.place(key))
    if (kind := program.word("checkpointing")) is not None:
        found["checkpointing"] = Setting(kind, program.place("checkpointing"))
    _trainer_fsdp(program, found, warnings)
    warnings += program.not_modelled(PROGRAM_UNMODELLED)


def _formats(program: Table, found: dict[str, Setting], settings: Settings) -> None:
    for key in ("bf16", "fp16"):
        if program.switch(key) is True:
            found["precision"] = Setting(PRECISIONS[key], program.place(key))
    strategy = str(settings.found["strategy"].value) if "strategy" in settings.found else "ddp"
    precision = found.get("precision") or settings.found.get("precision")
    mixes = precision is not None and precision.value != "fp32"
    for key in ("weights", "torch_dtype", "dtype"):
        weights = program.raw(key)
        if weights is None or weights == "auto" or strategy.startswith("zero"):
            continue  # DeepSpeed keeps fp32 masters whatever the model was built in
        format_ = program.word(key, FORMATS)
        if strategy.startswith("fsdp") and mixes:
            continue  # accelerate 1.15 casts the weights to fp32 for mixed precision (utils/fsdp_utils.py)
        if format_ == "bf16":
            found["param_dtype"] = Setting("bf16", program.place(key))
            if not mixes:
                found["precision"] = Setting("bf16", program.place(key))


def _trainer_fsdp(program: Table, found: dict[str, Setting], warnings: list[str]) -> None:
    """``--fsdp "full_shard auto_wrap"`` of the Trainer, which hands it to accelerate as FSDP of version 1."""
    words = str(program.raw("fsdp") or "").split()
    if not words or words == ["true"]:
        return
    kinds = {
        "full_shard": "fsdp",
        "shard_grad_op": "fsdp-grad-op",
        "hybrid_shard": "fsdp",
        "hybrid_shard_zero2": "fsdp-grad-op",
    }
    sharding = [kinds[word] for word in words if word in kinds]
    if len(sharding) != 1:
        raise program.error("fsdp", f"one of {', '.join(kinds)}, with auto_wrap", " ".join(words))
    found["strategy"] = Setting(sharding[0], program.place("fsdp"))
    found["fsdp_version"] = Setting(1, "the Trainer's default: version 1", written=False)
    warnings += [f"{program.place('fsdp')} {word} is not modelled" for word in words if word == "offload"]
    if program.raw("fsdp_config") is not None:
        warnings.append(f"{program.place('fsdp_config')} is not read; what follows assumes version 1")
