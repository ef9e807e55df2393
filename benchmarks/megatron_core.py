"""Runs Megatron-LM's own model on a CPU, one rank of one to eight, and compares what it holds with the step program.

    pip install megatron-core==0.16.1
    python benchmarks/megatron_core.py [--write]

The model has megatron-core's local layers, which need neither TransformerEngine nor apex; collectives do nothing (a
fake process group), random-number states of CUDA are left out, dropout is off, whose mask a CPU keeps in another
format, and experts take turns, so that all get equally many tokens. ``--write`` keeps the counts in
profiles/measured/megatron_core.csv, which the tests hold the model against.
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
from advisor.specs.megatron import MegatronSettings
from advisor.specs.model import Attention, Experts, FeedForward, LatentAttention, Layer, ModelSpec, Parameter, Run
from advisor.specs.plan import Checkpointing, Plan, Strategy
from advisor.step.build import build
from advisor.step.program import held_after, phase_peaks

FILE = profiles_folder() / "measured" / "megatron_core.csv"
COUNTS = ("saved_bytes", "forward_peak_bytes", "backward_peak_bytes")
"""Kept for backward when forward ends, and the most held in either, beside the weights."""
CPU_NORM_BYTES = 4
"""Per token and norm that a CPU's LayerNorm saves less: its statistics have the format of its input."""
CPU_ROTATION_BYTES = 8
"""Per position and rotated dimension that a CPU's unfused rotation keeps more in each latent layer: angles in fp32, and
cosines and sines in bf16 for queries and for keys, where the fused one has these once."""
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
    experts: int = 0
    """None: a dense block."""
    active: int = 2
    shared: int = 0
    """Width of a shared expert."""
    scoring: str = "softmax"
    expert_parallel: int = 1
    expert_tensor_parallel: int = 1
    dispatcher: str = "alltoall"
    latent: bool = False

    @property
    def title(self) -> str:
        cut = f"tp {self.tensor_parallel}{' + sp' * self.sequence_parallel}"
        kind = "gated" if self.gated else "plain"
        heads = "latent attention" if self.latent else f"{self.key_value_heads} key-value heads"
        title = f"{heads}, {kind}, micro-batch {self.micro_batch}, {cut}, {self.recompute}"
        if not self.experts:
            return title
        spread = f"ep {self.expert_parallel}, etp {self.expert_tensor_parallel}, {self.dispatcher}, {self.scoring}"
        return f"{title}, {self.active} of {self.experts} experts{' + shared' * bool(self.shared)}, {spread}"

    @property
    def ranks(self) -> int:
        return max(self.tensor_parallel, self.expert_parallel * self.expert_tensor_parallel)


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
    Case(key_value_heads=2, gated=True, micro_batch=1, experts=8),
    Case(key_value_heads=2, gated=True, micro_batch=2, experts=8, expert_parallel=4, shared=512),
    Case(key_value_heads=2, gated=True, micro_batch=1, experts=8, expert_parallel=8, scoring="first"),
    Case(key_value_heads=8, gated=True, micro_batch=1, experts=8, expert_parallel=2, scoring="sigmoid", shared=512),
    Case(
        key_value_heads=4,
        gated=True,
        micro_batch=1,
        tensor_parallel=2,
        sequence_parallel=True,
        experts=8,
        expert_parallel=2,
        expert_tensor_parallel=2,
        sequence_length=128,
    ),
    Case(
        key_value_heads=4,
        gated=True,
        micro_batch=2,
        tensor_parallel=2,
        sequence_parallel=True,
        experts=8,
        expert_parallel=4,
        shared=512,
        recompute="full",
    ),
    Case(
        key_value_heads=4,
        gated=True,
        micro_batch=2,
        tensor_parallel=2,
        sequence_parallel=True,
        experts=8,
        active=1,
        expert_parallel=2,
        expert_tensor_parallel=2,
        dispatcher="allgather",
        scoring="first",
    ),
    Case(key_value_heads=8, gated=True, micro_batch=2, latent=True),
    Case(key_value_heads=8, gated=True, micro_batch=1, latent=True, experts=8, expert_parallel=4, shared=512),
]
LATENT = LatentAttention(query_rank=96, key_value_rank=64, rotary_head_dim=16, plain_head_dim=32, value_head_dim=32)


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
    usual = Case(key_value_heads=0, gated=True, micro_batch=1)._asdict()
    read: dict[type, Any] = {bool: lambda text: text == "True", int: int, str: str}
    return Case(**{name: read[type(usual[name])](row[name]) for name in Case._fields})


