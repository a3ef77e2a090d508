"""Tiny members of each model family, each with a batch of eight."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import transformers

from tests.models import BATCH, SEQUENCE, VOCABULARY, Case, tokens
from tests.unet import DiffusionUNet

DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
PATCHES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
WINDOWS = {
    "embed_dim": 8,
    "depths": [2, 2],
    "num_heads": [2, 2],
    "window_size": 2,
    "image_size": 16,
    "patch_size": 2,
}
IMAGE = 5
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}


def causal(kind: str, **options: Any) -> Case:
    """A decoder of transformers, e.g. kind="Qwen3"."""
    text = "Text" if kind in ("Gemma3", "Llama4") else ""
    config = getattr(transformers, f"{kind}{text}Config")(**{**DECODER, **options})
    return Case(getattr(transformers, f"{kind}ForCausalLM")(config), tokens())


def padded(case: Case, left: bool) -> Case:
    """The case with its rows cut to different lengths by an attention mask."""
    lengths = torch.arange(BATCH) % 4 + SEQUENCE - 4
    mask = (torch.arange(SEQUENCE) < lengths[:, None]).long()
    mask = mask.flip(-1) if left else mask
    labels = case.batch["labels"].masked_fill(mask == 0, -100)
    return Case(case.model, {**case.batch, "attention_mask": mask, "labels": labels})


def packed(case: Case) -> Case:
    """The case with two sequences a row, told apart by position ids that start again."""
    positions = torch.cat([torch.arange(5), torch.arange(SEQUENCE - 5)]).expand(BATCH, -1).clone()
    return Case(case.model, {**case.batch, "position_ids": positions})


def lora(case: Case, modules: list[str], dropout: float = 0.1, **options: Any) -> Case:
    """The case under LoRA with dropout, B matrices not zero."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=modules, lora_dropout=dropout, task_type="CAUSAL_LM", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(case.model, config)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    return Case(model, case.batch)


def checkpointed(case: Case, use_reentrant: bool) -> Case:
    """The case with gradient checkpointing switched on."""
    options = {"use_reentrant": use_reentrant}
    case.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)  # type: ignore[operator]
    return case


def moe(**options: Any) -> Case:
    return causal("Qwen3Moe", num_experts=4, experts_implementation="grouped_mm", **EXPERTS, **options)


def falcon() -> Case:
    """All query heads share one key head; attention and MLP side by side."""
    sizes = {name: DECODER[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
    config = transformers.FalconConfig(
        **sizes, num_attention_heads=4, bos_token_id=0, eos_token_id=1, tie_word_embeddings=False
    )
    return Case(transformers.FalconForCausalLM(config), tokens())


def deepseek() -> Case:
    """Latent attention, whose values are narrower than its keys; the first layer has no experts."""
    latent = {"kv_lora_rank": 8, "q_lora_rank": None, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8}
    experts = {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
    sizes = {"num_key_value_heads": 4, "head_dim": 4, "v_head_dim": 8, "n_group": 1, "topk_group": 1}
    options = {**latent, **experts, **sizes, **EXPERTS, "topk_method": "greedy"}
    return causal("DeepseekV2", experts_implementation="grouped_mm", **options)


def deepseek_v3() -> Case:
    """Latent attention; experts are chosen in groups, by scores with a bias."""
    latent = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8}
    experts = {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
    sizes = {"num_key_value_heads": 4, "head_dim": 4, "v_head_dim": 8, "n_group": 2, "topk_group": 1}
    options = {**latent, **experts, **sizes, **EXPERTS}
    return causal("DeepseekV3", experts_implementation="grouped_mm", **options)


def qwen2_moe() -> Case:
    """Experts beside one that every token takes."""
    options = {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16}
    return causal("Qwen2Moe", experts_implementation="grouped_mm", **options)


def gpt_neox() -> Case:
    """Attention and MLP side by side."""
    names = (name for name in DECODER if name not in ("num_key_value_heads", "head_dim"))
    config = transformers.GPTNeoXConfig(**{name: DECODER[name] for name in names})
    return Case(transformers.GPTNeoXForCausalLM(config), tokens())


def whisper() -> Case:
    """40 frames of sound before text."""
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        **layers,
    )
    sound = torch.randn(BATCH, 8, 40, generator=torch.Generator().manual_seed(5))
    model = transformers.WhisperForConditionalGeneration(config)
    return Case(model, {"input_features": sound, "labels": tokens()["labels"]})


def t5() -> Case:
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.1,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    batch = tokens()
    return Case(
        transformers.T5ForConditionalGeneration(config),
        {**batch, "labels": batch["labels"][:, 4:].contiguous()},
    )


def _images(size: int, labels: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "pixel_values": torch.randn(BATCH, 3, size, size, generator=generator),
        "labels": torch.randint(0, labels, (BATCH,), generator=generator),
    }


_LAYERS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def encoder(model: str, **options: Any) -> Case:
    """An encoder of text, e.g. model="RobertaForSequenceClassification", padded, with three classes."""
    names = (
        *_LAYERS,
        "vocab_size",
        "max_position_embeddings",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
    )
    kind = model.partition("For")[0]
    sizes = {name: DECODER[name] for name in names}
    config = getattr(transformers, f"{kind}Config")(**sizes, num_labels=3, **options)
    case = padded(Case(getattr(transformers, model)(config), tokens()), left=False)
    if model.endswith("ForSequenceClassification"):
        return Case(case.model, {**case.batch, "labels": case.batch["input_ids"][:, 0] % 3})
    return case


def bart() -> Case:
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    config = transformers.BartConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=1,
        forced_eos_token_id=None,
        **layers,
    )
    batch = tokens()
    labels = batch["labels"][:, 4:].contiguous()
    return Case(transformers.BartForConditionalGeneration(config), {**batch, "labels": labels})


def image_classifier(kind: str, **options: Any) -> Case:
    """E.g. kind="Dinov2": a vision transformer on four by four patches, unless the options say otherwise."""
    config = getattr(transformers, f"{kind}Config")(num_labels=5, **options)
    return Case(getattr(transformers, f"{kind}ForImageClassification")(config), _images(16, 5))


def segformer() -> Case:
    config = transformers.SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
        num_labels=5,
    )
    images = _images(16, 5)["pixel_values"]
    classes = torch.randint(0, 5, (BATCH, 16, 16), generator=torch.Generator().manual_seed(6))
    model = transformers.SegformerForSemanticSegmentation(config)
    return Case(model, {"pixel_values": images, "labels": classes})


