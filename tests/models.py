"""Small models of the families that are tested, each with one batch."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rpcompile.ir import Hardware

if TYPE_CHECKING:
    from collections.abc import Callable

# Compute is so slow beside its links that the solver spreads even these models over all GPUs.
SLOW_GPU = Hardware("slow", 2**30, 2**30, 1e7, 1e7, 1e9, 1e9, 1e-6, {})
VOCABULARY, BATCH, SEQUENCE = 61, 8, 12


@dataclass(frozen=True)
class Case:
    """A model and a batch of eight."""

    model: nn.Module
    batch: dict[str, torch.Tensor]


def part(name: str, value: torch.Tensor, microbatches: int, index: int) -> torch.Tensor:
    """One microbatch of an input; positions in several dimensions have the batch second."""
    return value.chunk(microbatches, 1 if name == "position_ids" and value.ndim == 3 else 0)[index]


def tokens() -> dict[str, torch.Tensor]:
    """Random tokens; the first three of each row are not predicted."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(0, VOCABULARY, (BATCH, SEQUENCE), generator=generator)
    labels = ids.clone()
    labels[:, :3] = -100
    return {"input_ids": ids, "labels": labels}


def qwen3_config(layers: int = 3) -> Any:
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )


def qwen3() -> Case:
    from transformers import Qwen3ForCausalLM

    return Case(Qwen3ForCausalLM(qwen3_config()), tokens())


def gpt2() -> Case:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=1,
        loss_type="ForCausalLMLoss",
    )
    return Case(GPT2LMHeadModel(config), tokens())


def bert() -> Case:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    batch = tokens()
    mask = torch.ones(BATCH, SEQUENCE, dtype=torch.long)
    mask[:, -2:] = 0
    mask[0, 4:] = 0
    return Case(BertForMaskedLM(config), {**batch, "attention_mask": mask})


def lora() -> Case:
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3ForCausalLM

    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.1, task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(Qwen3ForCausalLM(qwen3_config()), config)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, which would make half of the gradients zero
            parameter.data.normal_(0, 0.1, generator=generator)
    return Case(model, tokens())


class TinyUNet(nn.Module):
    """Two levels, skip connections, BatchNorm, GroupNorm, in-place activations and dropout."""

    def __init__(self) -> None:
        super().__init__()
        conv = nn.Conv2d
        self.first = nn.Sequential(
            conv(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), conv(8, 8, 3, padding=1)
        )
        self.down1 = conv(8, 16, 3, 2, 1)
        self.level1 = nn.Sequential(nn.GroupNorm(4, 16), nn.SiLU(inplace=True), conv(16, 16, 3, padding=1))
        self.down2 = conv(16, 32, 3, 2, 1)
        self.middle = nn.Sequential(conv(32, 32, 3, padding=1), nn.SiLU(), nn.Dropout(0.1))
        self.up1 = nn.ConvTranspose2d(32, 16, 2, 2)
        self.join1 = nn.Sequential(conv(32, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.up2 = nn.ConvTranspose2d(16, 8, 2, 2)
        self.join2 = nn.Sequential(conv(16, 8, 3, padding=1), nn.SiLU(), conv(8, 3, 1))

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        skip0 = self.first(x)
        skip1 = self.level1(self.down1(skip0))
        hidden = self.middle(self.down2(skip1))
        hidden = self.join1(torch.cat([self.up1(hidden), skip1], 1))
        hidden = self.join2(torch.cat([self.up2(hidden), skip0], 1))
        return nn.functional.mse_loss(hidden, target)


def unet() -> Case:
    generator = torch.Generator().manual_seed(5)
    shape = (BATCH, 3, 16, 16)
    return Case(
        TinyUNet(),
        {"x": torch.randn(shape, generator=generator), "target": torch.randn(shape, generator=generator)},
    )


class Mlp(nn.Module):
    """Linear layers with ReLU and a cross-entropy loss."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return nn.functional.cross_entropy(self.layers[-1](x), y)


def mlp(*sizes: int) -> Case:
    sizes = sizes or (16, 16, 16, 16, 5)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(BATCH, sizes[0], generator=generator)
    return Case(Mlp(*sizes), {"x": x, "y": torch.randint(0, sizes[-1], (BATCH,), generator=generator)})


FAMILIES: dict[str, Callable[[], Case]] = {
    "qwen3-tied": qwen3,
    "gpt2-tied-dropout": gpt2,
    "bert-padded": bert,
    "qwen3-lora": lora,
    "unet-batchnorm": unet,
    "mlp": mlp,
}


def make(family: str) -> Case:
    """The family's case with weights that depend on nothing else, in training mode."""
    return build(FAMILIES[family])


def build(factory: Callable[[], Case]) -> Case:
    """A case with weights that depend on nothing else, in training mode."""
    torch.manual_seed(0)
    case = factory()
    case.model.train()
    # A key-value cache copies keys and values into another memory layout, which the matrix kernels
    # round differently; the captured graph has no cache, so neither has what it is compared with.
    for module in case.model.modules():
        if getattr(getattr(module, "config", None), "use_cache", False):
            module.config.use_cache = False
    return case
