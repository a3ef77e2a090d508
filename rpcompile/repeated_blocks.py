"""Traces each distinct block of a model once and copies its nodes for the blocks that do the same.

While torch.export traces the model, the forward of every block (a child of a ModuleList or
Sequential with siblings of its class) passes through `_Blocks`. The model around the blocks is
traced as always, so whatever it does between and with them is seen. A call is *the same* as an
earlier one if the blocks' descriptions (`module_identity`) and those of the arguments are equal.
Two such calls are traced and their nodes compared; from then on the nodes are copied, with the
block's own parameters and module paths, under the names that tracing would have given them.
What cannot be compared, changes the block's attributes, or reads its number is traced.

Sizes are one number in the whole graph, however they are worked out: copies read those of the blocks that
they are copies of (`exporting.share_sizes` makes that the rule).
The nodes' `val` is shared with those that they are copies of, and so is `torch_fn`, the running
number of the call; everything else is as torch.export makes it.
"""

from __future__ import annotations

import functools
import logging
import re
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import nn
from torch.fx import Node, Proxy
from torch.fx.experimental import proxy_tensor
from torch.fx.node import map_arg
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from rpcompile.module_identity import (
    Indescribable,
    describe_module,
    describe_tensor,
    noticed_reads,
    own_tensors,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

SMALLEST_RUN = 3
_log = logging.getLogger("rpcompile")
_PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device)
_SIZES = (bool, int, float, torch.SymInt, torch.SymBool, torch.SymFloat)
_CONTAINERS = (None, tuple, list, dict)


# Of torch's internals; they may move from one version to the next.
_PRIVATE = (
    "_ModuleStackTracer",
    "_ProxyTensor",
    "disable_proxy_modes_tracing",
    "get_proxy_mode",
    "get_proxy_slot",
    "set_proxy_slot",
    "track_tensor_tree",
)


@dataclass
class Interference:
    """Whether tracing was anything else than the model's own: if it fails, a full export may not."""

    possible: bool = False


@contextmanager
def repeated_blocks(model: nn.Module) -> Iterator[Interference]:
    """While it is open, torch.export (not strict) of `model` copies repeated blocks.

    The classes of the blocks have another `forward` meanwhile; the modules are left alone. With a
    torch that lacks one of the internals that this needs, every block is traced.
    """
    interference = Interference()
    missing = [name for name in _PRIVATE if not hasattr(proxy_tensor, name)]
    if missing:
        _log.warning(
            "every block is traced, which takes longer: torch %s has no proxy_tensor.%s",
            torch.__version__,
            missing[0],
        )
        yield interference
        return
    blocks = list(_candidates(model))
    calls = _Blocks(blocks, interference)
    with ExitStack() as stack:
        for kind in dict.fromkeys(type(block) for block in blocks):
            stack.enter_context(patch.object(kind, "forward", calls.intercept(kind.forward)))
        yield interference


def _candidates(model: nn.Module) -> Iterator[nn.Module]:
    for container in model.modules():
        if not isinstance(container, nn.ModuleList | nn.Sequential):
            continue
        kinds = Counter(type(child) for child in container)
        for child in container:
            if kinds[type(child)] >= SMALLEST_RUN and next(child.children(), None) is not None:
                yield child


@dataclass(frozen=True)
class _Call:
    """One call of a block.

    Attributes:
        block: The block.
        path: Its path, as the tracer has it.
        stack: The tracer's module stack at entry, the block last.
        leaves: The arguments, flat.
        tensors: Role ("argument 0", or the name of an own parameter or buffer) -> tensor.
        roles: Node -> the roles that it stands for.
        key: Equal for calls that are the same.
        unread: Attributes that may differ and so must not be read.
    """

    block: nn.Module
    path: str
    stack: dict[str, tuple[str, str]]
    leaves: list[Any]
    tensors: dict[str, torch.Tensor]
    roles: dict[Node, list[str]]
    key: Hashable
    unread: tuple[tuple[nn.Module, str], ...]


@dataclass(frozen=True)
class _Result:
    """One leaf of what a block returns: an argument, a constant, or a new tensor made by `node`."""

    argument: int | None = None
    constant: Any = None
    node: Node | None = None
    sizes: tuple[Any, Any] = ((), ())
    options: tuple[Any, ...] = ()
    requires_grad: bool = False


