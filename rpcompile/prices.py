"""The price of one operator call: what formulas see of it, and what they are combined into.

Conventions:
    FLOPs are counted for operators that multiply matrices only, 2 for a multiply-add. Everything
    else costs 0 FLOPs and is priced by its bytes.
    Forward bytes: each distinct input once, each output once. A table that is indexed is read only
    where it is hit.
    Backward bytes: read are the output's gradient (once for each gradient made, in a matrix product)
    and what autograd kept; the gradient of each differentiable input is written.
    Kept for the backward: what the operator's entry in `rpcompile/operators.py` names.

Ignored: caches, workspaces, the reduction of broadcast gradients, and adding a weight gradient to the
one of earlier microbatches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import sympy

from rpcompile.ir import NodeCost

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

RESULT = -1
"""The slot of an operator's own result in what autograd keeps."""

_ZERO = sympy.Integer(0)


@dataclass(frozen=True)
class Operand:
    """A tensor as formulas see it.

    Attributes:
        shape: Sizes.
        itemsize: Bytes an element.
        read_bytes: Bytes that reading it touches (less than its size where it is expanded).
        requires_grad: Whether a gradient is made for it.
        slot: Position among the distinct inputs of the call; `RESULT` for results.
    """

    shape: tuple[sympy.Expr, ...]
    itemsize: int
    read_bytes: sympy.Expr
    requires_grad: bool
    slot: int

    @property
    def nbytes(self) -> sympy.Expr:
        """Bytes of all its elements."""
        return sympy.Mul(*self.shape, self.itemsize)


@dataclass(frozen=True)
class Call:
    """One call of an operator; two calls that are equal cost the same.

    Attributes:
        arguments: (schema name, value): an `Operand`, a tuple of values, or a constant.
        results: What it returns.
        requires_grad: Whether its result carries a gradient.
    """

    arguments: tuple[tuple[str, object], ...]
    results: tuple[Operand, ...]
    requires_grad: bool

    def constant(self, name: str) -> object:
        """The value of an argument that is no tensor."""
        return dict(self.arguments)[name]

    def operands(self, *names: str) -> tuple[Operand, ...]:
        """The tensors among the named arguments, in the order of the names."""
        values = dict(self.arguments)
        return tuple(operand for name in names for operand in _flatten(values.get(name)))

    def inputs(self) -> tuple[Operand, ...]:
        """Each distinct input once."""
        every = (operand for _, value in self.arguments for operand in _flatten(value))
        return tuple({operand.slot: operand for operand in every}.values())


def _flatten(value: object) -> Iterator[Operand]:
    if isinstance(value, Operand):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _flatten(item)


@dataclass(frozen=True)
class Operator:
    """Formulas of one operator.

    Attributes:
        op_class: See `NodeCost.op_class`.
        source: Where the formulas are from.
        keeps: Arguments that autograd keeps; "result" for the result; None: all of them.
        crossed: Operands of a product: each is kept for the gradient of the others.
        table: The argument that is read only where it is indexed.
        scratch: Bytes the forward writes besides its results and keeps for the backward.
        flops: Forward FLOPs; a formula may return None for a form that it does not know.
        backward_flops: Backward FLOPs; by default `flops` for each differentiable one of `crossed`.
    """

    op_class: str
    source: str
    keeps: tuple[str, ...] | None = ()
    crossed: tuple[str, ...] = ()
    table: str | None = None
    scratch: Callable[[Call], sympy.Expr] | None = None
    flops: Callable[[Call], sympy.Expr | None] | None = None
    backward_flops: Callable[[Call], sympy.Expr] | None = None


UNKNOWN = Operator("elementwise", "bytes only", keeps=None)
"""Stands for an operator that no formula is known for; an upper bound of what autograd keeps."""


def price(operator: Operator, call: Call) -> tuple[NodeCost, tuple[int, ...]]:
    """Cost of one call.

    Returns:
        The cost, with `saved_bytes` holding only the operator's scratch; and the slots of the inputs
        (and `RESULT`) that autograd keeps, whose bytes depend on what else keeps them.
    """
    flops = _ZERO if operator.flops is None else operator.flops(call)
    if flops is None:
        operator, flops = UNKNOWN, _ZERO
    inputs = call.inputs()
    scratch = _ZERO if operator.scratch is None else operator.scratch(call)
    result_bytes = sympy.Add(*(result.nbytes for result in call.results))
    table = {operand.slot for operand in call.operands(operator.table)} if operator.table else set()
    read = sympy.Add(*(result_bytes if item.slot in table else item.read_bytes for item in inputs))
    write = result_bytes + scratch
    if not call.requires_grad:
        cost = NodeCost(operator.op_class, flops, _ZERO, read, write, _ZERO, _ZERO, _ZERO, operator.source)
        return cost, ()
    kept = _kept(operator, call)
    differentiable = [item for item in inputs if item.requires_grad]
    products = sum(item.requires_grad for item in call.operands(*operator.crossed))
    if operator.backward_flops is not None:
        backward_flops = operator.backward_flops(call)
    else:
        backward_flops = flops * products
    gradient_reads = max(products, 1) if operator.flops is not None else 1
    kept_reads = [item.read_bytes for item in inputs if item.slot in kept]
    kept_reads += [result_bytes] if RESULT in kept else []
    backward_read = sympy.Add(gradient_reads * result_bytes, scratch, *kept_reads)
    # The gradient of a table is zeros everywhere, then the hits are added.
    hits = result_bytes if any(item.slot in table for item in differentiable) else _ZERO
    backward_write = sympy.Add(hits, *(item.nbytes for item in differentiable))
    cost = NodeCost(
        operator.op_class,
        flops,
        backward_flops,
        read,
        write,
        backward_read,
        backward_write,
        scratch,
        operator.source,
    )
    return cost, kept


def price_view(call: Call) -> NodeCost:
    """Cost of a view: nothing, but that a part's gradient is written into zeros of the whole.

    That holds for slices, splits and expands: forms of another size. The gradient of a reshape is a reshape.
    """
    inputs = call.inputs()
    source = sympy.Add(*(item.nbytes for item in inputs))
    result = sympy.Add(*(item.nbytes for item in call.results))
    reshapes = len(inputs) == len(call.results) and source == result
    read, write = (result, source) if call.requires_grad and not reshapes else (_ZERO, _ZERO)
    return NodeCost("view", _ZERO, _ZERO, _ZERO, _ZERO, read, write, _ZERO, "a view moves nothing")


def free() -> NodeCost:
    """Cost of arithmetic on sizes, of constants and of picking one of several results."""
    return NodeCost("view", _ZERO, _ZERO, _ZERO, _ZERO, _ZERO, _ZERO, _ZERO, "no tensor is touched")


def _kept(operator: Operator, call: Call) -> tuple[int, ...]:
    if operator.keeps is None:
        slots = [item.slot for item in call.inputs()] + [RESULT]
    else:
        slots = [item.slot for item in call.operands(*operator.keeps)]
        slots += [RESULT] if "result" in operator.keeps else []
    operands = call.operands(*operator.crossed)
    for index, operand in enumerate(operands):
        others = operands[:index] + operands[index + 1 :]
        slots += [operand.slot] if any(other.requires_grad for other in others) else []
    return tuple(dict.fromkeys(slots))
