"""Capture -> Capture: drops what does nothing, inlines no-grad regions, names sizes by symbol."""

from __future__ import annotations

import copy
import operator
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from rpcompile.errors import UnsupportedModel
from rpcompile.graphs import (
    AUTOCAST,
    GRAD_MODE,
    argument,
    gradient_nodes,
    mutated_arguments,
    place_of,
    region_of,
    value_of,
)
from rpcompile.ir import Capture

_ATEN = torch.ops.aten
_NO_EFFECT = {
    _ATEN._assert_tensor_metadata.default,
    _ATEN._assert_scalar.default,
    _ATEN._assert_async.msg,
    _ATEN.sym_constrain_range.default,
    _ATEN.sym_constrain_range_for_size.default,
}
_CONVERSIONS = {_ATEN.to.dtype, _ATEN.to.dtype_layout, _ATEN.to.device, _ATEN.to.other}


@dataclass(frozen=True)
class CanonicalizeGraph:
    """Leaves a flat graph of operators that compute something.

    Before -> after::

        _assert_tensor_metadata(x, ...)            ->  (gone)
        to(x, float32) of a float32 x; alias(x)    ->  x
        set_(x, x)                                 ->  x
        wrap_with_set_grad_enabled(False, f, x)    ->  f's operators, of detach(x) where x carries a gradient
        sym_size(input_ids, 0)                     ->  the placeholder `sym_batch`
    """

    name = "canonicalize-graph"

    def run(self, capture: Capture) -> Capture:
        """Returns a capture over a copy of the graph; `capture` is left as it is.

        Raises:
            UnsupportedModel: A size depends on the values in a tensor, a gradient is sparse, or the graph
                calls torch.vmap.
        """
        module = copy.copy(capture.graph_module)
        module = GraphModule(module, copy.deepcopy(capture.graph_module.graph))
        module.meta.update(capture.graph_module.meta)
        graph = module.graph
        trainable = {spec.placeholder for spec in capture.parameters if spec.trainable}
        plain = capture.autocast is None
        while any(_inline(module, node, trainable, plain) for node in list(graph.nodes)):
            pass
        for node in list(graph.nodes):
            _drop_if_idle(graph, node, plain)
        for node in graph.nodes:
            region = getattr(module, node.target, None) if node.op == "get_attr" else None
            if isinstance(region, GraphModule):
                setattr(module, node.target, _without_assertions(region))
        _name_sizes(graph, module.meta["symbols"])
        _remove_dead(graph)
        _check_operators(graph, capture.model_name)
        module.recompile()
        renamed = _output_names(graph)
        return replace(capture, graph_module=module, outputs=renamed)


def _drop_if_idle(graph: Graph, node: Node, plain: bool) -> None:
    if node.op != "call_function":
        return
    if node.target in _NO_EFFECT:
        graph.erase_node(node)
    elif node.target is _ATEN.alias.default or _changes_nothing(node, plain):
        source = node.args[0]
        assert isinstance(source, Node)
        node.replace_all_uses_with(source)
        graph.erase_node(node)


def _without_assertions(region: GraphModule) -> GraphModule:
    """A copy of a region that stays one; what it asserts holds only on the device it was captured on."""
    copied = GraphModule(region, copy.deepcopy(region.graph))
    for node in list(copied.graph.nodes):
        if node.target in _NO_EFFECT:
            copied.graph.erase_node(node)
    copied.recompile()
    return copied


def _changes_nothing(node: Node, plain: bool) -> bool:
    if node.target in _CONVERSIONS:
        # Under autocast a dtype depends on the device that the graph runs on.
        return plain and _converts_nothing(node)
    # Removing a parametrization sets a parameter to itself.
    return node.target is _ATEN.set_.source_Tensor and node.args[0] is node.args[1]


def _converts_nothing(node: Node) -> bool:
    source = node.args[0]
    if not isinstance(source, Node) or node.kwargs.get("memory_format") is not None:
        return False
    schema = [arg.name for arg in node.target._schema.arguments]  # type: ignore[union-attr]
    if "copy" in schema and argument(node, schema.index("copy"), False):
        return False
    before, after = value_of(source), value_of(node)
    return (before.dtype, before.device, before.layout) == (after.dtype, after.device, after.layout)


# ------------------------------------------------------------------- no-grad and autocast regions


