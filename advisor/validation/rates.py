"""How fast one device does single operations: matrix products, attention, copies and the optimizer's update.

Every function makes its tensors on the device it is given, a CPU or a GPU, and returns a :class:`Rate`. Operands stay
the same between calls, so that small ones are in the cache of a GPU, where those of a training step seldom are.
Needs the extra ``run``; torch is imported when something is measured.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from advisor.errors import ConfigError
from advisor.specs.job import FORMAT_BYTES, Optimizer
from advisor.step.program import Node, blocks
from advisor.validation.record import from_plain, plain, versions, write_whole

if TYPE_CHECKING:
    import torch

SCHEMA = "advisor/rates/1"

Kind = Literal[
    "product",
    "attention forward",
    "attention backward",
    "copy",
    "host to device",
    "device to host",
    "adamw",
    "launch",
    "disk write",
    "disk read",
    "all-reduce",
    "all-gather",
    "reduce-scatter",
]

SAMPLES = 5
SAMPLE_S = 0.003
"""Least time between the two clocks of a sample, so that neither they nor one launch weigh in it."""
WARM_S = 0.2
MOST_CALLS = 100
"""In a sample."""
DISK_PART_BYTES = 2**24
FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 5
"""Of fused attention, which computes the scores again for its gradients."""
TENSORS = 100
"""Over which the optimizer's parameters are spread."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rate:
    """One operation's time: the median of several samples, and the least."""

    kind: Kind
    sizes: Mapping[str, int | str]
    """What it was done on, by the names of the measuring function's arguments."""
    seconds: float
    least_s: float
    flop: float = 0.0
    moved_bytes: float = 0.0
    """Read and written, each operand once."""

    @property
    def flop_per_s(self) -> float:
        return self.flop / self.seconds

    @property
    def bytes_per_s(self) -> float:
        return self.moved_bytes / self.seconds


def timed(call: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds of one *call*, the median and the least of several samples: by the device's events, or on a CPU its
    clock. A first call, which may choose a kernel or compile one, is left out; a GPU is kept busy until its power limit
    has had time to slow it down, as in training."""
    call()
    calls = max(1, min(MOST_CALLS, int(SAMPLE_S / max(sample(call, device, 1), 1e-9))))
    started = time.perf_counter()
    while device.type == "cuda" and time.perf_counter() - started < WARM_S:
        sample(call, device, calls)
    samples = [sample(call, device, calls) for _ in range(SAMPLES)]
    return statistics.median(samples), min(samples)


def sample(call: Callable[[], object], device: torch.device, calls: int) -> float:
    """Seconds of one of *calls* calls in a row."""
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - started) / calls
    import torch

    begins, ends = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize(device)
    begins.record()
    for _ in range(calls):
        call()
    ends.record()
    ends.synchronize()
    return float(begins.elapsed_time(ends)) / 1000 / calls


def product(device: torch.device, m: int, n: int, k: int, number_format: str = "bf16") -> Rate:
    """A linear layer's product (m x k)(k x n), with its weight as torch stores it, n x k."""
    x, weight = _random(device, number_format, m, k), _random(device, number_format, n, k)
    seconds, least_s = timed(lambda: x @ weight.t(), device)
    return Rate(
        kind="product",
        sizes={"m": m, "n": n, "k": k, "number_format": number_format},
        seconds=seconds,
        least_s=least_s,
        flop=2.0 * m * n * k,
        moved_bytes=float(FORMAT_BYTES[number_format] * (m * k + k * n + m * n)),
    )


def attention(
    device: torch.device,
    batch: int,
    length: int,
    heads: int,
    key_value_heads: int,
    head_dim: int,
    number_format: str = "bf16",
) -> tuple[Rate, Rate]:
    """Causal fused attention as transformers calls it, forward and backward, of whose work the mask leaves half."""
    import torch

    shapes = [(batch, count, length, head_dim) for count in (heads, key_value_heads, key_value_heads)]
    query, key, value = (_random(device, number_format, *shape).requires_grad_() for shape in shapes)
    grouped = heads != key_value_heads

    def forward() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)

    with torch.no_grad():
        times = [timed(forward, device)]
    output = forward()
    upstream = torch.ones_like(output)
    inputs = (query, key, value)
    times.append(timed(lambda: torch.autograd.grad(output, inputs, upstream, retain_graph=True), device))
    sizes: dict[str, int | str] = {
        "batch": batch,
        "length": length,
        "heads": heads,
        "key_value_heads": key_value_heads,
        "head_dim": head_dim,
        "number_format": number_format,
    }
    touched = FORMAT_BYTES[number_format] * 2.0 * batch * length * (heads + key_value_heads) * head_dim
    one_product = batch * heads * length**2 * head_dim
    kinds: tuple[tuple[Kind, int], ...] = (
        ("attention forward", FORWARD_PRODUCTS),
        ("attention backward", BACKWARD_PRODUCTS),
    )
    forwards, backwards = (
        Rate(
            kind=kind,
            sizes=sizes,
            seconds=seconds,
            least_s=least_s,
            flop=float(products * one_product),
            moved_bytes=touched * (1 if products == FORWARD_PRODUCTS else 2),
        )
        for (kind, products), (seconds, least_s) in zip(kinds, times, strict=True)
    )
    return forwards, backwards


