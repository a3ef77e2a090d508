from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from rpcompile.errors import UnsupportedModel
from rpcompile.passes.estimate_costs import EstimateCosts
from rpcompile.sizes import symbol
from tests.small_captures import BATCH, Chain, Function, capture_of, conv_net, costs_of, node_cost

if TYPE_CHECKING:
    from collections.abc import Callable

    from rpcompile.ir import CostedGraph, NodeCost

B, S = symbol("batch"), symbol("sequence")
TOKENS = {"x": {0: "batch", 1: "sequence"}}


def total(costed: CostedGraph, field: str, **sizes: int) -> float:
    values = {symbol(name): value for name, value in sizes.items()}
    return float(sum(getattr(cost, field).subs(values) for cost in costed.costs.values()))


def counted(model: nn.Module, x: torch.Tensor) -> tuple[int, int]:
    """FLOPs of forward and backward as torch counts them while the model runs."""
    with FlopCounterMode(display=False) as counter:
        loss = model(x).sum()
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    return forward, counter.get_total_flops()


# ------------------------------------------------------------------------------ FLOPs against torch's counter


class EagerAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        weights = (q @ k.transpose(-1, -2) / 2).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


def mlp() -> nn.Module:
    return Chain(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8, bias=False), nn.ReLU(), nn.Linear(8, 4))


def low_rank() -> nn.Module:
    """A frozen weight with trainable factors beside it, behind a frozen layer: LoRA's shape."""
    prefix, frozen = nn.Linear(8, 8), (6, 8)
    prefix.requires_grad_(False)
    adapted = Function(
        lambda x, w, a, b: functional.linear(x, w) + functional.linear(functional.linear(x, a), b),
        frozen,
        (2, 8),
        (6, 2),
        frozen=(0,),
    )
    return Chain(prefix, adapted, Function(lambda x, w: functional.linear(x, w), (4, 6), frozen=(0,)))


