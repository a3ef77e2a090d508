"""Model families: parity of tiny members, and captures of real sizes without weights."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import rpcompile
from rpcompile.errors import CaptureError, InvalidArgument, MissingExampleInputs, UnsupportedModel
from rpcompile.graphs import AUTOCAST
from rpcompile.huggingface import infer_example_inputs
from rpcompile.ir import StageKind
from rpcompile.passes.canonicalize_graph import CanonicalizeGraph
from rpcompile.passes.capture_graph import CaptureGraph, ExampleInputs, symbol_dims
from rpcompile.passes.extract_stages import ExtractStages
from rpcompile.runtime.stage_runner import on_device
from tests import families, family_real, family_tiny, models, reference, staged
from tests.families import FAMILIES, Family

CAPTURED = [item for item in FAMILIES if item.tiny is not None]
REAL = [item for item in FAMILIES if item.real is not None]


def name_of(item: Family) -> str:
    return item.name


@pytest.mark.parametrize("item", CAPTURED, ids=name_of)
def test_tiny_member_equals_plain_pytorch(item: Family) -> None:
    assert item.tiny is not None
    captured = staged.check_parity(models.build(item.tiny), partitions=2, context=item.context)
    assert (item.parity == families.TIED) == bool(captured.tied)


@pytest.mark.slow
@pytest.mark.parametrize("item", REAL, ids=name_of)
def test_real_size_is_captured_without_weights(item: Family) -> None:
    assert item.real is not None
    model, costed, chain = families.price(item)
    captured = costed.capture
    distinct = {spec.name: spec.nbytes for spec in captured.parameters}
    assert sum(distinct.values()) == sum(p.numel() * p.element_size() for p in model.parameters())
    assert all(p.device.type == "meta" for p in model.parameters())
    assert costed.unknown == ()
    # Llava does not use the last layer of its vision tower, embedded Qwen-VL none of it.
    users = {node.name: node.users for node in captured.graph_module.graph.nodes}
    read = {spec.name for spec in captured.parameters if users[spec.placeholder]}
    assert {name for segment in chain.segments for name in segment.parameters} == read
    assert (read == distinct.keys()) == (not item.unread)
    assert all(segment.forward_s > 0 for segment in chain.segments)
    forward = sum(segment.forward_flops for segment in chain.segments)
    backward = sum(segment.backward_flops for segment in chain.segments)
    frozen = any(not p.requires_grad for p in model.parameters())
    # Two products of matrices a forward one; with frozen weights one, besides attention's.
    assert forward < backward < 1.5 * forward if frozen else 1.9 * forward < backward < 2.2 * forward
    line = families.row(families.static_cells(item), families.measured_cells(costed, chain))
    assert line in families.DOCUMENT.read_text().splitlines(), "run python -m tests.families"
    if item.real.checkpoint.split(" ")[0] in family_real.CAUSAL:
        layers = model.config.num_hidden_layers  # type: ignore[union-attr]
        kinds = Counter(segment.name.rpartition(".")[2] for segment in chain.segments)
        assert kinds == {"embed_tokens": 1, "self_attn": layers, "mlp": layers, "lm_head": 1}
        assert all(len(cut.values) == 1 for cut in captured.cuts)


def test_document_lists_the_families() -> None:
    table = [line for line in families.DOCUMENT.read_text().splitlines() if line.startswith("| ")][1:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert [(*c[:3], c[-1]) for c in cells] == [families.static_cells(item) for item in FAMILIES]


# ------------------------------------------------------------------- what is refused


def test_eager_experts_name_the_operator_the_line_and_the_remedy() -> None:
    case = family_tiny.causal(
        "Qwen3Moe", num_experts=4, experts_implementation="eager", **family_tiny.EXPERTS
    )
    with pytest.raises(CaptureError) as caught:
        staged.capture(case.model.train(), case.batch)
    message = str(caught.value)
    assert "in operator aten." in message
    assert "modeling_qwen3_moe.py" in message
    assert "for expert_idx in expert_hit:" in message
    assert "its experts run by experts_implementation='eager'" in message.lower()
    assert "with experts_implementation='grouped_mm'." in message


def test_image_sizes_read_from_a_tensor_name_the_operator_the_line_and_the_remedy() -> None:
    case = models.build(family_tiny.qwen_vl)
    with pytest.raises(CaptureError) as caught:
        staged.capture(case.model, case.batch)
    message = str(caught.value)
    assert "in operator aten.item.default" in message
    assert "vision_utils.py" in message
    assert "Run the vision tower before (model.get_image_features, model.get_rope_index) and comp" in message


def test_what_is_advised_for_image_sizes_is_the_same_model() -> None:
    case = models.build(family_tiny.qwen_vl)
    embedded = family_tiny.embedded(case)
    loss = case.model(**case.batch).loss
    assert torch.equal(case.model(**embedded.batch).loss, loss)
    captured = staged.check_parity(embedded, partitions=1)
    assert {spec.name: spec.batch_dim for spec in captured.inputs} == {
        "inputs_embeds": 0,
        "position_ids": 1,
        "labels": 0,
    }
    assert set(captured.symbols) == {"batch", "sequence"}


def test_images_that_are_selected_name_the_operator_the_module_and_the_line() -> None:
    case = models.build(family_tiny.idefics3)
    with pytest.raises(UnsupportedModel) as caught:
        staged.capture(case.model, case.batch)
    message = str(caught.value)
    assert "size depends on values: aten.index.Tensor returns (u0, 3, 8, 8)\n  in module model\n" in message
    assert "modeling_idefics3.py" in message
    assert "multiply by a mask or use torch.where" in message


def test_vmap_is_refused() -> None:
    model = Calls(lambda layer, x: torch.vmap(lambda row: row * 2)(layer(x)))
    with pytest.raises(UnsupportedModel, match=r"^Calls calls torch.vmap, which [\s\S]*test_families\.py"):
        staged.capture(model, {"x": torch.zeros(8, 4)})


class WrongSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x * x

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
        return 3 * gradient


class Calls(nn.Module):
    """Calls a function on a linear layer's output."""

    def __init__(self, function: object) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.b, self.a(x)).sum()  # type: ignore[operator]