def hubert() -> Case:
    """640 samples of sound before classes."""
    config = transformers.HubertConfig(
        **{name: DECODER[name] for name in _LAYERS},
        conv_dim=(16, 16),
        conv_kernel=(4, 4),
        conv_stride=(4, 4),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        apply_spec_augment=False,
        layerdrop=0.0,
        num_labels=5,
        classifier_proj_size=16,
    )
    generator = torch.Generator().manual_seed(5)
    sound = {"input_values": torch.randn(BATCH, 640, generator=generator)}
    labels = torch.randint(0, 5, (BATCH,), generator=generator)
    return Case(transformers.HubertForSequenceClassification(config), {**sound, "labels": labels})


def vit() -> Case:
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=16,
        patch_size=4,
        num_labels=5,
        hidden_dropout_prob=0.1,
    )
    return Case(transformers.ViTForImageClassification(config), _images(16, 5))


def resnet() -> Case:
    config = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[2, 2],
        layer_type="basic",
        num_labels=5,
    )
    return Case(transformers.ResNetForImageClassification(config), _images(16, 5))


def unet() -> Case:
    generator = torch.Generator().manual_seed(5)
    images, noise = torch.randn(2, BATCH, 3, 8, 8, generator=generator)
    timesteps = torch.randint(0, 1000, (BATCH,), generator=generator)
    model = DiffusionUNet((8, 16), blocks=1, heads=2, dropout=0.1)
    return Case(model, {"x": images, "timesteps": timesteps, "noise": noise})


_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 4,
}


def _with_images(model: Any, image_tokens: int, **extra: torch.Tensor) -> Case:
    """One image at the beginning of each row; `IMAGE` stands for its tokens."""
    batch = tokens()
    ids = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, IMAGE + 1)
    ids[:, :image_tokens] = IMAGE
    images = torch.randn(BATCH, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    return Case(model, {**batch, "input_ids": ids, "pixel_values": images, **extra})


def clip() -> Case:
    """Towers of text and images; the loss is over all pairs of a microbatch, and only asked for."""
    text = {**{name: _TOWER[name] for name in _LAYERS}, "vocab_size": VOCABULARY, "eos_token_id": 1}
    config = transformers.CLIPConfig(text_config=text, vision_config=_TOWER, projection_dim=16)
    case = _with_images(transformers.CLIPModel(config), 0)
    return Case(case.model, {name: case.batch[name] for name in ("input_ids", "pixel_values")})


def llava() -> Case:
    """CLIP before Llama, four tokens an image."""
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**_TOWER),
        text_config=transformers.LlamaConfig(**DECODER),
        image_token_index=IMAGE,
        image_seq_length=4,
    )
    return _with_images(transformers.LlavaForConditionalGeneration(config), 4)


