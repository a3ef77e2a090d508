"""Capture, canonicalization and cuts: what the graph looks like, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import masking_utils

from rpcompile.errors import CaptureError, InvalidArgument, MissingExampleInputs, UnsupportedModel
from rpcompile.passes.canonicalize_graph import CanonicalizeGraph
from rpcompile.passes.capture_graph import CaptureGraph, ExampleInputs, symbol_dims
from rpcompile.passes.find_cuts import FindCuts
from tests import models, staged


def targets(captured: object) -> list[str]:
    return [str(n.target) for n in captured.graph_module.graph.nodes if n.op == "call_function"]  # type: ignore[attr-defined]


def test_batch_and_sequence_are_symbols_of_all_inputs() -> None:
    case = models.make("qwen3-tied")
    captured = staged.capture(case.model, case.batch)
    assert set(captured.symbols) == {"batch", "sequence"}
    assert [spec.shape for spec in captured.inputs] == [("batch", "sequence")] * 2
    assert captured.example_sizes == {"batch": 2, "sequence": 12}


def test_inputs_that_are_one_tensor_are_not_merged() -> None:
    case = models.make("qwen3-tied")
    ids = case.batch["input_ids"]
    captured = staged.capture(case.model, {"input_ids": ids, "labels": ids})
    embedding = next(n for n in captured.graph_module.graph.nodes if "embedding" in str(n.target))
    assert embedding.args[1].name == "input_ids"


def test_position_limit_becomes_the_range_of_the_sequence() -> None:
    case = models.make("bert-padded")
    assert staged.capture(case.model, case.batch).symbols["sequence"] == (1, 64)


@pytest.mark.parametrize("transformers", ["installed", "5.17"])
def test_causal_attention_keeps_is_causal_without_padding_and_the_mask_with_it(
    transformers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = models.make("qwen3-tied")
    if transformers == "5.17":  # does not ask whether a model is exported, but whether anything is traced
        monkeypatch.delattr(masking_utils, "is_torchdynamo_exporting")

        def ignores(padding_mask: torch.Tensor | None, *_: object, **__: object) -> bool:
            return not masking_utils.is_tracing(padding_mask)

        monkeypatch.setattr(masking_utils, "_ignore_causal_mask_sdpa", ignores)

    def attention(batch: dict[str, torch.Tensor]) -> list[tuple[bool, bool]]:
        nodes = staged.capture(case.model, batch).graph_module.graph.nodes
        sdpa = [n for n in nodes if "scaled_dot_product_attention" in str(n.target)]
        return [(n.args[3] is not None, len(n.args) > 5 and n.args[5]) for n in sdpa]

    assert attention(case.batch) == [(False, True)] * 3
    padded = {**case.batch, "attention_mask": torch.ones_like(case.batch["input_ids"])}
    assert attention(padded) == [(True, False)] * 3


def test_canonical_graph_has_no_asserts_regions_or_idle_conversions() -> None:
    case = models.make("qwen3-tied")
    example = {name: value[:2] for name, value in case.batch.items()}
    raw = CaptureGraph(ExampleInputs.of(example)).run(case.model)
    before = targets(raw)
    canonical = CanonicalizeGraph().run(raw)
    after = targets(canonical)
    assert any("wrap_with_set_grad_enabled" in target for target in before)
    assert targets(raw) == before, "the pass changed its input"
    for gone in ("_assert_tensor_metadata", "wrap_with", "alias", "sym_size"):
        assert not any(gone in target for target in after), gone
    conversions = [n for n in canonical.graph_module.graph.nodes if "aten.to." in str(n.target)]
    assert all(n.meta["val"].dtype != n.args[0].meta["val"].dtype for n in conversions)
    assert len(conversions) < sum("aten.to." in target for target in before)


def test_no_grad_region_reads_what_carries_gradients_detached() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.a(x)
            with torch.no_grad():
                scale = h.abs().mean()
            return (self.b(h) * scale).sum()

    model = Detached()
    batch = {"x": torch.randn(8, 4)}
    captured = staged.capture(model, batch)
    assert [t for t in targets(captured) if "wrap_with" in t or "detach" in t] == ["aten.detach.default"]
    assert "detach_default" not in captured.requires_grad
    plain = copy.deepcopy(model)
    plain(batch["x"]).backward()
    chain = staged.free_chain(captured)
    count = len(chain.segments)
    stages = staged.partition(0, count, count - 1, set(range(count)), set(range(count)))
    staged.forward_backward(model, captured, chain, stages, batch, 1, 0)
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


def test_decoder_layers_are_cut_between_attention_and_mlp_on_one_tensor() -> None:
    case = models.make("qwen3-tied")
    captured = staged.capture(case.model, case.batch)
    names = [cut.name for cut in captured.cuts]
    halves = [f"model.layers.{i}.{half}" for i in range(3) for half in ("self_attn", "mlp")]
    assert names == ["model.embed_tokens", *halves]
    assert captured.last_name == "lm_head"
    assert all(len(cut.values) == 1 for cut in captured.cuts)
    assert "scaled_dot_product_attention" not in " ".join(captured.rematerialised)


def test_frozen_prefix_carries_no_gradient() -> None:
    case = models.make("qwen3-lora")
    captured = staged.capture(case.model, case.batch)
    assert captured.cuts[0].gradients == ()
    assert all(len(cut.gradients) == 1 for cut in captured.cuts[1:])


def test_skip_connections_cross_cuts_and_statistics_are_mutations() -> None:
    case = models.make("unet-batchnorm")
    captured = staged.capture(case.model, case.batch)
    assert max(len(cut.values) for cut in captured.cuts) == 3
    assert set(captured.mutations) == {
        f"{module}.{what}"
        for module in ("first.1", "join1.1")
        for what in ("running_mean", "running_var", "num_batches_tracked")
    }


def test_no_cut_lies_between_a_tensor_and_its_change_in_place() -> None:
    case = models.make("unet-batchnorm")
    captured = staged.capture(case.model, case.batch)
    changed = [i for i, name in enumerate(captured.order) if name.startswith(("relu_", "silu_"))]
    positions = {cut.position for cut in captured.cuts}
    assert changed
    assert not positions & set(changed)


def test_growing_widths_are_divided_by_share_of_parameters() -> None:
    case = models.mlp(64, 32, 16, 5)
    captured = staged.capture(case.model, case.batch)
    assert [cut.name for cut in captured.cuts] == ["layers.0", "layers.1"]


class Skip(nn.Module):
    """Layers between whose ends one tensor skips."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.inner = nn.ModuleList(nn.Linear(8, 8) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skip = hidden = self.first(x)
        for layer in self.inner:
            hidden = layer(hidden).relu()
        return self.last(hidden + skip).sum()