def test_autograd_function_is_refused_since_its_backward_would_be_lost() -> None:
    model = Calls(lambda layer, x: WrongSquare.apply(layer(x)))
    with pytest.raises(UnsupportedModel) as caught:
        staged.capture(model, {"x": torch.zeros(8, 4)})
    message = str(caught.value)
    assert "Calls calls the autograd.Function WrongSquare" in message
    assert "test_families.py" in message
    assert "torch.library.custom_op with register_autograd" in message


# ------------------------------------------------------------------- checkpoints, autocast, sizes


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_function_is_captured_as_a_plain_call(reentrant: bool) -> None:
    def operators(function: object) -> list[object]:
        nodes = staged.capture(Calls(function), {"x": torch.zeros(8, 4)}).graph_module.graph.nodes
        return [node.target for node in nodes if node.op == "call_function"]

    plain = operators(lambda layer, x: layer(x).relu())
    assert operators(lambda f, x: checkpoint(lambda y: f(y).relu(), x, use_reentrant=reentrant)) == plain


def test_checkpointing_stays_switched_on_after_capture() -> None:
    case = family_tiny.checkpointed(family_tiny.causal("Qwen3"), use_reentrant=True)
    staged.capture(case.model.train(), case.batch)
    assert any(getattr(module, "gradient_checkpointing", False) for module in case.model.modules())


