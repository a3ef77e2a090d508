"""Small members of families, large enough that activations outweigh what kernels allocate besides."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import transformers

from rpcompile.ir import Stage, StageKind
from tests import family_tiny as tiny
from tests.models import Case
from tests.unet import DiffusionUNet

if TYPE_CHECKING:
    from rpcompile.ir import SegmentChain

F, B, FB = StageKind.F, StageKind.B, StageKind.FB

TOKENS = {"batch": 2, "sequence": 256}
_SIZES = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 352, "head_dim": 32}
_TEXT = {**_SIZES, "max_position_embeddings": 256}


def _tokens(case: Case, masked: bool = False) -> Case:
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(0, 256, (TOKENS["batch"], TOKENS["sequence"]), generator=generator)
    mask = torch.ones_like(ids)
    mask[:, -9:] = 0
    return Case(case.model, {"input_ids": ids, "labels": ids, **({"attention_mask": mask} if masked else {})})


def llama() -> Case:
    return _tokens(tiny.causal("Llama", **_TEXT))


def moe() -> Case:
    return _tokens(tiny.moe(**{**_TEXT, "num_hidden_layers": 1}))


def lora() -> Case:
    return _tokens(tiny.lora(tiny.causal("Qwen3", **_TEXT), ["q_proj", "v_proj", "down_proj"]))


def gpt2() -> Case:
    config = transformers.GPT2Config(
        vocab_size=256, n_embd=128, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1
    )
    config.loss_type = "ForCausalLMLoss"
    return _tokens(Case(transformers.GPT2LMHeadModel(config), {}))


def bert() -> Case:
    config = transformers.BertConfig(
        vocab_size=256, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512
    )
    return _tokens(Case(transformers.BertForMaskedLM(config), {}), masked=True)


def resnet() -> Case:
    config = transformers.ResNetConfig(
        embedding_size=32, hidden_sizes=[32, 64], depths=[2, 2], layer_type="basic", num_labels=5
    )
    batch = {"pixel_values": torch.randn(2, 3, 64, 64), "labels": torch.tensor([1, 2])}
    return Case(transformers.ResNetForImageClassification(config), batch)


def unet() -> Case:
    images, noise = torch.randn(2, 2, 3, 32, 32)
    model = DiffusionUNet((32, 64), blocks=1, heads=2, dropout=0.1)
    return Case(model, {"x": images, "timesteps": torch.tensor([5, 900]), "noise": noise})


def t5() -> Case:
    config = transformers.T5Config(
        vocab_size=256, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    case = _tokens(Case(transformers.T5ForConditionalGeneration(config), {}))
    return Case(case.model, {**case.batch, "labels": case.batch["labels"][:, :192].contiguous()})


_TOWER = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}


def vit() -> Case:
    config = transformers.ViTConfig(**_TOWER, image_size=64, patch_size=8, num_labels=5)
    batch = {"pixel_values": torch.randn(2, 3, 64, 64), "labels": torch.tensor([1, 2])}
    return Case(transformers.ViTForImageClassification(config), batch)


def llava() -> Case:
    """64 tokens an image, before text."""
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**_TOWER, image_size=64, patch_size=8),
        text_config=transformers.LlamaConfig(**{**tiny.DECODER, **_TEXT}),
        image_token_index=tiny.IMAGE,
        image_seq_length=64,
    )
    case = _tokens(Case(transformers.LlavaForConditionalGeneration(config), {}))
    ids = case.batch["input_ids"].clamp(min=tiny.IMAGE + 1)
    ids[:, :64] = tiny.IMAGE
    return Case(case.model, {"input_ids": ids, "labels": ids, "pixel_values": torch.randn(2, 3, 64, 64)})


def _few_tokens(case: Case, tokens: int) -> Case:
    ids = _tokens(case).batch["input_ids"][:, :tokens].contiguous()
    return Case(case.model, {"input_ids": ids, "labels": ids})


def mamba() -> Case:
    config = transformers.MambaConfig(
        vocab_size=256, hidden_size=128, state_size=8, num_hidden_layers=1, time_step_rank=8
    )
    return _few_tokens(Case(transformers.MambaForCausalLM(config), {}), 12)


def mamba2() -> Case:
    config = transformers.Mamba2Config(
        vocab_size=256,
        hidden_size=64,
        state_size=16,
        num_hidden_layers=1,
        num_heads=4,
        head_dim=32,
        n_groups=2,
        chunk_size=16,
    )
    return _few_tokens(Case(transformers.Mamba2ForCausalLM(config), {}), 32)


def gpt_oss() -> Case:
    options = {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "grouped_mm"}
    return _tokens(tiny.causal("GptOss", **_TEXT, **options, sliding_window=64))


def stages(chain: SegmentChain) -> list[Stage]:
    """Stages of each kind: of one segment, a few, and many."""
    n, first = len(chain.segments), chain.first_backward
    middle, last = max(first, n // 2), n - 2
    ranges = [(F, middle, middle), (F, middle, middle + 2), (F, 0, last)]
    ranges += [(B, middle, middle), (B, middle - 1, middle + 1), (B, first, last)]
    ranges += [(FB, n - 1, n - 1), (FB, n - 3, n - 1), (FB, first, n - 1)]
    return [
        Stage(0, kind, max(low, 0), high if kind is FB else min(high, last)) for kind, low, high in ranges
    ]


FAMILIES = {
    "Llama": llama,
    "Qwen3-MoE": moe,
    "GPT-2": gpt2,
    "BERT, padded": bert,
    "LoRA on Qwen3": lora,
    "ResNet, BatchNorm": resnet,
    "Diffusion UNet": unet,
    "T5": t5,
    "ViT": vit,
    "Llava": llava,
    "GPT-OSS": gpt_oss,
    "Mamba": mamba,
    "Mamba 2": mamba2,
}
