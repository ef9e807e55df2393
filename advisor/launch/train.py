"""Train a language model with transformers and accelerate, as the files beside this one describe.

    accelerate launch --config_file accelerate.yaml train.py --model Qwen/Qwen2.5-1.5B --dataset text.jsonl

DDP, FSDP or DeepSpeed is the choice of the accelerate configuration; this program is the same for all of them.
Without --dataset it trains on random tokens, which cost the same memory and time as real ones.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import time
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, DummyOptim, set_seed
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BitsAndBytesConfig,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutput

MODEL_CLASSES: dict[str, Any] = {
    "causal": AutoModelForCausalLM,
    "masked": AutoModelForMaskedLM,
    "seq2seq": AutoModelForSeq2SeqLM,
}
FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# None leaves the choice to transformers: sdpa, or eager for the few models without it.
ATTENTION = {"sdpa": None, "flash": "flash_attention_2", "eager": "eager"}

# Where a model with vision or audio stores its text part, and where a model that is all text has the same weights.
TEXT_PART = {
    r"^language_model\.model\.": "model.",
    r"^model\.language_model\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
}

IGNORED = -100  # the label that the loss leaves out
LOSS_TOKENS = 1024  # most tokens whose logits exist at once under --loss chunked


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a language model.", allow_abbrev=False)
    model = parser.add_argument_group("model")
    model.add_argument("--model", required=True, help="Hub id, folder, or config.json (with --random-weights)")
    model.add_argument("--random-weights", action="store_true", help="start from random weights, load none")
    model.add_argument("--objective", choices=MODEL_CLASSES, default="causal")
    model.add_argument("--weights", choices=FORMATS, default="fp32", help="number format the weights are built in")
    model.add_argument("--attention", choices=ATTENTION, default="sdpa")
    model.add_argument("--loss", choices=["full", "chunked", "fused"], default="full", help="fused needs liger-kernel")
    model.add_argument("--compile", action="store_true", help="compile each layer with torch.compile")
    model.add_argument("--checkpointing", choices=["none", "selective", "full"], default="none", help="of activations")
    methods = ["full", "lora", "dora", "qlora"]
    model.add_argument(
        "--method", choices=methods, default="full", help="all but full need peft, qlora bitsandbytes too"
    )
    model.add_argument("--lora-rank", type=int, default=8)
    model.add_argument("--lora-alpha", type=int, default=8, help="adapters are scaled by alpha / rank")
    model.add_argument("--lora-targets", default="", help="linear layers, joined by commas, or all-linear; else peft's")
    model.add_argument("--lora-dropout", type=float, default=0.0)
    model.add_argument("--lora-weights", choices=["fp32", "as-model"], default="fp32", help="format of the adapters")
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", help="text file, JSONL file with a field 'text', or Hub dataset; else random tokens")
    data.add_argument("--sequence-length", type=int, default=2048)
    data.add_argument("--padded", action="store_true", help="each text a sequence, padded; else joined and cut")
    data.add_argument("--micro-batch", type=int, default=1, help="sequences per GPU and forward pass")
    data.add_argument("--accumulation-steps", type=int, default=1, help="micro-batches per optimizer step")
    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=int, default=100, help="optimizer steps")
    training.add_argument("--optimizer", default="adamw-fused", help="one of train_optimizers.py beside this program")
    training.add_argument("--galore-rank", type=int, default=128, help="of the gradients under --optimizer galore")
    training.add_argument("--learning-rate", type=float, default=2e-5)
    training.add_argument("--warmup-steps", type=int, default=10)
    training.add_argument("--weight-decay", type=float, default=0.0)
    training.add_argument("--gradient-clipping", type=float, default=1.0, help="largest norm; DeepSpeed reads its JSON")
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--output", type=Path, help="folder for the trained model and its checkpoints; all see it")
    training.add_argument("--save-every", type=int, metavar="STEPS", help="of how many steps each ends in a checkpoint")
    training.add_argument("--resume", metavar="auto|FOLDER", help="go on from a checkpoint; auto: the last, if any")
    training.add_argument("--log", type=Path, help="file for one JSON object about the run and one per step")
    arguments = parser.parse_args()
    if arguments.model.endswith(".json") and not arguments.random_weights:
        parser.error(f"{arguments.model} holds no weights: add --random-weights, or give a Hub id or a folder")
    if arguments.loss != "full" and arguments.objective != "causal":
        parser.error(f"--loss {arguments.loss} is for causal models: take --loss full")
    if arguments.method != "full" and arguments.objective != "causal":
        parser.error(f"--method {arguments.method} is for causal models")
    if arguments.method == "qlora" and arguments.random_weights:
        parser.error("--method qlora brings loaded weights to four bits: give a Hub id or a folder with weights")
    if (arguments.save_every or arguments.resume == "auto") and not arguments.output:
        parser.error("--save-every and --resume auto need the folder of the checkpoints: add --output")
    return arguments


def main() -> None:
    # The files beside this one.
    from train_checkpoint import resume  # type: ignore[import-not-found]
    from train_data import make_batches  # type: ignore[import-not-found]
    from train_optimizers import refuse_unknown  # type: ignore[import-not-found]

    arguments = parse_arguments()
    refuse_unknown(arguments.optimizer)
    accelerator = Accelerator(gradient_accumulation_steps=arguments.accumulation_steps)
    set_seed(arguments.seed)
    refuse_other_batch_than_deepspeeds(accelerator, arguments)
    beside = Path(arguments.model).parent if arguments.model.endswith(".json") else arguments.model
    tokenizer = AutoTokenizer.from_pretrained(beside) if arguments.dataset else None
    model = build_model(accelerator, arguments)
    for layer in model.modules():
        if arguments.compile and isinstance(layer, GradientCheckpointingLayer):
            layer.compile()  # in place: names of weights stay, and what FSDP or DeepSpeed adds later is seen
    vocabulary_size = model.config.vocab_size
    optimizer = build_optimizer(accelerator, arguments, model)
    set_seed(arguments.seed, device_specific=True)  # dropout differs between processes, first weights do not
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()
    done = resume(accelerator, arguments, optimizer)
    batches = make_batches(accelerator, arguments, tokenizer, vocabulary_size, done * arguments.accumulation_steps)
    train(accelerator, arguments, model, optimizer, batches, done)
    if arguments.output:
        save(accelerator, arguments, model, tokenizer)
    accelerator.wait_for_everyone()  # the first process may still be writing
    accelerator.end_training()


def refuse_other_batch_than_deepspeeds(accelerator: Accelerator, arguments: argparse.Namespace) -> None:
    """DeepSpeed takes its batch from its JSON, which the arguments must therefore repeat."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return
    config = accelerator.deepspeed_plugin.deepspeed_config
    asked = {
        "train_micro_batch_size_per_gpu": arguments.micro_batch,
        "gradient_accumulation_steps": arguments.accumulation_steps,
    }
    for key, value in asked.items():
        if config[key] != value:
            raise SystemExit(f"ds_config.json has {key} {config[key]}, the arguments say {value}: change one of them")