@pytest.mark.parametrize(
    ("layers", "largest_bump", "widths"),
    [(6, 6, [1, 1]), (6, 5, [1, *[2] * 5, 1]), (20, 16, [1, *[2] * 19, 1]), (20, 20, [1, 1])],
)
def test_a_bump_is_left_out_unless_it_is_long(layers: int, largest_bump: int, widths: list[int]) -> None:
    raw = CaptureGraph(ExampleInputs.of(torch.zeros(4, 8))).run(Skip(layers))
    captured = FindCuts(largest_share=1.0, largest_bump=largest_bump).run(CanonicalizeGraph().run(raw))
    assert [len(cut.values) for cut in captured.cuts] == widths


def test_setting_a_parameter_to_itself_is_dropped() -> None:
    class Sets(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                self.weight.set_(self.weight)
            return super().forward(x).sum()

    model = Sets(4, 4)
    model.weight.requires_grad_(False)
    captured = staged.capture(model, {"x": torch.zeros(8, 4)})
    assert not any("set_" in target for target in targets(captured))


def test_fingerprint_depends_on_structure_not_on_weights() -> None:
    first, second = models.make("mlp"), models.make("mlp")
    with torch.no_grad():
        second.model.layers[0].weight.mul_(2)  # type: ignore[union-attr, operator]
    fingerprint = staged.capture(first.model, first.batch).fingerprint
    assert staged.capture(second.model, second.batch).fingerprint == fingerprint
    second.model.layers[0].weight.requires_grad_(False)  # type: ignore[union-attr, operator]
    assert staged.capture(second.model, second.batch).fingerprint != fingerprint


def test_meta_model_is_captured_without_weights() -> None:
    from transformers import Qwen3ForCausalLM

    with torch.device("meta"):
        model = Qwen3ForCausalLM(models.qwen3_config())
    model.config.use_cache = False
    batch = {name: torch.zeros(8, 12, dtype=torch.long) for name in ("input_ids", "labels")}
    captured = staged.capture(model.train(), batch)
    assert len(captured.cuts) == 7


def test_symbol_dims_finds_the_batch_by_majority() -> None:
    named = {"x": torch.zeros(4, 3), "y": torch.zeros(4), "table": torch.zeros(7, 3)}
    assert symbol_dims(named) == {"x": {0: "batch"}, "y": {0: "batch"}}


@pytest.mark.parametrize("example", [None, 3, {}, ()])
def test_example_without_tensors_is_refused(example: object) -> None:
    with pytest.raises(MissingExampleInputs, match="give a dict of keyword tensors"):
        ExampleInputs.of(example)


def test_example_with_something_else_than_tensors_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"example_inputs\['y'\] is a int"):
        ExampleInputs.of({"x": torch.zeros(2), "y": 3})


def test_model_without_loss_says_so() -> None:
    with pytest.raises(UnsupportedModel, match=r"Linear's first output must be the loss.*\(s\d+, 3\)"):
        CaptureGraph(ExampleInputs.of(torch.zeros(4, 3))).run(nn.Linear(3, 3))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.layer(x)
        if h.sum() > 0:
            h = -h
        return h.sum()


def test_branch_on_data_names_the_line_and_the_remedy() -> None:
    with pytest.raises(CaptureError) as caught:
        CaptureGraph(ExampleInputs.of(torch.zeros(4, 4))).run(Branching())
    message = str(caught.value)
    assert "Branching cannot be captured" in message
    assert "if h.sum() > 0:" in message
    assert "branches on tensor values" in message


def test_changed_input_names_the_operator() -> None:
    class Changes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x.mul_(2)).sum()

    captured = CaptureGraph(ExampleInputs.of(torch.zeros(4, 4))).run(Changes())
    with pytest.raises(UnsupportedModel, match=r"changes '0' in place \(aten.mul_.Tensor"):
        FindCuts().run(CanonicalizeGraph().run(captured))


def test_meta_model_has_the_fingerprint_of_the_real_one() -> None:
    from transformers import Qwen3ForCausalLM

    case = models.make("qwen3-tied")
    with torch.device("meta"):
        meta = Qwen3ForCausalLM(models.qwen3_config()).train()
    meta.config.use_cache = False
    captured = staged.capture(meta, case.batch)
    assert captured.fingerprint == staged.capture(case.model, case.batch).fingerprint
    assert all(parameter.device.type == "meta" for parameter in meta.parameters())
