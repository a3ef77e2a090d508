"""Operators one by one and in random chains: what is tiled gives the same numbers, one token a chunk."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest
import torch
import transformers.integrations.moe  # noqa: F401  (registers grouped_mm_fallback)
from torch import nn
from torch.nn import functional

from rpcompile.ir import SegmentChain, Stage, StageGraph, StageKind
from rpcompile.passes.tile_tokens import TileTokens
from rpcompile.tiling import TiledRegion
from tests.small_captures import capture_of

if TYPE_CHECKING:
    from torch.fx import GraphModule

H, EXPERTS = 8, 4
SIZES = {0: "batch", 1: "sequence"}
Body = Callable[..., torch.Tensor]


class Between(nn.Module):
    """Two products around each of some functions of (x BSH, a weight of at least 1024 numbers)."""

    def __init__(self, *bodies: Body) -> None:
        super().__init__()
        self.bodies = bodies
        generator = torch.Generator().manual_seed(1)
        self.first, self.last, self.weight = (
            nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64) / 2)
            for shape in ((H, H), (H, H), (1024,))
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        inner = (body(functional.linear(x, self.first), self.weight) for body in self.bodies)
        return tuple(functional.linear(found, self.last) for found in inner)


def tiled(module: GraphModule) -> tuple[GraphModule, list[TiledRegion]]:
    """The graph with every region at so many chunks that each is one token, and the regions."""
    nodes = tuple(node.name for node in module.graph.nodes if node.op == "call_function")
    chain = SimpleNamespace(segments=[SimpleNamespace(tiles=1000, nodes=nodes)])
    stage = StageGraph(Stage(0, StageKind.FB, 0, 0), module, (), frozenset(), (), *[frozenset()] * 9)  # type: ignore[arg-type]
    symbols = module.meta["symbols"]
    found = TileTokens(cast("SegmentChain", chain), symbols).run(stage).graph_module
    return found, [item for item in found.modules() if isinstance(item, TiledRegion)]


def check(*bodies: Body, sizes: dict[int, str] = SIZES, shape: tuple[int, ...] = (9, 11, H)) -> int:
    """Compares outputs and gradients whole and one token a chunk; returns the number of regions."""
    module = Between(*bodies)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    capture = capture_of(module, {"x": x}, {"x": sizes}, lowest=H + 1)
    weights = [dict(module.named_parameters())[spec.name] for spec in capture.parameters]
    whole = capture.graph_module
    for node in reversed(whole.graph.nodes):
        if "_assert" in node.name:
            whole.graph.erase_node(node)
    parts, regions = tiled(whole)
    found: list[list[torch.Tensor]] = []
    for graph in (whole, parts):
        leaf = x.clone().requires_grad_()
        outputs = graph(*weights, leaf)
        mixed = sum((out * torch.sin(torch.arange(out.numel()).view(out.shape))).sum() for out in outputs)
        gradients = torch.autograd.grad(cast("torch.Tensor", mixed), [*weights, leaf], allow_unused=True)
        found.append([*outputs, *(g for g in gradients if g is not None)])
    for mine, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    return len(regions)


def experts(x: torch.Tensor, weight: torch.Tensor, *, top: int, descending: bool = False) -> torch.Tensor:
    """The mixture of experts that sorts rows by expert, for x (..., H)."""
    rows = x.reshape(-1, H)
    chances, chosen = rows[:, :EXPERTS].softmax(-1).topk(top, -1)
    keys, order = torch.sort(chosen.reshape(-1), descending=descending)
    offsets = torch.cumsum(torch.histc(keys.float(), EXPERTS, 0, EXPERTS - 1), 0, dtype=torch.int32)
    picked = rows[order // top] if top > 1 else rows[order]
    made = torch.ops.transformers.grouped_mm_fallback(picked, weight[:256].view(EXPERTS, H, H), offsets)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.shape[0])
    return (made[back].view(-1, top, H) * chances.unsqueeze(-1)).sum(1).view(x.shape)


def groups_of_experts(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The router that first takes the best groups (DeepSeek-V3, GLM-4.5)."""
    scores = x.reshape(-1, H).sigmoid()
    best = scores.view(-1, 2, 4).topk(2, -1)[0].sum(-1).topk(1, -1)[1]
    mask = torch.zeros_like(scores[:, :2])
    mask.scatter_(1, best, 1)
    mask = mask.unsqueeze(-1).expand(-1, 2, 4).reshape(-1, H)
    return scores.masked_fill(~mask.bool(), 0.0).view(x.shape) * x


