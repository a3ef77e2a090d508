"""Questions that passes ask about a torch.fx graph of ATen operators."""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule, Node

if TYPE_CHECKING:
    from collections.abc import Iterable

GRAD_MODE = torch.ops.higher_order.wrap_with_set_grad_enabled
AUTOCAST = torch.ops.higher_order.wrap_with_autocast
_REGION_ARGUMENT: dict[Any, int] = {GRAD_MODE: 1, AUTOCAST: 4}
_CUTS_GRADIENT = {torch.ops.aten.detach.default, torch.ops.aten.detach_.default}
# These change running statistics in training although their schemas do not say so:
# operator -> (argument that says whether, arguments changed).
_STATISTICS = {
    torch.ops.aten.batch_norm.default: (5, (3, 4)),
    torch.ops.aten.instance_norm.default: (5, (3, 4)),
}
# Composite operators that return their input unchanged in some modes, unannounced by the schema.
_MAY_RETURN_INPUT = {
    torch.ops.aten.dropout.default,
    torch.ops.aten.feature_dropout.default,
    torch.ops.aten.alpha_dropout.default,
    torch.ops.aten.feature_alpha_dropout.default,
}
_DROPOUT_PROBABILITY = {torch.ops.aten.scaled_dot_product_attention.default: 4}


def value_of(node: Node) -> Any:
    """What the node evaluates to, as fake tensors and symbolic ints."""
    return node.meta.get("val")


def is_tensor(node: Node) -> bool:
    return isinstance(value_of(node), torch.Tensor)


def argument(node: Node, index: int, default: Any = None) -> Any:
    """Argument by its position in the operator's schema, however it was passed."""
    if index < len(node.args):
        return node.args[index]
    if isinstance(node.target, torch._ops.OpOverload):
        schema = node.target._schema.arguments
        if index < len(schema):
            return node.kwargs.get(schema[index].name, schema[index].default_value)
    return default


def size_hint(size: int | torch.SymInt) -> int:
    """A size as a number: the example's where it is symbolic."""
    return size if isinstance(size, int) else int(size.node.hint)


def bytes_hint(node: Node) -> int:
    """Bytes of the node's tensor at the example's sizes."""
    value = value_of(node)
    return math.prod(size_hint(size) for size in value.shape) * value.element_size()


def region_of(node: Node) -> tuple[GraphModule, list[Any]] | None:
    """The graph that a no-grad or autocast region runs, with what is passed to it; None for operators."""
    if node.op != "call_function" or node.target not in _REGION_ARGUMENT:
        return None
    index = _REGION_ARGUMENT[node.target]
    module = node.graph.owning_module
    region = node.args[index]
    assert isinstance(module, GraphModule)
    assert isinstance(region, Node)
    graph_module = module.get_submodule(str(region.target))
    assert isinstance(graph_module, GraphModule)
    return graph_module, list(node.args[index + 1 :])


def is_random(node: Node) -> bool:
    """Whether it draws random numbers when it runs."""
    target = node.target
    if (region := region_of(node)) is not None:
        return any(is_random(inner) for inner in region[0].graph.nodes)
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if target in _DROPOUT_PROBABILITY:
        return float(argument(node, _DROPOUT_PROBABILITY[target], 0.0)) > 0.0
    if target in _MAY_RETURN_INPUT:
        return bool(argument(node, 2, False)) and float(argument(node, 1, 0.0)) > 0.0
    return torch.Tag.nondeterministic_seeded in target.tags


def mutated_arguments(node: Node) -> list[Node]:
    """Inputs that the node changes in place."""
    target = node.target
    if (region := region_of(node)) is not None:
        inner = region[0].graph.nodes
        return _passed(region, (changed for item in inner for changed in mutated_arguments(item)))
    if not isinstance(target, torch._ops.OpOverload):
        return []
    changed: list[Node] = []
    if target in _STATISTICS:
        flag, indices = _STATISTICS[target]
        if argument(node, flag, False):
            changed += [arg for index in indices if isinstance(arg := argument(node, index), Node)]
    for index, arg_schema in enumerate(target._schema.arguments):
        if arg_schema.alias_info is not None and arg_schema.alias_info.is_write:
            arg = argument(node, index)
            items = arg if isinstance(arg, list | tuple) else [arg]
            changed += [item for item in items if isinstance(item, Node)]
    return changed


