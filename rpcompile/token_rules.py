"""For each operator that treats every token by itself: where the tokens of its results are."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import sympy
import torch
from torch._ops import OpOverload
from torch.fx import Node

from rpcompile.graphs import is_random
from rpcompile.sizes import Sizes, operator_name, symbol, tensors
from rpcompile.token_axis import Axes, Barrier, Call, Role, Shape, TokenAxis

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class TokenRules:
    """Follows the tokens of one graph through its operators.

    Args:
        torch_names: Symbol name -> torch's name for it in the graph's metadata.
        sequence: The one that counts tokens.
    """

    def __init__(self, torch_names: Mapping[str, str], sequence: str) -> None:
        self.sizes = Sizes(torch_names)
        self.sequence = symbol(sequence)
        self._torch_name = torch_names[sequence]

    def source(self, node: Node) -> Axes:
        """What the shapes alone say: tokens can only be in a dimension of their number.

        Raises:
            Barrier: A shape depends on the number of tokens in another way.
        """
        return tuple(self._source(self.sizes.shape(tensor)) for tensor in tensors(node))

    def result(self, node: Node, known: Mapping[Node, Axes]) -> Axes:
        """Where the tokens of a token-wise operator's results are.

        Args:
            node: Any node with tensor arguments.
            known: For every node before it that has them.

        Raises:
            Barrier: It is not known to be token-wise.
        """
        if node.target is operator.getitem:
            return self._item(node, known)
        if not isinstance(node.target, OpOverload) or is_random(node):
            raise Barrier
        rule = _RULES.get(operator_name(node))
        if rule is None and _is_pointwise(node.target):
            rule = _pointwise
        if rule is None:
            raise Barrier
        axes, found = rule(Call(node, known, self)), tensors(node)
        if len(axes) != len(found):
            raise Barrier
        for axis, tensor in zip(axes, found, strict=True):
            if not isinstance(axis, Role):
                self._check(axis, self.sizes.shape(tensor))
        return axes

    def counts_tokens(self, node: Node) -> bool:
        """Whether a size depends on the number of tokens; True where that cannot be told."""
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            return self.sequence in self.sizes.size(value).free_symbols
        if "symbol" in node.meta:
            return node.meta["symbol"] == self._torch_name
        inputs = node.all_input_nodes
        return not inputs or any(bool(tensors(arg)) or self.counts_tokens(arg) for arg in inputs)

    def _source(self, shape: Shape) -> TokenAxis | None:
        found = [dim for dim, size in enumerate(shape) if self.sequence in size.free_symbols]
        if not found:
            return None
        if len(found) > 1 or shape[found[0]] != self.sequence:
            raise Barrier
        return TokenAxis(found[0])

    def _check(self, axis: TokenAxis | None, shape: Shape) -> None:
        """A rule's answer must agree with the shape."""
        dims = {dim for dim, size in enumerate(shape) if self.sequence in size.free_symbols}
        if axis is None or dims != {axis.dim}:
            raise Barrier
        if not _equal(shape[axis.dim], axis.outer * self.sequence * axis.inner):
            raise Barrier

    def _item(self, node: Node, known: Mapping[Node, Axes]) -> Axes:
        source, index = node.args
        if not isinstance(source, Node) or not isinstance(index, int) or source not in known:
            raise Barrier
        return (known[source][index],)


# ---------------------------------------------------------------------- rules


def _pointwise(call: Call) -> Axes:
    """Arguments are broadcast against one another from the right."""
    call.numbers_only()
    rank = len(call.out())
    found: set[TokenAxis] = set()
    for node in call.node.all_input_nodes:
        if tensors(node) and (axis := call.axis(node)) is not None:
            found.add(axis.at(axis.dim + rank - len(call.shape(node))))
    if len(found) != 1:
        raise Barrier
    axis = found.pop()
    for node in call.node.all_input_nodes:
        # What has no tokens must be repeated over them.
        if tensors(node) and call.axis(node) is None:
            shape = call.shape(node)
            place = axis.dim - rank + len(shape)
            if place >= 0 and shape[place] != 1:
                raise Barrier
    return (axis,)