class Mixed(nn.Module):
    """A matrix product in float32 inside a model under autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.a(x)
        with torch.autocast("cpu", enabled=False):
            hidden = hidden.float() @ self.b.weight
        return self.b(hidden).float().square().mean()


def test_region_without_autocast_stays_without_it() -> None:
    context = families.family("bfloat16 autocast").context
    case = models.Case(Mixed(), {"x": torch.randn(8, 16, generator=torch.Generator().manual_seed(0))})
    captured = staged.check_parity(case, partitions=2, context=context)
    assert captured.autocast is torch.bfloat16
    plain = staged.capture(case.model, case.batch)
    assert plain.autocast is None
    assert plain.fingerprint != captured.fingerprint


def test_a_region_without_autocast_can_be_planned_and_run() -> None:
    batch = {"x": torch.randn(8, 16, generator=torch.Generator().manual_seed(0))}
    model = Mixed()
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        expected = sum(model(part) for part in batch["x"].chunk(2)) / 2
        with rpcompile.compile(model, 2, example_inputs=batch, microbatches=2, gpu="rtx4090") as compiled:
            assert torch.equal(compiled.forward_backward(**batch), expected)


def test_a_region_without_autocast_is_without_that_of_the_device_it_runs_on() -> None:
    """The model turned off autocast on the device of its inputs, which was the CPU when it was captured."""
    with families.family("bfloat16 autocast").context():
        captured = staged.capture(Mixed(), {"x": torch.randn(8, 16)})
    for device in ("cpu", "cuda"):
        module = on_device(copy.deepcopy(captured.graph_module), torch.device(device))
        (region,) = (node for node in module.graph.nodes if node.target is AUTOCAST)
        assert region.args[0] == device
        assert region.args[2] is False


def test_stages_inherit_the_autocast() -> None:
    case = models.make("mlp")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        captured = staged.capture(case.model, case.batch)
    chain = staged.free_chain(captured)
    stages = staged.partition(0, len(chain.segments), 1, set(), set())
    graphs = ExtractStages(captured, chain).run(stages)
    assert [graph.stage.kind for graph in graphs] == [StageKind.F, StageKind.FB, StageKind.B]
    assert all(graph.autocast is torch.bfloat16 for graph in graphs)


def test_a_batch_that_is_fixed_is_captured_at_the_size_of_the_example() -> None:
    class PerRow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([self.layer(row) for row in x]).sum()

    raw = CaptureGraph(ExampleInputs.of({"x": torch.zeros(1, 3)})).run(PerRow())
    captured = CanonicalizeGraph().run(raw)
    assert captured.inputs[0].shape == (1, 3)
    assert captured.symbols == {}


def test_labels_of_another_length_have_a_size_of_their_own() -> None:
    ids, labels = torch.zeros(4, 9, dtype=torch.long), torch.zeros(4, 5, dtype=torch.long)
    named = {"labels": labels, "input_ids": ids, "attention_mask": ids, "grid": ids[:, :3]}
    tokens = {0: "batch", 1: "sequence"}
    assert symbol_dims(named) == {
        "labels": {0: "batch", 1: "target_sequence"},
        "input_ids": tokens,
        "attention_mask": tokens,
        "grid": {0: "batch"},
    }


# ------------------------------------------------------------------- inferred inputs


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ("Qwen3", {"input_ids": (3, 64), "labels": (3, 64)}),
        ("T5", {"input_ids": (3, 2048), "labels": (3, 1024)}),
        ("ViT", {"pixel_values": (3, 3, 16, 16), "labels": (3,)}),
        ("ResNet, BatchNorm", {"pixel_values": (3, 3, 224, 224), "labels": (3,)}),
    ],
)
def test_inputs_are_inferred(item: str, expected: dict[str, tuple[int, ...]]) -> None:
    factory = families.family(item).tiny
    assert factory is not None
    example = infer_example_inputs(models.build(factory).model, 3)
    assert example is not None
    assert {key: tuple(value.shape) for key, value in example.items()} == expected


def test_inputs_of_a_vision_language_model_are_asked_for() -> None:
    model = models.build(family_tiny.llava).model
    with pytest.raises(MissingExampleInputs, match=r"as its processor makes it.*'pixel_values': images"):
        infer_example_inputs(model, 2)


# ------------------------------------------------------------------- models inside others


class Wrapped(nn.Module):
    """A transformers model inside a module of the user's own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, pixel_values=pixel_values, return_loss=True).loss


def test_a_model_inside_another_keeps_its_causal_attention() -> None:
    case = models.build(family_tiny.clip)
    captured = staged.capture(Wrapped(case.model), case.batch)
    attention = [
        node.args[3:] + tuple(node.kwargs.items())
        for node in captured.graph_module.graph.nodes
        if node.target is torch.ops.aten.scaled_dot_product_attention.default
    ]
    # Two layers of the text tower, which are causal, and two that look at images.
    causal = [arguments for arguments in attention if arguments[:3] == (None, 0.0, True)]
    assert len(causal) == 2
    assert len(attention) == 4
    assert not any(isinstance(argument, torch.fx.Node) for arguments in attention for argument in arguments)


def test_an_input_that_is_no_tensor_is_to_be_wrapped() -> None:
    with pytest.raises(InvalidArgument, match=r"is a bool; every input must be a tensor. Wrap"):
        ExampleInputs.of({"input_ids": torch.zeros(2, 3), "return_loss": True})


def test_clip_trains_bit_for_bit_on_as_many_threads_as_plain_pytorch() -> None:
    """Workers share torch's threads; addmm of [10, 32] by [32, 32] rounds otherwise with two than with one.

    That is the whole difference that CLIP's gradients have where threads differ, below 1e-6 of the largest;
    no sum is taken in another order. Here everything has one thread.
    """
    case = models.build(family_tiny.clip)
    model = Wrapped(case.model).train()
    plain = copy.deepcopy(model)
    options = {"microbatches": 4, "effort": None, "gpu": models.SLOW_GPU, "solver_time_s": 0.3}
    with rpcompile.compile(model, 3, example_inputs=case.batch, **options) as compiled:
        assert len(compiled.plan.partition.stages) > 3
        loss = compiled.forward_backward(**case.batch)
    assert torch.equal(loss, reference.forward_backward(plain, case.batch, 4, random=False))
    for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        assert mine.grad is None or torch.equal(mine.grad, theirs.grad), name