def read_arguments(node: Node) -> list[Node]:
    """Inputs that decide on what the node returns: all but running statistics that it only updates."""
    indices = _STATISTICS[node.target][1] if node.target in _STATISTICS and mutated_arguments(node) else ()  # type: ignore[index]
    skipped = {argument(node, index) for index in indices}
    return [arg for arg in node.all_input_nodes if arg not in skipped]


def aliased_arguments(node: Node) -> list[Node]:
    """Inputs whose storage the node's output may share."""
    target = node.target
    if (region := region_of(node)) is not None:
        output = next(iter(reversed(region[0].graph.nodes)))
        return _passed(region, output.all_input_nodes)
    if target is operator.getitem:
        return [arg for arg in node.args[:1] if isinstance(arg, Node)]
    if not isinstance(target, torch._ops.OpOverload):
        return []
    if target in _MAY_RETURN_INPUT:
        return [arg for arg in node.args[:1] if isinstance(arg, Node)]
    if not any(item.alias_info is not None for item in target._schema.returns):
        return []
    arguments = target._schema.arguments
    aliased = [argument(node, i) for i, arg in enumerate(arguments) if arg.alias_info is not None]
    return [item for item in aliased if isinstance(item, Node)]


def _passed(region: tuple[GraphModule, list[Any]], values: Iterable[Node]) -> list[Node]:
    """The arguments of a region whose storage the given values of its graph share."""
    nodes = region[0].graph.nodes
    inputs = [node for node in nodes if node.op == "placeholder"]
    outer = dict(zip(inputs, region[1], strict=True))
    aliases = AliasSets(nodes)
    shared = (outer.get(aliases.root(value)) for value in values)
    return [item for item in dict.fromkeys(shared) if isinstance(item, Node)]


class AliasSets:
    """Groups of nodes that may share one storage (union-find over view and in-place operators)."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        self._parent: dict[Node, Node] = {}
        for node in nodes:
            for source in aliased_arguments(node):
                self._parent[self.root(node)] = self.root(source)

    def root(self, node: Node) -> Node:
        """The same node for all members of a group; the group's first member in graph order."""
        path: list[Node] = []
        while (parent := self._parent.get(node, node)) is not node:
            path.append(node)
            node = parent
        for item in path:
            self._parent[item] = node
        return node


def gradient_nodes(nodes: Iterable[Node], trainable: set[str]) -> set[Node]:
    """Nodes whose value carries a gradient back to a trainable placeholder.

    Export marks only parameters; this propagates it through the graph the way autograd would.

    Args:
        nodes: The graph's nodes in order.
        trainable: Names of placeholders that require a gradient.
    """
    ordered = list(nodes)
    aliases = AliasSets(ordered)
    live: set[Node] = set()
    changed_roots: set[Node] = set()
    for node in ordered:
        if node.op == "placeholder":
            if node.name in trainable:
                live.add(node)
            continue
        if node.op != "call_function" or node.target in _CUTS_GRADIENT:
            continue
        if node.target is GRAD_MODE and node.args[0] is False:
            continue
        inputs = node.all_input_nodes
        if not any(arg in live or aliases.root(arg) in changed_roots for arg in inputs):
            continue
        if _carries_gradient(value_of(node)):
            live.add(node)
            changed_roots.update(aliases.root(arg) for arg in mutated_arguments(node))
    # A view made before its base took up a gradient carries one when it is read later.
    calls = (node for node in ordered if node.op == "call_function")
    return live | {n for n in calls if aliases.root(n) in changed_roots and _carries_gradient(value_of(n))}


def _carries_gradient(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.dtype.is_floating_point or value.dtype.is_complex
    if isinstance(value, list | tuple):
        return any(_carries_gradient(item) for item in value)
    return False


def module_path(node: Node) -> str:
    """Qualified name of the innermost module whose forward made the node; "" at the root."""
    stack = node.meta.get("nn_module_stack") or {}
    names = [entry[0] for entry in stack.values()]
    return names[-1].removeprefix("L['self'].") if names else ""


def place_of(node: Node) -> str:
    """Where the model's code calls the operator, as further lines of a message: module and source line."""
    lines = [line.strip() for line in str(node.meta.get("stack_trace") or "").splitlines() if line.strip()]
    files = [index for index, line in enumerate(lines) if line.startswith("File ")]
    path = module_path(node)
    return (f"\n  in module {path}" if path else "") + (
        f"\n  at {': '.join(lines[files[-1] : files[-1] + 2])}" if files else ""
    )
