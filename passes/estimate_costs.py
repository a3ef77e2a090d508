"""Capture -> CostedGraph: prices every node in FLOPs and bytes, as functions of the captured sizes."""

from __future__ import annotations

import functools
import operator
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import sympy
import torch
from torch.fx import Node

from rpcompile.ir import CostedGraph, NodeCost
from rpcompile.operators import find
from rpcompile.prices import RESULT, Call, Operand, free, price, price_view
from rpcompile.sizes import Sizes, arguments, is_view, storage, tensors

if TYPE_CHECKING:
    from rpcompile.ir import Capture


@dataclass(frozen=True)
class EstimateCosts:
    """Looks every node's operator up in `rpcompile/operators.py`; conventions are in `rpcompile/prices.py`.

    A value that k > 1 differentiable nodes use receives k gradients; adding them up is charged to
    the node that made it.
    """

    name: ClassVar[str] = "estimate-costs"

    def run(self, capture: Capture) -> CostedGraph:
        """Price the nodes that `capture` runs or rematerialises.

        Returns:
            The costs by node name, and the operators that no formula is known for, by name.

        Raises:
            UnsupportedModel: A size depends on data.
        """
        reader = _Reader(capture)
        run = {*capture.order, *capture.rematerialised}
        costs: dict[str, NodeCost] = {}
        unknown: dict[str, None] = {}
        for node in capture.graph_module.graph.nodes:
            if node.name in run:
                costs[node.name] = cost = reader.cost(node)
                if cost.source == "bytes only":
                    unknown[str(node.target)] = None
        return CostedGraph(capture, costs, tuple(unknown))


class _Reader:
    """Turns nodes into calls and calls into costs; equal calls, as in repeated layers, are priced once."""

    def __init__(self, capture: Capture) -> None:
        self._sizes = Sizes(capture.graph_module.meta.get("symbols", {}))
        trainable = {spec.placeholder for spec in capture.parameters if spec.trainable}
        self._differentiable = capture.requires_grad | trainable
        self._price = functools.cache(price)
        self._price_view = functools.cache(price_view)

    def cost(self, node: Node) -> NodeCost:
        computes = node.op == "call_function" and node.target is not operator.getitem
        if not computes or not tensors(node):
            return free()
        inputs: dict[Node, int] = {}
        bound = tuple((name, self._argument(value, inputs)) for name, value in arguments(node).items())
        results = tuple(self._operand(item, False, RESULT) for item in tensors(node))
        call = Call(bound, results, node.name in self._differentiable)
        if is_view(node):
            cost = self._price_view(call)
        else:
            cost, slots = self._price(find(node), call)
            cost = self._with_kept(cost, slots, node, tuple(inputs))
        return self._with_gradient_sum(cost, node)

    def _argument(self, value: object, inputs: dict[Node, int]) -> object:
        if isinstance(value, list | tuple):
            return tuple(self._argument(item, inputs) for item in value)
        if not isinstance(value, Node):
            return value if isinstance(value, Hashable) else None
        values = tensors(value)
        if len(values) != 1:
            return None  # a size, or the graph of a higher-order operator
        slot = inputs.setdefault(value, len(inputs))
        return self._operand(values[0], value.name in self._differentiable, slot)

    def _operand(self, tensor: torch.Tensor, requires_grad: bool, slot: int) -> Operand:
        shape, read = self._sizes.shape(tensor), self._sizes.read_bytes(tensor)
        return Operand(shape, tensor.element_size(), read, requires_grad, slot)

    def _with_kept(
        self, cost: NodeCost, slots: tuple[int, ...], node: Node, inputs: tuple[Node, ...]
    ) -> NodeCost:
        """Names what autograd keeps: whole storages, since a view keeps all of its base alive."""
        stored = (storage(node if slot == RESULT else inputs[slot]) for slot in slots)
        # Parameters, buffers and the caller's tensors are there anyway.
        kept = {item.name: item for item in stored if item.op == "call_function"}
        if not kept:
            return cost
        kept_bytes = sympy.Add(cost.saved_bytes, *(self._sizes.nbytes(item) for item in kept.values()))
        return replace(cost, saved_bytes=kept_bytes, saved=tuple(kept))

    def _with_gradient_sum(self, cost: NodeCost, node: Node) -> NodeCost:
        gradients = sum(user.name in self._differentiable for user in node.users)
        single = isinstance(node.meta["val"], torch.Tensor)
        if not single or gradients < 2 or node.name not in self._differentiable:
            return cost
        nbytes = (gradients - 1) * self._sizes.nbytes(node)
        return replace(
            cost,
            backward_read_bytes=cost.backward_read_bytes + 2 * nbytes,
            backward_write_bytes=cost.backward_write_bytes + nbytes,
        )
