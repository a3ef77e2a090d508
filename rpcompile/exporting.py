"""What torch.export does more than a compiler for large graphs can afford, or less than it needs."""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING
from unittest.mock import patch

from torch.fx import GraphModule
from torch.fx.graph import _Namespace

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def deferred_code() -> Iterator[None]:
    """While it is open, graph modules get no Python code; call `recompile` on those that stay.

    torch.export writes out the whole graph's code after each of its passes, about 30 times,
    and runs none of it.
    """
    with patch.object(GraphModule, "recompile", lambda _: None):
        yield


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
