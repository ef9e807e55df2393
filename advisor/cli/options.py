"""Flags that several commands share, grouped in the help by the question they answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from decimal import Decimal, InvalidOperation
from typing import Any, TypeVar, get_args

import click
from click.shell_completion import CompletionItem

from advisor.specs.job import AttentionKernel, LossKernel, Method, Optimizer, ParameterFormat, Precision, Trainer

_DEFAULT = click.core.ParameterSource.DEFAULT

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


class SectionOption(click.Option):
    """An option that stands under *section* in the help."""

    def __init__(self, *arguments: Any, section: str, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.section = section


class SectionCommand(click.Command):
    """A command whose help lists its options under their sections, in the order in which they were declared."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record and isinstance(parameter, click.Option):
                sections.setdefault(getattr(parameter, "section", "Other"), []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


def margin(text: str) -> str | float:
    """``auto``, or a share of memory written as 0.1 or 10%."""
    if text == "auto":
        return text
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise click.BadParameter(f"{text!r} is neither 'auto' nor a share such as 0.1 or 10%") from None
    if not 0 <= share < 1:
        raise click.BadParameter(f"{text} is not a share of the memory; give 0 to below 1, such as 0.1 or 10%")
    return share


def elements(text: str) -> int:
    """A whole number, also as 5e8."""
    try:
        number = float(text)
    except ValueError:
        number = 0.5
    if not number.is_integer():
        raise click.BadParameter(f"{text!r} is not a whole number of elements; give one such as 500000000 or 5e8")
    return int(number)


def amount(text: str) -> int:
    """A number of tokens or samples: 1000000, 1e9, 300B."""
    power = {"k": 3, "m": 6, "b": 9, "t": 12}.get(text[-1:].casefold(), 0)
    try:
        number = Decimal(text[:-1] if power else text).scaleb(power)
    except InvalidOperation:
        number = Decimal("nan")
    if not number.is_finite() or number != number.to_integral_value():
        raise click.BadParameter(f"{text!r} is not a whole number; give one such as 1000000, 1e9 or 300B")
    return int(number)


def price(text: str) -> str | float:
    """USD, or the name of a provider."""
    try:
        return float(text)
    except ValueError:
        return text


def nvme(text: str) -> str | float:
    """GiB of an NVMe, or a folder on it."""
    try:
        return float(text)
    except ValueError:
        return text


def options(*declared: Callable[[Decorated], Decorated]) -> Callable[[Decorated], Decorated]:
    """Several option decorators as one; the help keeps their order."""

    def decorate(function: Decorated) -> Decorated:
        for declare in reversed(declared):
            function = declare(function)
        return function

    return decorate


def option(section: str, *names: str, **settings: Any) -> Callable[[Decorated], Decorated]:
    """``click.option`` under a section of the help."""
    return click.option(*names, cls=SectionOption, section=section, **settings)


def given(context: click.Context, words: dict[str, Any]) -> dict[str, Any]:
    """Those of *words* that were typed: a default is not given but assumed, and every answer says so."""
    return {name: value for name, value in words.items() if context.get_parameter_source(name) is not _DEFAULT}


def complete_model(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of models that start with *incomplete*, with their organisations once a slash is typed."""
    from advisor.catalog.models import model_names

    names = model_names()
    return _starting(names if "/" in incomplete else [name.rpartition("/")[2] for name in names], incomplete)


def complete_gpu(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of GPUs that start with *incomplete*, other than those a shell would take for several words."""
    from advisor.catalog.gpus import all_gpus

    names = (name for gpu in all_gpus() for name in (gpu.name, *gpu.aliases))
    return _starting([name for name in names if " " not in name], incomplete)


def complete_cluster(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of clusters that start with *incomplete*."""
    from advisor.catalog.clusters import all_clusters

    return _starting((name for each in all_clusters() for name in (each.name, *each.aliases)), incomplete)


def _starting(names: Iterable[str], incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in names if name.casefold().startswith(incomplete.casefold())]


_TRAIN, _WHERE, _HOW, _ANSWER = "What to train", "Where", "How", "The answer"
_WHOLE = "The whole training"
_SEARCH = "The plans"


def job_options(*counts: Callable[[Decorated], Decorated]) -> Callable[[Decorated], Decorated]:
    """What is trained, where and how, with the options *counts* that say on how many GPUs."""
    return options(_job, *counts, _machine_and_method)


_job = options(
    option(
        _TRAIN,
        "--model",
        required=True,
        metavar="NAME",
        shell_complete=complete_model,
        help="A name from `advisor models`, a Hugging Face Hub id, a folder, or a config.json.",
    ),
    option(_TRAIN, "--seq-len", type=int, default=2048, show_default=True, help="Tokens in a sequence."),
    option(
        _TRAIN,
        "--global-batch",
        type=int,
        default=64,
        show_default=True,
        help="Sequences per optimizer step, all GPUs.",
    ),
    option(
        _TRAIN,
        "--method",
        type=click.Choice(get_args(Method)),
        default="full",
        show_default=True,
        help="Train every weight, or low-rank adapters beside frozen ones, with lengths, or beside four bits.",
    ),
    option(_TRAIN, "--lora-rank", type=int, default=8, show_default=True, help="Rank of the adapters."),
    option(
        _TRAIN,
        "--lora-targets",
        default="",
        metavar="NAMES",
        help="Linear layers that get adapters, joined by commas, or all-linear.  [default: peft's choice]",
    ),
    option(_TRAIN, "--lora-dropout", type=float, default=0.0, show_default=True, help="Before the adapters."),
)

_machine_and_method = options(
    option(
        _WHERE,
        "--gpu",
        metavar="NAME",
        shell_complete=complete_gpu,
        help="A name from `advisor gpus`.  [default: the one found, else A100-80GB]",
    ),
    option(_WHERE, "--link", metavar="NAME", help="Between GPUs of a machine.  [default: the GPU's usual one]"),
    option(_WHERE, "--network", metavar="NAME", help="Between machines.  [default: ib-hdr]"),
    option(_WHERE, "--host-memory", type=float, metavar="GIB", help="Memory of one machine in GiB.  [default: found]"),
    option(
        _HOW,
        "--precision",
        type=click.Choice(get_args(Precision)),
        help="Number format of the matrix products.  [default: bf16, or fp16 where the GPU has no bf16]",
    ),
    option(
        _HOW,
        "--param-dtype",
        type=click.Choice(get_args(ParameterFormat)),
        default="fp32",
        show_default=True,
        help="What the trained weights are held in.",
    ),
    option(
        _HOW,
        "--optimizer",
        type=click.Choice(get_args(Optimizer)),
        metavar="NAME",
        default="adamw-fused",
        show_default=True,
        help="Of torch: adamw-fused, adamw-foreach, adamw-loop, sgd, sgd-momentum, muon; of bitsandbytes: adamw-8bit, "
        "adamw-paged, adamw-8bit-paged, lion, lion-8bit; adafactor of transformers; galore.",
    ),
    option(_HOW, "--galore-rank", type=int, default=128, show_default=True, help="Rank of GaLore's gradients."),
    option(
        _HOW,
        "--attention",
        type=click.Choice(get_args(AttentionKernel)),
        default="sdpa",
        show_default=True,
        help="Attention kernel, in transformers' words.",
    ),
    option(_HOW, "--compile", is_flag=True, help="Each layer through torch.compile. Memory is priced as without it."),
    option(_HOW, "--padded", is_flag=True, help="Sequences of a batch are padded to one length, not joined and cut."),
    option(
        _HOW,
        "--loss",
        type=click.Choice(get_args(LossKernel)),
        help="How the cross entropy over the vocabulary is computed.  [default: full, or what the trainer does]",
    ),
    option(
        _HOW,
        "--trainer",
        type=click.Choice(get_args(Trainer)),
        default="advisor",
        show_default=True,
        help="Whose program trains, and so whose files are written.",
    ),
    option(
        _HOW,
        "--margin",
        type=margin,
        metavar="auto|SHARE",
        default="auto",
        show_default=True,
        help="Share of GPU memory to keep free, such as 10%.",
    ),
    option(
        _HOW,
        "--calibration",
        metavar="NAME|FILE",
        help="Measured constants to use.  [default: those that `advisor calibrate` found here for the GPU]",
    ),
)

question_options = job_options(
    option(
        _WHERE,
        "--cluster",
        metavar="NAME|FILE",
        shell_complete=complete_cluster,
        help="A name from `advisor clusters`, or a YAML file. Flags below win over it.",
    ),
    option(_WHERE, "--gpus", type=int, help="GPUs in all.  [default: those found, else 1]"),
    option(_WHERE, "--nodes", type=int, default=1, show_default=True, help="Machines they are in."),
)
"""The job and the machine, as `recommend` and `estimate` both ask for them."""


search_options = options(
    option(
        _SEARCH,
        "--strategy",
        metavar="PATTERNS",
        help="Search these alone: names and patterns such as zero*, joined by commas.",
    ),
    option(
        _SEARCH,
        "--offload",
        type=click.Choice(["none", "optimizer", "optimizer+params"]),
        help="Search plans alone that offload this.",
    ),
)
"""What a search is kept to."""

layout_options = options(
    option(_SEARCH, "--tp", type=int, help="GPUs that cut each layer (tensor), with --trainer megatron."),
    option(
        _SEARCH,
        "--sequence-parallel/--no-sequence-parallel",
        default=None,
        help="Whether they cut what they would hold alike, too.  [default: what is faster]",
    ),
    option(_SEARCH, "--pp", type=int, help="Stages of layers (pipeline)."),
    option(_SEARCH, "--vpp", type=int, help="Runs of layers a stage (interleaved)."),
    option(_SEARCH, "--cp", type=int, help="GPUs that cut a sequence (context)."),
    option(_SEARCH, "--ep", type=int, help="GPUs that experts are spread over."),
    option(_SEARCH, "--micro-batch", type=int, help="Sequences a GPU takes at once."),
    option(
        _SEARCH,
        "--checkpointing",
        type=click.Choice(["none", "selective", "full"]),
        help="Which activations are computed again in backward.",
    ),
)
"""The same of ``--trainer megatron``, whose plans else go over all of these."""

training_options = options(
    option(_WHOLE, "--tokens", type=amount, metavar="NUMBER", help="Tokens to train on, such as 1e9 or 300B."),
    option(_WHOLE, "--samples", type=amount, metavar="NUMBER", help="The same in sequences."),
    option(_WHOLE, "--epochs", type=float, metavar="NUMBER", help="How often to go through them.  [default: once]"),
    option(
        _WHOLE,
        "--price",
        type=price,
        metavar="USD|PROVIDER",
        help="What a GPU costs for an hour, or whose list price.  [default: a list price, with its date]",
    ),
    option(_WHOLE, "--max-hours", type=float, metavar="HOURS", help="Refuse plans that take longer."),
    option(_WHOLE, "--max-cost", type=float, metavar="USD", help="Refuse plans that cost more."),
)
"""How much is trained on in all, and what that may take."""

trust_option = option(
    _TRAIN,
    "--trust-remote-code",
    is_flag=True,
    help="Let the model's repository bring the code that is run.",
)
"""For whatever runs transformers."""

trace_options = options(
    option(
        _TRAIN,
        "--trace",
        is_flag=True,
        help="Run the model's own code on tensors without memory in place of formulas: any causal model, needs torch.",
    ),
    trust_option,
)
"""Where what the layers do is taken from."""

form_options = options(
    option(_ANSWER, "--json", "as_json", is_flag=True, help="Print one JSON object, in base units."),
    option(_ANSWER, "--csv", "as_csv", is_flag=True, help="Print comma-separated rows, in base units."),
)
"""The machine forms; without them, tables to read."""