def copy(device: torch.device, size_bytes: int) -> Rate:
    """A copy within the device's memory."""
    import torch

    source = torch.zeros(size_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds, least_s = timed(lambda: target.copy_(source), device)
    sizes = {"size_bytes": size_bytes}
    return Rate(kind="copy", sizes=sizes, seconds=seconds, least_s=least_s, moved_bytes=2.0 * size_bytes)


def host_copies(device: torch.device, size_bytes: int, pinned: bool) -> tuple[Rate, Rate]:
    """Copies from the host's memory to the GPU *device* and back."""
    import torch

    host = torch.zeros(size_bytes, dtype=torch.uint8, pin_memory=pinned)
    there = torch.zeros(size_bytes, dtype=torch.uint8, device=device)
    sizes: dict[str, int | str] = {"size_bytes": size_bytes, "memory": "pinned" if pinned else "pageable"}

    def rate(kind: Kind, call: Callable[[], object]) -> Rate:
        seconds, least_s = timed(call, device)
        return Rate(kind=kind, sizes=sizes, seconds=seconds, least_s=least_s, moved_bytes=float(size_bytes))

    return (
        rate("host to device", lambda: there.copy_(host, non_blocking=True)),
        rate("device to host", lambda: host.copy_(there, non_blocking=True)),
    )


def adamw(device: torch.device, parameters: int, optimizer: Optimizer, number_format: str = "fp32") -> Rate:
    """torch's AdamW over *parameters* in a hundred tensors: weight, gradient and both moments are read, all but the
    gradient written."""
    import torch

    from advisor.launch.train_optimizers import ADAMW

    each = max(1, parameters // TENSORS)
    weights = [_random(device, number_format, each).requires_grad_() for _ in range(TENSORS)]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    stepping = torch.optim.AdamW(weights, **ADAMW[optimizer])
    seconds, least_s = timed(stepping.step, device)
    return Rate(
        kind="adamw",
        sizes={"parameters": each * TENSORS, "optimizer": optimizer, "number_format": number_format},
        seconds=seconds,
        least_s=least_s,
        moved_bytes=7.0 * FORMAT_BYTES[number_format] * each * TENSORS,
    )


def launch(device: torch.device) -> Rate:
    """The least time between two kernels: one that has next to nothing to do, called from Python again and again."""
    import torch

    one = torch.zeros(1, device=device)
    seconds, least_s = timed(lambda: one.add_(1), device)
    return Rate(kind="launch", sizes={}, seconds=seconds, least_s=least_s)


def disk(folder: Path, size_bytes: int) -> tuple[Rate, Rate]:
    """Writing a file in *folder* until it is on the disk, and reading it from there, not from the system's cache."""
    part = os.urandom(DISK_PART_BYTES)
    parts = max(1, size_bytes // DISK_PART_BYTES)
    sizes = {"size_bytes": parts * DISK_PART_BYTES}
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        started = time.perf_counter()
        for _ in range(parts):
            file.write(part)
        os.fsync(file.fileno())
        written_s = time.perf_counter() - started
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        started = time.perf_counter()
        while file.read(DISK_PART_BYTES):
            pass
        read_s = time.perf_counter() - started
    moved = float(sizes["size_bytes"])
    return (
        Rate(kind="disk write", sizes=sizes, seconds=written_s, least_s=written_s, moved_bytes=moved),
        Rate(kind="disk read", sizes=sizes, seconds=read_s, least_s=read_s, moved_bytes=moved),
    )


def _random(device: torch.device, number_format: str, *shape: int) -> torch.Tensor:
    """Numbers as a training step has them: zeros would draw less power, and so run faster."""
    import torch

    formats = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return torch.randn(*shape, device=device, dtype=formats[number_format])


def linear_products(step: Node) -> tuple[tuple[int, int, int], ...]:
    """m, n, k of every different product with a weight that *step* makes, by their work, the largest first."""
    found = {
        (int(each.m), int(each.n), int(each.k))
        for _, block, _ in blocks(step)
        for each in block.matmuls
        if each.kind == "linear"
    }
    return tuple(sorted(found, key=lambda sizes: (-sizes[0] * sizes[1] * sizes[2], sizes)))


def write(path: Path, device_name: str, found: Sequence[Rate]) -> None:
    """Write the rates of one device, replacing the file as a whole."""
    head = json.dumps({"schema": SCHEMA, "device": device_name, "versions": versions()}).removesuffix("}")
    rows = ",\n".join(json.dumps(plain(each)) for each in found)
    write_whole(path, f'{head}, "rates": [\n{rows}\n]}}\n')


def read(path: Path) -> tuple[str, tuple[Rate, ...]]:
    """The name of a device, and its rates. Raises ConfigError where the file holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            raise ConfigError(f"{path} has schema {content['schema']}; this release reads {SCHEMA}")
        return content["device"], tuple(from_plain(Rate, each) for each in content["rates"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} holds no rates: {error!r}") from error


def lines(found: Sequence[Rate]) -> Iterator[str]:
    """One line of text a rate."""
    for each in found:
        sizes = " ".join(f"{name} {value}" for name, value in each.sizes.items())
        rate = f"{each.flop_per_s / 1e12:8.1f} TFLOP/s" if each.flop else f"{each.bytes_per_s / 1e9:8.1f} GB/s   "
        yield f"{rate} {1e3 * each.seconds:10.3f} ms  {each.kind}: {sizes}"
