"""The model families that rpcompile is tested on, and the table of them in `docs/families.md`.

`python -m tests.families` captures every real-size member (a few minutes) and writes the table.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers

from rpcompile import hardware
from rpcompile.passes.bind_chain import BindChain
from rpcompile.passes.estimate_costs import EstimateCosts
from tests import family_real as real
from tests import family_tiny as tiny
from tests import minilm, models, staged

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

    from rpcompile.ir import CostedGraph, SegmentChain
    from tests.models import Case

DOCUMENT = Path(__file__).parents[1] / "docs" / "families.md"
EXACT = "bit for bit"
TIED = "bit for bit; tied weight to rounding"


@dataclass(frozen=True)
class Real:
    """A published size: how to make it on the meta device, and one microbatch."""

    checkpoint: str
    model: Callable[[], nn.Module]
    batch: real.Batch


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        tiny: A small member with a batch; None where the family cannot be captured.
        real: A published member.
        parity: How near staged execution of the tiny member is to plain PyTorch.
        context: What both members run under.
        unread: Whether the model holds parameters that this batch does not need.
        note: What a user should know.
    """

    name: str
    tiny: Callable[[], Case] | None = None
    real: Real | None = None
    parity: str = EXACT
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    unread: bool = False
    note: str = ""


def _text(checkpoint: str, model: Callable[[], nn.Module] | None = None) -> Real:
    return Real(checkpoint, model or partial(real.causal, checkpoint), real.text_batch())


def _build(checkpoint: str, architecture: str, config: Callable[[], object], batch: real.Batch) -> Real:
    return Real(checkpoint, lambda: real.build(architecture, config()), batch)


_GROUPED = {"experts_implementation": "grouped_mm"}
_MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2, **_GROUPED}
_MOE_NOTE = 'needs `experts_implementation="grouped_mm"`'
_QWEN3 = partial(tiny.causal, "Qwen3")