def predicted(case: Case) -> tuple[int, ...]:
    """The :data:`COUNTS` by the step program, less what a CPU does otherwise; token and position ids were there."""
    plan = Plan(
        strategy=Strategy.MEGATRON,
        gpus=case.ranks,
        micro_batch=case.micro_batch,
        checkpointing=Checkpointing(case.recompute),
        tensor_parallel=case.tensor_parallel,
        sequence_parallel=case.sequence_parallel,
        expert_parallel=case.expert_parallel,
        expert_tensor_parallel=case.expert_tensor_parallel,
        megatron=MegatronSettings(
            fuses_gradient_sums=False,
            mask_in_batch=False,
            vocabulary_multiple=1,
            token_dispatcher=case.dispatcher,  # type: ignore[arg-type]
            fuses_permutation=False,
            groups_experts=False,
        ),
    )
    program = build(_described(case), Job(sequence_length=case.sequence_length, attention="eager"), plan)
    phases = phase_peaks(program.step)
    buffers = sum(line.size_bytes for line in held_after(program.init) if line.category == "buffers")
    tokens = case.micro_batch * case.sequence_length
    norms = 1 if case.recompute == "full" else 1 + (4 if case.latent else 2) * case.layers
    parts = case.tensor_parallel if case.sequence_parallel else 1
    otherwise = norms * tokens * CPU_NORM_BYTES // parts + 2 * INDEX_BYTES * tokens
    if case.latent:
        otherwise -= case.layers * case.sequence_length * LATENT.rotary_head_dim * CPU_ROTATION_BYTES
    counts = phases["loss"][1], max(phases["forward"][0], phases["loss"][0]), phases["backward"][0]
    return tuple(int(count) + buffers - otherwise for count in counts)


def _described(case: Case) -> ModelSpec:
    head_dim = case.hidden_size // case.heads
    biased = not case.gated
    layer = Layer(
        attention=Attention(
            heads=case.heads,
            key_value_heads=case.key_value_heads,
            head_dim=LATENT.plain_head_dim + LATENT.rotary_head_dim if case.latent else head_dim,
            bias=biased,
            output_bias=biased,
            rotary_fraction=0.0,
            latent=LATENT if case.latent else None,
        ),
        feed_forward=_experts(case)
        if case.experts
        else FeedForward(width=case.feed_forward, gated=case.gated, bias=biased),
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


def _experts(case: Case) -> Experts:
    return Experts(
        count=case.experts,
        active=case.active,
        width=case.feed_forward,
        gated=case.gated,
        shared=FeedForward(width=case.shared) if case.shared else None,
        scoring="sigmoid" if case.scoring == "sigmoid" else "softmax",
        scores_add_up=case.scoring != "first",
        router_in_fp32=case.scoring == "sigmoid",
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
    distributed.init_process_group("fake", rank=0, world_size=case.ranks, store=FakeStore())
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]
    states = import_module("megatron.core.parallel_state")
    states.initialize_model_parallel(
        case.tensor_parallel,
        1,
        expert_model_parallel_size=case.expert_parallel,
        expert_tensor_parallel_size=case.expert_tensor_parallel,
        create_gloo_process_groups=False,
    )
    random = import_module("megatron.core.tensor_parallel.random")
    random.CudaRNGStatesTracker.fork = lambda self, name="": contextlib.nullcontext()
    random._get_all_rng_states = lambda: (None, None, None)
    random._set_all_rng_states = lambda *states: None
    configs = import_module("megatron.core.transformer.transformer_config")
    kind = configs.MLATransformerConfig if case.latent else configs.TransformerConfig
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
        normalization="LayerNorm",
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
        **(_settings_of_experts(case) if case.experts else {}),
        **(_settings_of_latents() if case.latent else {}),
    )
    if case.latent:
        _take_heads_of_any_width()
    if case.experts:
        _share_tokens_out_evenly(case.active)
    with _torch_norms_for_cut_sequences(config):
        model = import_module("megatron.core.models.gpt.gpt_model").GPTModel(
            config,
            layers.get_gpt_layer_local_spec(
                num_experts=case.experts or None, qk_layernorm=case.latent, multi_latent_attention=case.latent
            ),
            vocab_size=case.vocabulary,
            max_sequence_length=case.sequence_length,
            share_embeddings_and_output_weights=False,
        )
    return model.bfloat16()


