"""``advisor estimate``: price one plan and print where its bytes and seconds go."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

import click

from advisor.cli.answer import NOTHING_FITS, form_of, notes, print_answer, traced_first
from advisor.cli.inference import answer_inference, inference_options, refuse_without_flag
from advisor.cli.options import (
    SectionCommand,
    elements,
    form_options,
    given,
    nvme,
    option,
    options,
    question_options,
    trace_options,
    training_options,
)
from advisor.specs.cuts import KeyValueExchange
from advisor.specs.megatron import ContextExchange
from advisor.specs.plan import OWN_STRATEGIES, Checkpointing, GradientFormat, Offload, OffloadPlace

if TYPE_CHECKING:
    from rich.console import RenderableType

    from advisor.cost.results import Estimate


class StrategyChoice(click.Choice[str]):
    """Names of strategies; of one that is known and not run, why not is said."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from advisor.catalog.legality import why_not_run

        if value not in self.choices and (reason := why_not_run(value)):
            self.fail(f"{value}: {reason}", param, ctx)
        return super().convert(value, param, ctx)


plan_options = options(
    option(
        "The plan",
        "--config",
        metavar="FILE",
        type=click.Path(),
        help="A DeepSpeed JSON, accelerate YAML or launch script to read; flags win over it.",
    ),
    option(
        "The plan",
        "--strategy",
        type=StrategyChoice([each.value for each in OWN_STRATEGIES]),
        help="Who keeps which share of weights, gradients and optimizer.",
    ),
    option(
        "The plan",
        "--offload",
        type=click.Choice([offload.value for offload in Offload]),
        default="none",
        show_default=True,
        help="What lives outside the GPU between its uses.",
    ),
    option(
        "The plan",
        "--offload-to",
        type=click.Choice(get_args(OffloadPlace)),
        default="cpu",
        show_default=True,
        help="Where that lives: host memory, or with zero3 the machine's NVMe.",
    ),
    option(
        "Where",
        "--nvme",
        type=nvme,
        metavar="GIB|FOLDER",
        help="NVMe of one machine: its size, or a folder on it.  [default: assumed]",
    ),
    option(
        "The plan",
        "--micro-batch",
        type=int,
        default=1,
        show_default=True,
        help="Sequences a GPU takes at once.",
    ),
    option(
        "The plan",
        "--grad-accum",
        type=int,
        help="Micro-batches per optimizer step.  [default: from the global batch]",
    ),
    option(
        "The plan",
        "--checkpointing",
        type=click.Choice([checkpointing.value for checkpointing in Checkpointing]),
        default="none",
        show_default=True,
        help="Which activations are computed again in backward.",
    ),
    option(
        "The plan",
        "--bucket-size",
        type=elements,
        metavar="ELEMENTS",
        help="DeepSpeed's reduce bucket, such as 5e8.  [default: DeepSpeed's own]",
    ),
    option(
        "The plan",
        "--grad-accum-dtype",
        type=click.Choice(get_args(GradientFormat)),
        help="What DeepSpeed accumulates gradients in.  [default: the precision]",
    ),
    option(
        "The plan",
        "--fsdp-version",
        type=click.IntRange(1, 2),
        default=2,
        show_default=True,
        help="PyTorch's FSDP: 2 cuts each tensor by rows, 1 all of a layer as one.",
    ),
    option(
        "The plan",
        "--shard-ranks",
        type=click.IntRange(min=2),
        help="GPUs that HSDP cuts states over.  [default: those of a machine]",
    ),
)

cut_options = options(
    option("The plan", "--cp", type=int, default=1, show_default=True, help="GPUs that cut a sequence (context)."),
    option(
        "The plan",
        "--cp-exchange",
        type=click.Choice(get_args(KeyValueExchange)),
        default="allgather",
        show_default=True,
        help="With --cp and FSDP: keys and values of all GPUs at once, or of one after the other.",
    ),
    option(
        "The plan",
        "--sp",
        type=int,
        default=1,
        show_default=True,
        help="With ZeRO: GPUs that share a sequence, and its heads within attention (Ulysses).",
    ),
)
"""Ways to cut sequences, of FSDP and ZeRO; the first of ``--trainer megatron``, too."""

parallel_options = options(
    cut_options,
    option("The plan", "--tp", type=int, default=1, show_default=True, help="GPUs that cut each layer (tensor)."),
    option("The plan", "--sequence-parallel", is_flag=True, help="With --tp: cut what these would hold alike, too."),
    option("The plan", "--pp", type=int, default=1, show_default=True, help="Stages of layers (pipeline)."),
    option("The plan", "--vpp", type=int, default=1, show_default=True, help="Runs of layers a stage (interleaved)."),
    option("The plan", "--decoder-first-pipeline-num-layers", type=int, default=0, help="Layers of the first stage."),
    option("The plan", "--decoder-last-pipeline-num-layers", type=int, default=0, help="Layers of the last stage."),
    option(
        "The plan",
        "--cp-comm-type",
        type=click.Choice(get_args(ContextExchange)),
        default="p2p",
        show_default=True,
        help="With --cp: a ring of keys and values, or heads for sequences.",
    ),
    option("The plan", "--ep", type=int, default=1, show_default=True, help="GPUs that experts are spread over."),
    option("The plan", "--etp", type=int, help="GPUs that cut each expert.  [default: --tp]"),
)
"""The same with those that ``--trainer megatron`` alone has."""

rank_option = option("The plan", "--rank", type=int, help="Whose memory to show.  [default: the fullest rank's]")


@click.command(cls=SectionCommand)
@question_options
@trace_options
@plan_options
@parallel_options
@rank_option
@training_options
@inference_options
@form_options
@click.pass_context
def estimate(context: click.Context, /, *, as_json: bool, as_csv: bool, **question: Any) -> None:
    """Price one plan: memory, traffic and time of a training step.

    With --inference: of a call of transformers' generate. Exits with 3 where it does not fit.

    \b
    Examples:
      advisor estimate --model Qwen2.5-1.5B --gpus 4 --strategy zero2
      advisor estimate --model Llama-3.1-8B --gpus 8 --gpu H100 --strategy fsdp
      advisor estimate --model Llama-3.1-8B --gpu H100 --config accelerate.yaml
      advisor estimate --model Qwen3-32B --gpus 16 --trainer megatron --tp 8
      advisor estimate --model Llama-3.1-8B --gpus 8 --strategy fsdp --tokens 1e9
      advisor estimate --inference --model Llama-3.1-8B --gpu L4 --weights nf4
      advisor estimate --model Qwen3-8B --gpus 8 --strategy zero3 --sp 8
    """
    from advisor.cost.estimate import estimate as price

    form, words = form_of(as_json, as_csv), given(context, question)
    if question["inference"]:
        return answer_inference(context, form, words)
    refuse_without_flag(words)
    with traced_first(question["trace"]):
        answer = price(**words)
    notes(answer.warnings)
    print_answer(
        form,
        whole=lambda: _whole(answer),
        rows=lambda: _rows(answer),
        page=lambda width: _page(answer, width),
    )
    if answer.verdict == "no":
        context.exit(NOTHING_FITS)


def _whole(answer: Estimate) -> Mapping[str, object]:
    from advisor.report.machine import estimate_object

    return estimate_object(answer)


def _rows(answer: Estimate) -> Sequence[Mapping[str, object]]:
    from advisor.search.results import row

    return [row(answer)]


def _page(answer: Estimate, width: int) -> Iterable[RenderableType]:
    from advisor.report.estimate import estimate_report

    return estimate_report(answer, width=width)
