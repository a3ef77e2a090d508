"""What is particular to Hugging Face models: their inputs, and how their masks are captured.

Nothing here imports transformers unless the model already did.
"""

from __future__ import annotations

import functools
import sys
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch

from rpcompile.errors import MissingExampleInputs
from rpcompile.model_loss import ModelWithLoss

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn

DEFAULT_SEQUENCE = 2048
DEFAULT_IMAGE = 224


def base_model(model: nn.Module) -> nn.Module | None:
    """The transformers model inside `model` (itself, or what PEFT wraps), or None."""
    transformers = sys.modules.get("transformers")
    if transformers is None:
        return None
    if isinstance(model, ModelWithLoss):
        model = model.model
    candidate = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return candidate if isinstance(candidate, transformers.PreTrainedModel) else None


def infer_example_inputs(model: nn.Module, batch: int) -> dict[str, torch.Tensor] | None:
    """Example inputs of a language model or an image classifier, None where they cannot be told.

    Args:
        model: Any module.
        batch: Number of sequences or images in the example.

    Returns:
        Zeros. `input_ids` of shape (batch, sequence), int64, sequence being 2048 or the model's longest,
        whichever is less; or `pixel_values` of shape (batch, channels, height, width) in the model's dtype.
        `labels` are int64: one a token, half as many for sequence-to-sequence models (so that the two
        lengths may differ later), or of shape (batch,) for classification.

    Raises:
        MissingExampleInputs: The model reads text and images, whose sizes only its processor knows.
    """
    base: Any = base_model(model)
    if base is None:
        return None
    architecture = type(base).__name__
    config = base.config
    if getattr(config, "vision_config", None) is not None:
        raise MissingExampleInputs(
            f"{architecture} reads text and images, whose number and sizes cannot be inferred; pass one "
            f"batch as its processor makes it: example_inputs={{'input_ids': ids, 'attention_mask': mask, "
            f"'pixel_values': images, 'labels': labels}}"
        )
    classes = torch.zeros(batch, dtype=torch.long)
    if base.main_input_name == "pixel_values" and architecture.endswith("ForImageClassification"):
        size = getattr(config, "image_size", None) or DEFAULT_IMAGE
        height, width = (size, size) if isinstance(size, int) else size
        return {
            "pixel_values": torch.zeros(batch, config.num_channels, height, width, dtype=base.dtype),
            "labels": classes,
        }
    if base.main_input_name != "input_ids":
        return None
    limit = getattr(config, "max_position_embeddings", None) or DEFAULT_SEQUENCE
    tokens = torch.zeros(batch, min(DEFAULT_SEQUENCE, int(limit)), dtype=torch.long)
    if config.is_encoder_decoder:
        if architecture.endswith(("ForConditionalGeneration", "ForSeq2SeqLM")):
            return {"input_ids": tokens, "labels": tokens[:, : tokens.shape[1] // 2].clone()}
        return None
    if architecture.endswith(("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForTokenClassification")):
        return {"input_ids": tokens, "labels": tokens.clone()}
    if architecture.endswith("ForSequenceClassification"):
        return {"input_ids": tokens, "labels": classes}
    return None


@contextmanager
def capture_context(model: nn.Module, input_names: frozenset[str]) -> Iterator[None]:
    """Patches that make a Hugging Face model's export equal to what it does when it trains.

    - No key-value cache: it would be a graph output, and training has no use for it.
    - Without `attention_mask`, causal attention is `is_causal=True`, as in eager mode; the mask
      builder refuses that while exporting for fear that the graph will be used for decoding. A
      mask that is an input of the graph is always kept.
    - No gradient checkpointing: stages recompute anyway.
    - Masks of transformers' own functions are built by broadcasting indices, since `torch.vmap` cannot
      be exported.
    - Without `position_ids` the batch is not packed, so the builder need not look for packing.
      With them it looks, and the mask it makes stays in the graph.
    """
    with ExitStack() as stack:
        for module in model.modules():
            config = getattr(module, "config", None)
            if getattr(config, "use_cache", None):
                stack.enter_context(patch.object(config, "use_cache", False))
            if getattr(module, "gradient_checkpointing", None):
                stack.enter_context(patch.object(module, "gradient_checkpointing", False))
        masking = sys.modules.get("transformers.masking_utils")
        if masking is not None and any(base_model(module) is not None for module in model.modules()):
            if hasattr(masking, "is_torchdynamo_exporting"):  # not yet in transformers 5.17
                stack.enter_context(patch.object(masking, "is_torchdynamo_exporting", lambda: False))
            tracing = functools.partial(_is_tracing_a_mask, masking.is_tracing)
            stack.enter_context(patch.object(masking, "is_tracing", tracing))
            expand = functools.partial(
                _expand_mask, masking, masking._vmap_expansion_sdpa, masking.TransformGetItemToIndex
            )
            stack.enter_context(patch.object(masking, "_vmap_expansion_sdpa", expand))
            stack.enter_context(patch.object(masking, "TransformGetItemToIndex", nullcontext))
            # What a module around the model passes on to it as positions cannot be told from the names.
            if "position_ids" not in input_names and base_model(model) is not None:
                stack.enter_context(patch.object(masking, "find_packed_sequence_indices", lambda _: None))
        yield


def idle_mask_notice(model: nn.Module, named: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """What to say of an example whose attention mask hides nothing: it stays in the graph all the same."""
    mask = named.get("attention_mask")
    if mask is None or mask.device.type == "meta" or base_model(model) is None:
        return
    if bool(mask.all()):
        yield (
            "attention_mask is all ones in the first microbatch. It stays in the graph, since a batch may be "
            "padded, and keeps attention from its faster causal kernels; leave it out if no batch is padded"
        )


def _is_tracing_a_mask(is_tracing: Any, tensor: torch.Tensor | None = None) -> bool:
    """Whether the values of a mask cannot be asked for; without one there is nothing to ask."""
    return tensor is not None and is_tracing(tensor)


def _expand_mask(masking: Any, by_vmap: Any, indexing: Any, mask_function: Any) -> Any:
    """The mask over all (batch, head, query, key) indices, given one vector of each."""

    def expanded(*indices: torch.Tensor) -> torch.Tensor:
        if not _is_of_transformers(mask_function):
            with indexing():
                return by_vmap(mask_function)(*indices)
        mask = mask_function(*masking._non_vmap_expansion_sdpa(*indices))
        return mask.expand(*(index.shape[0] for index in indices))

    return expanded


def _is_of_transformers(function: Any) -> bool:
    """Whether it and the functions it is put together from are; these only compare and look up indices."""
    if not getattr(function, "__module__", "").startswith("transformers."):
        return False
    held = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    held = [item for value in held for item in (value if isinstance(value, tuple | list) else [value])]
    return all(_is_of_transformers(item) for item in held if callable(item))


def remedy_for(model: nn.Module, text: str) -> str | None:
    """What to change in a transformers model that cannot be captured, None where nothing is known.

    Args:
        text: The error, with the source lines that it passed through.
    """
    base: Any = base_model(model)
    if base is None:
        return None
    implementation = getattr(base.config.get_text_config(), "_experts_implementation", None)
    if "expert" in text and implementation != "grouped_mm":
        return (
            f"Its experts run by experts_implementation={implementation!r}, which loops over the experts "
            f"that were hit: load or configure the model with experts_implementation='grouped_mm'."
        )
    if "grid_thw" in text or "grid_h" in text:
        return (
            "Image sizes are read from the tensor image_grid_thw, and shapes depend on them. Run the vision "
            "tower before (model.get_image_features, model.get_rope_index) and compile the model for "
            "inputs_embeds, position_ids and labels; or use a model whose images have one size (Llava, "
            "PaliGemma, Gemma 3, InternVL)."
        )
    return None
