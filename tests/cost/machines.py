"""Clusters and a calibration with round numbers."""

from __future__ import annotations

from dataclasses import replace

from advisor.catalog.calibrations import find_calibration
from advisor.specs.hardware import Cluster, Gpu, Link

GB_PER_S = 1e9

GPU = Gpu(
    name="round",
    memory_bytes=80 * 2**30,
    memory_bandwidth_bytes_per_s=2e12,
    peak_flop_per_s={"bf16": 400e12, "fp16": 400e12, "tf32": 200e12, "fp32": 20e12},
    link="fast",
    host_link="host",
    architecture="round",
    compute_capability="round",
    source="made up",
)

CALIBRATION = replace(
    find_calibration(),
    matmul_efficiency={"default": 0.5},
    attention_efficiency={f"{kernel}, default": (0.25, 0.25) for kernel in ("sdpa", "flash", "memory-efficient")},
    attention_extra_columns=0,
    attention_narrow_share=1.0,
    bandwidth_efficiency=0.5,
    copy_efficiency=0.9,
    operand_bandwidth_efficiency=1e9,
    product_floor_s=0.0,
    kernel_floor_s=0.0,
    kernel_launch_s=1e-5,
    overlap_share=0.8,
    cpu_adam_bytes_per_parameter=30,
    time_ranges={"default": (0.9, 1.2)},
)


def link(name: str, gigabytes_per_s: float, latency_s: float = 0.0) -> Link:
    return Link(
        name=name,
        kind=name,
        bandwidth_bytes_per_s=gigabytes_per_s * GB_PER_S,
        peak_bytes_per_s=gigabytes_per_s * GB_PER_S,
        latency_s=latency_s,
        assumed=True,
        source="made up",
    )


def cluster(
    gpus: int = 8,
    nodes: int = 1,
    fast: float = 200,
    network: float = 10,
    latency_s: float = 0.0,
    network_latency_s: float = 0.0,
) -> Cluster:
    """*fast* and *network* are GB/s per GPU."""
    return Cluster(
        gpu=GPU,
        gpus=gpus,
        nodes=nodes,
        link=link("fast", fast, latency_s),
        host_link=link("host", 20),
        network=link("network", network, network_latency_s),
        host_memory_bytes=2**40,
        cpu_memory_bandwidth_bytes_per_s=120 * GB_PER_S,
    )