PRODUCTS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, dict[int, str]]]] = {
    "mlp": (mlp, (4, 6, 8), TOKENS),
    "conv net": (conv_net, (4, 3, 14, 14), BATCH),
    "eager attention": (EagerAttention, (4, 6, 8), TOKENS),
    "low rank": (low_rank, (4, 6, 8), TOKENS),
    "conv1d": (lambda: Function(functional.conv1d, (6, 3, 5)), (4, 3, 20), BATCH),
    "conv3d": (lambda: Function(functional.conv3d, (2, 3, 2, 2, 2)), (4, 3, 5, 5, 5), BATCH),
    "convolution": (
        lambda: Function(lambda x, w: torch.convolution(x, w, None, [2], [0], [1], True, [0], 1), (3, 2, 5)),
        (4, 3, 9),
        BATCH,
    ),
    "addmm": (lambda: Function(lambda x, w, v: torch.addmm(w, x, v), (7,), (5, 7)), (4, 5), BATCH),
    "baddbmm": (lambda: Function(lambda x, w, v: torch.baddbmm(v, w, x), (3, 7, 5), (7, 6)), (3, 5, 6), {}),
    "bmm of two inputs": (lambda: Function(lambda x, w: torch.bmm(x * w, x.mT * w), ()), (4, 5, 6), BATCH),
    "mm": (lambda: Function(torch.mm, (5, 7)), (4, 5), BATCH),
    "broadcast matmul": (lambda: Function(torch.matmul, (5, 2)), (4, 3, 6, 5), BATCH),
    "einsum": (
        lambda: Function(lambda x, w: torch.einsum("bsd,hde->bhse", x, w), (2, 5, 3)),
        (4, 6, 5),
        TOKENS,
    ),
    "einsum with an index summed first": (
        lambda: Function(lambda x, w: torch.einsum("bsd,dez->se", x, w), (5, 3, 2)),
        (4, 6, 5),
        TOKENS,
    ),
    "einsum without an output": (
        lambda: Function(lambda x, w: torch.einsum("bd,de", x, w), (5, 3)),
        (4, 5),
        BATCH,
    ),
    "einsum that contracts nothing": (
        lambda: Function(lambda x, w: torch.einsum("bd,d->bd", x, w), (5,)),
        (4, 5),
        BATCH,
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_flops_equal_the_flop_counter(name: str):
    make, shape, sizes = PRODUCTS[name]
    model, x = make(), torch.randn(shape)
    forward, backward = counted(model, x)
    costed = costs_of(model, x, sizes)
    bound = {
        symbol_name: shape[dim] for symbol_name, dim in {n: d for d, n in sizes.get("x", {}).items()}.items()
    }
    assert total(costed, "forward_flops", **bound) == forward
    assert total(costed, "backward_flops", **bound) == backward
    assert costed.unknown == ()
    assert (forward > 0) == (name != "einsum that contracts nothing")


@functools.cache
def symbolic_attention() -> tuple[EagerAttention, CostedGraph]:
    model = EagerAttention()
    return model, costs_of(model, torch.randn(4, 6, 8), TOKENS)


@settings(max_examples=15, deadline=None)
@given(batch=st.integers(1, 5), sequence=st.integers(1, 9))
def test_flops_hold_at_every_size(batch: int, sequence: int):
    model, costed = symbolic_attention()
    forward, backward = counted(model, torch.randn(batch, sequence, 8))
    assert total(costed, "forward_flops", batch=batch, sequence=sequence) == forward
    assert total(costed, "backward_flops", batch=batch, sequence=sequence) == backward


def test_grouped_convolution_counts_each_group_once():
    # torch's counter lets every input channel meet every output channel in the weight gradient.
    model = Chain(nn.Conv2d(4, 8, 3, groups=2, bias=False))
    x = torch.randn(3, 4, 6, 6)
    forward, backward = counted(model, x)
    costed = costs_of(model, x, {"x": {0: "batch"}})
    assert forward == total(costed, "forward_flops", batch=3) == 2 * (3 * 8 * 4 * 4) * (2 * 9)
    assert total(costed, "backward_flops", batch=3) == forward
    assert backward == 2 * forward


# ------------------------------------------------------------------------------ attention and experts


def attention_cost(**options: Any) -> NodeCost:
    def body(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        q, k, v = x.expand(-1, 4, -1, -1) * w, x[..., :5, :].expand(-1, 2, -1, -1), x[..., :5, :3]
        return functional.scaled_dot_product_attention(
            q, k, v.expand(-1, 2, -1, -1), enable_gqa=True, **options
        )

    return node_cost(body, torch.randn(3, 1, 7, 8), (8,))["scaled_dot_product_attention"]


def test_attention_is_two_products_forward_and_five_backward():
    # 4 query heads on 2 key heads, 7 queries, 5 keys, 8 deep, values 3 deep
    q, k, v = (3, 4, 7, 8), (3, 2, 5, 8), (3, 2, 5, 3)
    cost = attention_cost()
    assert cost.op_class == "attention"
    assert cost.forward_flops.subs(B, 3) == sdpa_flop_count(q, k, v) == 2 * 3 * 4 * 7 * 5 * (8 + 3)
    assert cost.backward_flops.subs(B, 3) == sdpa_backward_flop_count((3, 4, 7, 3), q, k, v)
    # queries and the result belong to the graph; keys and values are views of the input; log-sum-exp
    assert cost.saved_bytes == 4 * (B * 4 * 7 * 8 + B * 4 * 7 * 3 + B * 4 * 7)
    assert cost.saved == ("mul", "scaled_dot_product_attention")


def test_causal_attention_costs_half_where_the_counter_counts_all():
    whole, causal = attention_cost(), attention_cost(is_causal=True)
    assert causal.forward_flops == whole.forward_flops / 2
    assert causal.backward_flops == whole.backward_flops / 2


def test_grouped_mm_meets_each_row_with_one_matrix():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(3, 16, 24, dtype=torch.bfloat16))

        def forward(self, x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
            return functional.grouped_mm(x, self.up, offs=offsets)

    inputs = {
        "x": torch.randn(8, 16, dtype=torch.bfloat16),
        "offsets": torch.tensor([3, 5, 8], dtype=torch.int32),
    }
    costed = EstimateCosts().run(capture_of(Experts(), inputs, BATCH))
    cost = costed.costs["_grouped_mm"]
    assert cost.forward_flops == cost.backward_flops == 2 * B * 16 * 24  # x needs no gradient
    assert cost.op_class == "matmul"
    assert costed.unknown == ()


def test_grouped_mm_of_equal_groups():
    def body(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return functional.grouped_mm(x.bfloat16(), w.bfloat16())

    cost = node_cost(body, torch.randn(3, 8, 16), (3, 16, 24), sizes={})["_grouped_mm"]
    assert cost.forward_flops == 2 * 3 * 8 * 16 * 24


# ------------------------------------------------------------------------------ requires_grad


def test_frozen_prefix_has_no_backward():
    model = Chain(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    model[0].requires_grad_(False)
    costs = costs_of(model, torch.randn(4, 8), BATCH).costs
    for name in ("linear", "relu"):
        cost = costs[name]
        assert (
            cost.backward_flops
            == cost.backward_read_bytes
            == cost.backward_write_bytes
            == cost.saved_bytes
            == 0
        )
    # the gradient ends at the second layer's weight
    assert costs["linear_1"].backward_flops == 2 * B * 16 * 4
    assert costs["linear_1"].saved == ("relu",)


def test_frozen_weight_costs_no_weight_gradient_and_keeps_no_input():
    costs = node_cost(
        lambda x, w, v: functional.linear(x * w, v), torch.randn(4, 8), (8,), (3, 8), frozen=(1,)
    )
    assert costs["linear"].backward_flops == costs["linear"].forward_flops == 2 * B * 8 * 3
    assert costs["linear"].saved_bytes == 0
    assert costs["linear"].backward_write_bytes == 4 * B * 8


# ------------------------------------------------------------------------------ operators without formulas


def test_unknown_operator_is_priced_by_bytes_and_reported():
    # between the 5 rows of each element of the batch
    costed = costs_of(Function(lambda x, w: torch.cdist(x * w, x), (8,)), torch.randn(4, 5, 8), BATCH)
    cost = costed.costs["cdist"]
    assert costed.unknown == ("aten.cdist.default",)
    assert cost.source == "bytes only"
    assert cost.forward_flops == 0
    assert cost.read_bytes == 2 * 4 * B * 5 * 8
    assert cost.write_bytes == 4 * B * 5 * 5
    assert cost.saved_bytes == 4 * B * 5 * 8 + 4 * B * 5 * 5  # all it can keep; x is the caller's


def test_einsum_of_three_operands_is_reported():
    body = Function(lambda x, w, v: torch.einsum("bd,de,ef->bf", x, w, v), (5, 3), (3, 2))
    assert costs_of(body, torch.randn(4, 5), BATCH).unknown == ("aten.einsum.default",)


def test_pointwise_operator_without_an_entry_keeps_everything():
    costed = costs_of(Function(lambda x, w: torch.erfinv(x * w), (8,)), torch.randn(4, 8), BATCH)
    assert costed.unknown == ()
    assert costed.costs["erfinv"].saved == ("mul", "erfinv")
    assert "upper bound" in costed.costs["erfinv"].source


def test_every_entry_names_its_source():
    _, costed = symbolic_attention()
    assert costed.costs["linear"].source == "torch.utils.flop_counter: mm_flop"
    assert costed.costs["softmax"].source.startswith("bytes: ")
    assert all(cost.source for cost in costed.costs.values())


def test_size_that_depends_on_data():
    with pytest.raises(
        UnsupportedModel,
        match=r"^the size u0 is no function of the captured sizes \(batch\), so its cost cannot be known "
        r"before training; use an implementation whose shapes do not depend on the data, or name",
    ):
        node_cost(lambda x, w: x[x > 0] * w, torch.randn(4, 8), (1,))


def test_expressions_use_the_captures_symbols():
    _, costed = symbolic_attention()
    for cost in costed.costs.values():
        for expression in (cost.forward_flops, cost.read_bytes, cost.backward_write_bytes, cost.saved_bytes):
            assert expression.free_symbols <= {B, S}
    assert costed.costs["linear"].forward_flops == 2 * B * S * 8 * 24