def build_model(accelerator: Accelerator, arguments: argparse.Namespace) -> Any:
    config = AutoConfig.from_pretrained(arguments.model)
    if has_other_parts(arguments):
        config = config.get_text_config()
    config.use_cache = False
    model_class = MODEL_CLASSES[arguments.objective]
    options: dict[str, Any] = {
        "dtype": FORMATS[arguments.weights],
        "attn_implementation": ATTENTION[arguments.attention],
    }

    # ZeRO-3 splits the weights while it builds the model, and FSDP sends out those of the first process; otherwise
    # every process keeps all of them, and builds them where they stay rather than in host memory.
    zero3 = accelerator.distributed_type == DistributedType.DEEPSPEED and accelerator.deepspeed_plugin.zero_stage == 3
    elsewhere = zero3 or accelerator.distributed_type == DistributedType.FSDP
    if arguments.random_weights:
        with contextlib.nullcontext() if elsewhere else accelerator.device:
            model = model_class.from_config(config, **options)
    else:
        if not elsewhere:
            options["device_map"] = {"": accelerator.device}
        elif arguments.method == "qlora" and not zero3:
            options["device_map"] = {"": "cpu"}  # whole on every process, which a GPU need not have room for
        if has_other_parts(arguments):
            options["key_mapping"] = TEXT_PART
        if arguments.method == "qlora":
            options["quantization_config"] = in_four_bits(FORMATS[arguments.weights], packed=elsewhere)
        model, loaded = model_class.from_pretrained(arguments.model, config=config, output_loading_info=True, **options)
        if loaded["missing_keys"]:
            names = sorted(loaded["missing_keys"])
            raise SystemExit(
                f"{arguments.model} lacks {len(names)} weights of {type(model).__name__}, first {names[0]}"
            )
    if arguments.checkpointing != "none":
        # transformers is renaming gradient checkpointing to activation checkpointing.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False} | checkpointing_contexts(arguments.checkpointing))
    if arguments.loss == "chunked":
        chunk_loss(model)
    elif arguments.loss == "fused":
        fuse_loss(model)
    if arguments.method != "full":
        targets = [name for name in arguments.lora_targets.split(",") if name]
        settings = {
            "alpha": arguments.lora_alpha,
            "dropout": arguments.lora_dropout,
            "widens": not elsewhere,
            "lengths": arguments.method == "dora",
        }
        return add_adapters(model, arguments.lora_rank, targets, in_fp32=arguments.lora_weights == "fp32", **settings)
    return model


