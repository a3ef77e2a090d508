"""Token-wise regions: what is proved, what is refused, and that chunks change nothing but rounding."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional

from rpcompile.ir import SegmentChain, StageGraph
from rpcompile.passes._token_regions import find_regions
from rpcompile.passes.extract_stages import ExtractStages
from rpcompile.runtime.compiled_stages import structure
from rpcompile.tiling import TiledRegion
from tests import families, family_tiny, models, reference, staged
from tests.families import Family

# Gradients of float32 are sums over tokens, taken in another order.
TOLERANCE = 2e-6
# One of every kind: plain, sliding window, soft caps, mixtures, learned positions and dropout, encoder with
# padding, encoder-decoder, vision, adapters, autocast, packed.
TILED = [
    families.family(name)
    for name in (
        "Qwen3, tied",
        "Mistral",
        "Gemma 2",
        "Qwen3-MoE",
        "GPT-OSS",
        "GPT-2",
        "BERT, padded",
        "T5",
        "Llava",
        "LoRA on experts",
        "bfloat16 autocast",
        "Packed batch",
    )
]
_MIXTURE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 2, "topk_group": 1}
ROUTERS = [
    Family(
        "GLM-4.5",
        partial(family_tiny.causal, "Glm4Moe", n_routed_experts=4, first_k_dense_replace=1, **_MIXTURE),
    ),
    Family("Llama 4", partial(family_tiny.causal, "Llama4", num_local_experts=4, intermediate_size_mlp=48)),
]
"""Mixtures whose routers scatter: by groups of experts, and with every expert for each token."""


def with_tiles(chain: SegmentChain, tiles: int, loss_tiles: int) -> SegmentChain:
    last = len(chain.segments) - 1
    segments = [replace(s, tiles=loss_tiles if i == last else tiles) for i, s in enumerate(chain.segments)]
    return replace(chain, segments=tuple(segments))


def regions_of(stage: StageGraph) -> list[TiledRegion]:
    return [item for item in stage.graph_module.modules() if isinstance(item, TiledRegion)]


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: item.grad for name, item in model.named_parameters() if item.grad is not None}


def run_tiled(item: Family, tiles: int, loss_tiles: int) -> tuple[list[TiledRegion], float]:
    """Runs a tiny family tiled; returns its largest relative error of a gradient against eager."""
    assert item.tiny is not None
    case = models.build(item.tiny)
    plain = copy.deepcopy(case.model)
    torch.manual_seed(11)
    expected = reference.forward_backward(plain, case.batch, 4, random=True, context=item.context)
    with item.context():
        captured = staged.capture(case.model, case.batch)
    chain = staged.free_chain(captured)
    count = len(chain.segments)
    everywhere = set(range(count))
    stages = staged.partition(chain.first_backward, count, count - 2, everywhere, set(range(1, count, 3)))
    regions: list[TiledRegion] = []
    tiled = with_tiles(chain, tiles, loss_tiles)
    torch.manual_seed(11)
    loss = staged.forward_backward(
        case.model,
        captured,
        tiled,
        stages,
        case.batch,
        4,
        reference.draw_seed(),
        look=lambda stage: regions.extend(regions_of(stage)),
    )
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    mine, theirs = gradients(case.model), gradients(plain)
    assert mine.keys() == theirs.keys()
    scale = max(grad.abs().max().item() for grad in theirs.values())
    # A gradient that is nothing but rounding (of a key's bias) is measured by the others.
    errors = [
        ((mine[name] - theirs[name]).abs().max() / max(theirs[name].abs().max().item(), 1e-3 * scale)).item()
        for name in theirs
    ]
    return regions, max(errors)


@pytest.mark.parametrize("item", [*TILED, *ROUTERS], ids=lambda item: item.name)
def test_chunks_change_nothing_but_rounding(item: Family) -> None:
    regions, error = run_tiled(item, 3, 5)
    assert error < (0.02 if item.name == "bfloat16 autocast" else TOLERANCE), error
    assert regions
    assert any(region.is_loss for region in regions)


WHOLE_LAYERS = [families.family(n) for n in ("Qwen3", "Gemma 3", "Qwen3-MoE", "GPT-OSS", "Packed batch")]


@pytest.mark.parametrize("item", [*WHOLE_LAYERS, *ROUTERS], ids=lambda item: item.name)
def test_products_and_norms_of_a_layer_are_token_wise(item: Family) -> None:
    """Everything with a weight is inside of a region; attention alone is not."""
    assert item.tiny is not None
    case = models.build(item.tiny)
    captured = staged.capture(case.model, case.batch)
    chain = staged.free_chain(captured)
    count = len(chain.segments)
    stages = staged.partition(chain.first_backward, count, count - 1, set(), set(range(0, count, 2)))
    seen: set[str] = set()
    for graph in ExtractStages(captured, chain).run(stages):
        nodes = list(graph.graph_module.graph.nodes)
        segment_of = {name: index for index in graph.stage.segments for name in chain.segments[index].nodes}
        names = captured.graph_module.meta["symbols"]
        regions = find_regions(graph.graph_module.graph, names, segment_of)
        inside = {node for region in regions for node in (*region.members, region.last)}
        for node in nodes:
            if str(node.target) in WITH_WEIGHTS:
                assert node in inside, node
                seen.add(str(node.target))
    assert len(seen) >= 3


WITH_WEIGHTS = {
    f"aten.{name}"
    for name in (
        "linear.default",
        "bmm.default",
        "rsqrt.default",
        "silu.default",
        "cross_entropy_loss.default",
    )
} | {
    "aten.cross_entropy_loss.default",
    "transformers.grouped_mm_fallback.default",
    "aten.sort.default",
}


# --------------------------------------------------------------------- soundness


class Mixer(nn.Module):
    """Two products with something between them that may mix tokens."""

    def __init__(self, between: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 8)
        self.first, self.second, self.head = (nn.Linear(8, 8) for _ in range(3))
        self.between = between

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(self.embedding(input_ids)))
        hidden = self.second(torch.tanh(self.between(hidden)))
        return functional.cross_entropy(self.head(hidden).flatten(0, 1), labels.flatten() % 8)


TOKEN_WISE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "activation": lambda x: functional.gelu(x) * x,
    "heads there and back": lambda x: x.view(*x.shape[:2], 2, 4).transpose(1, 2).transpose(1, 2).flatten(2),
    "flat and back": lambda x: x.reshape(-1, 8).softmax(-1).view(x.shape),
    "norm over features": lambda x: functional.layer_norm(x, (8,)),
    "cumulative sum over features": lambda x: x.cumsum(-1),
    "sum over features": lambda x: x + x.sum(-1, keepdim=True),
    "halves": lambda x: torch.cat([-x[..., 4:], x[..., :4]], -1),
    "products of features": lambda x: (x.unsqueeze(-1) @ x.unsqueeze(-2)).sum(-1),
    "sort of features": lambda x: x.sort(-1).values,
    "batches first and back": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1) * 2,
}
MIXING: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cumulative sum over tokens": lambda x: x.cumsum(1),
    "shift": lambda x: functional.pad(x, (0, 0, 1, 0))[:, :-1],
    "roll": lambda x: x.roll(1, 1),
    "flip": lambda x: x.flip(1),
    "mean over tokens": lambda x: x - x.mean(1, keepdim=True),
    "norm over all": lambda x: x / x.norm(),
    "softmax over tokens": lambda x: x.softmax(1),
    "softmax over flat tokens": lambda x: x.reshape(-1, 8).softmax(0).view(x.shape),
    "tokens with tokens": lambda x: (x @ x.transpose(1, 2)).softmax(-1) @ x,
    "tokens as features": lambda x: x.transpose(1, 2).reshape(x.shape),
    "maximum over tokens": lambda x: x * x.amax(1, keepdim=True),
    "sort of tokens": lambda x: x.sort(1).values,
    "norm over tokens and features": lambda x: functional.instance_norm(x.transpose(1, 2)).transpose(1, 2),
    "count of tokens": lambda x: x / x.shape[1],
    "positions": lambda x: x * torch.arange(x.shape[1] * 8).view(1, -1, 8),
    "flat positions": lambda x: x * torch.arange(x.shape[0] * x.shape[1] * 8).view(x.shape),
}


def tiled_mixer(between: Callable[[torch.Tensor], torch.Tensor]) -> tuple[list[TiledRegion], list[list]]:
    """The regions of a mixer, with the inputs that they were called with; its gradients are checked."""
    torch.manual_seed(0)
    model = Mixer(between)
    batch = {"input_ids": torch.randint(13, (4, 12)), "labels": torch.randint(8, (4, 12))}
    plain = copy.deepcopy(model)
    captured = replace(staged.capture(model, batch, microbatches=2), cuts=())
    chain = staged.free_chain(captured)
    whole = staged.partition(chain.first_backward, len(chain.segments), 0, set(), set())
    regions: list[TiledRegion] = []
    calls: list[list] = []

    def look(stage: StageGraph) -> None:
        for region in regions_of(stage):
            regions.append(region)
            region.register_forward_pre_hook(lambda _, inputs: calls.append(list(inputs)))

    loss = staged.forward_backward(model, captured, with_tiles(chain, 4, 4), whole, batch, 2, 0, look=look)
    for part in range(2):
        (plain(**{name: value.chunk(2)[part] for name, value in batch.items()}) / 2).backward()
    assert torch.isfinite(loss)
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-7)
    return regions, calls


@pytest.mark.parametrize("between", TOKEN_WISE.values(), ids=TOKEN_WISE)
def test_what_is_token_wise_is_one_region_with_the_loss(between: Callable) -> None:
    regions, _ = tiled_mixer(between)
    assert [region.is_loss for region in regions] == [True]
    products = [n for n in regions[0].graph_module.graph.nodes if str(n.target) == "aten.linear.default"]
    assert len(products) == 3


@pytest.mark.parametrize("between", MIXING.values(), ids=MIXING)
def test_what_mixes_tokens_is_never_inside_a_region(between: Callable) -> None:
    """A NaN in one token must not reach another; numbers must not depend on the chunks."""
    regions, calls = tiled_mixer(between)
    products = [
        n for r in regions for n in r.graph_module.graph.nodes if str(n.target) == "aten.linear.default"
    ]
    assert len(products) == 3
    # Positions are counted outside and come in sliced, like any other tensor.
    assert len(regions) == (1 if between in (MIXING["positions"], MIXING["flat positions"]) else 2)
    for region, inputs in zip(regions, calls[: len(regions)], strict=True):
        if not region.is_loss:
            check_tokens_stay_apart(region, inputs)


def check_tokens_stay_apart(region: TiledRegion, inputs: list) -> None:
    """Other numbers in one token (NaN, where there are any) must change that token of the outputs only."""
    tokens = region.tokens(inputs)
    clean = region.run(inputs, tokens)
    for token in (0, 3, tokens - 1):
        poisoned = [value.detach().clone() if isinstance(value, torch.Tensor) else value for value in inputs]
        for value, dim in zip(poisoned, region.input_dims, strict=True):
            if dim is not None:
                here = value.select(dim, token)
                here.copy_((here + 1) % 8 if here.dtype == torch.int64 else torch.full_like(here, torch.nan))
        for output, before, dim in zip(region.run(poisoned, tokens), clean, region.output_dims, strict=True):
            assert dim is not None
            found = (output != before).transpose(0, dim).flatten(1).any(1)
            assert found.tolist() == [index == token for index in range(tokens)]


def test_regions_that_differ_are_not_compiled_as_one() -> None:
    texts: set[str] = set()
    for chunks, operator in ((2, "silu"), (3, "silu"), (2, "tanh"), (2, "silu")):
        inner = torch.fx.Graph()
        target = getattr(torch.ops.aten, operator).default
        inner.output((inner.call_function(target, (inner.placeholder("x"),)),))
        module = torch.fx.GraphModule({}, inner)
        region = TiledRegion(module, (1,), (1,), chunks, takes_sequence=False, needs_output=True)
        outer = torch.fx.Graph()
        outer.output(outer.call_module("tiled_0", (outer.placeholder("x"),)))
        texts.add(structure(torch.fx.GraphModule({"tiled_0": region}, outer)))
    assert len(texts) == 3


def test_a_residual_gets_the_very_gradient_that_came_in() -> None:
    """Where a region only adds something to it; where it does more, a gradient of its own."""
    for factor in (None, 2.0):
        graph = torch.fx.Graph()
        x, y = graph.placeholder("x"), graph.placeholder("y")
        first = x if factor is None else graph.call_function(torch.ops.aten.mul.Tensor, (x, factor))
        changed = graph.call_function(torch.ops.aten.silu.default, (y,))
        graph.output((graph.call_function(torch.ops.aten.add.Tensor, (first, changed)),))
        module = torch.fx.GraphModule({}, graph)
        region = TiledRegion(module, (1, 1), (1,), 3, takes_sequence=False, needs_output=True)
        given = [torch.randn(2, 7, 4, requires_grad=True) for _ in range(2)]
        gradient = torch.randn(2, 7, 4)
        found = torch.autograd.grad(region(*given), given, gradient)
        assert (found[0].data_ptr() == gradient.data_ptr()) == (factor is None)
        torch.testing.assert_close(found[0], gradient * (factor or 1.0))
        expected = torch.autograd.grad(functional.silu(given[1]), given[1], gradient)
        torch.testing.assert_close(found[1], expected[0])


def test_low_precision_weight_gradients_are_summed_in_float32() -> None:
    """In bfloat16 sixteen chunks would lose what a sum in float32 keeps."""
    torch.manual_seed(0)
    graph = torch.fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    graph.output((graph.call_function(torch.ops.aten.linear.default, (x, weight)),))
    region = TiledRegion(
        torch.fx.GraphModule({}, graph), (1, None), (1,), 16, takes_sequence=False, needs_output=True
    )
    x = torch.randn(2, 64, 8, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(8, 8, dtype=torch.bfloat16, requires_grad=True)
    (y,) = region(x, weight)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    exact = gradient.double().flatten(0, 1).T @ x.detach().double().flatten(0, 1)
    assert weight.grad is not None
    error = (weight.grad.double() - exact).abs().max() / exact.abs().max()
    assert error < 2**-8  # one rounding to bfloat16
    drifting = torch.zeros_like(weight)
    for low, high in region.bounds([x]):
        drifting += gradient[:, low:high].flatten(0, 1).T @ x.detach()[:, low:high].flatten(0, 1)
    assert (drifting.double() - exact).abs().max() / exact.abs().max() > 2**-8


def test_a_low_precision_loss_is_summed_in_float32() -> None:
    """In bfloat16 a sum of 512 chunks stops growing long before its end."""
    torch.manual_seed(0)
    graph = torch.fx.Graph()
    logits, target = graph.placeholder("logits"), graph.placeholder("target")
    loss = graph.call_function(torch.ops.aten.cross_entropy_loss.default, (logits, target, None, 2))
    graph.output((loss,))
    region = TiledRegion(
        torch.fx.GraphModule({}, graph), (0, 0), (None,), 512, takes_sequence=False, needs_output=True
    )
    logits, target = torch.randn(2048, 16, dtype=torch.bfloat16), torch.randint(16, (2048,))
    exact = functional.cross_entropy(logits.double(), target, reduction="sum")
    with torch.no_grad():
        (evaluated,) = region(logits, target)
    (trained,) = region(logits.requires_grad_(), target)
    for found in (evaluated, trained):
        assert found.dtype == torch.bfloat16
        assert abs(found.double() / exact - 1) < 0.02
