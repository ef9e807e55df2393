"""Runs Megatron-LM's own model on a CPU, one rank of one or two, and compares what it holds with the step program.

    pip install megatron-core==0.16.1
    python benchmarks/megatron_core.py [--write]

The model has megatron-core's local layers, which need neither TransformerEngine nor apex; collectives do nothing (a
fake process group), random-number states of CUDA are left out, and dropout is off, whose mask a CPU keeps in another
format. ``--write`` keeps the counts in profiles/measured/megatron_core.csv, which the tests hold the model against.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any, NamedTuple

from advisor.catalog.profiles import profiles_folder
from advisor.specs.job import Job
from advisor.specs.model import Attention, FeedForward, Layer, ModelSpec, Parameter, Run
from advisor.specs.plan import Checkpointing, MegatronSettings, Plan, Strategy
from advisor.step.build import build
from advisor.step.program import held_after, phase_peaks

FILE = profiles_folder() / "measured" / "megatron_core.csv"
COUNTS = ("saved_bytes", "forward_peak_bytes", "backward_peak_bytes")
"""Kept for backward when forward ends, and the most held in either, beside the weights."""
CPU_NORM_BYTES = 4
"""Per token and norm that a CPU's LayerNorm saves less: its statistics have the format of its input."""
INDEX_BYTES = 8


class Case(NamedTuple):
    """One rank's model, micro-batch and cut. The vocabulary is large enough for peaks to be at the logits."""

    key_value_heads: int
    gated: bool
    micro_batch: int
    tensor_parallel: int = 1
    sequence_parallel: bool = False
    recompute: str = "none"
    layers: int = 2
    hidden_size: int = 256
    heads: int = 8
    feed_forward: int = 1024
    vocabulary: int = 32768
    sequence_length: int = 64

    @property
    def title(self) -> str:
        cut = f"tp {self.tensor_parallel}{' + sp' * self.sequence_parallel}"
        kind = "gated" if self.gated else "plain"
        return (
            f"{self.key_value_heads} key-value heads, {kind}, micro-batch {self.micro_batch}, {cut}, {self.recompute}"
        )


CASES = [
    Case(key_value_heads=8, gated=False, micro_batch=1),
    Case(key_value_heads=2, gated=False, micro_batch=1),
    Case(key_value_heads=2, gated=True, micro_batch=2),
    Case(key_value_heads=8, gated=False, micro_batch=1, tensor_parallel=2),
    Case(key_value_heads=2, gated=True, micro_batch=2, tensor_parallel=2),
    Case(key_value_heads=8, gated=False, micro_batch=2, tensor_parallel=2, sequence_parallel=True),
    Case(key_value_heads=8, gated=False, micro_batch=1, tensor_parallel=2, sequence_parallel=True, recompute="full"),
    Case(
        key_value_heads=8, gated=False, micro_batch=1, tensor_parallel=2, sequence_parallel=True, recompute="selective"
    ),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"keep the counts in {FILE.name}")
    parser.add_argument("--case", type=int, help="run this case alone and print its counts")
    asked = parser.parse_args()
    if asked.case is not None:
        print(*measured(CASES[asked.case]))
        return
    # A process runs one case: megatron-core's groups are global.
    rows = [(case, _alone(index)) for index, case in enumerate(CASES)]
    for case, true in rows:
        print(case.title)
        for name, mine, his in zip(COUNTS, predicted(case), true, strict=True):
            print(f"  {name:22} predicted {mine:12,}   megatron-core {his:12,}   {100 * (mine / his - 1):+8.4f} %")
    if asked.write:
        with FILE.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*Case._fields, *COUNTS])
            writer.writerows([*case, *true] for case, true in rows)


def cases() -> list[tuple[Case, tuple[int, ...]]]:
    """The cases that were kept, with their true counts."""
    with FILE.open(newline="", encoding="utf-8") as file:
        return [(_case(row), tuple(int(row[name]) for name in COUNTS)) for row in csv.DictReader(file)]


def _case(row: Mapping[str, str]) -> Case:
    flags = {name: row[name] == "True" for name in ("gated", "sequence_parallel")}
    counts = {name: int(row[name]) for name in Case._fields if name not in (*flags, "recompute")}
    return Case(**counts, **flags, recompute=row["recompute"])


def predicted(case: Case) -> tuple[int, ...]:
    """The :data:`COUNTS` by the step program, less what a CPU does otherwise; token and position ids were there."""
    plan = Plan(
        strategy=Strategy.MEGATRON,
        gpus=case.tensor_parallel,
        micro_batch=case.micro_batch,
        checkpointing=Checkpointing(case.recompute),
        tensor_parallel=case.tensor_parallel,
        sequence_parallel=case.sequence_parallel,
        megatron=MegatronSettings(fuses_gradient_sums=False, mask_in_batch=False, vocabulary_multiple=1),
    )
    program = build(_described(case), Job(sequence_length=case.sequence_length, attention="eager"), plan)
    phases = phase_peaks(program.step)
    buffers = sum(line.size_bytes for line in held_after(program.init) if line.category == "buffers")
    tokens = case.micro_batch * case.sequence_length
    norms = 1 if case.recompute == "full" else 1 + 2 * case.layers
    parts = case.tensor_parallel if case.sequence_parallel else 1
    otherwise = norms * tokens * CPU_NORM_BYTES // parts + 2 * INDEX_BYTES * tokens
    counts = phases["loss"][1], max(phases["forward"][0], phases["loss"][0]), phases["backward"][0]
    return tuple(int(count) + buffers - otherwise for count in counts)