def _same(call: Call) -> Axes:
    call.numbers_only()
    return (call.tokens(next(iter(call.bound))),)


def _along_other_dims(call: Call) -> Axes:
    """Softmax, cumulative sums, sorting, ...: shapes stay, whole rows along `dim` matter."""
    axis = call.tokens("self")
    call.numbers_only()
    if axis.dim in call.dims("dim", call.rank("self")):
        raise Barrier
    return (axis.at(axis.dim),) * len(tensors(call.node))


def _reduction(call: Call) -> Axes:
    axis, rank = call.tokens("self"), call.rank("self")
    call.numbers_only()
    dims = call.dims("dim", rank)
    if axis.dim in dims:
        raise Barrier
    gone = 0 if call.bound.get("keepdim") else sum(dim < axis.dim for dim in dims)
    return (axis.at(axis.dim - gone),) * len(tensors(call.node))


def _norm(call: Call) -> Axes:
    axis = call.tokens("input")
    call.numbers_only()
    call.without_tokens("weight", "bias")
    normalized = call.bound["normalized_shape"]
    if axis.dim >= call.rank("input") - len(cast("list[object]", normalized)):
        raise Barrier
    return (axis.at(axis.dim),)


def _linear(call: Call) -> Axes:
    axis = call.tokens("input")
    call.without_tokens("weight", "bias")
    if axis.dim == call.rank("input") - 1:
        raise Barrier
    return (axis,)


def _product(left: str, right: str, *rest: str) -> Callable[[Call], Axes]:
    """Matrix products: rows of the left one are tokens, or both are batches of one matrix a token."""

    def rule(call: Call) -> Axes:
        call.without_tokens(*rest)
        axis, ranks = call.tokens(left), (call.rank(left), call.rank(right))
        other = call.axis(call.tensor(right))
        if other is not None:
            if ranks[0] != ranks[1] or other != axis or axis.dim >= ranks[0] - 2:
                raise Barrier
        elif axis.dim == ranks[0] - 1 or ranks[1] < 2 or (ranks[1] > 2 and axis.dim != ranks[0] - 2):
            raise Barrier
        return (axis.at(axis.dim + len(call.out()) - ranks[0]),)

    return rule


def _embedding(call: Call) -> Axes:
    call.without_tokens("weight")
    if call.bound["scale_grad_by_freq"]:
        raise Barrier  # gradients depend on how often a row is looked up in all tokens
    axis = call.tokens("indices")
    return (axis.at(axis.dim),)


def _view(call: Call) -> Axes:
    axis, node = call.tokens("self"), call.tensor("self")
    shape, out = call.shape(node), call.out()
    if axis.order is not None:  # sorted rows stay one dimension
        sizes = [size for size in (*shape, *out) if call.sequence in size.free_symbols]
        before = sympy.Mul(*shape[: axis.dim])
        dim = next((dim for dim in range(len(out)) if out[dim] == sizes[0]), len(out))
        if len(sizes) != 2 or sizes[0] != sizes[1] or not _equal(before, sympy.Mul(*out[:dim])):
            raise Barrier
        return (replace(axis, dim=dim),)
    left = sympy.Mul(*shape[: axis.dim], axis.outer)
    right = sympy.Mul(axis.inner, *shape[axis.dim + 1 :])
    for dim, size in enumerate(out):
        if call.sequence in size.free_symbols:
            outer = _quotient(left, sympy.Mul(*out[:dim]))
            inner = _quotient(right, sympy.Mul(*out[dim + 1 :]))
            return (TokenAxis(dim, outer, inner),)
    raise Barrier


def _squeeze(call: Call) -> Axes:
    """A chunk of one token must not lose its dimension: which ones go has to be said."""
    if call.tokens("self").dim in call.dims("dim", call.rank("self")):
        raise Barrier
    return _view(call)


