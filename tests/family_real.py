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
    "Mistral-7B-v0.3": ("Mistral", _decoder(4096, 32, (32, 8, 128), 14_336, 32_768, sliding_window=None)),
    "Gemma-3-1B": (
        "Gemma3",
        _decoder(1152, 26, (4, 1, 256), 6912, 262_144, tie_word_embeddings=True, sliding_window=512),
    ),
    "Gemma-2-2B": (
        "Gemma2",
        _decoder(
            2304,
            26,
            (8, 4, 256),
            9216,
            256_000,
            tie_word_embeddings=True,
            sliding_window=4096,
            max_position_embeddings=8192,
            attn_implementation="eager",
        ),
    ),
    "Phi-3-medium-128k": ("Phi3", _decoder(5120, 40, (40, 10, 128), 17_920, 32_064, sliding_window=None)),
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
    "Qwen3-30B-A3B": (
        "Qwen3Moe",
        _decoder(
            2048,
            48,
            (32, 4, 128),
            6144,
            151_936,
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
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


def causal(checkpoint: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A decoder with a language-modelling head, e.g. "Qwen3-1.7B"."""
    kind, options = CAUSAL[checkpoint]
    text = "Text" if kind == "Gemma3" else ""
    config = getattr(transformers, f"{kind}{text}Config")(**options)
    with torch.device("meta"):
        return getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype)


def checkpointed(checkpoint: str, use_reentrant: bool) -> nn.Module:
    """The decoder with gradient checkpointing switched on."""
    model: Any = causal(checkpoint)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    return model


def lora(checkpoint: str, modules: list[str], **options: Any) -> nn.Module:
    """The decoder under LoRA of rank 16."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=16, target_modules=modules, task_type="CAUSAL_LM", **options)
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        return get_peft_model(causal(checkpoint), config, autocast_adapter_dtype=False)


def llava() -> nn.Module:
    """Llava-1.5-7B: a CLIP-L/14 of 336 pixels before a Llama of 7B."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    text = transformers.LlamaConfig(**_decoder(4096, 32, (32, 32, 128), 11_008, 32_064))
    return build(
        "LlavaForConditionalGeneration", transformers.LlavaConfig(vision_config=vision, text_config=text)
    ).to(torch.bfloat16)


def gemma3_vision() -> nn.Module:
    """Gemma-3-4B: a SigLIP of 896 pixels, 256 tokens an image, before a Gemma 3 of 4B."""
    vision = transformers.SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=896,
        patch_size=14,
        vision_use_head=False,
    )
    sizes = _decoder(2560, 34, (8, 4, 256), 10_240, 262_208, tie_word_embeddings=True, sliding_window=1024)
    config = transformers.Gemma3Config(
        vision_config=vision, text_config=transformers.Gemma3TextConfig(**sizes), mm_tokens_per_image=256
    )
    return build("Gemma3ForConditionalGeneration", config).to(torch.bfloat16)


def qwen_vl() -> nn.Module:
    """Qwen2.5-VL-7B."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "patch_size": 14,
        "out_hidden_size": 3584,
    }
    sizes = _decoder(3584, 28, (28, 4, 128), 18_944, 152_064, rope_parameters=rope)
    config = transformers.Qwen2_5_VLConfig(vision_config=vision, text_config=sizes)
    return build("Qwen2_5_VLForConditionalGeneration", config).to(torch.bfloat16)


def mamba() -> nn.Module:
    """Mamba-130M."""
    config = transformers.MambaConfig(hidden_size=768, num_hidden_layers=24, state_size=16, vocab_size=50_280)
    return build("MambaForCausalLM", config)


def mamba2() -> nn.Module:
    """Mamba2-1.3B with a quarter of its layers."""
    config = transformers.Mamba2Config(
        hidden_size=2048,
        num_hidden_layers=12,
        num_heads=64,
        head_dim=64,
        state_size=128,
        n_groups=1,
        vocab_size=50_288,
        tie_word_embeddings=True,
    )
    return build("Mamba2ForCausalLM", config).to(torch.bfloat16)


def build(architecture: str, config: Any) -> nn.Module:
    """Any other model of transformers, in float32."""
    with torch.device("meta"):
        return getattr(transformers, architecture)(config)


def t5_config() -> Any:
    """T5-base's."""
    return transformers.T5Config(
        d_model=768, d_ff=3072, num_layers=12, num_heads=12, decoder_start_token_id=0
    )


def unet() -> nn.Module:
    """About the size of Stable Diffusion's: four levels, 320 to 1280 channels, two blocks a level."""
    with torch.device("meta"):
        return DiffusionUNet((320, 640, 1280, 1280), blocks=2, heads=8)


Batch = dict[str, torch.Tensor]


def text_batch(sequence: int = SEQUENCE, targets: int | None = None) -> Batch:
    """One row of `sequence` tokens, with `targets` labels."""
    tokens = torch.zeros(1, sequence, dtype=torch.long)
    return {"input_ids": tokens, "labels": tokens[:, :targets]}


def image_batch(size: int = 224) -> Batch:
    """One labelled image."""
    return {"pixel_values": torch.zeros(1, 3, size, size), "labels": torch.zeros(1, dtype=torch.long)}


def noise_batch(size: int = 64) -> Batch:
    """One latent image with the noise to predict."""
    image = torch.zeros(1, 3, size, size)
    return {"x": image, "timesteps": torch.zeros(1, dtype=torch.long), "noise": image}


def text_and_image_batch() -> Batch:
    """One row that begins with one image."""
    return {**text_batch(), "pixel_values": torch.zeros(1, 3, 336, 336, dtype=torch.bfloat16)}


def gemma3_batch() -> Batch:
    """One row that begins with one image."""
    batch = text_batch()
    images = torch.zeros(1, 3, 896, 896, dtype=torch.bfloat16)
    return {**batch, "pixel_values": images, "token_type_ids": torch.zeros_like(batch["input_ids"])}


def embedded_batch() -> Batch:
    """One row of vectors with their positions in time, height and width."""
    positions = torch.zeros(3, 1, SEQUENCE, dtype=torch.long)
    vectors = torch.zeros(1, SEQUENCE, 3584, dtype=torch.bfloat16)
    return {"inputs_embeds": vectors, "position_ids": positions, "labels": text_batch()["labels"]}


def masked_batch() -> Batch:
    """One row with a mask."""
    batch = text_batch()
    return {**batch, "attention_mask": torch.zeros_like(batch["input_ids"])}


def packed_batch() -> Batch:
    """One row with positions."""
    batch = text_batch()
    return {**batch, "position_ids": torch.zeros_like(batch["input_ids"])}