def _described(case: Case) -> ModelSpec:
    head_dim = case.hidden_size // case.heads
    biased = not case.gated
    layer = Layer(
        attention=Attention(
            heads=case.heads,
            key_value_heads=case.key_value_heads,
            head_dim=head_dim,
            bias=biased,
            output_bias=biased,
            rotary_fraction=0.0,
        ),
        feed_forward=FeedForward(width=case.feed_forward, gated=case.gated, bias=biased),
        norm="layer",
        parameters=(),
    )
    width = case.hidden_size
    words = Parameter("words", (case.vocabulary, width))
    return ModelSpec(
        name="gpt",
        family="gpt",
        objective="causal",
        hidden_size=width,
        vocabulary_size=case.vocabulary,
        maximum_positions=case.sequence_length,
        tied_embeddings=False,
        embedding=(words, Parameter("positions", (case.sequence_length, width))),
        runs=(Run((layer,), case.layers),),
        final_norm="layer",
        head=(Parameter("norm", (width,)), words),
    )


def _alone(index: int) -> tuple[int, ...]:
    command = [sys.executable, __file__, "--case", str(index)]
    environment = os.environ | {"TORCHDYNAMO_DISABLE": "1"}
    ran = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return tuple(int(count) for count in ran.stdout.splitlines()[-1].split())


def measured(case: Case) -> tuple[int, int, int]:
    """Bytes that *case* keeps for backward, and the most it holds in forward and in backward, beside weights."""
    import torch

    from advisor.tracing.counter import StorageCounter

    model = _model(case)
    for parameter in model.parameters():
        # As if its gradient had been added to its sum.
        parameter.register_post_accumulate_grad_hook(lambda each: setattr(each, "grad", None))
    tokens = torch.zeros(case.micro_batch, case.sequence_length, dtype=torch.int64)
    positions = torch.arange(case.sequence_length).expand_as(tokens).contiguous()
    mask = torch.ones(1, 1, case.sequence_length, case.sequence_length, dtype=torch.bool).tril().logical_not()
    counter = StorageCounter()
    with counter:
        counter.include([*model.parameters(), tokens, positions, mask])
        weights = counter.live_bytes
        counter.start_peak()
        losses = model(tokens, positions, mask, labels=tokens)
        forward = counter.peak_bytes
        loss = losses.sum()
        del losses
        saved = counter.live_bytes
        counter.in_backward = True
        counter.start_peak()
        loss.backward()
    return saved - weights, forward - weights, counter.peak_bytes - weights


def _model(case: Case) -> Any:
    import torch
    import torch.distributed as distributed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    distributed.init_process_group("fake", rank=0, world_size=case.tensor_parallel, store=FakeStore())
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]
    states = import_module("megatron.core.parallel_state")
    states.initialize_model_parallel(case.tensor_parallel, 1, create_gloo_process_groups=False)
    random = import_module("megatron.core.tensor_parallel.random")
    random.CudaRNGStatesTracker.fork = lambda self, name="": contextlib.nullcontext()
    random._get_all_rng_states = lambda: (None, None, None)
    random._set_all_rng_states = lambda *states: None
    kind = import_module("megatron.core.transformer.transformer_config").TransformerConfig
    layers = import_module("megatron.core.models.gpt.gpt_layer_specs")
    recompute: dict[str, Any] = {"recompute_granularity": case.recompute} if case.recompute != "none" else {}
    if case.recompute == "full":
        recompute |= {"recompute_method": "uniform", "recompute_num_layers": 1}
    config = kind(
        num_layers=case.layers,
        hidden_size=case.hidden_size,
        num_attention_heads=case.heads,
        num_query_groups=case.key_value_heads,
        ffn_hidden_size=case.feed_forward,
        add_bias_linear=not case.gated,
        gated_linear_unit=case.gated,
        activation_func=torch.nn.functional.silu if case.gated else torch.nn.functional.gelu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=True,
        bias_dropout_fusion=True,
        masked_softmax_fusion=False,
        attention_softmax_in_fp32=False,
        tensor_model_parallel_size=case.tensor_parallel,
        sequence_parallel=case.sequence_parallel,
        use_cpu_initialization=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        bf16=True,
        **recompute,
    )
    with _torch_norms_for_cut_sequences(config):
        model = import_module("megatron.core.models.gpt.gpt_model").GPTModel(
            config,
            layers.get_gpt_layer_local_spec(),
            vocab_size=case.vocabulary,
            max_sequence_length=case.sequence_length,
            share_embeddings_and_output_weights=False,
        )
    return model.bfloat16()


@contextlib.contextmanager
def _torch_norms_for_cut_sequences(config: Any) -> Iterator[None]:
    """megatron-core takes torch's LayerNorm for whole sequences only; what it saves is the same for cut ones."""
    norm = import_module("megatron.core.transformer.torch_norm").WrappedTorchNorm
    make = norm.__new__

    def made(cls: Any, config: Any, *others: Any, **named: Any) -> Any:
        cuts, config.sequence_parallel = config.sequence_parallel, False
        try:
            return make(cls, config, *others, **named)
        finally:
            config.sequence_parallel = cuts

    norm.__new__ = staticmethod(made)
    yield
    norm.__new__ = make


if __name__ == "__main__":
    main()
