"""Question and answer pairs about tech support, as token batches.

The corpus (chatterbot-corpus, BSD) lists 1,050 conversations, but only ten of them differ. They are
reduced to those ten, and whole questions are held out: a split by row would put the same pair on both sides.

Shape legend: B batch, S sequence.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch

from rpcompile.demo.packages import data_file, require
from rpcompile.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

SYSTEM = "You are a tech support agent."
IGNORED = -100  # the label that Hugging Face losses skip


@dataclass(frozen=True)
class Pair:
    """A user's question and the answer to learn."""

    question: str
    answer: str


def read_pairs(path: Path | None = None) -> tuple[Pair, ...]:
    """Read the distinct pairs, in order of first appearance.

    Args:
        path: A YAML file of the corpus; by default the installed tech-support file. Of a conversation's
            turns the first is the question and every other one an answer to it.

    Raises:
        MissingPackage: chatterbot_corpus or yaml is not installed.
        InvalidArgument: The file holds no list of conversations.
    """
    require("yaml")
    import yaml

    if path is None:
        path = data_file("chatterbot_corpus", "data", "english", "tech_support.yml")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    conversations = content.get("conversations") if isinstance(content, dict) else None
    if not conversations:
        raise InvalidArgument(f"{path} has no `conversations`; give a YAML file of chatterbot-corpus")
    pairs = (Pair(turns[0], answer) for turns in conversations for answer in turns[1:])
    return tuple(dict.fromkeys(pairs))


def split(pairs: Sequence[Pair], held_out: int, seed: int = 0) -> tuple[tuple[Pair, ...], tuple[Pair, ...]]:
    """Divide pairs into training and held-out ones so that no question is on both sides.

    Args:
        pairs: Distinct pairs.
        held_out: Number of questions to hold out.
        seed: Decides which; the same pairs and seed give the same split.

    Returns:
        Training pairs and held-out pairs, each in the order of `pairs`.

    Raises:
        InvalidArgument: `held_out` leaves either side empty.
    """
    questions = sorted({pair.question for pair in pairs})
    if not 0 < held_out < len(questions):
        raise InvalidArgument(
            f"held_out={held_out} of {len(questions)} questions leaves one side empty; "
            f"use 1 to {len(questions) - 1}"
        )
    chosen = set(random.Random(seed).sample(questions, held_out))
    train = tuple(pair for pair in pairs if pair.question not in chosen)
    return train, tuple(pair for pair in pairs if pair.question in chosen)


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    """Tokens of the chat up to where the assistant's answer begins."""
    chat = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return tokenizer(cast(str, text), add_special_tokens=False)["input_ids"]


def encode(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], length: int) -> dict[str, torch.Tensor]:
    """Turn pairs into one padded batch whose labels are the answers and their end mark.

    Args:
        tokenizer: With a chat template, an `eos_token_id` and a `pad_token_id`.
        pairs: B pairs.
        length: S, the sequence length to pad to.

    Returns:
        `input_ids` and `labels`, int64 (B, S), on the CPU.

    Raises:
        InvalidArgument: A pair is longer than `length`.
    """
    # No attention mask: padding stands on the right, and under a causal mask a token sees only what is on
    # its left. So no real token sees padding, and padding's own outputs have no label.
    input_ids = torch.full((len(pairs), length), cast(int, tokenizer.pad_token_id))
    labels = torch.full((len(pairs), length), IGNORED)
    for row, pair in enumerate(pairs):
        prompt = prompt_tokens(tokenizer, pair.question)
        answer = tokenizer(pair.answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        end = len(prompt) + len(answer)
        if end > length:
            raise InvalidArgument(f"{pair.question!r} takes {end} tokens, over {length}; use length={end}")
        input_ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return {"input_ids": input_ids, "labels": labels}


def batches(
    rows: dict[str, torch.Tensor], batch_size: int, steps: int, seed: int = 0
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield `steps` batches of `batch_size` rows, shuffled anew for each pass through them.

    A batch may span two passes, so every batch has the same shape however few rows there are.
    """
    generator = torch.Generator().manual_seed(seed)
    count = rows["input_ids"].shape[0]
    order: list[int] = []
    for _ in range(steps):
        while len(order) < batch_size:
            order += torch.randperm(count, generator=generator).tolist()
        chosen, order = order[:batch_size], order[batch_size:]
        yield {name: tensor[chosen] for name, tensor in rows.items()}
