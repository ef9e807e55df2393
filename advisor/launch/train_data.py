"""What train.py trains on: micro-batches of a dataset's tokens, or of random ones."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

PADDING = -1  # stands for no token until the batch is made
IGNORED = -100  # the label that the loss leaves out
MASKED_SHARE = 0.15  # of the tokens that a masked or sequence-to-sequence model has to restore; Devlin et al., 2019


def make_batches(
    accelerator: Accelerator, arguments: argparse.Namespace, tokenizer: Any, vocabulary_size: int, skipped: int = 0
) -> Iterator[dict[str, torch.Tensor]]:
    """Endless micro-batches of this process, on its device, after the first *skipped*.

    An attention mask comes with padding alone. Processes that share sequences get the same ones; those that share them
    by Ulysses each get their part, whose labels are shifted, as the last of them lies in the next part.
    """
    if tokenizer is None:
        sequences = random_sequences(accelerator, arguments, vocabulary_size)
        mask_token = 0
    else:
        sequences = text_sequences(accelerator, arguments, tokenizer)
        known = (tokenizer.mask_token_id, tokenizer.unk_token_id, 0)
        mask_token = next(token for token in known if token is not None)
    for tokens in itertools.islice(sequences, skipped, None):
        inputs = labels = tokens
        if arguments.objective != "causal":
            hidden = torch.rand(tokens.shape) < MASKED_SHARE
            hidden[:, 0] = True  # at least one token to restore in each sequence
            inputs = tokens.masked_fill(hidden, mask_token)
        if arguments.objective == "masked":
            labels = tokens.masked_fill(~hidden, IGNORED)
        batch = {"input_ids": inputs, "labels": labels}
        if arguments.padded:
            seen = tokens != PADDING
            batch = {
                "input_ids": inputs.masked_fill(~seen, 0),
                "labels": labels.masked_fill(~seen, IGNORED),
                "attention_mask": seen.long(),
            }
        if together_on_sequences(accelerator) > 1:
            batch = with_positions(batch)
        if (ranks := ulysses_ranks(accelerator)) > 1:
            rank = accelerator.process_index % ranks
            batch = {name: tensor.chunk(ranks, dim=1)[rank].contiguous() for name, tensor in batch.items()}
        batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
        if "shift_labels" in batch:
            batch["labels"] = batch["shift_labels"]
        yield batch


def with_positions(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a part of a sequence does not tell: where it stands, and the token that follows its last."""
    labels = batch["labels"]
    following = torch.nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    positions = torch.arange(labels.shape[1]).repeat(len(labels), 1)
    return {"input_ids": batch["input_ids"], "shift_labels": following.contiguous(), "position_ids": positions}


def together_on_sequences(accelerator: Accelerator) -> int:
    """Processes that share each sequence."""
    mesh = accelerator.parallelism_config
    return mesh.cp_size * mesh.sp_size if mesh else 1


def ulysses_ranks(accelerator: Accelerator) -> int:
    """Those that share it by Ulysses."""
    return accelerator.parallelism_config.sp_size if accelerator.parallelism_config else 1


def readers(accelerator: Accelerator) -> tuple[int, int]:
    """How many groups of processes read different sequences, and which is this process's. Neighbours share them."""
    mesh = accelerator.parallelism_config
    together = mesh.non_data_parallel_size if mesh else 1
    return accelerator.num_processes // together, accelerator.process_index // together


def whole_attention(accelerator: Accelerator, batch: dict[str, torch.Tensor]) -> AbstractContextManager[None]:
    """Where context-parallel processes share sequences, *batch* is cut to this one's part, and attention sees all."""
    mesh = accelerator.parallelism_config
    if not mesh or not mesh.cp_enabled:
        return nullcontext()
    parts = [tensor for name, tensor in batch.items() if name != "labels"]  # which are the shifted ones
    context: Any = accelerator.maybe_context_parallel
    found: AbstractContextManager[None] = context(
        buffers=parts, buffer_seq_dims=[1] * len(parts), no_restore_buffers=set(parts)
    )
    return found


def random_sequences(
    accelerator: Accelerator, arguments: argparse.Namespace, vocabulary_size: int
) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(arguments.seed + readers(accelerator)[1])
    shape = (arguments.micro_batch, arguments.sequence_length)
    while True:
        tokens = torch.randint(vocabulary_size, shape, generator=generator)
        if arguments.padded:
            lengths = torch.randint(1, arguments.sequence_length, (arguments.micro_batch, 1), generator=generator)
            tokens[torch.arange(arguments.sequence_length) >= lengths] = PADDING
        yield tokens


def text_sequences(accelerator: Accelerator, arguments: argparse.Namespace, tokenizer: Any) -> Iterator[torch.Tensor]:
    """The dataset's tokens in a new order on every pass: joined and cut into equal sequences, or padded one by one."""
    separator = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    tokens: list[int] = []
    for text in read_texts(arguments.dataset):
        tokens += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        tokens += [separator] if separator is not None else []
        if arguments.padded:
            tokens += [PADDING] * (-len(tokens) % arguments.sequence_length)
    count = len(tokens) // arguments.sequence_length
    groups, group = readers(accelerator)
    together = arguments.micro_batch * groups
    if count < together:
        raise SystemExit(
            f"{arguments.dataset} gives {count} sequences of {arguments.sequence_length} tokens; one forward pass of "
            f"{groups} {'processes' if groups == accelerator.num_processes else 'groups of processes'} x "
            f"{arguments.micro_batch} needs {together}"
        )
    sequences = torch.tensor(tokens[: count * arguments.sequence_length]).view(count, arguments.sequence_length)
    generator = torch.Generator().manual_seed(arguments.seed)  # the same order in every process
    while True:
        order = torch.randperm(count, generator=generator)
        for start in range(0, count - together + 1, together):
            first = start + group * arguments.micro_batch
            yield sequences[order[first : first + arguments.micro_batch]]


def read_texts(dataset: str) -> Iterator[str]:
    path = Path(dataset)
    if path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)["text"]
    elif path.is_file():
        yield path.read_text(encoding="utf-8")
    else:
        try:
            from datasets import load_dataset  # type: ignore[import-not-found, import-untyped, unused-ignore]
        except ImportError:
            raise SystemExit(f"there is no file {dataset}; to look for it on the Hub: pip install datasets") from None
        for row in load_dataset(dataset, split="train"):
            yield row["text"]