def _permute(call: Call) -> Axes:
    axis, rank = call.tokens("self"), call.rank("self")
    order = [cast("int", dim) % rank for dim in cast("list[object]", call.bound["dims"])]
    return (axis.at(order.index(axis.dim)),)


def _transpose(call: Call) -> Axes:
    axis, rank = call.tokens("self"), call.rank("self")
    first, second = (0, 1) if "dim0" not in call.bound else (call.dim("dim0", rank), call.dim("dim1", rank))
    dim = {first: second, second: first}.get(axis.dim, axis.dim) if rank > 1 else axis.dim
    return (axis.at(dim),)


def _expand(call: Call) -> Axes:
    axis = call.tokens("self")
    return (axis.at(axis.dim + len(call.out()) - call.rank("self")),)


def _slice(call: Call) -> Axes:
    axis = call.tokens("self")
    if axis.dim == call.dim("dim", call.rank("self")):
        everything = call.bound["start"] in (None, 0) and call.bound["step"] == 1
        if not everything or call.out()[axis.dim] != call.shape(call.tensor("self"))[axis.dim]:
            raise Barrier
    else:
        call.numbers_only()
    return (axis,)


def _pieces(call: Call) -> Axes:
    """split, chunk: a list of slices along another dimension."""
    axis = call.tokens("self")
    call.numbers_only()
    if axis.dim == call.dim("dim", call.rank("self")):
        raise Barrier
    return (axis.at(axis.dim),) * len(tensors(call.node))


def _select(call: Call) -> Axes:
    """select, unbind: one dimension goes."""
    axis = call.tokens("self")
    call.numbers_only()
    dim = call.dim("dim", call.rank("self"))
    if axis.dim == dim:
        raise Barrier
    return (axis.at(axis.dim - (dim < axis.dim)),) * len(tensors(call.node))


def _concatenation(call: Call) -> Axes:
    nodes = call.bound["tensors"]
    if not isinstance(nodes, list | tuple):
        raise Barrier
    axes = {call.axis(node) if isinstance(node, Node) else None for node in nodes}
    if len(axes) != 1 or (axis := axes.pop()) is None:
        raise Barrier
    rank = len(call.out())
    dim = call.dim("dim", rank)
    if operator_name(call.node) == "aten.stack":
        return (axis.at(axis.dim + (dim <= axis.dim)),)
    if dim == axis.dim:
        raise Barrier
    return (axis,)


def _gather(call: Call) -> Axes:
    """gather, scatter: along another dimension, by an index (and of numbers) with the same tokens."""
    axis = call.tokens("self")
    call.numbers_only()
    given = [call.bound["index"], call.bound.get("src")]
    if any(isinstance(node, Node) and call.axis(node) != axis for node in given):
        raise Barrier
    if call.dim("dim", call.rank("self")) == axis.dim:
        raise Barrier
    return (axis.at(axis.dim),)


def _filled(call: Call) -> Axes:
    """zeros_like, full_like, ...: of `self` nothing but the shape matters."""
    axis = call.tokens("self")
    call.numbers_only()
    return (axis.at(axis.dim),)


def _repeat(call: Call) -> Axes:
    """Dimensions are repeated as a whole."""
    axis, repeats = call.tokens("self"), cast("list[object]", call.bound["repeats"])
    call.numbers_only()
    dim = axis.dim + len(repeats) - call.rank("self")
    times = repeats[dim]
    if not isinstance(times, int) or (times != 1 and axis.order is not None):
        raise Barrier
    return (replace(axis.at(dim), outer=times * axis.outer),)


def _repeat_interleave(call: Call) -> Axes:
    """Each entry of a dimension is repeated."""
    axis, times = call.tokens("self"), call.number("repeats")
    call.numbers_only()
    if axis.dim != call.dim("dim", call.rank("self")):
        return (axis.at(axis.dim),)
    if axis.order is not None:
        raise Barrier
    return (replace(axis.at(axis.dim), inner=times * axis.inner),)


