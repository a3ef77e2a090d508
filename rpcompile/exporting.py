"""What torch.export does more than a compiler for large graphs can afford, or less than it needs."""

from __future__ import annotations

import re
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING
from unittest.mock import patch

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import _Namespace

if TYPE_CHECKING:
    from collections.abc import Iterator

    import sympy

EXPORT_LOCK = threading.Lock()
"""Held while a model is exported or a stage compiled, and while an optimizer steps on another thread: tracing
sets a flag of the whole process (`torch.compiler.is_compiling`), by which optimizers other than fused ones
compute with tensors instead of floats and round differently. The flag cannot be hidden from one thread, so
`Compiled.step` asks callers not to trace anything of their own meanwhile."""


@contextmanager
def deferred_code() -> Iterator[None]:
    """While it is open, graph modules get no Python code; call `recompile` on those that stay.

    torch.export writes out the whole graph's code after each of its passes, about 30 times,
    and runs none of it. Other threads' graph modules get their code.
    """
    own, recompile = threading.get_ident(), GraphModule.recompile

    def deferred(module: GraphModule) -> object:
        return None if threading.get_ident() == own else recompile(module)

    with patch.object(GraphModule, "recompile", deferred):
        yield


def share_sizes(graph: Graph) -> None:
    """Works out every symbolic size once, from the inputs, where it is first needed.

    Before -> after::

        size = sym_size(view_7, 0); size_1 = sym_size(add_9, 0)  ->  size = sym_size(input_ids, 0)

    From which tensor torch.export reads a size depends on what it has cached.
    """
    sources: dict[sympy.Expr, tuple[Node, int]] = {}
    first: dict[sympy.Expr, Node] = {}
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, torch.Tensor):
            for dim, size in enumerate(value.shape):
                if isinstance(size, torch.SymInt):
                    sources.setdefault(size.node.expr, (node, dim))
        if node.op != "call_function" or not isinstance(value, torch.SymInt):
            continue
        expression = value.node.expr
        if expression in first:
            node.replace_all_uses_with(first[expression])
            graph.erase_node(node)
            continue
        first[expression] = node
        if expression in sources:
            node.target, node.args = torch.ops.aten.sym_size.int, sources[expression]


def renumber_nodes(module: GraphModule) -> None:
    """Numbers the nodes of each name in graph order, from one and without gaps, regions included.

    While tracing, numbers are also given to sizes that turn out not to be needed. How many there are
    depends on torch's caches, that is on what the process has traced before: `mul_55` in one process
    would be `mul_63` in another, and a plan names its nodes.

    Args:
        module: The exported graph; the names of its placeholders stay.
    """
    names = _Namespace()
    for node in module.graph.nodes:
        if node.op == "placeholder":
            names.create_name(node.name, node)
    _renumber(module, names, inner=False)


def _renumber(module: GraphModule, names: _Namespace, inner: bool) -> None:
    for node in module.graph.nodes:
        if node.op == "get_attr":
            region = getattr(module, str(node.target), None)
            if isinstance(region, GraphModule):
                _renumber(region, names, inner=True)
        if inner or node.op not in ("placeholder", "output"):
            node.name = names.create_name(re.sub(r"_\d+$", "", node.name), node)
    module.graph._graph_namespace = names
