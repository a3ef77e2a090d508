"""Compares captures node by node, and counts the blocks that were copied instead of traced."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from rpcompile import repeated_blocks
from rpcompile.passes.capture_graph import CaptureGraph, ExampleInputs

if TYPE_CHECKING:
    import pytest
    from torch.fx import GraphModule

    from rpcompile.ir import Capture


def facts(module: GraphModule) -> list[tuple[Any, ...]]:
    """Everything about every node that rpcompile may read, regions included."""
    found: list[tuple[Any, ...]] = []
    for node in module.graph.nodes:
        meta = node.meta
        stack = list(meta.get("nn_module_stack", {}).items())
        arguments = (repr(node.args), repr(node.kwargs))
        value = [_value(leaf) for leaf in pytree.tree_leaves(meta.get("val"))]
        found.append(
            (node.name, node.op, str(node.target), *arguments, value, stack, meta.get("stack_trace"))
        )
        region = getattr(module, str(node.target), None) if node.op == "get_attr" else None
        if isinstance(region, torch.fx.GraphModule):
            found += facts(region)
    return found


def _value(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return repr(leaf)
    sizes = [str(size) for size in (*leaf.shape, *leaf.stride())]
    return (type(leaf), sizes, leaf.dtype, leaf.device, leaf.requires_grad)


def captures(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> tuple[Capture, Capture, list[str]]:
    """The full capture, the one with repeated blocks, and the paths of the blocks that were copied."""
    example = ExampleInputs.of({name: value[:2] for name, value in batch.items()})
    full = CaptureGraph(example, repeat_blocks=False).run(model)
    copied: list[str] = []
    copy = repeated_blocks._copy

    def counted(tracer: Any, trace: Any, call: Any) -> Any:
        copied.append(call.path.removeprefix("_export_root.inner."))
        return copy(tracer, trace, call)

    with monkeypatch.context() as patches:
        patches.setattr(repeated_blocks, "_copy", counted)
        repeated = CaptureGraph(example).run(model)
    return full, repeated, copied


def assert_equal(full: Capture, repeated: Capture) -> None:
    """Same nodes in the same order with the same names, arguments, values, paths and source lines."""
    mine, theirs = facts(repeated.graph_module), facts(full.graph_module)
    for a, b in zip(mine, theirs, strict=True):
        assert a == b
    for field in (
        "parameters",
        "buffers",
        "inputs",
        "outputs",
        "symbols",
        "tied",
        "fingerprint",
        "model_name",
    ):
        assert getattr(repeated, field) == getattr(full, field), field
