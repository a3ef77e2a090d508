"""Captures of real architectures that copy repeated blocks are the full captures, node by node."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from rpcompile.passes.capture_graph import CaptureGraph, ExampleInputs
from tests import graph_equality, models, reference, staged

if TYPE_CHECKING:
    from collections.abc import Callable

SMALL = {
    "vocab_size": models.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
DECODER = {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}


def _tokens() -> dict[str, torch.Tensor]:
    ids = torch.zeros(4, 12, dtype=torch.long)
    return {"input_ids": ids, "labels": ids.clone()}


def _qwen3(layers: int = 6, **options: Any) -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**DECODER, num_hidden_layers=layers, **options))


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**DECODER, num_hidden_layers=6))


def _gpt2(**options: Any) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": models.VOCABULARY, "n_embd": 32, "n_head": 4, "n_positions": 64, "n_layer": 6}
    return GPT2LMHeadModel(GPT2Config(**sizes, loss_type="ForCausalLMLoss", **options))


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**SMALL, num_hidden_layers=6, max_position_embeddings=64))


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 5, "num_decoder_layers": 5}
    return T5ForConditionalGeneration(
        T5Config(vocab_size=models.VOCABULARY, decoder_start_token_id=0, **sizes)  # type: ignore[arg-type]
    )


def _lora(layers: int = 6, **options: Any) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj", "down_proj"],
        lora_dropout=0.1,
        task_type="CAUSAL_LM",
        **options,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(_qwen3(layers), config)  # type: ignore[arg-type]


def _gemma3() -> nn.Module:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    pattern = ["sliding_attention", "full_attention"] * 4
    config = Gemma3TextConfig(**DECODER, num_hidden_layers=8, layer_types=pattern, sliding_window=4)
    return Gemma3ForCausalLM(config)


def _qwen3_moe(**options: Any) -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_hidden_layers": 6}
    config = Qwen3MoeConfig(**DECODER, **sizes, **options)
    config._experts_implementation = "grouped_mm"
    return Qwen3MoeForCausalLM(config)


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {key: SMALL[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads")}
    return ViTForImageClassification(
        ViTConfig(**sizes, num_hidden_layers=5, image_size=16, patch_size=8, num_labels=3)
    )


@pytest.mark.parametrize(
    ("make", "fewest_copies"),
    [
        (_qwen3, 4),
        (_llama, 4),
        (_gpt2, 4),
        (_bert, 4),
        pytest.param(_t5, 2 + 2, marks=pytest.mark.slow),
        (_lora, 3),
        pytest.param(_gemma3, 4, marks=pytest.mark.slow),
        (_qwen3_moe, 3),
        (lambda: _qwen3_moe(mlp_only_layers=[0]), 2),
        (lambda: _qwen3(tie_word_embeddings=True), 4),
    ],
    ids=["qwen3", "llama", "gpt2", "bert", "t5", "lora", "gemma3", "moe", "moe-first-dense", "tied"],
)
def test_graph_is_that_of_the_full_export(
    make: Callable[[], nn.Module], fewest_copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make().train()
    full, repeated, copied = graph_equality.captures(model, _tokens(), monkeypatch)
    graph_equality.assert_equal(full, repeated)
    assert len(copied) >= fewest_copies


def test_images(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = {"pixel_values": torch.zeros(4, 3, 16, 16), "labels": torch.zeros(4, dtype=torch.long)}
    full, repeated, copied = graph_equality.captures(_vit().train(), batch, monkeypatch)
    graph_equality.assert_equal(full, repeated)
    assert len(copied) == 3


def test_meta_model_gives_the_same_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        meta = _qwen3().train()
    full, repeated, copied = graph_equality.captures(meta, _tokens(), monkeypatch)
    graph_equality.assert_equal(full, repeated)
    real = CaptureGraph(ExampleInputs.of(_tokens())).run(_qwen3().train())
    assert real.fingerprint == repeated.fingerprint
    assert len(copied) == 4


def test_gradient_checkpointing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _qwen3(5).train()
    model.gradient_checkpointing_enable()  # type: ignore[operator]
    full, repeated, _ = graph_equality.captures(model, _tokens(), monkeypatch)
    graph_equality.assert_equal(full, repeated)


def test_hidden_states_are_collected_by_hooks_which_forbid_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _qwen3(output_hidden_states=True).train()
    full, repeated, copied = graph_equality.captures(model, _tokens(), monkeypatch)
    graph_equality.assert_equal(full, repeated)
    assert len(full.outputs) > 6
    assert copied == []


def test_a_layer_number_used_in_arithmetic_forbids_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _gpt2(scale_attn_by_inverse_layer_idx=True).train()
    full, repeated, copied = graph_equality.captures(model, _tokens(), monkeypatch)
    graph_equality.assert_equal(full, repeated)
    assert copied == []


def test_layers_with_other_lora_targets_are_not_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    # 1 gets no gradient back, 3 has another rank, 2 and 5 are traced; 0, 4 and 7 have no adapter.
    model = _lora(8, layers_to_transform=[1, 2, 3, 5, 6], rank_pattern={r"layers\.3\..*": 2}).train()
    full, repeated, copied = graph_equality.captures(model, _tokens(), monkeypatch)
    graph_equality.assert_equal(full, repeated)
    assert copied == ["base_model.model.model.layers.6"]


def test_staged_execution_of_copied_blocks_is_bit_exact() -> None:
    torch.manual_seed(0)
    model = _qwen3().train()
    model.config.use_cache = False  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(0, models.VOCABULARY, (8, 12), generator=generator)
    batch = {"input_ids": ids, "labels": ids.clone()}
    plain = copy.deepcopy(model)
    expected = reference.forward_backward(plain, batch, microbatches=4, random=False)
    captured = staged.capture(model, batch)
    chain = staged.free_chain(captured)
    count = len(chain.segments)
    assert count == 2 + 6 * 2
    stages = staged.partition(chain.first_backward, count, count - 3, {1, 4, 6}, {2, 5, 8})
    assert torch.equal(staged.forward_backward(model, captured, chain, stages, batch, 4, 0), expected)
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        if mine is not model.lm_head.weight:  # type: ignore[union-attr]
            assert torch.equal(mine.grad, theirs.grad)  # type: ignore[arg-type]