FAMILIES: tuple[Family, ...] = (
    Family("Qwen3, tied", partial(_QWEN3, tie_word_embeddings=True), _text("Qwen3-1.7B"), parity=TIED),
    Family("Qwen3", _QWEN3, _text("Qwen3-32B")),
    Family("Llama", partial(tiny.causal, "Llama", rope_parameters=tiny.LLAMA3_ROPE), _text("Llama-3.1-8B")),
    Family(
        "Mistral",
        partial(tiny.causal, "Mistral", sliding_window=4),
        _text("Mistral-7B-v0.3"),
        note="with a sliding window, the sequence stays on the side of the window that it was captured on",
    ),
    Family(
        "Gemma 2",
        partial(tiny.causal, "Gemma2", sliding_window=4, attn_implementation="eager"),
        _text("Gemma-2-2B"),
        note="sliding window: as Mistral",
    ),
    Family(
        "Gemma 3",
        partial(tiny.causal, "Gemma3", sliding_window=4, tie_word_embeddings=True),
        _text("Gemma-3-1B"),
        parity=TIED,
        note="sliding window: as Mistral",
    ),
    Family("Phi-3", partial(tiny.causal, "Phi3", sliding_window=None), _text("Phi-3-medium-128k")),
    Family("GLM-4", partial(tiny.causal, "Glm4")),
    Family("GPT-NeoX", tiny.gpt_neox),
    Family("OLMo 2", partial(tiny.causal, "Olmo2")),
    Family("Falcon", tiny.falcon),
    Family("StableLM", partial(tiny.causal, "StableLm")),
    Family("Granite", partial(tiny.causal, "Granite")),
    Family("StarCoder 2", partial(tiny.causal, "Starcoder2", residual_dropout=0.1)),
    Family("OPT", partial(tiny.causal, "OPT", ffn_dim=48, word_embed_proj_dim=32)),
    Family("Qwen3-MoE", tiny.moe, _text("Qwen3-235B-A22B"), note=_MOE_NOTE),
    Family("Qwen2-MoE", tiny.qwen2_moe, note=_MOE_NOTE),
    Family("DeepSeek-V2", tiny.deepseek, note=_MOE_NOTE),
    Family("DeepSeek-V3", tiny.deepseek_v3, note=_MOE_NOTE),
    Family(
        "GPT-OSS",
        partial(tiny.causal, "GptOss", sliding_window=4, **_MIXTURE),
        _text("GPT-OSS-20B"),
        note=_MOE_NOTE,
    ),
    Family("Mixtral", partial(tiny.causal, "Mixtral", **_MIXTURE), _text("Mixtral-8x7B"), note=_MOE_NOTE),
    Family(
        "GPT-2",
        models.gpt2,
        _build("GPT-2", "GPT2LMHeadModel", transformers.GPT2Config, real.text_batch(1024)),
        parity=TIED,
    ),
    Family(
        "BERT, padded",
        models.bert,
        _build("BERT-base", "BertForMaskedLM", transformers.BertConfig, real.text_batch(512)),
        parity=TIED,
    ),
    Family("RoBERTa, padded, classifier", partial(tiny.encoder, "RobertaForSequenceClassification")),
    Family(
        "DeBERTa-v2, padded",
        partial(tiny.encoder, "DebertaV2ForMaskedLM", relative_attention=True, pos_att_type=["p2c", "c2p"]),
        parity=TIED,
        note="its classifier is not captured: it branches on the labels; pass `loss_fn`",
    ),
    Family(
        "ModernBERT, padded",
        partial(tiny.encoder, "ModernBertForMaskedLM", local_attention=4, global_attn_every_n_layers=2),
        parity=TIED,
    ),
    Family(
        "T5",
        tiny.t5,
        _build("T5-base", "T5ForConditionalGeneration", real.t5_config, real.text_batch(512, 128)),
        parity=TIED,
        note="encoder output and position biases cross the decoder's cuts",
    ),
    Family("BART", tiny.bart, parity=TIED, note="as T5"),
    Family("Whisper", tiny.whisper, parity=TIED, note="as T5"),
    Family(
        "ViT",
        tiny.vit,
        _build(
            "ViT-B/16",
            "ViTForImageClassification",
            partial(transformers.ViTConfig, num_labels=1000),
            real.image_batch(),
        ),
    ),
    Family("DINOv2", partial(tiny.image_classifier, "Dinov2", **tiny.PATCHES)),
    Family(
        "BEiT",
        partial(tiny.image_classifier, "Beit", use_relative_position_bias=True, **tiny.PATCHES),
        note="attention under a learned bias",
    ),
    Family("Swin", partial(tiny.image_classifier, "Swin", **tiny.WINDOWS)),
    Family(
        "ConvNeXt",
        partial(
            tiny.image_classifier, "ConvNext", hidden_sizes=[8, 16], depths=[2, 2], num_stages=2, patch_size=2
        ),
    ),
    Family("SegFormer", tiny.segformer),
    Family(
        "HuBERT, classifier",
        tiny.hubert,
        note="needs `apply_spec_augment=False` and `layerdrop=0`: NumPy draws those masks",
    ),
    Family(
        "Wav2Vec2 and HuBERT with CTC",
        note="not captured: they branch on the labels, and the sizes inside of a CTC loss depend on values",
    ),
    Family(
        "Llava",
        tiny.llava,
        Real("Llava-1.5-7B", real.llava, real.text_and_image_batch()),
        unread=True,
        note="the number of images in a microbatch may be fixed (the capture says so)",
    ),
    Family(
        "Gemma 3 with images",
        tiny.gemma3_vision,
        Real("Gemma-3-4B", real.gemma3_vision, real.gemma3_batch()),
        parity=TIED,
        note="the mask stays in the graph: the tokens of an image see each other",
    ),
    Family(
        "PaliGemma",
        tiny.paligemma,
        parity=TIED,
        note="the mask stays in the graph: image and prompt see each other",
    ),
    Family("InternVL", tiny.internvl, parity=TIED),
    Family(
        "Qwen-VL, embedded",
        lambda: tiny.embedded(tiny.qwen_vl()),
        Real("Qwen2.5-VL-7B", real.qwen_vl, real.embedded_batch()),
        unread=True,
        note="`inputs_embeds`, `position_ids` and `labels`: the vision tower runs before, outside",
    ),
    Family(
        "Qwen-VL with images",
        note="not captured: shapes depend on the values of `image_grid_thw`; use the row above",
    ),
    Family("Idefics 3, SmolVLM", note="not captured: selects the images that are not padding"),
    Family(
        "ResNet, BatchNorm",
        tiny.resnet,
        _build(
            "ResNet-50",
            "ResNetForImageClassification",
            partial(transformers.ResNetConfig, num_labels=1000),
            real.image_batch(),
        ),
    ),
    Family(
        "Diffusion UNet",
        tiny.unet,
        Real("UNet 320-1280", real.unet, real.noise_batch()),
        note="skips cross every cut between their two ends",
    ),
    Family(
        "Mamba",
        tiny.mamba,
        Real("Mamba-130M, 16 tokens", real.mamba, real.text_batch(16)),
        parity=TIED,
        note="without its CUDA kernels the scan is a Python loop: the graph holds one copy of it per token, "
        "so the sequence length is fixed (the capture says so) and the real size is shown for 16 tokens",
    ),
    Family(
        "Mamba 2",
        tiny.mamba2,
        Real("Mamba2-1.3B, 12 of 48 layers", real.mamba2, real.text_batch(1024)),
        note="works in chunks, so the sequence length is fixed (the capture says so); layers are alike",
    ),
    Family(
        "LoRA on Qwen3",
        lambda: tiny.lora(_QWEN3(), ["q_proj", "v_proj", "down_proj"]),
        _text("Qwen3-1.7B + LoRA", partial(real.lora, "Qwen3-1.7B", ["q_proj", "v_proj"])),
        note="no backward before the first adapter",
    ),
    Family(
        "LoRA on Qwen3-MoE",
        lambda: tiny.lora(tiny.moe(), ["q_proj", "v_proj"]),
        _text("Qwen3-30B-A3B + LoRA", partial(real.lora, "Qwen3-30B-A3B", ["q_proj", "v_proj"])),
        note=_MOE_NOTE,
    ),
    Family(
        "LoRA on experts",
        lambda: tiny.lora(tiny.moe(), ["q_proj"], dropout=0.0, target_parameters=["mlp.experts.down_proj"]),
        _text(
            "Qwen3-30B-A3B + LoRA on experts",
            partial(real.lora, "Qwen3-30B-A3B", ["q_proj"], target_parameters=["mlp.experts.down_proj"]),
        ),
        note=_MOE_NOTE,
    ),
    Family(
        "Gradient checkpointing",
        lambda: tiny.checkpointed(_QWEN3(), use_reentrant=False),
        _text("Qwen3-1.7B, checkpointed", partial(real.checkpointed, "Qwen3-1.7B", False)),
        note="bypassed: stages recompute anyway",
    ),
    Family(
        "Gradient checkpointing, reentrant",
        lambda: tiny.checkpointed(_QWEN3(), use_reentrant=True),
        _text("Qwen3-1.7B, reentrant", partial(real.checkpointed, "Qwen3-1.7B", True)),
        note="bypassed: stages recompute anyway",
    ),
    Family(
        "bfloat16 autocast",
        _QWEN3,
        _text("Qwen3-1.7B, autocast", partial(real.causal, "Qwen3-1.7B", torch.float32)),
        context=partial(torch.autocast, "cpu", dtype=torch.bfloat16, cache_enabled=False),
        note="compile under the autocast of training; equal to plain PyTorch with `cache_enabled=False`",
    ),
    Family(
        "Padded on the right",
        lambda: tiny.padded(_QWEN3(), left=False),
        Real("Qwen3-1.7B, padded", partial(real.causal, "Qwen3-1.7B"), real.masked_batch()),
        note="the mask stays in the graph",
    ),
    Family(
        "Padded on the left",
        lambda: tiny.padded(_QWEN3(), left=True),
        note="the graph of the row above",
    ),
    Family(
        "Packed batch",
        lambda: tiny.packed(_QWEN3()),
        Real("Qwen3-1.7B, packed", partial(real.causal, "Qwen3-1.7B"), real.packed_batch()),
        note="`position_ids` that start again; the mask stays in the graph",
    ),
    Family(
        "MiniLM, its real weights",
        minilm.case,
        Real("all-MiniLM-L6-v2", minilm.on_meta, minilm.batch()),
        note="trained on real text: sentence pairs, padded",
    ),
)