@dataclass(frozen=True)
class _Trace:
    """The nodes that one call made.

    Attributes:
        call: The call.
        nodes: In order, without those of sizes.
        paths: Per node, the module stack below the block, relative to its path.
        results: What it returned, flat.
        spec: How that is put together.
        changed: Role -> the node that stands for the tensor from now on: an operator that changes it in
            place, or returns it as it is (`to` with its own dtype).
        calls: Module below the block -> number of times it was called.
    """

    call: _Call
    nodes: tuple[Node, ...]
    paths: tuple[tuple[tuple[str, str, str], ...], ...]
    results: tuple[_Result, ...]
    spec: pytree.TreeSpec
    changed: dict[str, Node]
    calls: dict[str, int]


class _Blocks:
    """What is known about the calls of one export."""

    def __init__(self, blocks: list[nn.Module], interference: Interference) -> None:
        self._interference = interference
        # torch.export may call a block through a proxy, which shares the block's dictionary.
        self._blocks = {id(vars(block)): block for block in blocks}
        self._traced: dict[Hashable, _Trace] = {}
        self._proved: set[Hashable] = set()
        self._refused: set[Hashable] = set()

    def intercept(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """The forward that stands in for a block class's own."""

        @functools.wraps(original)
        def call_block(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            block = self._blocks.get(id(vars(module)))
            mode = proxy_tensor.get_proxy_mode()
            tracer = None if mode is None else mode.tracer
            if block is None or not isinstance(tracer, proxy_tensor._ModuleStackTracer):
                return original(module, *args, **kwargs)
            return self._call(tracer, block, module, original, args, kwargs)

        return call_block

    def _call(
        self,
        tracer: proxy_tensor._ModuleStackTracer,
        block: nn.Module,
        module: nn.Module,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        # Export counts and inspects every look at a tensor; ours are not the model's.
        with torch._C.DisableTorchFunction(), self._noted():
            try:
                call = _entered(tracer, block, module, args, kwargs)
            except Indescribable:
                call = None
            if call is not None and call.key in self._proved:
                self._interference.possible = True
                return _copy(tracer, self._traced[call.key], call)
        if call is None or call.key in self._refused:
            return original(module, *args, **kwargs)
        start = tracer.graph._root.prev
        with noticed_reads(call.unread) as read:
            output = original(module, *args, **kwargs)
        with torch._C.DisableTorchFunction(), self._noted():
            self._learn(tracer, call, start, output, read)
        return output

    @contextmanager
    def _noted(self) -> Iterator[None]:
        try:
            yield
        except Exception:
            self._interference.possible = True
            raise

    def _learn(
        self, tracer: proxy_tensor._ModuleStackTracer, call: _Call, start: Node, output: Any, read: list[str]
    ) -> None:
        try:
            _check_unchanged(call, read)
            trace = _traced(tracer, call, start, output)
        except Indescribable:
            self._refused.add(call.key)
            return
        earlier = self._traced.get(call.key)
        if earlier is not None and _same(earlier, trace):
            self._proved.add(call.key)
        self._traced[call.key] = trace


# ------------------------------------------------------------------- describing a call


def _entered(
    tracer: proxy_tensor._ModuleStackTracer,
    block: nn.Module,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Any,
) -> _Call:
    """Raises Indescribable where the call cannot be compared with others."""
    path = next(reversed(tracer.module_stack.values()))[0]
    if path != _path(tracer, module) or any(_calls_below(tracer, path, block).values()):
        raise Indescribable("not the first call, or not through the module")
    leaves, spec = pytree.tree_flatten((args, kwargs))
    if not _is_plain(spec):
        raise Indescribable("arguments in containers of other classes")
    own = own_tensors(block)
    tensors = {f"argument {i}": leaf for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)}
    tensors.update(own)
    roles: dict[Node, list[str]] = {}
    for role, tensor in tensors.items():
        roles.setdefault(_node(tracer, tensor), []).append(role)
    description = describe_module(block, path)
    key = (
        description.value,
        tracer,
        str(spec),
        tuple(_leaf(leaf) for leaf in leaves),
        tuple(tuple(names) for names in roles.values()),
        torch.is_grad_enabled(),
        _autocast_state(),
    )
    return _Call(block, path, _named_stack(tracer), leaves, tensors, roles, key, description.unread)


def _path(tracer: proxy_tensor._ModuleStackTracer, module: nn.Module) -> str | None:
    try:
        return tracer.path_of_module(module)
    except NameError:
        return None


def _calls_below(tracer: proxy_tensor._ModuleStackTracer, path: str, block: nn.Module) -> dict[str, int]:
    """How often each module below the block was called; the block itself ("") without this call."""
    names = [name for name, _ in block.named_modules(remove_duplicate=False)]
    counts = {name: tracer.num_calls.get(f"{path}.{name}" if name else path, 0) for name in names}
    counts[""] -= 1
    return counts


def _named_stack(tracer: proxy_tensor._ModuleStackTracer) -> dict[str, tuple[str, str]]:
    return {
        key: (path, kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}")
        for key, (path, kind) in tracer.module_stack.items()
    }


def _is_plain(spec: pytree.TreeSpec) -> bool:
    return spec.type in _CONTAINERS and all(_is_plain(child) for child in spec.children())


def _node(tracer: proxy_tensor._ModuleStackTracer, tensor: torch.Tensor) -> Node:
    slot = proxy_tensor.get_proxy_slot(tensor, tracer, None)
    if slot is None or slot.constant is not None:
        raise Indescribable("a tensor that is a constant of the graph")
    return slot.proxy.node


def _leaf(leaf: Any) -> Hashable:
    if isinstance(leaf, torch.Tensor):
        return describe_tensor(leaf)
    if isinstance(leaf, torch.SymInt):
        return (torch.SymInt, id(leaf.node))
    if isinstance(leaf, _PLAIN):
        return (type(leaf), repr(leaf))
    raise Indescribable(f"an argument of class {type(leaf).__name__}")


def _autocast_state() -> Hashable:
    return tuple(
        (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        for device in ("cpu", "cuda")
    )


# ------------------------------------------------------------------- tracing a call


def _check_unchanged(call: _Call, read: list[str]) -> None:
    """Raises Indescribable if the call left more behind than its nodes, or read what may differ."""
    if read:
        raise Indescribable(f"it reads {read[0]!r}")
    own = own_tensors(call.block)
    description, _, _, leaves, *_ = call.key  # type: ignore[misc]
    replaced = any(tensor is not call.tensors.get(name) for name, tensor in own.items())
    if replaced or describe_module(call.block, call.path).value != description:
        raise Indescribable("it changes the module's attributes")
    if tuple(_leaf(leaf) for leaf in call.leaves) != leaves:
        raise Indescribable("it changes an argument")


def _traced(tracer: proxy_tensor._ModuleStackTracer, call: _Call, start: Node, output: Any) -> _Trace:
    """Raises Indescribable where the nodes cannot be copied."""
    nodes: list[Node] = []
    while (following := (nodes[-1] if nodes else start).next) is not tracer.graph._root:
        nodes.append(following)
    if any(node.op != "call_function" or "unbacked_bindings" in node.meta for node in nodes):
        raise Indescribable("it holds a constant, or sizes that depend on data")
    nodes = [node for node in nodes if not _is_size(node)]
    made = set(nodes)
    for node in nodes:
        outside = [arg for arg in node.all_input_nodes if arg not in made and arg not in call.roles]
        if not all(_is_size(arg) for arg in outside):
            raise Indescribable(f"{node.target} reads a tensor that is not passed to the block")
    after = {role: _node(tracer, tensor) for role, tensor in call.tensors.items()}
    changed = {role: node for role, node in after.items() if role not in call.roles.get(node, ())}
    leaves, spec = pytree.tree_flatten(output)
    if not _is_plain(spec) or not made.issuperset(changed.values()):
        raise Indescribable("results in containers of other classes")
    return _Trace(
        call=call,
        nodes=tuple(nodes),
        paths=tuple(_relative(node, call) for node in nodes),
        results=_results(tracer, call, made, leaves),
        spec=spec,
        changed=changed,
        calls=_calls_below(tracer, call.path, call.block),
    )


def _is_size(node: Node) -> bool:
    return isinstance(node.meta.get("val"), _SIZES)


def _relative(node: Node, call: _Call) -> tuple[tuple[str, str, str], ...]:
    stack = list(node.meta.get("nn_module_stack", {}).items())
    depth = len(call.stack)
    if stack[:depth] != list(call.stack.items()):
        raise Indescribable(f"{node.name} was made outside of the block")
    below: list[tuple[str, str, str]] = []
    for key, (path, kind) in stack[depth:]:
        if not (key.startswith(call.path + ".") and path.startswith(call.path + ".")):
            raise Indescribable(f"{path} is not below the block")
        below.append((key.removeprefix(call.path), path.removeprefix(call.path), kind))
    return tuple(below)


def _results(
    tracer: proxy_tensor._ModuleStackTracer, call: _Call, made: set[Node], leaves: list[Any]
) -> tuple[_Result, ...]:
    arguments = {id(leaf): i for i, leaf in enumerate(call.leaves) if isinstance(leaf, torch.Tensor)}
    storages = {StorageWeakRef(tensor.untyped_storage()) for tensor in call.tensors.values()}
    results: list[_Result] = []
    for leaf in leaves:
        if not isinstance(leaf, torch.Tensor):
            if not isinstance(leaf, _PLAIN):
                raise Indescribable(f"it returns a {type(leaf).__name__}")
            results.append(_Result(constant=leaf))
        elif id(leaf) in arguments:
            results.append(_Result(argument=arguments[id(leaf)]))
        else:
            storage = StorageWeakRef(leaf.untyped_storage())
            node = _node(tracer, leaf)
            if storage in storages or node not in made:
                raise Indescribable("what it returns shares memory with something else")
            storages.add(storage)
            sizes = (tuple(leaf.shape), tuple(leaf.stride()))
            results.append(
                _Result(
                    node=node,
                    sizes=sizes,
                    options=(leaf.dtype, leaf.device),
                    requires_grad=leaf.requires_grad,
                )
            )
    return tuple(results)


def _same(first: _Trace, second: _Trace) -> bool:
    """Whether the calls made the same nodes, each from its own tensors."""
    mapping = dict(zip(first.call.roles, second.call.roles, strict=True))
    if len(first.nodes) != len(second.nodes) or (first.paths, first.calls) != (second.paths, second.calls):
        return False
    for a, b in zip(first.nodes, second.nodes, strict=True):
        mine = map_arg((a.args, a.kwargs), lambda node: _size(node) or mapping.get(node, node))
        theirs = map_arg((b.args, b.kwargs), lambda node: _size(node) or node)
        if a.target is not b.target or repr(mine) != repr(theirs):
            return False
        if _values(a) != _values(b):
            return False
        mapping[a] = b
    if {name: mapping[node] for name, node in first.changed.items()} != second.changed:
        return False
    return first.spec == second.spec and all(
        (a.argument, repr(a.constant), None if a.node is None else mapping[a.node], a.requires_grad)
        == (b.argument, repr(b.constant), b.node, b.requires_grad)
        for a, b in zip(first.results, second.results, strict=True)
    )


def _size(node: Node) -> str | None:
    return str(node.meta["val"]) if _is_size(node) else None


def _values(node: Node) -> list[Hashable]:
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return [describe_tensor(leaf) if isinstance(leaf, torch.Tensor) else repr(leaf) for leaf in leaves]


# ------------------------------------------------------------------- copying


def _copy(tracer: proxy_tensor._ModuleStackTracer, trace: _Trace, call: _Call) -> Any:
    """Appends the trace's nodes for another call, and returns what that call returns."""
    graph = tracer.graph
    mapping = dict(zip(trace.call.roles, call.roles, strict=True))
    for node, below in zip(trace.nodes, trace.paths, strict=True):
        args, kwargs = map_arg((node.args, node.kwargs), lambda item: mapping.get(item, item))
        # Without its number it is the name that the tracer asked for, and the graph numbers it anew.
        copied = graph.create_node(node.op, node.target, args, kwargs, re.sub(r"_\d+$", "", node.name))
        stack = {call.path + key: (call.path + path, kind) for key, path, kind in below}
        copied.meta = {**node.meta, "nn_module_stack": {**call.stack, **stack}}
        mapping[node] = copied
    for name, count in trace.calls.items():
        tracer.num_calls[f"{call.path}.{name}" if name else call.path] = count + (not name)
    for role, node in trace.changed.items():
        proxy_tensor.set_proxy_slot(
            call.tensors[role], tracer, proxy_tensor._ProxyTensor(Proxy(mapping[node], tracer), None)
        )
    results = [_result(tracer, result, call, mapping) for result in trace.results]
    return pytree.tree_unflatten(results, trace.spec)


def _result(
    tracer: proxy_tensor._ModuleStackTracer, result: _Result, call: _Call, mapping: dict[Node, Node]
) -> Any:
    if result.argument is not None:
        return call.leaves[result.argument]
    if result.node is None:
        return result.constant
    dtype, device = result.options
    with proxy_tensor.disable_proxy_modes_tracing():
        tensor = torch.empty_strided(*result.sizes, dtype=dtype, device=device)
        if result.requires_grad:
            # Adding in place keeps the strides, and makes it no leaf: it may be changed in place.
            tensor.add_(torch.zeros((), dtype=dtype, device=device, requires_grad=True))
    return proxy_tensor.track_tensor_tree(
        tensor, Proxy(mapping[result.node], tracer), constant=None, tracer=tracer
    )