def gemma3_vision() -> Case:
    """SigLIP before Gemma 3; the tokens of an image see each other."""
    config = transformers.Gemma3Config(
        vision_config=transformers.SiglipVisionConfig(**_TOWER, vision_use_head=False),
        text_config=transformers.Gemma3TextConfig(**DECODER, sliding_window=4),
        image_token_id=IMAGE,
        mm_tokens_per_image=4,
    )
    is_image = (torch.arange(SEQUENCE) < 4).long().expand(BATCH, -1).clone()
    model = transformers.Gemma3ForConditionalGeneration(config)
    return _with_images(model, 4, token_type_ids=is_image)


def paligemma() -> Case:
    """SigLIP before Gemma; image and prompt see each other."""
    config = transformers.PaliGemmaConfig(
        vision_config=transformers.SiglipVisionConfig(**_TOWER, vision_use_head=False),
        text_config=transformers.GemmaConfig(**DECODER),
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
    )
    is_answer = (torch.arange(SEQUENCE) >= 6).long().expand(BATCH, -1).clone()
    model = transformers.PaliGemmaForConditionalGeneration(config)
    return _with_images(model, 4, token_type_ids=is_answer, attention_mask=torch.ones_like(is_answer))


def internvl() -> Case:
    """InternViT before Qwen2, four patches a token."""
    tower = {**_TOWER, "image_size": [8, 8], "patch_size": [4, 4]}
    config = transformers.InternVLConfig(
        vision_config=transformers.InternVLVisionConfig(**tower),
        text_config=transformers.Qwen2Config(**DECODER),
        image_token_id=IMAGE,
        downsample_ratio=0.5,
        image_seq_length=1,
    )
    return _with_images(transformers.InternVLForConditionalGeneration(config), 1)


def idefics3() -> Case:
    """Selects the images that are not padding, so their number depends on values."""
    config = transformers.Idefics3Config(
        vision_config=_TOWER,
        text_config=transformers.LlamaConfig(**DECODER),
        image_token_id=IMAGE,
        scale_factor=2,
    )
    case = _with_images(transformers.Idefics3ForConditionalGeneration(config), 1)
    return Case(case.model, {**case.batch, "pixel_values": case.batch["pixel_values"][:, None]})


def qwen_vl() -> Case:
    """Qwen2.5-VL with one image of 4 x 4 patches, two by two merged, in each row."""
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "patch_size": 4,
        "window_size": 16,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [1],
    }
    config = transformers.Qwen2_5_VLConfig(
        vision_config=vision, text_config={**DECODER, "rope_parameters": rope}, image_token_id=IMAGE
    )
    model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    is_image = (torch.arange(SEQUENCE) < 4).long().expand(BATCH, -1).clone()
    case = _with_images(
        model, 4, mm_token_type_ids=is_image, image_grid_thw=torch.tensor([[1, 4, 4]] * BATCH)
    )
    patches = torch.randn(BATCH * 16, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(5))
    return Case(model, {**case.batch, "pixel_values": patches})


def embedded(case: Case) -> Case:
    """A Qwen-VL case whose vision tower ran before: embeddings, and the positions of their tokens."""
    model, batch = case.model.model, case.batch
    ids, grid = batch["input_ids"], batch["image_grid_thw"]
    with torch.no_grad():
        vectors = model.get_input_embeddings()(ids)  # type: ignore[operator]
        features = torch.cat(model.get_image_features(batch["pixel_values"], grid).pooler_output)  # type: ignore[operator]
        vectors = vectors.masked_scatter((ids == IMAGE)[..., None], features)
        positions, _ = model.get_rope_index(  # type: ignore[operator]
            ids, mm_token_type_ids=batch["mm_token_type_ids"], image_grid_thw=grid
        )
    given = {"inputs_embeds": vectors, "position_ids": positions, "labels": batch["labels"]}
    return Case(case.model, given)


def mamba2() -> Case:
    """Three chunks of four tokens."""
    config = transformers.Mamba2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        state_size=4,
        num_hidden_layers=2,
        num_heads=4,
        head_dim=8,
        n_groups=2,
        chunk_size=4,
    )
    return Case(transformers.Mamba2ForCausalLM(config), tokens())


def mamba() -> Case:
    config = transformers.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=32, state_size=4, num_hidden_layers=2, time_step_rank=4
    )
    return Case(transformers.MambaForCausalLM(config), tokens())