def checkpointing_contexts(checkpointing: str) -> dict[str, Any]:
    """Selective checkpointing keeps what matrix products and fused attention return; all else is computed again."""
    if checkpointing != "selective":
        return {}
    kept = [
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    ]
    return {"context_fn": functools.partial(create_selective_checkpoint_contexts, kept)}


def chunk_loss(model: Any) -> None:
    """Let *model* return its loss alone, from the logits of a few tokens at a time, computed again in backward."""
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier"):
        if getattr(model.config, name, None) not in (None, 1):
            raise SystemExit(f"the {name} of {type(model).__name__} is not known to --loss chunked: take --loss full")
    head = model.get_output_embeddings()
    logits_of = head.forward

    def summed_loss(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(
            logits_of(hidden).float(), labels, ignore_index=IGNORED, reduction="sum"
        )

    # Within one call of the output matrix's own module, so that ZeRO-3 and FSDP have it there for all pieces.
    def mean_loss(hidden: torch.Tensor, labels: torch.Tensor, shifted: bool) -> torch.Tensor:
        following = labels
        if not shifted:
            following = torch.full_like(labels, IGNORED)
            following[..., :-1] = labels[..., 1:]
        following, hidden = following.flatten(), hidden.flatten(0, 1)
        tokens = min(LOSS_TOKENS, math.ceil(len(hidden) / 2))
        sums = [
            checkpoint(summed_loss, *piece, use_reentrant=False, preserve_rng_state=False)
            for piece in zip(torch.split(hidden, tokens), torch.split(following, tokens), strict=True)
        ]
        return torch.stack(sums).sum() / (following != IGNORED).sum()

    def forward(self: Any, labels: torch.Tensor, **inputs: torch.Tensor) -> CausalLMOutput:
        shifted = inputs.pop("shift_labels", None) is not None
        return CausalLMOutput(loss=head(self.base_model(**inputs).last_hidden_state, labels, shifted))

    head.forward = mean_loss
    model.forward = types.MethodType(forward, model)


def fuse_loss(model: Any) -> None:
    """Let *model* return its loss alone, by Liger's kernel; its other kernels stay transformers'."""
    try:
        from liger_kernel.transformers import (  # type: ignore[import-not-found, unused-ignore]
            _apply_liger_kernel_to_instance,
        )
    except ImportError:
        raise SystemExit("--loss fused needs Liger's kernels: pip install liger-kernel") from None
    others = dict.fromkeys(("rope", "rms_norm", "layer_norm", "swiglu", "geglu", "cross_entropy"), False)
    _apply_liger_kernel_to_instance(model=model, fused_linear_cross_entropy=True, **others)
    if "forward" not in vars(model):
        raise SystemExit(f"Liger has no fused loss for {type(model).__name__}: take --loss chunked or full")


def in_four_bits(compute_dtype: torch.dtype, *, packed: bool) -> Any:
    """The linear layers in NF4, their scales quantized too; Dettmers et al., 2023.

    FSDP and ZeRO-3 cut them if *packed* into elements of the format that products read.
    """
    nested: dict[str, Any] = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config: Any = BitsAndBytesConfig
    storage = compute_dtype if packed else torch.uint8
    return config(load_in_4bit=True, bnb_4bit_compute_dtype=compute_dtype, bnb_4bit_quant_storage=storage, **nested)


def add_adapters(
    model: Any,
    rank: int,
    targets: Sequence[str],
    *,
    alpha: int = 8,
    dropout: float = 0.0,
    in_fp32: bool = True,
    widens: bool = True,
    lengths: bool = False,
) -> Any:
    """Freeze *model* and put low-rank adapters beside its linear layers; without *targets*, beside peft's choice.

    Beside weights in four bits all others are brought to fp32 where that *widens*. With *lengths*, DoRA trains those of
    the columns too.
    """
    try:
        import peft  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise SystemExit("--method lora, dora and qlora need peft: pip install peft") from None
    if widens and getattr(model, "is_loaded_in_4bit", False):
        prepare: Any = peft.prepare_model_for_kbit_training  # brings all other weights to fp32
        model = prepare(model, use_gradient_checkpointing=False)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_dora=lengths,
        target_modules="all-linear" if "all-linear" in targets else list(targets) or None,
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, config, autocast_adapter_dtype=in_fp32)


