"""The ``advisor`` command: finds the subcommand, and turns whatever goes wrong into one line and an exit code.

Subcommands are loaded when they are called, so that ``advisor --help`` answers at once.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
from importlib import import_module
from typing import Any

import click

from advisor.errors import AdvisorError
from advisor.version import __version__

COMMANDS = {
    "recommend": "Find the fastest plan that fits, and say why not the others.",
    "estimate": "Price one plan: memory, traffic and time of a training step.",
    "compare": "Compare strategies and GPU counts: speed, efficiency, time and cost.",
    "limits": "Find the largest micro-batch, the longest sequence or the largest model.",
    "launch": "Show, write or start the files that train by one plan.",
    "trace": "Run one plan's step without its data, and compare its bytes with the prediction.",
    "validate": "Run plans for a few steps on this machine, and compare with the prediction.",
    "records": "List recorded runs, or compare them with what is predicted now.",
    "calibrate": "Measure this machine for the constants that predictions use.",
    "models": "List the models that are known by name.",
    "gpus": "List the GPUs that are known by name.",
    "clusters": "List the clusters that --cluster knows by name.",
    "completion": "Print the script that completes commands in your shell.",
}
"""The first sentence of each command's help, by the module that holds it."""

EXAMPLES = (
    "advisor recommend --model Qwen2.5-1.5B --gpus 4",
    "advisor estimate --model Llama-3.1-8B --gpus 8 --gpu H100 --strategy zero3",
    "advisor models qwen",
)

SYNONYMS = {
    # transformers
    "model-name-or-path": "model",
    "per-device-train-batch-size": "micro-batch",
    "gradient-accumulation-steps": "grad-accum",
    "attn-implementation": "attention",
    "flash-attention-2": "flash",
    "optim": "optimizer",
    "adamw-torch": "adamw-foreach",
    "adamw-torch-fused": "adamw-fused",
    # trl, LLaMA-Factory, axolotl
    "max-seq-length": "seq-len",
    "max-length": "seq-len",
    "cutoff-len": "seq-len",
    "sequence-len": "seq-len",
    # accelerate, torchrun
    "num-processes": "gpus",
    "num-machines": "nodes",
    "nnodes": "nodes",
    # DeepSpeed
    "train-batch-size": "global-batch",
    "train-micro-batch-size-per-gpu": "micro-batch",
    "reduce-bucket-size": "bucket-size",
}
"""Words of trainers for what has a name here; they mean exactly the same."""


def own_word(word: str) -> str:
    """The flag or choice that *word* stands for: trainers' words and snake_case are understood, though not shown."""
    word = word.replace("_", "-")
    return SYNONYMS.get(word, word)


class Failure(click.ClickException):
    """One line on stderr, and an exit code of its own."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]


def _in_one_line(error: click.UsageError) -> Failure:
    """Wrong usage without click's lines about usage, but with where to read about it."""
    asked = error.ctx.command_path if error.ctx else "advisor"
    return Failure(f"{' '.join(error.format_message().split()).rstrip('.')}; see `{asked} --help`", error.exit_code)


class Cli(click.Group):
    """A group that knows its commands by name, and loads one only to run it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = getattr(import_module(f"advisor.cli.{cmd_name}"), cmd_name)
        assert isinstance(command, click.Command)
        return command

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Examples first: they say more than usage does."""
        formatter.write_text(self.help or "")
        with formatter.section("Examples"):
            for example in EXAMPLES:
                formatter.write_text(example)
        formatter.write_paragraph()
        self.format_usage(ctx, formatter)
        self.format_commands(ctx, formatter)
        click.Command.format_options(self, ctx, formatter)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        try:
            return super().make_context(info_name, list(args), parent, **extra)
        except click.UsageError as error:
            if not args:  # without a word the group answers with its help
                raise
            raise _in_one_line(error) from error

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            raise _in_one_line(error) from error
        except AdvisorError as error:
            raise Failure(" ".join(str(error).split()), error.exit_code) from error
        except KeyboardInterrupt as error:
            raise Failure("interrupted", 130) from error


@click.group(
    cls=Cli,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": own_word,
        "max_content_width": 100,
    },
)
@click.version_option(__version__, message="advisor %(version)s")
def cli() -> None:
    """Says whether training a language model fits, what is fastest, and what to type."""


def main() -> None:
    """What the installed ``advisor`` command runs."""
    # numpy's threads take time to start and nothing here multiplies matrices. To be said before numpy is loaded.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # An answer is made of many small values that live as long as the process: garbage is not worth looking for, least
    # of all when the process ends.
    gc.set_threshold(200_000)
    atexit.register(gc.freeze)
    from advisor.report.terminal import accept_any_text

    for stream in (sys.stdout, sys.stderr):
        accept_any_text(stream)
    cli(prog_name="advisor")
