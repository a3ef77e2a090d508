"""The families at the sizes of published checkpoints, without weights.

Sizes are those of each checkpoint's `config.json`; vocabularies included.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
import transformers

from tests.unet import DiffusionUNet

if TYPE_CHECKING:
    from torch import nn

SEQUENCE = 2048
GROUPED = {"experts_implementation": "grouped_mm"}


def _decoder(
    hidden: int, layers: int, heads: tuple[int, int, int], mlp: int, vocabulary: int, **options: Any
) -> dict[str, Any]:
    query, key, depth = heads
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": query,
        "num_key_value_heads": key,
        "head_dim": depth,
        "intermediate_size": mlp,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "max_position_embeddings": 32768,
        **options,
    }


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3-1.7B": ("Qwen3", _decoder(2048, 28, (16, 8, 128), 6144, 151_936, tie_word_embeddings=True)),
    "Qwen3-32B": ("Qwen3", _decoder(5120, 64, (64, 8, 128), 25_600, 151_936)),
    "Llama-3.1-8B": (
        "Llama",
        _decoder(4096, 32, (32, 8, 128), 14_336, 128_256, rope_parameters=LLAMA3_ROPE),
    ),
    "Mistral-7B-v0.1": ("Mistral", _decoder(4096, 32, (32, 8, 128), 14_336, 32_000, sliding_window=4096)),
    "Gemma-3-4B": (
        "Gemma3",
        _decoder(2560, 34, (8, 4, 256), 10_240, 262_208, tie_word_embeddings=True, sliding_window=1024),
    ),
    "Phi-3-mini": ("Phi3", _decoder(3072, 32, (32, 32, 96), 8192, 32_064, sliding_window=2047)),
    "Qwen3-235B-A22B": (
        "Qwen3Moe",
        _decoder(
            4096,
            94,
            (64, 4, 128),
            12_288,
            151_936,
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=1536,
            **GROUPED,
        ),
    ),
    "GPT-OSS-20B": (
        "GptOss",
        _decoder(
            2880,
            24,
            (64, 8, 64),
            2880,
            201_088,
            num_local_experts=32,
            num_experts_per_tok=4,
            sliding_window=128,
            max_position_embeddings=131_072,
            **GROUPED,
        ),
    ),
    "Mixtral-8x7B": (
        "Mixtral",
        _decoder(
            4096,
            32,
            (32, 8, 128),
            14_336,
            32_000,
            num_local_experts=8,
            num_experts_per_tok=2,
            **GROUPED,
        ),
    ),
}


def causal(checkpoint: str) -> nn.Module:
    """A decoder with a language-modelling head, e.g. "Qwen3-1.7B"."""
    kind, options = CAUSAL[checkpoint]
    text = "Text" if kind == "Gemma3" else ""
    config = getattr(transformers, f"{kind}{text}Config")(**options)
    with torch.device("meta"):
        return getattr(transformers, f"{kind}ForCausalLM")(config).to(torch.bfloat16)


def lora(checkpoint: str, modules: list[str], **options: Any) -> nn.Module:
    """The decoder under LoRA of rank 16."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=16, target_modules=modules, task_type="CAUSAL_LM", **options)
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        return get_peft_model(causal(checkpoint), config, autocast_adapter_dtype=False)


def build(architecture: str, config: Any) -> nn.Module:
    """Any other model of transformers, in float32."""
    with torch.device("meta"):
        return getattr(transformers, architecture)(config)


def unet() -> nn.Module:
    """About the size of Stable Diffusion's: four levels, 320 to 1280 channels, two blocks a level."""
    with torch.device("meta"):
        return DiffusionUNet((320, 640, 1280, 1280), blocks=2, heads=8)


def token_batch(batch: int = 1, sequence: int = SEQUENCE) -> dict[str, torch.Tensor]:
    ids = torch.zeros(batch, sequence, dtype=torch.long)
    return {"input_ids": ids, "labels": ids}


def image_batch(size: int = 224, batch: int = 1) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": torch.zeros(batch, 3, size, size),
        "labels": torch.zeros(batch, dtype=torch.long),
    }
