"""How much memory a piece of a captured graph needs, found by running it on tensors without data.

The piece's forward and backward really run, operator by operator and under autograd, on tensors that have
shapes but no memory, while a dispatch mode follows the birth and death of every storage. So views, in-place
operators, what autograd keeps, the order in which it lets go and the sums of gradients are what torch
does, not a model of it. A run takes some 20 us an operator at any size. The peak is piecewise linear and
convex in the sequence length, so it has to be found at the length that is planned for.

What a kernel allocates inside itself does not show; `rpcompile/device_kernels.py` adds that, and replaces
operators whose kernel on the device keeps other tensors than the one that data-free tensors get.
"""

from __future__ import annotations

import copy
import functools
import weakref
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import get_gradient_edge
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rpcompile.device_kernels import Kernels
from rpcompile.sizes import Sizes, symbol

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from rpcompile.ir import Capture

_ADD = torch.ops.aten.add.Tensor


@dataclass(frozen=True)
class Piece:
    """A run of a captured graph's nodes, as a stage runs it.

    Attributes:
        nodes: What runs, in graph order, without what is rematerialised.
        rematerialised: Cheap nodes it needs, in graph order. Their results are not counted as the
            piece's own, since all segments of a stage share them.
        values: Names of the nodes whose values come in.
        gradients_out: The members of `values` whose gradient the piece makes.
        boundary: Names of the nodes whose values go out; empty for the piece that ends with the loss.
        gradients_in: The members of `boundary` whose gradient comes in.
    """

    nodes: tuple[Node, ...]
    rematerialised: tuple[Node, ...]
    values: tuple[str, ...]
    gradients_out: tuple[str, ...]
    boundary: tuple[str, ...]
    gradients_in: tuple[str, ...]


@dataclass(frozen=True)
class PieceMemory:
    """What a piece needs for one microbatch, in bytes.

    Weights, their accumulated gradients, the caller's inputs, the values that come in and the gradients
    that come in are not counted: they have buffers of their own.

    Attributes:
        forward_bytes: Most alive at once in a forward without autograd, the results included.
        saved_bytes: What autograd holds at the end of the forward.
        recompute_bytes: Most alive at once in a forward with autograd.
        training_bytes: Most alive at once in a forward with autograd and the backward behind it, with the
            gradients that go out, and one temporary gradient for each weight that is being added to.
        keeps_value: For each of the piece's `values`, whether autograd holds it.
        keeps_boundary: For each of its `boundary`, whether autograd holds it.
        rematerialised_bytes: The results of rematerialised nodes that its own nodes read.
    """

    forward_bytes: int
    saved_bytes: int
    recompute_bytes: int
    training_bytes: int
    keeps_value: tuple[bool, ...]
    keeps_boundary: tuple[bool, ...]
    rematerialised_bytes: int


