"""Generating, priced, to read: the verdict, how far batch and context can go, what fills the GPU, and the speed."""

from __future__ import annotations

from rich.console import RenderableType
from rich.text import Text

from advisor.cost.inference import InferenceEstimate, PassTime
from advisor.report.estimate import VERDICTS, Names, memory_sections
from advisor.report.numbers import gib, parameter_count, rate, seconds
from advisor.report.question import assumed_line, read_lines, sentence
from advisor.report.tables import list_of, section

OF_A_CALL = Names("a call of generate", "between calls", "weights", ", if PYTORCH_CUDA_ALLOC_CONF says so")


def inference_report(estimate: InferenceEstimate, *, width: int) -> list[RenderableType]:
    """The whole estimate for a page of *width* columns."""
    word, style = VERDICTS[estimate.verdict]
    return [
        Text.assemble((word, style), f": {sentence(estimate.why)}"),
        Text(),
        Text(_question(estimate)),
        *read_lines(estimate.inputs),
        *assumed_line(estimate.inputs),
        *section("How far it goes", _reach(estimate)),
        *memory_sections(estimate.memory, width, OF_A_CALL),
        *section("Time of a call", _time(estimate)),
    ]


def _question(estimate: InferenceEstimate) -> str:
    inference, plan, cluster = estimate.inference, estimate.plan, estimate.cluster
    copies = "one copy" if plan.copies == 1 else f"{plan.copies} copies"
    cut = f", each over {plan.tensor_parallel} GPUs" if plan.talks and plan.copies > 1 else ""
    cut = f" over {plan.tensor_parallel} GPUs" if plan.talks and plan.copies == 1 else cut
    sequences = "one sequence" if inference.batch == 1 else f"{inference.batch} sequences"
    return (
        f"{estimate.model.name} ({parameter_count(estimate.model.parameter_count)} parameters) on {cluster.gpus} × "
        f"{cluster.gpu.name}: {copies}{cut}, {sequences} of {inference.prompt:,} + {estimate.new_tokens:,} tokens at "
        f"once, weights in {inference.weights}, by transformers' generate."
    )


def _reach(estimate: InferenceEstimate) -> RenderableType:
    inference = estimate.inference
    bound = estimate.context_bound
    longest = f"{estimate.longest_context:,} tokens" if estimate.longest_context else "none"
    return list_of(
        [
            ("cache", gib(estimate.kv_cache_bytes), f"keys and values of {inference.context:,} tokens a sequence"),
            (
                "largest batch",
                f"{estimate.largest_batch:,}" if estimate.largest_batch else "none",
                f"sequences of {inference.context:,} tokens, and one more does not fit",
            ),
            (
                "longest context",
                longest,
                f"all positions that the model has, with a batch of {inference.batch}"
                if bound
                else f"with a batch of {inference.batch}, and one more does not fit",
            ),
        ]
    )


def _time(estimate: InferenceEstimate) -> RenderableType:
    prefill, decode = estimate.prefill, estimate.decode
    return list_of(
        [
            ("prompt", seconds(prefill.seconds), _made_of(prefill, "tokens of prompts")),
            ("last token", seconds(decode.seconds), _made_of(decode, "new tokens")),
            ("whole call", seconds(estimate.call_s), f"{rate(estimate.tokens_per_s)} new tokens per second"),
        ]
    )


def _made_of(time: PassTime, what: str) -> str:
    waiting = [
        f"{seconds(duration_s)} {said}"
        for duration_s, said in ((time.launch_s, "launching kernels"), (time.communication_s, "sums over GPUs"))
        if duration_s
    ]
    parts = "".join(f", {each}" for each in waiting)
    return (
        f"a real run may take {seconds(time.low_s)} to {seconds(time.high_s)}; "
        f"{rate(time.tokens_per_s)} {what} per second{parts}"
    )
