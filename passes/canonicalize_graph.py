"""Capture -> Capture: drops what does nothing, inlines no-grad regions, names sizes by symbol."""

from __future__ import annotations

import copy
import operator
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch.fx import Graph, GraphModule, Node

from rpcompile.graphs import argument, gradient_nodes, is_random, mutated_arguments, value_of
from rpcompile.ir import Capture

_ATEN = torch.ops.aten
_GRAD_MODE = torch.ops.higher_order.wrap_with_set_grad_enabled
_AUTOCAST = torch.ops.higher_order.wrap_with_autocast
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
        wrap_with_set_grad_enabled(False, f, x)    ->  f's operators, where x carries no gradient
        sym_size(input_ids, 0)                     ->  the placeholder `sym_batch`
    """

    name = "canonicalize-graph"

    def run(self, capture: Capture) -> Capture:
        """Returns a capture over a copy of the graph; `capture` is left as it is."""
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
        _name_sizes(graph, module.meta["symbols"])
        _remove_dead(graph)
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
    if node.op != "call_function" or node.target not in (_GRAD_MODE, _AUTOCAST):
        return False
    region_node, arguments = _region(node)
    if node.target is _GRAD_MODE:
        live = gradient_nodes(module.graph.nodes, trainable)
        if node.args[0] is False and any(arg in live for arg in node.all_input_nodes):
            return False
    elif not plain or node.args[2] is not False:
        return False  # changes autocast: stays one operator, which runs under its own context
    region = module.get_submodule(str(region_node.target))
    assert isinstance(region, GraphModule)
    results = _copy_region(module, region, node, arguments)
    for user in list(node.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
        module.graph.erase_node(user)
    module.graph.erase_node(node)
    if not region_node.users:
        module.graph.erase_node(region_node)
    return True


def _region(node: Node) -> tuple[Node, list[Any]]:
    # (enabled, region, *args) and (device_type, dtype, enabled, cache_enabled, region, *args)
    index = 1 if node.target is _GRAD_MODE else 4
    region = node.args[index]
    assert isinstance(region, Node)
    return region, list(node.args[index + 1 :])


def _copy_region(module: GraphModule, region: GraphModule, place: Node, arguments: list[Any]) -> list[Node]:
    values: dict[Node, Any] = {}
    inputs = [node for node in region.graph.nodes if node.op == "placeholder"]
    values.update(zip(inputs, arguments, strict=True))
    results: list[Node] = []
    for inner in region.graph.nodes:
        if inner.op == "output":
            results = [values[item] for item in inner.args[0]]
        elif inner.op == "get_attr":
            name = f"{place.name}_{inner.name}"
            module.add_submodule(name, region.get_submodule(str(inner.target)))
            with module.graph.inserting_before(place):
                values[inner] = module.graph.get_attr(name)
        elif inner.op != "placeholder":
            with module.graph.inserting_before(place):
                values[inner] = module.graph.node_copy(inner, lambda item: values[item])
    return results


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
        if not mutated_arguments(node) or is_random(node):
            graph.erase_node(node)


def _output_names(graph: Graph) -> tuple[str, ...]:
    output = next(node for node in graph.nodes if node.op == "output")
    return tuple(node.name for node in output.args[0] if isinstance(node, Node))