class PeakMemory:
    """Runs pieces of one capture at one size, for one kind of device.

    Args:
        capture: The graph.
        bindings: Symbol name -> size of one microbatch.
        kernels: What the device's kernels do differently.
    """

    def __init__(self, capture: Capture, bindings: Mapping[str, int], kernels: Kernels) -> None:
        self.capture, self.kernels, self.bindings = capture, kernels, bindings
        self._sizes = Sizes(capture.graph_module.meta.get("symbols", {}))
        self._numbers = {symbol(name): sympy.Integer(size) for name, size in bindings.items()}
        self._known: dict[sympy.Expr, int] = {}
        self.nodes: dict[str, Node] = {node.name: node for node in capture.graph_module.graph.nodes}
        self._trainable = {spec.placeholder for spec in capture.parameters if spec.trainable}
        _uses_of_own_gradient()  # finds it out here: not possible inside a backward
        # Autocast knows a device's tensors by their device, and none that is only said to be one.
        self.device = kernels.device if capture.autocast is None else "cpu"
        self._fake = FakeTensorMode() if self.device == "cpu" else None

    def of(self, piece: Piece) -> PieceMemory:
        """Runs the piece's forward, and its forward and backward."""
        with self._mode():
            held = _Run(self, piece)
            saved_bytes, keeps_value, keeps_boundary = held.forward()
        return PieceMemory(
            forward_bytes=self._forward(piece).tracker.peak,
            saved_bytes=saved_bytes,
            recompute_bytes=held.tracker.peak,
            training_bytes=self._training(piece).tracker.peak,
            keeps_value=keeps_value,
            keeps_boundary=keeps_boundary,
            rematerialised_bytes=held.rematerialised_bytes,
        )

    def peak_bytes(self, piece: Piece, train: bool) -> int:
        """`PieceMemory.training_bytes` or `forward_bytes` alone."""
        return (self._training(piece) if train else self._forward(piece)).tracker.peak

    def _forward(self, piece: Piece) -> _Run:
        with self._mode():
            run = _Run(self, piece, train=False)
            run.forward()
        return run

    def _training(self, piece: Piece) -> _Run:
        with self._mode():
            run = _Run(self, piece, backward=True)
            run.forward()
            run.backward()
        return run

    def _mode(self) -> ExitStack:
        """Whatever mode the caller is in, e.g. evaluating: this is about training."""
        stack = ExitStack()
        for context in (torch.inference_mode(False), torch.enable_grad(), self._fake or nullcontext()):
            stack.enter_context(context)
        return stack

    def shape(self, tensor: torch.Tensor) -> tuple[int, ...]:
        """Sizes of a captured value at the bindings."""
        return tuple(self._number(size) for size in self._sizes.shape(tensor))

    def nbytes(self, name: str) -> int:
        """Bytes of a captured tensor at the bindings."""
        value = self.nodes[name].meta["val"]
        if not isinstance(value, torch.Tensor):
            return 0
        return functools.reduce(int.__mul__, self.shape(value), value.element_size())

    def key(self, piece: Piece) -> object:
        """Equal for pieces that run the same operators on tensors of the same shapes."""
        number: dict[Node, int] = {}
        lines: list[object] = []
        for node in (*piece.rematerialised, *piece.nodes):
            for source in node.all_input_nodes:
                if source not in number:
                    number[source] = len(number)
                    lines.append(self._role(source, piece))
            number[node] = len(number)
            plain = torch.fx.map_arg((node.args, node.kwargs), lambda arg: f"%{number[arg]}")
            lines.append((node.target, str(plain)))
        own = self.nodes
        ends = tuple((number.get(own[name], -1), name in piece.gradients_in) for name in piece.boundary)
        begins = tuple((number.get(own[name], -1), self.nbytes(name)) for name in piece.values)
        loss = number.get(self.nodes[self.capture.outputs[0]]) if self.capture.outputs else None
        return tuple(lines), len(piece.rematerialised), begins, ends, None if piece.boundary else loss

    def execute(self, node: Node, environment: Mapping[Node, Any]) -> Any:
        """Runs one node."""
        if node.op == "get_attr":
            return self.external(node)
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), environment.__getitem__)
        args, kwargs = _on_device((args, kwargs), self.device)
        if node.op == "call_module":
            return self.capture.graph_module.get_submodule(str(node.target))(*args, **kwargs)
        return self.kernels.call(node.target, args, kwargs)

    # ---------------------------------------------------------------------- tensors without data

    def empty(self, name: str) -> Any:
        """A tensor like a captured value; a parameter that trains has a gradient. Sizes are numbers."""
        value = self.nodes[name].meta["val"]
        if not isinstance(value, torch.Tensor):
            return self._number(self._sizes.size(value))
        tensor = torch.empty(self.shape(value), dtype=value.dtype, device=self.device)
        if name in self._trainable:
            tensor.requires_grad_(True).grad = torch.empty_like(tensor)
        return tensor

    def external(self, node: Node) -> object:
        """What a placeholder or an attribute of the graph stands for: a tensor, a size or a subgraph."""
        if node.op == "get_attr":
            found = functools.reduce(getattr, str(node.target).split("."), self.capture.graph_module)
            return _graph_on_device(found, self.device) if isinstance(found, GraphModule) else found
        size = self.bindings.get(node.name.removeprefix("sym_"))
        return self.empty(node.name) if size is None or not node.name.startswith("sym_") else size

    def _number(self, size: sympy.Expr) -> int:
        if size not in self._known:
            self._known[size] = int(sympy.Integer(size.xreplace(self._numbers)))
        return self._known[size]

    def _role(self, source: Node, piece: Piece) -> object:
        value = source.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return source.op, source.name
        trains = source.name in self._trainable
        return self.shape(value), value.dtype, trains, trains or source.name in piece.gradients_out