def has_other_parts(arguments: argparse.Namespace) -> bool:
    """Whether the model sees or hears besides; only its text part is trained."""
    config = AutoConfig.from_pretrained(arguments.model)
    return arguments.objective == "causal" and config.get_text_config() is not config


def build_optimizer(accelerator: Accelerator, arguments: argparse.Namespace, model: Any) -> Any:
    """The optimizer over all parameters that are trained."""
    from train_optimizers import make_optimizer  # beside this program

    if (
        accelerator.distributed_type == DistributedType.DEEPSPEED
        and "optimizer" in accelerator.deepspeed_plugin.deepspeed_config
    ):
        # An optimizer on the CPU is DeepSpeed's own: it builds DeepSpeedCPUAdam from the entry in its JSON.
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return DummyOptim(trained, lr=arguments.learning_rate, weight_decay=arguments.weight_decay)
    return make_optimizer(
        arguments.optimizer,
        model,
        learning_rate=arguments.learning_rate,
        weight_decay=arguments.weight_decay,
        galore_rank=arguments.galore_rank,
    )


def train(
    accelerator: Accelerator,
    arguments: argparse.Namespace,
    model: Any,
    optimizer: Any,
    batches: Iterator[dict[str, torch.Tensor]],
    done: int = 0,
) -> None:
    """All steps after the first *done*."""
    from train_checkpoint import save_checkpoint
    from train_data import readers, whole_attention

    device = accelerator.device
    groups, _ = readers(accelerator)
    tokens_per_step = groups * arguments.accumulation_steps * arguments.micro_batch * arguments.sequence_length
    prediction = read_prediction(accelerator, arguments)
    if prediction and accelerator.is_main_process:
        print(f"in brackets: what was predicted for {prediction['predicted_for']}", flush=True)
    report(accelerator, arguments.log, describe(accelerator, model, optimizer))
    for step in range(done + 1, arguments.steps + 1):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = arguments.learning_rate * min(1.0, step / max(1, arguments.warmup_steps))
        loss_sum = torch.zeros((), device=device)
        for _ in range(arguments.accumulation_steps):
            batch = next(batches)
            # Gradients stay unreduced until the last micro-batch, where the strategy allows that.
            with accelerator.accumulate(model):
                with whole_attention(accelerator, batch):
                    loss = loss_of(accelerator, model, batch)
                    accelerator.backward(loss)
                loss_sum += loss.detach()
                del loss  # its graph would keep the embeddings of a model with adapters through the next forward pass
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), arguments.gradient_clipping)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        loss_mean = loss_sum.item() / arguments.accumulation_steps  # waits for the device, so the clock below is right
        seconds = time.perf_counter() - start
        record = measure(accelerator, step, loss_mean, seconds, tokens_per_step)
        if prediction and device.type == "cuda":
            peak = accelerator.num_processes * prediction["peak_flop_per_s_per_gpu"]
            record["mfu"] = record["tokens_per_s"] * prediction["flop_per_token"] / peak
        report(accelerator, arguments.log, record, prediction)
        if arguments.save_every and step % arguments.save_every == 0:
            save_checkpoint(accelerator, arguments, step)


