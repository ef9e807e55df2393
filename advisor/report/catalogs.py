"""The catalogs of models, GPUs and clusters to read."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType

from advisor.catalog.clusters import ClusterProfile
from advisor.catalog.models import ModelRow
from advisor.report.numbers import GB, GIB, aligned, parameter_count
from advisor.report.tables import Column, faint, fitting, table_of
from advisor.specs.hardware import Gpu


def models_report(models: Sequence[ModelRow], *, width: int) -> list[RenderableType]:
    """One row per model."""
    columns = [
        Column(header="Model", cells=[model.name for model in models], justify="left"),
        Column(header="Parameters", cells=[parameter_count(model.parameters) for model in models]),
        Column(header="Family", cells=[model.family for model in models], justify="left", rank=1),
        Column(header="Layers", cells=[str(model.layers) for model in models], rank=3),
        Column(header="Hidden\nsize", cells=[f"{model.hidden_size:,}" for model in models], rank=4),
        Column(header="Vocabulary", cells=[f"{model.vocabulary_size:,}" for model in models], rank=5),
        Column(
            header="Longest\nsequence",
            cells=[f"{model.maximum_positions:,}" if model.maximum_positions else "any" for model in models],
            rank=2,
        ),
    ]
    kept, _ = fitting(columns, width)
    return [table_of(kept)]


def gpus_report(gpus: Sequence[Gpu], *, width: int) -> list[RenderableType]:
    """One row per GPU; an assumed figure has a star. All GPUs with bf16 compute in it as fast as in fp16."""
    memory = aligned([gpu.memory_bytes / GIB for gpu in gpus], most_decimals=1)
    bandwidth = [f"{gpu.memory_bandwidth_bytes_per_s / GB:,.0f}" for gpu in gpus]
    columns = [
        Column(header="GPU", cells=[gpu.name for gpu in gpus], justify="left"),
        Column(header="Or just", cells=[_short_name(gpu) for gpu in gpus], justify="left", rank=2),
        Column(header="Memory\nGiB ", cells=_starred(gpus, "memory_bytes", memory)),
        Column(header="Bandwidth\nGB/s ", cells=_starred(gpus, "memory_bandwidth_bytes_per_s", bandwidth), rank=1),
        Column(header="16-bit\nTFLOP/s ", cells=[_peak(gpu, "bf16" if gpu.has_bf16 else "fp16") for gpu in gpus]),
        Column(header="fp32\nTFLOP/s ", cells=[_peak(gpu, "fp32") for gpu in gpus], rank=4),
        Column(header="fp8\nTFLOP/s ", cells=[_peak(gpu, "fp8") for gpu in gpus], rank=5),
        Column(header="bf16", cells=["yes" if gpu.has_bf16 else "no" for gpu in gpus], justify="left"),
        Column(header="Link", cells=[gpu.link for gpu in gpus], justify="left", rank=3),
    ]
    kept, _ = fitting(columns, width)
    return [table_of(kept), faint("Dense peaks, without sparsity. *: assumed, for want of a source.")]


def clusters_report(clusters: Sequence[ClusterProfile], *, width: int) -> list[RenderableType]:
    """One row per cluster, of one machine."""
    networks = [each.network(each.gpus_per_node) for each in clusters]
    columns = [
        Column(header="Cluster", cells=[each.name for each in clusters], justify="left"),
        Column(header="GPUs", cells=[f"{each.gpus_per_node} × {each.gpu.name}" for each in clusters], justify="left"),
        Column(header="Link", cells=[_joined(each) for each in clusters], justify="left"),
        Column(header="Network", cells=[each.name if each else "" for each in networks], justify="left", rank=1),
        Column(
            header="GB/s of\na GPU",
            cells=[f"{each.bandwidth_bytes_per_s / GB:.3g}" if each else "" for each in networks],
            rank=2,
        ),
        Column(
            header="Host\nGiB",
            cells=[f"{each.host_memory_bytes / GIB:,.0f}" if each.host_memory_bytes else "" for each in clusters],
            rank=3,
        ),
        Column(
            header="Or just",
            cells=[min(each.aliases, key=len, default="") for each in clusters],
            justify="left",
            rank=4,
        ),
    ]
    kept, _ = fitting(columns, width)
    return [
        table_of(kept),
        faint("One machine; --nodes or --gpus says how many. --cluster FILE.yaml takes one of your own."),
    ]


def _joined(cluster: ClusterProfile) -> str:
    """What joins the GPUs of a machine."""
    topology = cluster.topology
    if topology is None:
        return cluster.link.name
    sizes = "+".join(str(len(island)) for island in topology.islands)
    return f"{cluster.link.name} in {sizes}, {topology.between.name}"


def _short_name(gpu: Gpu) -> str:
    return next((alias for alias in gpu.aliases if len(alias) < len(gpu.name)), "")


def _peak(gpu: Gpu, number: str) -> str:
    peak = gpu.peak_flop_per_s.get(number)
    return "" if peak is None else f"{peak / 1e12:,.0f}{_star(gpu, number)}"


def _starred(gpus: Sequence[Gpu], field: str, texts: Sequence[str]) -> list[str]:
    return [f"{text}{_star(gpu, field)}" for gpu, text in zip(gpus, texts, strict=True)]


def _star(gpu: Gpu, field: str) -> str:
    return "*" if field in gpu.assumed_fields else " "
