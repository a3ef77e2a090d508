"""What is particular to Hugging Face models: their inputs, and how their masks are captured.

Nothing here imports transformers unless the model already did.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

DEFAULT_SEQUENCE = 2048


def base_model(model: nn.Module) -> nn.Module | None:
    """The transformers model inside `model` (itself, or what PEFT wraps), or None."""
    transformers = sys.modules.get("transformers")
    if transformers is None:
        return None
    candidate = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return candidate if isinstance(candidate, transformers.PreTrainedModel) else None


def infer_example_inputs(model: nn.Module, batch: int) -> dict[str, torch.Tensor] | None:
    """Example `input_ids` and `labels` for a token model, None where that cannot be told.

    Args:
        model: Any module.
        batch: Number of sequences in the example.

    Returns:
        int64 zeros of shape (batch, sequence), sequence being 2048 or the model's
        longest, whichever is less; labels have shape (batch,) for sequence classification.
    """
    base = base_model(model)
    if base is None or getattr(base, "main_input_name", None) != "input_ids":
        return None
    architecture = type(base).__name__
    config: Any = base.config
    limit = getattr(config, "max_position_embeddings", None) or DEFAULT_SEQUENCE
    tokens = torch.zeros(batch, min(DEFAULT_SEQUENCE, int(limit)), dtype=torch.long)
    if architecture.endswith(("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForTokenClassification")):
        return {"input_ids": tokens, "labels": tokens.clone()}
    if architecture.endswith("ForSequenceClassification"):
        return {"input_ids": tokens, "labels": torch.zeros(batch, dtype=torch.long)}
    return None


@contextmanager
def capture_context(model: nn.Module, input_names: frozenset[str]) -> Iterator[None]:
    """Patches that make a Hugging Face model's export equal to what it does when it trains.

    - No key-value cache: it would be a graph output, and training has no use for it.
    - Without `attention_mask`, causal attention is `is_causal=True`, as in eager mode; the mask
      builder refuses that while exporting for fear that the graph will be used for decoding. A
      mask that is an input of the graph is always kept.
    - Without `position_ids` the batch is not packed, so the builder need not look for packing.
      With them it looks, and the mask it makes stays in the graph.
    """
    with ExitStack() as stack:
        for module in model.modules():
            config = getattr(module, "config", None)
            if getattr(config, "use_cache", None):
                stack.enter_context(patch.object(config, "use_cache", False))
        masking = sys.modules.get("transformers.masking_utils")
        if masking is not None and base_model(model) is not None:
            stack.enter_context(patch.object(masking, "is_torchdynamo_exporting", lambda: False))
            if "position_ids" not in input_names:
                stack.enter_context(patch.object(masking, "find_packed_sequence_indices", lambda _: None))
        yield
