"""Sizes of graph values as sympy expressions, and the tensor that each value lives in.

Costs are functions of a few sizes that the caller chooses per plan, e.g. batch and sequence. Export
calls them s12 or s70; here they carry the capture's names. Planning only: the runtime never imports it.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

import sympy
import torch
from torch._ops import OpOverload

from rpcompile.errors import UnsupportedModel

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.fx import Node

# Operators that return their argument where they can and a copy where they must.
_COPY_UNLESS_CONTIGUOUS = frozenset(
    f"aten.{name}" for name in ("contiguous", "reshape", "reshape_as", "flatten", "unflatten")
)
# Operators that return a view of each tensor in a list.
_VIEWS_OF_A_LIST = frozenset({"aten.broadcast_tensors", "aten.meshgrid"})


def symbol(name: str) -> sympy.Symbol:
    """The sympy symbol of a size, e.g. "batch"; sizes are positive integers."""
    return sympy.Symbol(name, positive=True, integer=True)


def tensors(node: Node) -> tuple[torch.Tensor, ...]:
    """The (fake) tensors that `node` returns; empty for sizes and other numbers."""
    value = node.meta.get("val")
    values = value if isinstance(value, tuple | list) else (value,)
    return tuple(item for item in values if isinstance(item, torch.Tensor))


def operator_name(node: Node) -> str:
    """Name without overload, e.g. "aten.linear"; the function's own name outside torch's operators."""
    if isinstance(node.target, OpOverload):
        return str(node.target.overloadpacket)
    return getattr(node.target, "__name__", str(node.target))


def arguments(node: Node) -> Mapping[str, object]:
    """Arguments by schema name, defaults filled in; by position for what is no torch operator."""
    if not isinstance(node.target, OpOverload):
        return {**{str(index): value for index, value in enumerate(node.args)}, **node.kwargs}
    bound: dict[str, object] = {}
    for index, argument in enumerate(node.target._schema.arguments):
        given = node.args[index] if index < len(node.args) else argument.default_value
        bound[argument.name] = node.kwargs.get(argument.name, given)
    return bound


def is_view(node: Node) -> bool:
    """Whether `node` only renames memory that another node wrote."""
    if operator_name(node) in _VIEWS_OF_A_LIST:
        return True
    return _base(node) is not None and not _writes_in_place(node)


def storage(node: Node) -> Node:
    """The node that wrote the memory of `node`'s value: follows views and in-place operators.

    The results of an operator with several count as one piece of memory.
    """
    while (base := _base(node)) is not None:
        node = base
    return node


class Sizes:
    """Translates the sizes in one graph's metadata and remembers the translations.

    Args:
        torch_names: Symbol name -> torch's name for it, e.g. {"batch": "s12"}.
    """

    def __init__(self, torch_names: Mapping[str, str]) -> None:
        self._names = tuple(torch_names)
        self._symbols = {text: symbol(name) for name, text in torch_names.items()}
        self._translated: dict[sympy.Expr, sympy.Expr] = {}

    def size(self, size: int | torch.SymInt) -> sympy.Expr:
        """One size as an expression in the capture's symbols.

        Raises:
            UnsupportedModel: It depends on anything else, e.g. on the values in a tensor.
        """
        if isinstance(size, int):
            return sympy.Integer(size)
        expression: sympy.Expr = size.node.expr
        if expression not in self._translated:
            ours = {item: self._symbols.get(str(item)) for item in expression.free_symbols}
            if None in ours.values():
                captured = ", ".join(self._names) or "none"
                raise UnsupportedModel(
                    f"the size {expression} is no function of the captured sizes ({captured}), so its cost "
                    "cannot be known before training; use an implementation whose shapes do not depend "
                    "on the data, or name the dimension in dynamic_shapes"
                )
            self._translated[expression] = expression.xreplace(ours)  # pyright: ignore
        return self._translated[expression]

    def shape(self, tensor: torch.Tensor) -> tuple[sympy.Expr, ...]:
        """The tensor's sizes, each as an expression."""
        return tuple(self.size(size) for size in tensor.shape)

    def nbytes(self, node: Node) -> sympy.Expr:
        """Bytes of everything `node` returns."""
        return sympy.Add(*(sympy.Mul(*self.shape(item), item.element_size()) for item in tensors(node)))

    def read_bytes(self, tensor: torch.Tensor) -> sympy.Expr:
        """Bytes that reading it touches: a dimension that `expand` repeats (stride 0) counts once."""
        strides = tensor.stride()
        stored = [size for size, stride in zip(tensor.shape, strides, strict=True) if _is_not_zero(stride)]
        return sympy.Mul(*(self.size(size) for size in stored), tensor.element_size())


def _is_not_zero(stride: int | torch.SymInt) -> bool:
    # Comparing a SymInt with 0 would ask its shape environment and could add a guard.
    return stride != 0 if isinstance(stride, int) else stride.node.expr != 0


def _writes_in_place(node: Node) -> bool:
    if not isinstance(node.target, OpOverload):
        return False
    returns = node.target._schema.returns
    return bool(returns) and returns[0].alias_info is not None and returns[0].alias_info.is_write


def _base(node: Node) -> Node | None:
    """The argument whose memory `node` returns, None if it makes its own."""
    if node.op != "call_function" or not node.args:
        return None
    first = node.args[0]
    if not isinstance(first, torch.fx.Node):
        return None
    if node.target is operator.getitem:
        return first.args[0][node.args[1]] if operator_name(first) in _VIEWS_OF_A_LIST else first  # type: ignore[index]
    if not isinstance(node.target, OpOverload) or not tensors(first):
        return None
    name = operator_name(node)
    if name == "aten.dropout":
        bound = arguments(node)
        return first if not bound["train"] or bound["p"] == 0 else None
    returns = node.target._schema.returns
    if not returns or returns[0].alias_info is None or _copies(node, tensors(first)[0], name):
        return None
    return first


def _copies(node: Node, source: torch.Tensor, name: str) -> bool:
    if name == "aten.to":
        return source.dtype != tensors(node)[0].dtype
    if name in _COPY_UNLESS_CONTIGUOUS:
        order = node.kwargs.get("memory_format", torch.contiguous_format)
        return not source.is_contiguous(memory_format=order)  # type: ignore[arg-type]
    return False