def _complex(call: Call) -> Axes:
    """view_as_complex, view_as_real: pairs of numbers in the last dimension."""
    axis = call.tokens("self")
    return (axis.at(axis.dim),)


def _extreme(call: Call) -> Axes:
    """max, min: of two tensors, or over dimensions."""
    return _pointwise(call) if "other" in call.bound else _reduction(call)


# ------------------------------------------------- rows sorted by a key, e.g. by expert


def _sort(call: Call) -> Axes:
    axis = call.tokens("self")
    if call.rank("self") > 1 or axis.order is not None:
        return _along_other_dims(call)
    if call.bound["descending"]:
        raise Barrier  # offsets are those of ascending keys
    return replace(axis, order=call.node, sorted_keys=True), Role("index", axis, call.node)


def _floor_divide(call: Call) -> Axes:
    if not isinstance(call.what(call.tensor("self")), Role):
        return _pointwise(call)
    role = call.role("self", "index")
    return (replace(role, kind="rows", number=call.number("other")),)


def _to(call: Call) -> Axes:
    axis = call.tokens("self")
    call.numbers_only()
    return (axis,)


def _index(call: Call) -> Axes:
    """Rows of `self`: sorted, put back in place, or looked up by each token."""
    index, node = call.only_index(), call.tensor("self")
    by, axis = call.what(index), call.axis(node)
    if isinstance(by, TokenAxis):
        if axis is not None or len(call.shape(index)) != 1:
            raise Barrier
        return (by.at(0),)
    if by is None or axis is None or axis.dim != 0:
        raise Barrier
    if by.kind == "inverse":
        if axis.order is not by.order or not _equal(axis.inner, by.axis.inner):
            raise Barrier
        return (replace(axis, order=None, sorted_keys=False),)
    if by.kind not in ("index", "rows") or axis.order is not None:
        raise Barrier
    if not _equal(axis.outer, by.axis.outer) or not _equal(axis.inner * by.number, by.axis.inner):
        raise Barrier
    return (replace(by.axis, order=by.order),)


def _counts(call: Call) -> Axes:
    """histc(keys, bins=n, min=0, max=n - 1) counts each whole number below n."""
    axis, bins = call.tokens("self"), call.number("bins")
    if not axis.sorted_keys or axis.order is None or (call.bound["min"], call.bound["max"]) != (0, bins - 1):
        raise Barrier
    return (Role("counts", axis, axis.order, bins),)


def _cumsum(call: Call) -> Axes:
    if not isinstance(call.what(call.tensor("self")), Role):
        return _along_other_dims(call)
    return (replace(call.role("self", "counts"), kind="offsets"),)


def _grouped_product(call: Call) -> Axes:
    """Rows with one key are multiplied by the matrix of that key."""
    given, weights, offsets = list(call.bound)[:3]
    axis, role = call.tokens(given), call.role(offsets, "offsets")
    call.without_tokens(weights, *list(call.bound)[3:4])
    if axis.dim != 0 or axis.order is not role.order or call.rank(weights) != 3:
        raise Barrier
    if call.shape(call.tensor(weights))[0] != role.number:
        raise Barrier
    return (axis.at(0),)


def _blank(call: Call) -> Axes:
    return (replace(call.role("self", "index"), kind="blank"),)


def _scatter_positions(call: Call) -> Axes:
    """blank[index] = 0, 1, 2, ... is the inverse of `index`."""
    blank, index, values = call.role("self", "blank"), call.what(call.only_index()), call.tensor("values")
    counts_up = operator_name(values) == "aten.arange" and len(values.args) == 1
    if not isinstance(index, Role) or index.kind != "index" or index.order is not blank.order:
        raise Barrier
    if not counts_up or call.shape(values) != call.shape(call.only_index()) or call.bound["accumulate"]:
        raise Barrier
    if call.is_known(values):
        raise Barrier  # one number a token: they come in sliced, and a chunk's would not begin with 0
    return (replace(index, kind="inverse"),)


