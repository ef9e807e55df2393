"""What ``torch.compile`` makes of a layer's kernels: one where several would follow one another.

Inductor fuses element-wise operations and reductions that read each other's results (torch 2.13,
_inductor/scheduler.py); products, fused attention and messages stay by themselves. So a run of others between two of
those becomes one kernel here, which reads and writes what it touches once, and never writes what nobody needs after it.

Left out: runs that inductor cuts, such as at a second reduction over other rows; products that it fuses with what
follows; and memory. A compiled graph keeps fewer tensors for backward and computes more of them again, which the events
do not show: what is held is that of eager mode.
"""

from __future__ import annotations

from collections.abc import Sequence

from advisor.step.tape import Event, Work


def fused(events: Sequence[Event]) -> tuple[Event, ...]:
    """*events* with the work of every run of fusable kernels in the first of them."""
    found: list[Event] = []
    run: list[Event] = []
    for event in events:
        if event.kind == "work" and (event.work.products or event.work.sent or event.work.awaits):
            found += _fused(run)
            found.append(event)
            run = []
        else:
            run.append(event)
    return (*found, *_fused(run))


def _fused(run: Sequence[Event]) -> list[Event]:
    """*run*, which has no products, with all of its work at the first place where there is some."""
    works = [event.work for event in run if event.kind == "work"]
    if len(works) < 2:
        return list(run)
    first = next(at for at, event in enumerate(run) if event.kind == "work")
    rest = [event for event in run[first:] if event.kind != "work"]
    return [*run[:first], run[first]._replace(work=_together(works, _inside(run))), *rest]


def _inside(run: Sequence[Event]) -> set[int]:
    """The memory that *run* takes and gives back."""
    taken = {event.storage for event in run if event.kind == "take"}
    return taken & {event.storage for event in run if event.kind == "give"}


def _together(works: Sequence[Work], inside: set[int]) -> Work:
    """One kernel that touches each memory once, and none of what lies *inside*."""
    touched = [each for work in works for each in work.touched]
    seen = {each.storage: each for each in sorted(touched, key=lambda each: each.size_bytes)}
    once = tuple(each for storage, each in seen.items() if storage not in inside)
    # What a kernel moves beyond the tensors that it names.
    more = sum(work.moved_bytes for work in works) - sum(each.size_bytes for each in touched if each.scales)
    more_fixed = sum(work.fixed_moved_bytes for work in works) - sum(
        each.size_bytes for each in touched if not each.scales
    )
    return Work(
        moved_bytes=more + sum(each.size_bytes for each in once if each.scales),
        fixed_moved_bytes=more_fixed + sum(each.size_bytes for each in once if not each.scales),
        kernels=1,
        touched=once,
    )
