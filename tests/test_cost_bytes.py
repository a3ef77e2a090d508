from __future__ import annotations

import math
from typing import TYPE_CHECKING

import sympy
import torch
from torch import nn
from torch.nn import functional

from rpcompile.passes.estimate_costs import EstimateCosts
from rpcompile.sizes import symbol
from tests.small_captures import BATCH, Chain, capture_of, conv_net, costs_of, node_cost

if TYPE_CHECKING:
    from rpcompile.ir import CostedGraph

B = symbol("batch")

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


def test_learned_slopes_and_normalised_weights_are_priced_by_what_they_move_and_keep():
    cost = node_cost(lambda x, w: functional.prelu(x * 2, w), torch.randn(4, 6), (6,))["prelu"]
    assert (cost.read_bytes, cost.write_bytes) == (4 * B * 6 + 4 * 6, 4 * B * 6)
    assert cost.saved == ("mul",)
    cost = node_cost(lambda x, w: x @ torch._weight_norm(w, w[:, :1], 0), torch.randn(4, 6), (6, 6))
    assert (cost["_weight_norm"].op_class, cost["_weight_norm"].write_bytes) == ("reduction", 4 * 6 * 6)


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