class _Run:
    """One run of one piece; `forward` first.

    For a backward, values that come in are leaves, as they are for a stage: autograd takes a gradient that
    goes out as it is, or copies what is part of another tensor or comes from the stage behind. But it holds a
    leaf for the leaf's own sake, so that what it holds for the operators shows only without.
    """

    def __init__(self, memory: PeakMemory, piece: Piece, train: bool = True, backward: bool = False) -> None:
        self._memory, self._piece, self._train, self._backward = memory, piece, train, backward
        self.tracker = StorageTracker(memory.kernels)
        self._environment: dict[Node, Any] = {}
        own = {node.name for node in piece.nodes}
        self._loss = [memory.nodes[name] for name in memory.capture.outputs[:1] if name in own]
        self._hold = [memory.nodes[name] for name in piece.boundary] or self._loss
        self._leaves: list[torch.Tensor] = []  # their gradients are held to the end
        self._roots: list[Any] = []
        self._prepare()

    def _prepare(self) -> None:
        """Everything that is there before the piece's own nodes run."""
        memory, piece, environment = self._memory, self._piece, self._environment
        for name in piece.values:
            environment[memory.nodes[name]] = self._received(name)
        every = (*piece.rematerialised, *piece.nodes)
        for source in dict.fromkeys(source for node in every for source in node.all_input_nodes):
            if source.op in ("placeholder", "get_attr") and source not in environment:
                given = memory.external(source)
                if not self._train and isinstance(given, torch.Tensor):
                    given.requires_grad_(False)  # products of matrices ask for it, whatever the mode
                environment[source] = given
        self.tracker.ignore(environment.values())
        with self._context():
            for node in piece.rematerialised:
                environment[node] = memory.execute(node, environment)
        read = {source for node in piece.nodes for source in node.all_input_nodes}
        shared = [node for node in piece.rematerialised if node in read]
        self.rematerialised_bytes = self.tracker.ignore(environment[node] for node in shared)
        for node in set(piece.rematerialised).difference(shared):
            del environment[node]

    def _received(self, name: str) -> Any:
        """A value that comes in."""
        value = self._memory.empty(name)
        if not self._train or name not in self._piece.gradients_out:
            return value
        if self._backward:
            self._leaves.append(value.requires_grad_(True))
            return value
        return torch.empty_like(value, requires_grad=True).clone()

    def forward(self) -> tuple[int, tuple[bool, ...], tuple[bool, ...]]:
        """Returns what autograd holds behind it: bytes, which values, which of the boundary."""
        memory, piece, environment = self._memory, self._piece, self._environment
        values = [self.tracker.key(environment[memory.nodes[name]]) for name in piece.values]
        last = {source: node for node in piece.nodes for source in (node, *node.all_input_nodes)}
        ends: dict[Node, list[Node]] = {}
        for source, node in last.items():
            if source not in self._hold:
                ends.setdefault(node, []).append(source)
        for source in set(environment) - last.keys() - set(self._hold):
            del environment[source]
        with self.tracker, self._context():
            for node in piece.nodes:
                environment[node] = memory.execute(node, environment)
                for source in ends.get(node, ()):
                    del environment[source]
        boundary = [self.tracker.key(environment[memory.nodes[name]]) for name in piece.boundary]
        wanted = [memory.nodes[name] for name in piece.gradients_in] if piece.boundary else self._loss
        roots = [environment[node] for node in wanted if self._train and environment[node].requires_grad]
        self._roots = [(get_gradient_edge(root), torch.empty_like(root)) for root in roots]
        del roots
        environment.clear()
        alive = self.tracker.numbers
        return self.tracker.live, tuple(k in alive for k in values), tuple(k in alive for k in boundary)

    def backward(self) -> None:
        """Back-propagates; the gradients that go out are held to the end."""
        if not self._roots:
            return
        edges, gradients = zip(*self._roots, strict=True)
        self._roots.clear()
        self.tracker.ignore(gradients)
        with self.tracker:
            torch.autograd.backward(edges, gradients)

    def _context(self) -> ExitStack:
        stack = ExitStack()
        stack.enter_context(torch.set_grad_enabled(self._train))
        autocast = self._memory.capture.autocast
        if autocast is not None:
            stack.enter_context(torch.autocast("cpu", autocast, cache_enabled=False))
        return stack


