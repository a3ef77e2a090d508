"""Finds the node of a stage's graph that failed, or that made the first number that is not finite."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Interpreter

from rpcompile.graphs import module_path

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch.fx import GraphModule, Node


def failing_node(error: BaseException, module: GraphModule) -> Node | None:
    """The node that raised, None if it was not one of this graph's (a backward, a compiled graph).

    Args:
        error: What calling `module.forward` raised.
        module: The graph; its code is what the error's traceback goes through.
    """
    code = type(module).forward.__code__
    numbers: Mapping[int, int | None] = getattr(module, "_lineno_map", None) or {}
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code is code:
            first = getattr(module, "_prologue_start", 0) or 0
            number = numbers.get(trace.tb_lineno - first)
            return None if number is None else list(module.graph.nodes)[number]
        trace = trace.tb_next
    return None


def describe(node: Node) -> str:
    """Where a node comes from: its module, its operator and, if known, the line of the model's source."""
    path = module_path(node) or "the model itself"
    source = str(node.meta.get("stack_trace") or "").strip().splitlines()
    line = next((text.strip() for text in reversed(source) if text.lstrip().startswith("File ")), "")
    return f"{path} ({node.target}{', ' + line if line else ''})"


def all_finite(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether every floating-point tensor holds finite numbers only. Waits for a GPU."""
    return all(_finite(tensor) for tensor in tensors.values())


def first_nonfinite(module: GraphModule, arguments: Sequence[Any]) -> str:
    """Runs a graph again, operator by operator, up to the first result that is NaN or +infinite.

    -inf is left out: masks are made of it.

    Returns:
        Where that is, in words.
    """
    for node, value in zip(_placeholders(module), arguments, strict=True):
        if isinstance(value, torch.Tensor) and _broken(value):
            return f"{node.name}, which came in so"
    finder = _Finder(module)
    with torch.no_grad():
        finder.run(*arguments)
    return "an operator that could not be found" if finder.found is None else describe(finder.found)


def first_nonfinite_gradient(run: KeepGradients, gradients: Mapping[str, torch.Tensor]) -> str:
    """Runs a backward and finds the first gradient, from the end, that is not finite.

    Args:
        run: A forward that has been run.
        gradients: Gradients of its outputs by node name.

    Returns:
        Where that is, in words.
    """
    kept = run.kept
    roots = {node.name: value for node, value in kept.items() if node.name in gradients}
    torch.autograd.backward(list(roots.values()), [gradients[name] for name in roots])
    for node, value in reversed(kept.items()):
        if value.grad is not None and not _finite(value.grad):
            if node.name in gradients and not _finite(gradients[node.name]):
                return f"{node.name}, whose gradient came in so"
            users = [user for user in node.users if user.op == "call_function"]
            return f"the backward of {describe(users[-1] if users else node)}"
    return "an operator that could not be found"


class KeepGradients(Interpreter):
    """Runs a graph and keeps every value that a gradient flows through, with its gradient."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.kept: dict[Node, torch.Tensor] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor) and value.requires_grad:
            value.retain_grad()
            self.kept[n] = value
        return value


class _Finder(Interpreter):
    """Remembers the first node whose value is broken."""

    found: Node | None = None

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if self.found is None and n.op == "call_function" and _any_broken(value):
            self.found = n
        return value


def _placeholders(module: GraphModule) -> list[Node]:
    return [node for node in module.graph.nodes if node.op == "placeholder"]


def _finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _broken(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and bool((torch.isnan(tensor) | torch.isposinf(tensor)).any())


def _any_broken(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return _broken(value)
    return isinstance(value, list | tuple) and any(_any_broken(item) for item in value)
