"""What train.py trains on: micro-batches of a dataset's tokens, or of random ones."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
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

    An attention mask comes with padding alone.
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
        yield {name: tensor.to(accelerator.device) for name, tensor in batch.items()}


def random_sequences(
    accelerator: Accelerator, arguments: argparse.Namespace, vocabulary_size: int
) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(arguments.seed + accelerator.process_index)
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
    together = arguments.micro_batch * accelerator.num_processes
    if count < together:
        raise SystemExit(
            f"{arguments.dataset} gives {count} sequences of {arguments.sequence_length} tokens; one forward pass of "
            f"{accelerator.num_processes} processes x {arguments.micro_batch} needs {together}"
        )
    sequences = torch.tensor(tokens[: count * arguments.sequence_length]).view(count, arguments.sequence_length)
    generator = torch.Generator().manual_seed(arguments.seed)  # the same order in every process
    while True:
        order = torch.randperm(count, generator=generator)
        for start in range(0, count - together + 1, together):
            first = start + accelerator.process_index * arguments.micro_batch
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