def _on_device(arguments: Any, device: str) -> Any:
    """The arguments with `device` in place of any that the graph was captured on."""
    here = torch.device(device)
    return map_aggregate(arguments, lambda item: here if isinstance(item, torch.device) else item)


def _graph_on_device(graph: GraphModule, device: str) -> GraphModule:
    graph = copy.deepcopy(graph)
    for node in graph.graph.nodes:
        node.args, node.kwargs = _on_device((node.args, node.kwargs), device)
    graph.recompile()
    return graph


class StorageTracker(TorchDispatchMode):
    """Follows the storages that operators make while it is on.

    Attributes:
        live: Bytes of those that are there now.
        peak: The most there were at once, kernels' workspaces included.
    """

    def __init__(self, kernels: Kernels) -> None:
        super().__init__()
        self._kernels = kernels
        self.live = self.peak = 0
        # Address of a storage -> its number, and the bytes that count. An address is used again.
        self._alive: dict[int, tuple[int, int]] = {}
        self._entered = 0

    @property
    def numbers(self) -> set[int]:
        """Numbers of all storages that are there, `ignore`d ones too."""
        return {number for number, _ in self._alive.values()}

    def key(self, value: object) -> int:
        """The number of a storage that is there, which no other ever has; -1 for what has none."""
        return self._alive[value.untyped_storage()._cdata][0] if isinstance(value, torch.Tensor) else -1

    def ignore(self, values: Iterable[object]) -> int:
        """Counts these tensors as nothing; returns the bytes of those that it did not know."""
        given = [value for value in values if isinstance(value, torch.Tensor)]
        given += [value.grad for value in given if value.is_leaf and value.grad is not None]
        return sum(self._enter(value, counts=False) for value in given)

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _ADD and self._adds_in_place(args):
            return args[0]
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self._enter(value, counts=True)
        extra = self._kernels.workspace_bytes(func, args)
        self.peak = max(self.peak, self.live + extra)
        return result

    def _adds_in_place(self, args: tuple[Any, ...]) -> bool:
        """Whether autograd adds to a gradient that is nobody else's: in place, if no mode looks on."""
        first, second, *rest = args
        return (
            torch._C._current_graph_task_id() != -1
            and not rest
            and isinstance(second, torch.Tensor)
            and first.shape == second.shape
            and first.dtype == second.dtype
            and _uses(first) == _uses_of_own_gradient()
        )

    def _enter(self, tensor: torch.Tensor, counts: bool) -> int:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return 0
        nbytes = self._kernels.allocated(storage.nbytes())
        self._entered += 1
        self._alive[key] = self._entered, nbytes if counts else 0
        self.live += nbytes if counts else 0
        weakref.finalize(storage, self._leave, key).atexit = False
        return nbytes

    def _leave(self, key: int) -> None:
        self.live -= self._alive.pop(key)[1]


def _uses(tensor: torch.Tensor) -> tuple[int, int]:
    storage = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
    return tensor._use_count(), storage  # pyright: ignore[reportAttributeAccessIssue]


@functools.cache
def _uses_of_own_gradient() -> tuple[int, int]:
    """Reference counts that a gradient has while autograd adds to it, if it is nobody else's."""

    class Look(TorchDispatchMode):
        found = (0, 0)

        def __torch_dispatch__(
            self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            if func is _ADD:
                first, _ = args
                self.found = _uses(first)
            return func(*args, **(kwargs or {}))

    with torch.enable_grad():
        leaf = torch.empty(2, device="meta", requires_grad=True)
        value = leaf.exp()
        roots = [value.sin(), value.cos()]
    with Look() as look:
        torch.autograd.backward(roots, [torch.empty_like(root) for root in roots])
    return look.found