def _inline(module: GraphModule, node: Node, trainable: set[str], plain: bool) -> bool:
    """Replaces one region node by its operators; False where there is nothing to inline.

    `plain`: the graph does not run under autocast, so that a region without it is nothing special.
    """
    found = region_of(node)
    if found is None:
        return False
    if node.target is AUTOCAST and (not plain or node.args[2] is not False):
        return False  # changes autocast: stays one operator, which runs under its own context
    region, arguments = found
    detached: set[Node] = set()
    if node.target is GRAD_MODE and node.args[0] is False:
        live = gradient_nodes(module.graph.nodes, trainable)
        inputs = [inner for inner in region.graph.nodes if inner.op == "placeholder"]
        detached = {inner for inner, given in zip(inputs, arguments, strict=True) if given in live}
    results = _copy_region(module, region, node, arguments, detached)
    region_node = next(arg for arg in node.all_input_nodes if arg.op == "get_attr")
    for user in list(node.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
        module.graph.erase_node(user)
    module.graph.erase_node(node)
    if not region_node.users:
        module.graph.erase_node(region_node)
    return True


def _copy_region(
    module: GraphModule, region: GraphModule, place: Node, arguments: list[Any], detached: set[Node]
) -> list[Node]:
    """Copies a region's nodes before `place` and returns what they return.

    Args:
        detached: Nodes of a no-grad region that carry a gradient outside of it; its operators read
            them detached. More are added: the results of regions with gradients inside of it.
    """
    graph = module.graph
    inputs = [node for node in region.graph.nodes if node.op == "placeholder"]
    values: dict[Node, Any] = dict(zip(inputs, arguments, strict=True))
    plain: dict[Node, Node] = {}
    without_gradients = place.target is GRAD_MODE and place.args[0] is False

    def read(item: Node) -> Any:
        if item not in detached:
            return values[item]
        if item not in plain:
            plain[item] = graph.call_function(_ATEN.detach.default, (values[item],))
            plain[item].meta = dict(values[item].meta)
        return plain[item]

    for inner in region.graph.nodes:
        if inner.op in ("placeholder", "output"):
            continue
        with graph.inserting_before(place):
            if inner.op == "get_attr":
                name = f"{place.name}_{inner.name}"
                module.add_submodule(name, region.get_submodule(str(inner.target)))
                values[inner] = graph.get_attr(name)
                continue
            inside = without_gradients and inner.target is GRAD_MODE and inner.args[0] is True
            values[inner] = graph.node_copy(inner, values.__getitem__ if inside else read)
        if inside:
            detached.update(inner.users)
    output = next(iter(reversed(region.graph.nodes)))
    return [values[_written_to(item)] for item in output.args[0]]


def _written_to(node: Node) -> Node:
    """What an in-place operator returns is its own argument, and carries the gradient that this has."""
    while isinstance(node.target, torch._ops.OpOverload) and isinstance(first := argument(node, 0), Node):
        returns = node.target._schema.returns
        if not returns or returns[0].alias_info is None or not returns[0].alias_info.is_write:
            break
        node = first
    return node


# ------------------------------------------------------------------- sizes


def _name_sizes(graph: Graph, symbols: dict[str, str]) -> None:
    """Computes every symbolic int from one placeholder a symbol instead of from a tensor."""
    first = next(iter(graph.nodes))
    with graph.inserting_before(first):
        sources = {text: graph.placeholder(f"sym_{name}") for name, text in symbols.items()}
    for node in list(graph.nodes):
        value = value_of(node)
        if node.op != "call_function" or not isinstance(value, torch.SymInt):
            continue
        with graph.inserting_before(node):
            replacement = _emit(graph, value.node.expr, sources)
        if replacement is not None:
            node.replace_all_uses_with(replacement)  # type: ignore[arg-type]
            graph.erase_node(node)
    for text, source in sources.items():
        source.meta["symbol"] = text


def _emit(graph: Graph, expression: sympy.Expr, sources: dict[str, Node]) -> Node | int | None:
    """Nodes that compute `expression`, None where it uses more than + * // on known symbols."""
    if isinstance(expression, sympy.Integer):
        return int(expression)
    if isinstance(expression, sympy.Symbol):
        return sources.get(str(expression))
    functions: dict[str, Any] = {"Add": operator.add, "Mul": operator.mul, "FloorDiv": operator.floordiv}
    function = functions.get(type(expression).__name__)
    operands = [_emit(graph, arg, sources) for arg in expression.args]  # type: ignore[arg-type]
    if function is None or any(operand is None for operand in operands):
        return None
    result = operands[0]
    for operand in operands[1:]:
        result = graph.call_function(function, (result, operand))
    return result


def _remove_dead(graph: Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if node.op in ("placeholder", "output") or node.users:
            continue
        if not mutated_arguments(node):
            graph.erase_node(node)


def _check_operators(graph: Graph, model_name: str) -> None:
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        schema = getattr(node.target, "_schema", None)
        for index, parameter in enumerate(schema.arguments if schema else ()):
            if parameter.name == "sparse" and argument(node, index, False):
                raise UnsupportedModel(
                    f"{model_name} asks {node.target} for a sparse gradient, which stages cannot send"
                    f"{place_of(node)}\n  Make the embedding with sparse=False."
                )
        if getattr(node.target, "__module__", "") == "torch._functorch.predispatch":
            raise UnsupportedModel(
                f"{model_name} calls torch.vmap, which torch.export leaves in pieces that do not run alone"
                f"{place_of(node)}\n  Write it with operators that take the whole batch."
            )
        for value in pytree.tree_leaves(value_of(node)):
            sizes = value.shape if isinstance(value, torch.Tensor) else ()
            if any(isinstance(size, torch.SymInt) and free_unbacked_symbols(size) for size in sizes):
                raise UnsupportedModel(
                    f"{model_name} makes a tensor whose size depends on values: {node.target} returns "
                    f"{tuple(sizes)}{place_of(node)}\n  Keep the size: multiply by a mask or use torch.where "
                    f"instead of selecting elements."
                )


def _output_names(graph: Graph) -> tuple[str, ...]:
    output = next(node for node in graph.nodes if node.op == "output")
    return tuple(node.name for node in output.args[0] if isinstance(node, Node))