def _is_pointwise(target: OpOverload) -> bool:
    """Also if it works in place: the tag is on the operator that returns its result."""
    name = target._schema.name.partition("::")[2]
    if torch.Tag.pointwise in target.tags:
        return True
    other = getattr(torch.ops.aten, name[:-1], None) if name.endswith("_") else None
    overload = getattr(other, target._overloadname, None)
    return overload is not None and torch.Tag.pointwise in overload.tags


def _equal(left: sympy.Expr, right: sympy.Expr) -> bool:
    return sympy.expand(left - right) == 0


def _quotient(left: sympy.Expr, right: sympy.Expr) -> sympy.Expr:
    """left / right, which must be a whole number at all sizes."""
    found = sympy.cancel(left / right)
    numerator, denominator = found.as_numer_denom()
    if denominator != 1 or not numerator.is_polynomial(*numerator.free_symbols):
        raise Barrier
    return found


_RULES: dict[str, Callable[[Call], Axes]] = {
    **dict.fromkeys(
        (
            "aten.contiguous",
            "aten.clone",
            "aten.dropout",
            "aten.detach",
            "aten.type_as",
        ),
        _same,
    ),
    **dict.fromkeys(
        (
            "aten.softmax",
            "aten._softmax",
            "aten.log_softmax",
            "aten._log_softmax",
            "aten.topk",
            "aten.argsort",
        ),
        _along_other_dims,
    ),
    **dict.fromkeys(
        (
            "aten.mean",
            "aten.sum",
            "aten.amax",
            "aten.amin",
            "aten.argmax",
            "aten.var",
            "aten.std",
            "aten.logsumexp",
            "aten.linalg_vector_norm",
        ),
        _reduction,
    ),
    "aten.layer_norm": _norm,
    "aten.rms_norm": _norm,
    "aten.linear": _linear,
    "aten.matmul": _product("self", "other"),
    "aten.mm": _product("self", "mat2"),
    "aten.bmm": _product("self", "mat2"),
    "aten.addmm": _product("mat1", "mat2", "self"),
    "aten.embedding": _embedding,
    **dict.fromkeys(
        (
            "aten.view",
            "aten.reshape",
            "aten._unsafe_view",
            "aten.flatten",
            "aten.unflatten",
            "aten.unsqueeze",
        ),
        _view,
    ),
    "aten.squeeze": _squeeze,
    "aten.permute": _permute,
    "aten.transpose": _transpose,
    "aten.t": _transpose,
    "aten.expand": _expand,
    "aten.slice": _slice,
    "aten.split": _pieces,
    "aten.split_with_sizes": _pieces,
    "aten.chunk": _pieces,
    "aten.select": _select,
    "aten.unbind": _select,
    "aten.cat": _concatenation,
    "aten.stack": _concatenation,
    **dict.fromkeys(("aten.gather", "aten.scatter", "aten.scatter_"), _gather),
    **dict.fromkeys(("aten.zeros_like", "aten.ones_like", "aten.full_like"), _filled),
    "aten.repeat": _repeat,
    "aten.repeat_interleave": _repeat_interleave,
    **dict.fromkeys(("aten.view_as_complex", "aten.view_as_real"), _complex),
    **dict.fromkeys(("aten.max", "aten.min"), _extreme),
    "aten.to": _to,
    "aten._to_copy": _to,
    "aten.sort": _sort,
    "aten.floor_divide": _floor_divide,
    "aten.index": _index,
    "aten.histc": _counts,
    "aten.cumsum": _cumsum,
    "aten.empty_like": _blank,
    "aten.index_put_": _scatter_positions,
    "aten._grouped_mm": _grouped_product,
    "transformers.grouped_mm_fallback": _grouped_product,
}
