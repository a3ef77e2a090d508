"""`torch.compile` of stage graphs, each distinct one once."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from rpcompile.exporting import EXPORT_LOCK
from rpcompile.tiling import TiledRegion

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class CompiledStage:
    """A compiled graph.

    Args:
        call: The compiled callable.
    """

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call
        self._warm: set[object] = set()

    @contextmanager
    def warming(self, use: object) -> Iterator[None]:
        """Around each use; the first one of its kind (pass, sizes), which compiles, runs alone."""
        if use in self._warm:
            yield
            return
        # Stages run on many threads, the compiler on one at a time; and not beside an optimizer's update.
        with EXPORT_LOCK:
            yield
            self._warm.add(use)


class CompiledStages:
    """Compiled graphs by what they do; stages that differ only in names share one.

    Args:
        backend: A backend of `torch.compile`.
    """

    def __init__(self, backend: str = "inductor") -> None:
        self._backend = backend
        self._stages: dict[str, CompiledStage] = {}

    def __len__(self) -> int:
        """How many distinct graphs there are."""
        return len(self._stages)

    def of(self, module: GraphModule) -> CompiledStage:
        """The compiled graph that does what `module` does."""
        key = structure(module)
        if key not in self._stages:
            call = torch.compile(module, backend=self._backend, dynamic=False)
            self._stages[key] = CompiledStage(call)
        return self._stages[key]


def structure(module: GraphModule) -> str:
    """A graph's operators and arguments, nodes by number; equal for graphs that do the same."""
    numbers: dict[Node, str] = {}
    lines: list[str] = []
    for node in module.graph.nodes:
        numbers[node] = f"%{len(numbers)}"
        arguments = map_arg((node.args, node.kwargs), lambda arg: _Text(numbers[arg]))
        target = "" if node.op in ("placeholder", "output") else str(node.target)
        if node.op == "get_attr":
            value = module.get_submodule(target) if hasattr(module, target) else None
            target = structure(value) if isinstance(value, GraphModule) else f"{id(module)}.{target}"
        if node.op == "call_module":
            region = module.get_submodule(target)
            assert isinstance(region, TiledRegion)
            target = f"{region.places} {structure(region.graph_module)}"
        lines.append(f"{node.op} {target} {arguments}")
    return "\n".join(lines)


class _Text(str):
    """Printed without quotes, unlike a string among the arguments."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)
