"""A small model, job, plan and cluster, and strategies that draw others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from advisor.specs.hardware import Cluster, Gpu, Link
from advisor.specs.job import Job
from advisor.specs.model import Attention, FeedForward, Layer, ModelSpec, Parameter, Run
from advisor.specs.plan import Checkpointing, FsdpSettings, Offload, Plan, Strategy, ZeroSettings

LINK = Link(
    name="test-link",
    kind="test",
    bandwidth_bytes_per_s=1e11,
    peak_bytes_per_s=2e11,
    latency_s=1e-6,
    assumed=False,
    source="test",
)


def gpu(name: str = "Test-80GB", bf16: bool = True) -> Gpu:
    return Gpu(
        name=name,
        memory_bytes=80 * 2**30,
        memory_bandwidth_bytes_per_s=2e12,
        peak_flop_per_s={"fp32": 2e13, "fp16": 3e14} | ({"bf16": 3e14} if bf16 else {}),
        link="test-link",
        host_link="test-link",
        architecture="Test",
        compute_capability="8.0",
        source="test",
    )


def cluster(gpus: int = 2, nodes: int = 1, bf16: bool = True) -> Cluster:
    return Cluster(
        gpu=gpu(bf16=bf16),
        gpus=gpus,
        nodes=nodes,
        link=LINK,
        host_link=LINK,
        network=LINK,
        host_memory_bytes=2**40,
        cpu_memory_bandwidth_bytes_per_s=1e11,
    )


def model(name: str = "tiny", family: str = "qwen2", objective: Any = "causal", eager_only: bool = False) -> ModelSpec:
    """The facts that launching reads; the parameters are not the real ones."""
    layer = Layer(
        attention=Attention(heads=4, key_value_heads=2, head_dim=8, eager_only=eager_only),
        feed_forward=FeedForward(width=64),
        norm="rms",
        parameters=(Parameter("weight", (32, 32)),),
    )
    return ModelSpec(
        name=name,
        family=family,
        objective=objective,
        hidden_size=32,
        vocabulary_size=256,
        maximum_positions=64,
        tied_embeddings=True,
        embedding=(Parameter("embed_tokens.weight", (256, 32)),),
        runs=(Run((layer,), 2),),
        final_norm="rms",
        head=(Parameter("norm.weight", (32,)),),
    )


def plan(strategy: Strategy = Strategy.DDP, gpus: int = 2, **choices: Any) -> Plan:
    return Plan(**{"strategy": strategy, "gpus": gpus, "micro_batch": 2, "accumulation_steps": 2} | choices)


TINY_QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
"""A configuration that transformers builds; its fp32 weights take less than 0.2 MB."""


def write_tiny_qwen2(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(TINY_QWEN2), encoding="utf-8")
    return path


ZERO = (Strategy.ZERO1, Strategy.ZERO2, Strategy.ZERO3)
PLANS_OF_EVERY_KIND = {
    "one-gpu": plan(gpus=1),
    "ddp": plan(),
    "fsdp": plan(Strategy.FSDP),
    "fsdp-grad-op": plan(Strategy.FSDP_GRAD_OP),
    "fsdp1": plan(Strategy.FSDP, fsdp=FsdpSettings(version=1)),
    "hsdp": plan(Strategy.HSDP, gpus=4, fsdp=FsdpSettings(shard_ranks=2)),
    "zero0": plan(Strategy.ZERO0),
    "zero1": plan(Strategy.ZERO1),
    "zero2": plan(Strategy.ZERO2),
    "zero3": plan(Strategy.ZERO3),
    "zero3++": plan(Strategy.ZERO3_PLUS, zero=ZeroSettings(hpz_partition=2, quantized_weights=True)),
    "zero2-offload": plan(Strategy.ZERO2, offload=Offload.OPTIMIZER),
    "zero3-offload": plan(Strategy.ZERO3, offload=Offload.OPTIMIZER),
    "zero3-offload-all": plan(Strategy.ZERO3, offload=Offload.OPTIMIZER_AND_PARAMETERS),
    "zero3-nvme": plan(Strategy.ZERO3, offload=Offload.OPTIMIZER_AND_PARAMETERS, offload_to="nvme"),
}

elements = st.integers(1, 10**12)


@st.composite
def zero_plans(draw: st.DrawFn) -> Plan:
    strategy = draw(st.sampled_from(ZERO))
    offloads = {Strategy.ZERO1: [Offload.NONE], Strategy.ZERO2: [Offload.NONE, Offload.OPTIMIZER]}
    return Plan(
        strategy=strategy,
        gpus=draw(st.integers(1, 64)),
        micro_batch=draw(st.integers(1, 64)),
        accumulation_steps=draw(st.integers(1, 64)),
        checkpointing=draw(st.sampled_from(Checkpointing)),
        offload=draw(st.sampled_from(offloads.get(strategy, list(Offload)))),
        zero=ZeroSettings(
            reduce_bucket=draw(elements),
            prefetch_bucket=draw(st.integers(0, 10**12)),
            persistence_threshold=draw(st.integers(0, 10**12)),
            max_live_parameters=draw(elements),
            max_reuse_distance=draw(st.integers(0, 10**12)),
            sub_group=draw(elements),
            overlap_communication=draw(st.booleans()),
        ),
    )


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    precision = draw(st.sampled_from(["bf16", "fp16", "fp32"]))
    return Job(
        sequence_length=draw(st.integers(1, 10**6)),
        precision=precision,
        parameter_format=draw(st.sampled_from(["fp32", "bf16"])) if precision == "bf16" else "fp32",
        optimizer=draw(st.sampled_from(["adamw-fused", "adamw-foreach", "adamw-loop"])),
        attention=draw(st.sampled_from(["sdpa", "flash", "eager"])),
        loss=draw(st.sampled_from(["full", "chunked", "fused"])),
    )


# Everything that a shell, YAML or a terminal could take for more than text. A command line carries no NUL, UTF-8 no
# lone surrogate.
hostile_text = st.one_of(
    st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), min_size=1, max_size=40),
    st.sampled_from(
        [
            "$(touch pwned)",
            "`touch pwned`",
            "a'; touch pwned; '",
            'a"; touch pwned; "',
            "line\nbreak: $(touch pwned)",
            "next\x85line\u2028separator",
            "--output=pwned",
            "-",
            "back\\slash \\n",
            "#comment # another",
            "a: {b: [c]} & *d !e | > % @",
            "tab\tand\rreturn",
            "~/home $HOME ${HOME} %PATH%",
        ]
    ),
)