def family(name: str) -> Family:
    """The family of that name."""
    return next(item for item in FAMILIES if item.name == name)


def price(item: Family) -> tuple[nn.Module, CostedGraph, SegmentChain]:
    """The real-size model, its costed graph, and its segments on an RTX 4090."""
    assert item.real is not None
    model = item.real.model().train()
    with item.context():
        captured = staged.capture(model, item.real.batch, microbatches=1)
    costed = EstimateCosts().run(captured)
    return model, costed, BindChain(captured.example_sizes, hardware.lookup("rtx4090")).run(costed)


# ------------------------------------------------------------------- the table

_HEAD = """\
# Model families

Generated by `python -m tests.families`; checked by `tests/test_families.py`. *Parity*: staged execution of
a tiny member, cut at random places, against plain PyTorch on the same microbatches: loss, gradients and
buffers. A tied weight's gradient is a sum over stages, added in another order than plain PyTorch does.
*Segments* and *tensors per cut* are those of the real size, captured without weights.

"""
_COLUMNS = ("Family", "Parity", "Real size", "Parameters", "Segments", "Tensors per cut", "Note")


def static_cells(item: Family) -> tuple[str, ...]:
    """Family, parity, real size and note."""
    parity = "not captured" if item.tiny is None else item.parity
    return item.name, parity, item.real.checkpoint if item.real else "", item.note


def measured_cells(costed: CostedGraph, chain: SegmentChain) -> tuple[str, ...]:
    """Parameters, segments and tensors per cut."""
    elements = {spec.name: torch.Size(spec.shape).numel() for spec in costed.capture.parameters}
    widths = [len(cut.values) for cut in costed.capture.cuts]
    spread = str(min(widths)) if min(widths) == max(widths) else f"{min(widths)} to {max(widths)}"
    return f"{sum(elements.values()) / 1e9:.2f} B", str(len(chain.segments)), spread


def row(static: tuple[str, ...], measured: tuple[str, ...]) -> str:
    """One line of the table."""
    return "| " + " | ".join((*static[:3], *measured, static[3])) + " |"


def lines() -> Iterator[str]:
    """The table, line by line; captures every real size."""
    yield "| " + " | ".join(_COLUMNS) + " |"
    yield "|" + "---|" * len(_COLUMNS)
    for item in FAMILIES:
        measured = measured_cells(*price(item)[1:]) if item.real else ("", "", "")
        yield row(static_cells(item), measured)


if __name__ == "__main__":
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(_HEAD + "\n".join(lines()) + "\n")
