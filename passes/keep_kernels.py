"""StageGraph -> StageGraph: a forward stage runs the kernels that its recompute will run."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from rpcompile.graphs import value_of
from rpcompile.random_streams import seeded
from rpcompile.training_kernels import as_in_training

if TYPE_CHECKING:
    from rpcompile.ir import StageGraph

_ATEN = torch.ops.aten
_RECURRENT = {
    getattr(getattr(_ATEN, name), overload)
    for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")
    for overload in ("input", "data")
}


@dataclass(frozen=True)
class KeepKernels:
    """Rewrites the operators of a forward stage that torch runs in another way where no gradient is wanted.

    These are products of a batch with a trainable matrix, one product where a gradient is wanted and one a
    row where it is not and the batch is not contiguous (also in recurrent layers), and attention under a
    mask that has a gradient. Both ways are right, but round differently, and plain PyTorch takes the first.

    Before -> after::

        linear(x, w, b)     ->  as_in_training(linear, (0, 1, 2), None, x, w, b)

    Options:
        requires_grad: Names of the nodes whose value carries a gradient.
    """

    requires_grad: frozenset[str]

    name: ClassVar[str] = "keep-kernels"

    def run(self, stage: StageGraph) -> StageGraph:
        """Returns the stage over a copy of its graph; one without such operators comes back as it was."""
        found = {node.name for node in stage.graph_module.graph.nodes if self._depends(node)}
        if not found:
            return stage
        module = GraphModule(stage.graph_module, copy.deepcopy(stage.graph_module.graph))
        module.meta.update(stage.graph_module.meta)
        for node in module.graph.nodes:
            if node.name in found:
                operator, stream, args = _call(node)
                node.args = (operator, self._wanted((args, node.kwargs)), stream, *args)
                node.target = as_in_training
        module.recompile()
        return replace(stage, graph_module=module)

    def _depends(self, node: Node) -> bool:
        operator, _, args = _call(node)
        if operator in _RECURRENT:
            return bool(self._wanted((args, {})))
        if operator is _ATEN.scaled_dot_product_attention.default:
            return bool(self._wanted((args[3:4], {"attn_mask": node.kwargs.get("attn_mask")})))
        if operator is _ATEN.linear.default:
            return bool(self._wanted((args[1:2], {}))) and not _is_contiguous(args[0])
        if operator is _ATEN.matmul.default:
            left, right = (value_of(arg).ndim for arg in args)  # type: ignore[arg-type]
            smaller = args[1] if left >= right else args[0]
            return max(left, right) >= 3 > min(left, right) and bool(self._wanted(((smaller,), {})))
        return False

    def _wanted(self, arguments: tuple[Any, dict[str, Any]]) -> tuple[int, ...]:
        leaves = enumerate(pytree.tree_leaves(arguments))
        return tuple(i for i, leaf in leaves if isinstance(leaf, Node) and leaf.name in self.requires_grad)


def _call(node: Node) -> tuple[Any, Any, tuple[Any, ...]]:
    """The operator, the number of its random stream, and its arguments."""
    if node.target is seeded:
        return node.args[0], node.args[1], node.args[2:]
    return node.target, None, node.args


def _is_contiguous(node: Any) -> bool:
    return value_of(node).is_contiguous()
