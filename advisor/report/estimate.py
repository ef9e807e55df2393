"""One priced plan to read: the verdict, what fills the GPU, what travels, and where the time goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rich.console import RenderableType
from rich.text import Text

from advisor.cost.results import Estimate, Memory, StepTime, TrafficLine
from advisor.report.numbers import GB, GIB, aligned, bar, gib, percent, rate, seconds
from advisor.report.question import assumed_line, question_line, read_lines, sentence
from advisor.report.tables import INDENT, Column, faint, fitting, list_of, section, table_of
from advisor.report.training import training_section
from advisor.step.program import Line

VERDICTS = {"fits": ("Fits", "bold green"), "tight": ("Tight", "bold yellow"), "no": ("Does not fit", "bold red")}
BAR_WIDTH = 20


class Names(NamedTuple):
    """How to speak of what is run."""

    whole: str
    between: str
    """When the states are all that there is."""
    states: str
    set_by: str
    """Who sets the allocator so."""


OF_A_STEP = Names("a step", "between steps", "weights, gradients that are kept, optimizer", " as run.sh sets")
LEAST_SHOWN_BYTES = GIB // 200
"""What would read 0.00 GiB is left to the sum of its category."""


def estimate_report(estimate: Estimate, *, width: int) -> list[RenderableType]:
    """The whole estimate for a page of *width* columns."""
    word, style = VERDICTS[estimate.verdict]
    plan, memory = estimate.plan, estimate.memory
    checkpointing = "every layer recomputed" if plan.checkpointing.value == "full" else "no activation checkpointing"
    parts = [
        Text.assemble((word, style), f": {sentence(estimate.why)}"),
        Text(),
        Text(question_line(estimate.model, estimate.job, estimate.cluster)),
        Text(
            f"{plan.title}: micro-batch {plan.micro_batch} × {plan.accumulation_steps} accumulation steps, "
            f"{checkpointing}."
        ),
        *read_lines(estimate.inputs),
        *assumed_line(estimate.inputs),
        *memory_sections(memory, width, OF_A_STEP),
    ]
    parts += section(
        f"Host memory of one machine: {gib(memory.host_bytes)} of {gib(memory.host_capacity_bytes)}",
        *_host(memory, estimate.cluster.gpus_per_node, width),
    )
    if memory.nvme_bytes:
        parts += section(
            f"NVMe of one machine: {gib(memory.nvme_bytes)} of {gib(memory.nvme_capacity_bytes)}",
            Text(f"Of that, one of its {estimate.cluster.gpus_per_node} ranks keeps there:"),
            _ledger(memory.nvme_ledger, width),
        )
    if estimate.traffic:
        parts += section("What one GPU sends and copies in a step", *_traffic(estimate.traffic, width))
    parts += section("Time of a step", _time(estimate.time))
    if estimate.training:
        parts += training_section(estimate.training, estimate.cluster)
    return list(parts)


def memory_sections(memory: Memory, width: int, named: Names) -> list[RenderableType]:
    """What the fullest GPU holds, in all, at the peak and in each phase."""
    rank = f"{'the fullest GPU, ' if memory.fullest else ''}rank {memory.rank}"
    return [
        *section(f"Memory of {rank}", _totals(memory, named)),
        *section(
            f"What is allocated at the peak: {memory.peak_phase}, {memory.peak_label}", _ledger(memory.ledger, width)
        ),
        *section(f"Peak of each phase of {named.whole}", _timeline(memory, width)),
    ]


def _totals(memory: Memory, named: Names) -> RenderableType:
    sizes = {
        named.between: (memory.states_bytes, named.states),
        "allocated at the peak": (memory.peak_allocated_bytes, "torch.cuda.max_memory_allocated()"),
        "reserved at the peak": (
            memory.peak_reserved_bytes,
            f"torch.cuda.max_memory_reserved(), with {memory.allocator}{named.set_by}",
        ),
        "used on the device": (
            memory.device_used_bytes,
            f"as nvidia-smi shows it; a real run may lie between {memory.low_bytes / GIB:.1f} and "
            f"{memory.high_bytes / GIB:.1f}",
        ),
        "the GPU has": (memory.capacity_bytes, ""),
    }
    numbers = _right(aligned([size / GIB for size, _ in sizes.values()]))
    return list_of(
        (name, f"{number} GiB", said) for (name, (_, said)), number in zip(sizes.items(), numbers, strict=True)
    )


def _ledger(ledger: Sequence[Line], width: int) -> RenderableType:
    """Entries under their categories, the largest first, and their total."""
    total = _sum(ledger)
    rows = [row for lines in _by_category(ledger) for row in _category_rows(lines, total)]
    rows.append(("total", "", total, "100 %", ""))
    categories, labels, sizes, shares, bars = zip(*rows, strict=True)
    columns = [
        Column(header="Category", cells=categories, justify="left"),
        Column(header="What", cells=labels, justify="left"),
        Column(header="Bytes", cells=[f"{size:,}" for size in sizes], rank=2),
        Column(header="GiB", cells=[f"{size / GIB:,.2f}" for size in sizes]),
        Column(header="Share", cells=shares),
        Column(header="", cells=bars, justify="left", rank=1),
    ]
    kept, _ = fitting(columns, width - INDENT)
    return table_of(kept, strong_rows=[len(rows) - 1])


def _by_category(ledger: Sequence[Line]) -> list[list[Line]]:
    categories: dict[str, list[Line]] = {}
    for line in sorted(ledger, key=lambda line: -line.size_bytes):
        categories.setdefault(line.category, []).append(line)
    return sorted(categories.values(), key=_sum, reverse=True)


def _category_rows(lines: Sequence[Line], total: int) -> list[tuple[str, str, int, str, str]]:
    """One row for a category of one entry; else a row for the whole of it and one for each entry that shows."""
    size = _sum(lines)
    share = size / total if total else 0.0
    shown = [line for line in lines if line.size_bytes >= LEAST_SHOWN_BYTES] or lines[:1]
    entries = [(line.label, line.size_bytes) for line in shown]
    if size - _sum(shown) >= LEAST_SHOWN_BYTES:
        entries.append(("smaller entries", size - _sum(shown)))
    whole = (lines[0].category, entries[0][0] if len(entries) == 1 else "", size, percent(share), bar(share, BAR_WIDTH))
    return [whole, *(("", f"  {label}", part, "", "") for label, part in entries if len(entries) > 1)]


def _timeline(memory: Memory, width: int) -> RenderableType:
    phases = memory.timeline
    columns = [
        Column(header="Phase", cells=[each.phase for each in phases], justify="left"),
        Column(header="Peak GiB", cells=[f"{each.peak_bytes / GIB:,.2f}" for each in phases]),
        Column(header="After it GiB", cells=[f"{each.end_bytes / GIB:,.2f}" for each in phases]),
        Column(
            header="Of the GPU's memory",
            cells=[bar(each.peak_bytes / memory.capacity_bytes, BAR_WIDTH) for each in phases],
            justify="left",
            rank=1,
        ),
    ]
    kept, _ = fitting(columns, width - INDENT)
    return table_of(kept)


def _host(memory: Memory, processes: int, width: int) -> list[RenderableType]:
    if not memory.host_ledger:
        return []
    owner = "its one process" if processes == 1 else f"one of its {processes} processes"
    return [Text(f"Of that, the tensors of {owner}:"), _ledger(memory.host_ledger, width)]


def _traffic(traffic: Sequence[TrafficLine], width: int) -> list[RenderableType]:
    columns = [
        Column(header="What", cells=[line.what for line in traffic], justify="left"),
        Column(header="How", cells=[line.collective for line in traffic], justify="left", rank=1),
        Column(header="Link", cells=[line.link for line in traffic], justify="left", rank=2),
        Column(header="GB", cells=aligned([line.bytes_per_step / GB for line in traffic])),
        Column(header="Takes s", cells=_durations([line.seconds for line in traffic])),
        Column(header="Waited for s", cells=_durations([line.exposed_seconds for line in traffic])),
    ]
    kept, _ = fitting(columns, width - INDENT)
    return [table_of(kept), faint("Waited for: the part that does not hide behind computing.")]


def _time(time: StepTime) -> RenderableType:
    parts = [
        ("step", time.step_s, f"a real run may take {seconds(time.low_s)} to {seconds(time.high_s)}"),
        ("  computing", time.compute_s, ""),
        ("  launching", time.launch_s, "kernels one by one, slower than the GPU runs them"),
        ("  waiting", time.exposed_communication_s, "for other GPUs and the host"),
        ("  bubble", time.bubble_s, "for the pipeline to fill and drain"),
        ("  optimizer", time.optimizer_s, "updating the weights"),
    ]
    shown = [part for part in parts if part[1] or part[0] not in ("  launching", "  bubble")]
    durations = [f"{each} s" for each in _durations([duration_s for _, duration_s, _ in shown])]
    *durations, tokens = _right([*durations, rate(time.tokens_per_s)])
    return list_of(
        [
            *((name, duration, note) for (name, _, note), duration in zip(shown, durations, strict=True)),
            ("tokens per second", tokens, f"{rate(time.tokens_per_s_per_gpu)} per GPU"),
            (
                "MFU",
                percent(time.mfu).rjust(len(tokens)),
                f"{time.flop_per_s_per_gpu / 1e12:,.0f} TFLOP/s per GPU of the model's own arithmetic",
            ),
        ]
    )


def _durations(durations_s: Sequence[float]) -> list[str]:
    return aligned(durations_s, significant=2, most_decimals=3)


def _right(numbers: Sequence[str]) -> list[str]:
    width = max(map(len, numbers))
    return [number.rjust(width) for number in numbers]


def _sum(lines: Sequence[Line]) -> int:
    return sum(line.size_bytes for line in lines)
