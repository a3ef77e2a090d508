from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from rpcompile.errors import UnsupportedModel
from rpcompile.passes.estimate_costs import EstimateCosts
from rpcompile.sizes import symbol
from tests.small_captures import capture_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from rpcompile.ir import CostedGraph, NodeCost

B, S = symbol("batch"), symbol("sequence")
BATCH = {"x": {0: "batch"}}
TOKENS = {"x": {0: "batch", 1: "sequence"}}


class Function(nn.Module):
    """A function of x and of trainable (or frozen) tensors w0, w1, ..."""

    def __init__(
        self, body: Callable[..., torch.Tensor], *shapes: tuple[int, ...], frozen: tuple[int, ...] = ()
    ):
        super().__init__()
        self.body = body
        self.weights = nn.ParameterList([torch.randn(shape) for shape in shapes])
        for index in frozen:
            self.weights[index].requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x, *self.weights)


class Chain(nn.Sequential):
    """nn.Sequential whose input is called x."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


def costs_of(model: nn.Module, x: torch.Tensor, sizes: dict[str, dict[int, str]]) -> CostedGraph:
    return EstimateCosts().run(capture_of(model, {"x": x}, sizes))


def node_cost(
    body: Callable[..., torch.Tensor],
    x: torch.Tensor,
    *shapes: tuple[int, ...],
    frozen: tuple[int, ...] = (),
    sizes: dict[str, dict[int, str]] = BATCH,
) -> dict[str, NodeCost]:
    """Costs by node of a function of x, whose first dimension is `batch`."""
    return dict(costs_of(Function(body, *shapes, frozen=frozen), x, sizes).costs)


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


def conv_net() -> nn.Module:
    return Chain(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, stride=2, bias=False),
        nn.ConvTranspose2d(4, 5, 2, stride=2),
        nn.GroupNorm(5, 5),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(180, 3),
    )


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
    return Chain(
        prefix, adapted, adapted.__class__(lambda x, w: functional.linear(x, w), (4, 6), frozen=(0,))
    )


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


# ------------------------------------------------------------------------------ bytes


def test_linear_moves_its_tensors_once():
    cost = node_cost(lambda x, w, v: functional.linear(x * w, v), torch.randn(4, 8), (8,), (3, 8))["linear"]
    x, weight, y = 4 * B * 8, 4 * 3 * 8, 4 * B * 3
    assert cost.read_bytes == x + weight
    assert cost.write_bytes == y
    assert sympy.expand(cost.backward_read_bytes - (2 * y + x + weight)) == 0  # dy for each of dx and dw
    assert cost.backward_write_bytes == x + weight
    assert cost.saved_bytes == x


def test_same_tensor_twice_is_read_and_kept_once():
    cost = node_cost(lambda x, w: (x + w) * (x + w), torch.randn(4, 8), (8,))
    assert cost["mul"].read_bytes == 8 * 4 * B * 2  # two sums: export does not merge them
    cost = node_cost(lambda x, w: (y := x + w) * y, torch.randn(4, 8), (8,))
    assert cost["mul"].read_bytes == 8 * 4 * B
    assert cost["mul"].saved_bytes == 8 * 4 * B


def test_expanded_input_is_read_at_its_own_size():
    cost = node_cost(lambda x, w: x + w.expand(6, 8), torch.randn(4, 6, 8), (8,))["add"]
    assert cost.read_bytes == 4 * B * 6 * 8 + 4 * 8


def test_embedding_reads_only_the_rows_it_looks_up():
    cost = node_cost(lambda x, w: functional.embedding(x, w), torch.zeros(4, 6, dtype=torch.long), (1000, 8))
    rows = 4 * B * 6 * 8
    assert cost["embedding"].op_class == "gather"
    assert cost["embedding"].read_bytes == rows + 8 * B * 6
    assert cost["embedding"].backward_write_bytes == rows + 4 * 1000 * 8
    assert cost["embedding"].saved_bytes == 0  # the indices are the caller's


def test_views_and_sizes_cost_nothing():
    def body(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = (x + w).view(x.shape[0], 2, 4).transpose(1, 2).unsqueeze(1)
        return y.sum()

    costs = node_cost(body, torch.randn(4, 8), (8,))
    for name in ("sym_size_int_1", "view", "transpose", "unsqueeze"):
        moved = {getattr(costs[name], field) for field in ("read_bytes", "write_bytes", "saved_bytes")}
        moved |= {
            costs[name].backward_read_bytes,
            costs[name].backward_write_bytes,
            costs[name].forward_flops,
        }
        assert moved == {0}, name
        assert costs[name].op_class == "view"


def test_reshape_costs_a_copy_only_where_it_must_copy():
    costs = node_cost(lambda x, w: (x * w).reshape(-1).sum(), torch.randn(4, 6), (6,))
    assert costs["reshape"].write_bytes == 0
    costs = node_cost(lambda x, w: (x * w).mT.reshape(-1).sum(), torch.randn(4, 6), (6,))
    assert costs["reshape"].read_bytes == costs["reshape"].write_bytes == 4 * B * 6


def test_conversion_is_a_copy_that_keeps_nothing():
    cost = node_cost(lambda x, w: (x * w).bfloat16(), torch.randn(4, 6), (6,))["to"]
    assert (cost.read_bytes, cost.write_bytes, cost.saved_bytes) == (4 * B * 6, 2 * B * 6, 0)
    assert (cost.backward_read_bytes, cost.backward_write_bytes) == (2 * B * 6, 4 * B * 6)


def test_operator_in_place_is_priced_and_owns_no_memory():
    cost = node_cost(lambda x, w: torch.relu_(x * w), torch.randn(4, 6), (6,))["relu_"]
    assert cost.read_bytes == cost.write_bytes == 4 * B * 6
    assert cost.saved == ("mul",)  # its result lies in its argument's memory
    assert cost.source == "bytes: each input and output once; kept: torch's derivative formulas"


def test_division_keeps_its_denominator():
    assert node_cost(lambda x, w: x / (x * w), torch.randn(4, 6), (6,))["div"].saved == ("mul",)
    assert node_cost(lambda x, w: (x * w) / 2, torch.randn(4, 6), (6,))["div"].saved == ()


def test_cross_entropy_writes_keeps_and_reads_the_logarithms():
    x = torch.zeros(4, dtype=torch.long)
    cost = node_cost(lambda x, w: functional.cross_entropy(w, x), x, (4, 10), sizes={})["cross_entropy_loss"]
    logits, sums, labels = 4 * 4 * 10, 4, 8 * 4
    assert (cost.read_bytes, cost.write_bytes) == (logits + labels, 4 + logits + sums)
    assert cost.saved_bytes == logits + sums
    assert (cost.backward_read_bytes, cost.backward_write_bytes) == (4 + logits + sums + labels, logits)


def test_gradient_of_a_slice_fills_the_whole():
    costs = node_cost(lambda x, w: (x * w)[:, :2].exp(), torch.randn(4, 8), (8,))
    assert costs["slice_1"].read_bytes == costs["slice_1"].write_bytes == 0
    assert costs["slice_1"].backward_read_bytes == 4 * B * 2
    assert costs["slice_1"].backward_write_bytes == 4 * B * 8


def test_gradients_of_several_users_are_added_up():
    once = node_cost(lambda x, w: (x * w).exp(), torch.randn(4, 8), (8,))["mul"]
    thrice = node_cost(lambda x, w: (y := x * w).exp() + y.sin() + y.cos(), torch.randn(4, 8), (8,))["mul"]
    assert sympy.expand(thrice.backward_read_bytes - once.backward_read_bytes) == 2 * 2 * 4 * B * 8
    assert sympy.expand(thrice.backward_write_bytes - once.backward_write_bytes) == 2 * 4 * B * 8


def test_views_of_a_list_belong_each_to_its_own_tensor():
    def body(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y, z = torch.broadcast_tensors(x * w, (x * w).exp())
        return y * z

    costs = node_cost(body, torch.randn(4, 8), (8,))
    assert costs["broadcast_tensors"].read_bytes == costs["broadcast_tensors"].backward_write_bytes == 0
    assert costs["mul_2"].saved == ("mul", "exp")


def test_dropout_in_evaluation_is_a_view():
    drop = Chain(nn.Linear(4, 4), nn.Dropout(0.5))
    training = costs_of(drop, torch.randn(4, 4), BATCH).costs["dropout"]
    assert training.saved_bytes == 4 * B * 4  # the mask
    assert training.write_bytes == 2 * 4 * B * 4
    assert costs_of(drop.eval(), torch.randn(4, 4), BATCH).costs["dropout"].write_bytes == 0


# ------------------------------------------------------------------------------ what autograd keeps


def actually_saved(model: nn.Module, inputs: dict[str, torch.Tensor]) -> int:
    """Bytes of the storages that autograd holds after a forward, besides parameters, buffers and inputs."""
    there = {
        item.untyped_storage().data_ptr()
        for item in (*model.parameters(), *model.buffers(), *inputs.values())
    }
    held: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            held[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that its address stays its own
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**inputs)
    return sum(nbytes for nbytes, _ in held.values())


def distinct_saved(costed: CostedGraph, **sizes: int) -> int:
    """Sum of what nodes keep, with each tensor counted once."""
    seen: set[str] = set()
    nodes = {node.name: node for node in costed.capture.graph_module.graph.nodes}
    result = 0
    for cost in costed.costs.values():
        result += int(cost.saved_bytes.subs({symbol(name): value for name, value in sizes.items()}))
        for name in set(cost.saved) & seen:
            shape = [
                sizes.get("batch", 0) if not isinstance(size, int) else size
                for size in nodes[name].meta["val"].shape
            ]
            result -= math.prod(shape) * nodes[name].meta["val"].element_size()
        seen.update(cost.saved)
    return result


class TinyTransformer(nn.Module):
    """Every operator of a usual layer; sequence fixed at 6."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv = nn.Embedding(32, 8), nn.Linear(8, 24)
        self.out, self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 32), nn.Linear(16, 8)
        self.before, self.after, self.drop = nn.LayerNorm(8), nn.RMSNorm(8), nn.Dropout(0.2)
        self.head = nn.Linear(8, 32, bias=False)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        hidden = self.drop(self.embed(x))
        q, k, v = (
            part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(self.before(hidden)).chunk(3, -1)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        hidden = hidden + self.out(mixed.transpose(1, 2).flatten(2))
        gate, up = self.up(self.after(hidden)).chunk(2, -1)
        hidden = hidden + self.drop(self.down(functional.silu(gate) * up))
        return functional.cross_entropy(self.head(hidden).flatten(0, 1), labels.flatten())


def test_saved_bytes_bound_what_autograd_keeps():
    model = TinyTransformer()
    inputs = {"x": torch.randint(0, 32, (4, 6)), "labels": torch.randint(0, 32, (4, 6))}
    capture = capture_of(model, inputs, {"x": {0: "batch"}, "labels": {0: "batch"}})
    costed = EstimateCosts().run(capture)
    assert costed.unknown == ()
    bound, actual = distinct_saved(costed, batch=4), actually_saved(model, inputs)
    assert actual <= bound <= 1.1 * actual


def test_saved_bytes_of_a_conv_net_bound_what_autograd_keeps():
    model, x = conv_net(), torch.randn(4, 3, 14, 14)
    costed = costs_of(model, x, BATCH)
    actual = actually_saved(model, {"x": x})
    assert actual <= distinct_saved(costed, batch=4) <= 1.1 * actual


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
