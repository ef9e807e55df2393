"""Answers made by hand, with the sizes that Qwen2.5-1.5B has on four A100-80GB."""

from __future__ import annotations

from dataclasses import replace

from advisor.cost.results import Estimate, Memory, PhaseMemory, StepTime, TrafficLine
from advisor.search.results import Recommendation, Rejected
from advisor.specs.hardware import Cluster, Gpu, Link
from advisor.specs.job import Job
from advisor.specs.model import Attention, FeedForward, Layer, ModelSpec, Parameter, Run
from advisor.specs.plan import Checkpointing, Offload, Plan, Strategy
from advisor.specs.question import Input
from advisor.step.program import Line

GIB = 2**30


def _qwen() -> ModelSpec:
    hidden, feed_forward, key_value, vocabulary = 1536, 8960, 256, 151_936
    tensors = {
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.q_proj.bias": (hidden,),
        "self_attn.k_proj.weight": (key_value, hidden),
        "self_attn.k_proj.bias": (key_value,),
        "self_attn.v_proj.weight": (key_value, hidden),
        "self_attn.v_proj.bias": (key_value,),
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (feed_forward, hidden),
        "mlp.up_proj.weight": (feed_forward, hidden),
        "mlp.down_proj.weight": (hidden, feed_forward),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    layer = Layer(
        attention=Attention(heads=12, key_value_heads=2, head_dim=128, bias=True),
        feed_forward=FeedForward(width=feed_forward),
        norm="rms",
        parameters=tuple(Parameter(name, shape) for name, shape in tensors.items()),
    )
    return ModelSpec(
        name="Qwen2.5-1.5B",
        family="qwen2",
        objective="causal",
        hidden_size=hidden,
        vocabulary_size=vocabulary,
        maximum_positions=131_072,
        tied_embeddings=True,
        embedding=(Parameter("model.embed_tokens.weight", (vocabulary, hidden)),),
        runs=(Run((layer,), 28),),
        final_norm="rms",
        head=(Parameter("model.norm.weight", (hidden,)),),
        source="made for tests",
    )


QWEN = _qwen()
A100 = Gpu(
    name="A100-80GB",
    aliases=("A100", "A100-SXM4-80GB"),
    memory_bytes=84_987_740_160,
    memory_bandwidth_bytes_per_s=2.039e12,
    peak_flop_per_s={"fp32": 19.5e12, "tf32": 156e12, "fp16": 312e12, "bf16": 312e12},
    link="nvlink3",
    host_link="pcie4-x16",
    architecture="Ampere",
    compute_capability="8.0",
    power_w=400.0,
    source="made for tests",
)
T4 = Gpu(
    name="T4",
    memory_bytes=15_655_829_504,
    memory_bandwidth_bytes_per_s=3.2e11,
    peak_flop_per_s={"fp32": 8.1e12, "fp16": 65e12},
    link="pcie3-x16",
    host_link="pcie3-x16",
    architecture="Turing",
    compute_capability="7.5",
    assumed_fields=("memory_bandwidth_bytes_per_s",),
    source="made for tests",
)


def _link(name: str, kind: str, bandwidth: float) -> Link:
    return Link(
        name=name,
        kind=kind,
        bandwidth_bytes_per_s=bandwidth,
        peak_bytes_per_s=bandwidth / 0.8,
        latency_s=5e-6,
        assumed=False,
        source="made for tests",
    )


CLUSTER = Cluster(
    gpu=A100,
    gpus=4,
    nodes=1,
    link=_link("nvlink3", "intra", 235e9),
    host_link=_link("pcie4-x16", "host", 25e9),
    network=_link("ib-hdr200", "inter", 22e9),
    host_memory_bytes=1024 * GIB,
    cpu_memory_bandwidth_bytes_per_s=300e9,
)
JOB = Job()
INPUTS = (
    Input("model", "Qwen/Qwen2.5-1.5B", "given"),
    Input("gpus", 4, "given"),
    Input("gpu", "A100-80GB", "assumed"),
    Input("link", "nvlink3", "assumed"),
    Input("host_memory_gib", 1024, "assumed"),
    Input("seq_len", 2048, "assumed"),
)


def _traffic(what: str, collective: str, sent_bytes: int, exposed_s: float) -> TrafficLine:
    return TrafficLine(
        what=what,
        collective=collective,
        link="nvlink3",
        bytes_per_step=sent_bytes,
        seconds=0.042,
        exposed_seconds=exposed_s,
    )


def made_estimate(
    strategy: Strategy = Strategy.ZERO1,
    *,
    offload: Offload = Offload.NONE,
    micro_batch: int = 4,
    checkpointing: Checkpointing = Checkpointing.NONE,
    device_gib: float = 51.3,
    step_s: float = 2.31,
    traffic_gb: float = 9.3,
    host_gib: float = 30.0,
    why: str = "memory is not what limits it, and it sends least",
) -> Estimate:
    """One priced plan whose parts add up."""
    used = round(device_gib * GIB)
    allocated = used - 2 * GIB
    states = {
        ("parameters", "weights, bf16"): round(2.88 * GIB),
        ("optimizer", "fp32 master weights"): round(1.44 * GIB),
        ("optimizer", "Adam momentum and variance"): round(2.88 * GIB),
        ("gradients", "gradients, bf16"): round(2.88 * GIB),
        ("buffers", "reduce buckets"): round(1.86 * GIB),
        ("workspace", "cuBLAS workspace"): 8 * 2**20,
    }
    activations = (allocated - sum(states.values())) // 2
    ledger = [Line(category, label, size) for (category, label), size in states.items()]  # type: ignore[arg-type]
    ledger.append(Line("activations", "saved by 28 layers", activations))
    ledger.append(Line("logits", "logits and their gradient", allocated - sum(line.size_bytes for line in ledger)))
    return Estimate(
        model=QWEN,
        job=JOB,
        cluster=CLUSTER,
        plan=Plan(
            strategy=strategy,
            gpus=4,
            micro_batch=micro_batch,
            accumulation_steps=16 // micro_batch,
            checkpointing=checkpointing,
            offload=offload,
        ),
        inputs=INPUTS,
        memory=Memory(
            capacity_bytes=A100.memory_bytes,
            states_bytes=round(10.1 * GIB),
            peak_allocated_bytes=allocated,
            peak_reserved_bytes=allocated + GIB,
            device_used_bytes=used,
            low_bytes=round(0.95 * used),
            high_bytes=round(1.06 * used),
            peak_phase="backward",
            peak_label="loss backward",
            rank=0,
            fullest=True,
            allocator="expandable segments",
            cache_releases=0,
            ledger=tuple(ledger),
            timeline=(
                PhaseMemory("init", round(11.5 * GIB), round(7.2 * GIB)),
                PhaseMemory("forward", round(0.7 * allocated), round(0.65 * allocated)),
                PhaseMemory("loss", round(0.9 * allocated), round(0.85 * allocated)),
                PhaseMemory("backward", allocated, round(10.1 * GIB)),
                PhaseMemory("step", round(13.0 * GIB), round(7.2 * GIB)),
            ),
            host_bytes=round(host_gib * GIB),
            host_capacity_bytes=CLUSTER.host_memory_bytes,
            host_ledger=(
                Line("optimizer", "fp32 weights", round(1.44 * GIB)),
                Line("optimizer", "Adam moments", round(2.88 * GIB)),
            )
            if offload.optimizer
            else (),
        ),
        traffic=(
            _traffic("gradients", "reduce-scatter", round(traffic_gb * 5e8), 0.011),
            _traffic("weights", "all-gather", round(traffic_gb * 5e8), 0.042),
        ),
        time=StepTime(
            step_s=step_s,
            low_s=0.9 * step_s,
            high_s=1.15 * step_s,
            compute_s=step_s - 0.08,
            launch_s=0.0,
            bubble_s=0.0,
            exposed_communication_s=0.053,
            optimizer_s=0.027,
            tokens_per_s=64 * 2048 / step_s,
            tokens_per_s_per_gpu=16 * 2048 / step_s,
            mfu=1.1 / step_s,
            flop_per_s_per_gpu=312e12 * 1.1 / step_s,
        ),
        verdict="fits",
        why=why,
    )


def made_recommendation() -> Recommendation:
    """Six strategies that fit, two that do not."""
    return Recommendation(
        model=QWEN,
        job=JOB,
        cluster=CLUSTER,
        inputs=INPUTS,
        plans=(
            made_estimate(),
            made_estimate(
                Strategy.DDP,
                device_gib=62.7,
                step_s=2.36,
                traffic_gb=9.26,
                why="2 % slower: gradients travel in fp32, twice the bytes.",
            ),
            made_estimate(
                Strategy.FSDP_GRAD_OP,
                device_gib=48.9,
                step_s=2.41,
                why="4 % slower: weights are gathered again in every micro-batch.",
            ),
            made_estimate(
                Strategy.FSDP,
                micro_batch=8,
                checkpointing=Checkpointing.FULL,
                device_gib=38.2,
                step_s=2.66,
                traffic_gb=13.9,
                why="15 % slower, 4.6 GB more traffic per step, and memory is not what limits you.",
            ),
            made_estimate(
                Strategy.ZERO3,
                device_gib=40.4,
                step_s=2.73,
                traffic_gb=18.5,
                why="18 % slower, 9.3 GB more traffic per step, and memory is not what limits you.",
            ),
            made_estimate(
                Strategy.ZERO2,
                offload=Offload.OPTIMIZER,
                micro_batch=16,
                device_gib=73.9,
                step_s=4.9,
                host_gib=58.2,
                why="112 % slower: the optimizer runs on the CPU.",
            ),
        ),
        rejected=(
            Rejected(
                plan=Plan(
                    strategy=Strategy.ZERO3,
                    gpus=4,
                    micro_batch=1,
                    accumulation_steps=16,
                    offload=Offload.OPTIMIZER_AND_PARAMETERS,
                ),
                why="Host memory holds 62.0 GiB, and this plan needs 74.3 GiB.",
                short_by_bytes=round(12.3 * GIB),
                remedy="80 GiB of host memory (--host-memory 80)",
            ),
        ),
        headline="Yes: ZeRO-1 trains Qwen2.5-1.5B on 4 A100-80GB at 56,700 tokens per second, using 51.3 of 79.2 GiB.",
        fewest_gpus=None,
        considered=1480,
        seconds=0.041,
    )


def made_refusal() -> Recommendation:
    """Nothing fits."""
    answer = made_recommendation()
    return replace(
        answer,
        plans=(),
        headline="No: nothing fits on 4 A100-80GB; the nearest plan is short by 12.3 GiB. 8 GPUs would do.",
        fewest_gpus=8,
    )