def every_expert(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The router that gives each expert all rows, most of them times 0 (Llama 4)."""
    rows = x.reshape(-1, H)
    value, index = rows[:, :EXPERTS].topk(1, -1)
    scores = torch.full_like(rows[:, :EXPERTS], float("-inf")).scatter_(1, index, value).t().sigmoid()
    given = (rows.repeat(EXPERTS, 1) * scores.reshape(-1, 1)).view(EXPERTS, -1, H)
    return torch.bmm(given, weight[:256].view(EXPERTS, H, H)).sum(0).view(x.shape)


def rotated(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * (1 + 2j)).flatten(-2)


TOKEN_WISE: dict[str, Body] = {
    "experts": lambda x, w: experts(x, w, top=2),
    "one expert a token": lambda x, w: experts(x, w, top=1),
    "groups of experts": groups_of_experts,
    "every expert": every_expert,
    "complex numbers": rotated,
    "repeated features": lambda x, w: x.repeat_interleave(2, -1)[..., ::2] + x.repeat(1, 1, 2)[..., :H],
    "each token thrice": lambda x, w: x.repeat_interleave(3, 1).view(*x.shape[:2], 3, H).cumsum(2).sum(2),
    "all tokens thrice": lambda x, w: x.repeat(1, 3, 1).view(x.shape[0], 3, -1, H).cumsum(1).sum(1),
    "largest feature": lambda x, w: torch.maximum(x - x.max(-1, keepdim=True).values, x.min(x * 2)),
    "scattered features": lambda x, w: torch.ones_like(x).scatter(-1, x.argsort(-1), x * 3) * x,
}
MIXING: dict[str, Body] = {
    "sum of all": lambda x, w: x * x.sum(),
    "mean of all": lambda x, w: x * x.mean(),
    "deviation of all": lambda x, w: x * x.std(),
    "largest of all": lambda x, w: x * x.max(),
    "largest token": lambda x, w: x * x.max(1, keepdim=True).values,
    "two results": lambda x, w: x + torch.frexp(x).mantissa,
    "each token thrice, read as all thrice": lambda x, w: (
        x.repeat_interleave(3, 1).view(x.shape[0], 3, -1, H).sum(1) + x
    ),
    "all tokens thrice, read as each thrice": lambda x, w: x.repeat(1, 3, 1).view(*x.shape[:2], 3, H).sum(2),
    "scattered tokens": lambda x, w: torch.zeros_like(x).scatter(1, x.argsort(1), x),
    "experts in descending order": lambda x, w: experts(x, w, top=2, descending=True),
    "frequencies of what is looked up": lambda x, w: (
        functional.embedding(x.argmax(-1), w[:64].view(8, H), scale_grad_by_freq=True) + x
    ),
    # In a chunk of one token they would take the tokens' dimension away.
    "squeezed": lambda x, w: x.squeeze() * 2,
    "squeezed tokens": lambda x, w: x.squeeze(1) * 2,
}


@pytest.mark.parametrize("body", TOKEN_WISE.values(), ids=TOKEN_WISE)
def test_what_is_token_wise_is_one_region(body: Body) -> None:
    assert check(body) == 1


@pytest.mark.parametrize("body", MIXING.values(), ids=MIXING)
def test_what_mixes_tokens_parts_the_graph(body: Body) -> None:
    assert check(body) == 2


def test_positions_of_rows_do_not_come_in_sliced() -> None:
    """One row a token, without a batch: what puts the rows back counts from 0 in each chunk."""
    for top in (1, 2):
        body = lambda x, w, top=top: experts(x, w, top=top)  # noqa: E731
        assert check(body, sizes={0: "sequence"}, shape=(11, H)) >= 1


STEPS: dict[str, Body] = {
    **{name: TOKEN_WISE[name] for name in TOKEN_WISE if name != "complex numbers"},
    **{name: MIXING[name] for name in MIXING if not name.startswith(("squeezed", "experts"))},
    "activation": lambda x, w: functional.silu(x) * x,
    "scrambled by features": lambda x, w: x.transpose(1, 2).reshape(x.shape),
    "scrambled by batches": lambda x, w: x.transpose(0, 1).reshape(x.shape),
    "flat softmax": lambda x, w: x.reshape(-1, H).softmax(-1).view(x.shape),
    "softmax over rows": lambda x, w: x.reshape(-1, H).softmax(0).view(x.shape),
    "cumulative": lambda x, w: x.cumsum(1),
    "attention": lambda x, w: (x @ x.mT).softmax(-1) @ x,
    "heads": lambda x, w: x.view(*x.shape[:2], 2, 4).transpose(1, 2).softmax(-1).transpose(1, 2).flatten(2),
    "heads in disorder": lambda x, w: x.view(*x.shape[:2], 2, 4).transpose(1, 2).tanh().reshape(x.shape),
    "convolution": lambda x, w: functional.conv1d(x.mT, w[:24].view(H, 1, 3), padding=1, groups=H).mT,
    "norm": lambda x, w: functional.layer_norm(x, (H,), w[:H], w[H : 2 * H]),
    "norm over tokens": lambda x, w: functional.instance_norm(x.mT).mT,
    "rolled": lambda x, w: x.roll(1, 1),
    "halves": lambda x, w: torch.cat(x.chunk(2, -1)[::-1], -1),
    "stacked": lambda x, w: torch.stack([x, x * 2], 1).sum(1),
    "written in place": lambda x, w: (x * 1).index_fill_(1, torch.zeros(1, dtype=torch.int64), 2.0),
    "half in place": lambda x, w: (y := x * 1, y[..., :4].mul_(3), y)[-1],
    "positions": lambda x, w: x + torch.arange(x.shape[1], dtype=x.dtype)[:, None],
    "count": lambda x, w: x / x.shape[1],
    "looked up": lambda x, w: w[: 8 * H].view(8, H)[x.argmax(-1)] + x,
    "first token": lambda x, w: x - x[:, :1],
}


@pytest.mark.parametrize("seed", range(6))
def test_random_chains_of_operators_give_the_same_numbers(seed: int) -> None:
    choices = random.Random(seed)

    def chain() -> Body:
        steps = [STEPS[name] for name in choices.choices(list(STEPS), k=choices.randint(2, 5))]

        def body(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            for step in steps:
                x = functional.layer_norm(step(x, weight), (H,))
            return x

        return body

    assert check(*(chain() for _ in range(4))) > 1