def loss_of(accelerator: Accelerator, model: Any, batch: dict[str, torch.Tensor]) -> Any:
    """Only the loss is kept of the outputs: the logits would live on through the backward pass."""
    mesh = accelerator.parallelism_config
    if mesh and mesh.sp_enabled:
        from transformers.integrations import deepspeed

        compute_loss: Any = deepspeed.deepspeed_sp_compute_loss  # the mean over all processes' tokens of a sequence
        return compute_loss(accelerator, model, batch, False, mesh)
    return model(**batch).loss


def read_prediction(accelerator: Accelerator, arguments: argparse.Namespace) -> dict[str, Any]:
    """What prediction.json beside this file says; nothing where it is not there, or is for another batch."""
    path = Path(__file__).with_name("prediction.json")
    if not path.is_file():
        return {}
    prediction: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    here = {
        "processes": accelerator.num_processes,
        "micro_batch": arguments.micro_batch,
        "accumulation_steps": arguments.accumulation_steps,
        "sequence_length": arguments.sequence_length,
    }
    return prediction if here.items() <= prediction.items() else {}


def describe(accelerator: Accelerator, model: Any, optimizer: Any) -> dict[str, Any]:
    """What runs, by the classes that really do."""
    inner = optimizer.optimizer  # accelerate's wrapper holds torch's or DeepSpeed's optimizer
    unwrapped = accelerator.unwrap_model(model)
    model_itself = unwrapped.get_base_model() if hasattr(unwrapped, "get_base_model") else unwrapped
    return {
        "processes": accelerator.num_processes,
        "distributed_type": accelerator.distributed_type.value,
        "engine": type(model).__name__,
        "model": type(model_itself).__name__,
        "attention": model_itself.config._attn_implementation,
        "optimizer": type(inner).__name__,
        "base_optimizer": type(getattr(inner, "optimizer", inner)).__name__,
    }


def measure(
    accelerator: Accelerator, step: int, loss: float, seconds: float, tokens_per_step: int
) -> dict[str, int | float]:
    """The step over all processes: mean loss, slowest time, largest memory."""
    on_gpu = accelerator.device.type == "cuda"
    own = [
        loss,
        seconds,
        torch.cuda.max_memory_allocated() if on_gpu else 0,
        torch.cuda.max_memory_reserved() if on_gpu else 0,
    ]
    # fp64 holds byte counts exactly up to 2^53.
    losses, times, allocated, reserved = accelerator.gather(
        torch.tensor([own], dtype=torch.float64, device=accelerator.device)
    ).T.tolist()
    return {
        "step": step,
        "loss": sum(losses) / len(losses),
        "seconds": max(times),
        "tokens_per_s": tokens_per_step / max(times),
        "peak_allocated_bytes": int(max(allocated)),
        "peak_reserved_bytes": int(max(reserved)),
    }


def report(
    accelerator: Accelerator, log: Path | None, record: dict[str, Any], prediction: dict[str, Any] | None = None
) -> None:
    if not accelerator.is_main_process:
        return
    if log:
        with log.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(record) + "\n")
    if "step" not in record:
        print(", ".join(f"{name} {value}" for name, value in record.items()), flush=True)
        return
    shown = {
        "tokens_per_s": ("", ",.0f", "tokens/s", 1),
        "mfu": ("MFU ", ".1f", "%", 100),
        "peak_allocated_bytes": ("peak allocated ", ".2f", "GiB", 2**-30),
        "peak_reserved_bytes": ("reserved ", ".2f", "GiB", 2**-30),
    }
    line = f"step {record['step']}  loss {record['loss']:.4f}"
    for name, (title, form, unit, scale) in shown.items():
        if record.get(name):
            predicted = f" ({prediction[name] * scale:{form}})" if prediction else ""
            line += f"  {title}{record[name] * scale:{form}}{predicted} {unit}"
    print(line, flush=True)
    if not math.isfinite(record["loss"]):
        print("the loss is not finite: lower --learning-rate or raise --warmup-steps", flush=True)


def save(accelerator: Accelerator, arguments: argparse.Namespace, model: Any, tokenizer: Any) -> None:
    weights = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        # A text part taken out of a larger model keeps its new names: its old ones lead nowhere any more.
        original_names = not has_other_parts(arguments)
        options = {"save_original_format": original_names} if arguments.method == "full" else {}
        accelerator.unwrap_model(model).save_pretrained(arguments.output, state_dict=weights, **options)
        if tokenizer is not None:
            tokenizer.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