def _settings_of_experts(case: Case) -> dict[str, Any]:
    return {
        "num_moe_experts": case.experts,
        "moe_router_topk": case.active,
        "moe_ffn_hidden_size": case.feed_forward,
        "moe_shared_expert_intermediate_size": case.shared or None,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 1e-2,
        "moe_router_score_function": "sigmoid" if case.scoring == "sigmoid" else "softmax",
        "moe_router_enable_expert_bias": case.scoring == "sigmoid",
        "moe_router_pre_softmax": case.scoring == "first",
        "moe_router_dtype": "fp32" if case.scoring == "sigmoid" else None,
        "moe_router_force_load_balancing": True,
        "moe_token_dispatcher_type": case.dispatcher,
        "expert_model_parallel_size": case.expert_parallel,
        "expert_tensor_parallel_size": case.expert_tensor_parallel,
    }


def _settings_of_latents() -> dict[str, Any]:
    return {
        "multi_latent_attention": True,
        "q_lora_rank": LATENT.query_rank,
        "kv_lora_rank": LATENT.key_value_rank,
        "qk_head_dim": LATENT.plain_head_dim,
        "qk_pos_emb_head_dim": LATENT.rotary_head_dim,
        "v_head_dim": LATENT.value_head_dim,
        "rope_type": "rope",
    }


def _take_heads_of_any_width() -> None:
    """megatron-core's own attention is not told of them, and needs not be; nor is TransformerEngine there to ask."""
    import_module("megatron.core.transformer.multi_latent_attention").TELinear = type(None)
    own = import_module("megatron.core.transformer.dot_product_attention").DotProductAttention
    make = own.__init__

    def made(self: Any, *others: Any, k_channels: int = 0, v_channels: int = 0, **named: Any) -> None:
        make(self, *others, **named)

    own.__init__ = made


def _share_tokens_out_evenly(active: int) -> None:
    """Experts take turns, on this rank and on those that are not there."""
    import torch

    class Even(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, logits: Any) -> Any:
            count = logits.shape[-1]
            turns = torch.arange(logits.numel() // count)[:, None] * active + torch.arange(count)
            return (-(turns % count)).to(logits.dtype).view_as(logits)

        @staticmethod
        def backward(context: Any, gradient: Any) -> Any:
            return gradient

    import_module("megatron.core.transformer.moe.router").apply_random_logits = Even.apply
    # Missing where TransformerEngine is.
    import_module("megatron.core.transformer.moe.moe_utils").te_general_gemm = None
    mappings = import_module("megatron.core.tensor_parallel.mappings")

    def gather(output: Any, own: Any, group: Any) -> None:
        output.view(group.size(), *own.shape).copy_(own)

    mappings.dist_all_gather_func = gather

    def on_the_host(self: Any, point: str, counts: Any = None) -> Any:
        for name in ("input_splits", "output_splits", "output_splits_tp"):
            if isinstance(getattr(self, name), torch.Tensor):
                setattr(self, name, getattr(self, name).numpy())
        return counts

    # Copies to the host go by a stream of the GPU, which is not there.
    dispatcher = import_module("megatron.core.transformer.moe.token_dispatcher").MoEAlltoAllTokenDispatcher
    dispatcher.cuda_dtoh_stream = object()
    dispatcher._maybe_dtoh_and_synchronize = on_the_host


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
