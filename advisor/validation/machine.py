"""Times what this machine does, one thing after the other: for :mod:`advisor.validation.calibrate`."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from advisor.errors import RunError
from advisor.specs.model import Layer
from advisor.specs.plan import Plan, Strategy
from advisor.specs.question import Question
from advisor.step.build import build
from advisor.validation import rates
from advisor.validation.processes import finish
from advisor.validation.rates import Rate
from advisor.validation.run import with_this_package

if TYPE_CHECKING:
    import torch

PRODUCTS = 8
"""Different matrix products of the model that are timed, those with most work."""
CPU_TOKENS = 128
"""Where there is no GPU, products and attention are timed for a sequence of so many."""
CPU_RANKS = 2
COPY_BYTES = {"cuda": 2**30, "cpu": 2**27}
ADAM_PARAMETERS = {"cuda": 10**8, "cpu": 10**7}
"""By the kind of device."""
DISK_BYTES = 2**30

Section = tuple[str, Callable[[float], list[Rate]]]
"""What is measured, and the function that does so in at most the seconds that it is given."""


def sections(device: torch.device, question: Question, nvme: str | None) -> Iterator[Section]:
    """All there is to measure on *device* and its host, with the sizes of *question*'s model."""
    import torch

    kind, host = device.type, torch.device("cpu")
    if kind == "cuda":
        yield "time between two kernels", lambda left_s: [rates.launch(device)]
    yield "host memory", lambda left_s: [rates.copy(host, COPY_BYTES["cpu"])]
    yield "Adam on the host", lambda left_s: [rates.adamw(host, ADAM_PARAMETERS["cpu"], "adamw-fused")]
    if kind == "cuda":
        yield "device memory", lambda left_s: [rates.copy(device, COPY_BYTES[kind])]
        yield "Adam on the device", lambda left_s: [rates.adamw(device, ADAM_PARAMETERS[kind], "adamw-fused")]
        for pinned in (True, False):
            what = f"copies from {'pinned' if pinned else 'pageable'} host memory"
            yield what, partial(_host_copies, device, pinned)
    ranks = torch.cuda.device_count() if kind == "cuda" else CPU_RANKS
    if ranks > 1:
        yield f"collectives over {ranks} ranks", lambda left_s: _collectives(ranks, kind, left_s)
    if nvme:
        yield f"the disk of {nvme}", lambda left_s: [*rates.disk(Path(nvme), DISK_BYTES)]
    length = question.job.sequence_length if kind == "cuda" else CPU_TOKENS
    yield "attention", lambda left_s: _attention(device, question, length)
    yield "matrix products", lambda left_s: _products(device, question, length, left_s)


def _host_copies(device: torch.device, pinned: bool, left_s: float) -> list[Rate]:
    return [*rates.host_copies(device, COPY_BYTES["cpu"], pinned)]


def _products(device: torch.device, question: Question, length: int, left_s: float) -> list[Rate]:
    """The model's, the largest first, as many as there is time for."""
    ends = time.monotonic() + left_s
    plan = Plan(strategy=Strategy.DDP, gpus=1, micro_batch=1)
    step = build(question.model, replace(question.job, sequence_length=length, global_batch=1), plan).step
    found: list[Rate] = []
    for sizes in rates.linear_products(step)[:PRODUCTS]:
        if time.monotonic() < ends:
            found.append(rates.product(device, *sizes))
    return found


def _attention(device: torch.device, question: Question, length: int) -> list[Rate]:
    layer = next(each for each in question.model.layers if isinstance(each, Layer))
    heads = layer.attention
    return [*rates.attention(device, 1, length, heads.heads, heads.key_value_heads, heads.head_dim)]


def _collectives(ranks: int, kind: str, left_s: float) -> list[Rate]:
    """By torchrun. Raises RunError where it fails or takes longer."""
    with tempfile.TemporaryDirectory(prefix="advisor-calibrate-") as folder:
        path = Path(folder) / "rates.json"
        launcher = f"torch.distributed.run --standalone --nproc-per-node {ranks} -m advisor.validation.collectives"
        hidden = {} if kind == "cuda" else {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", *launcher.split(), str(path)]
        ended = finish(command, with_this_package() | hidden, Path(folder), left_s)
        if ended.interrupted:
            raise KeyboardInterrupt
        if ended.exit_code != 0 or not path.is_file():
            raise RunError(f"ended with exit code {ended.exit_code} after {ended.seconds:.0f} s")
        return list(rates.read(path)[1])
