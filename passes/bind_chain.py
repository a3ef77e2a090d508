"""CostedGraph -> SegmentChain: puts numbers in for the sizes and adds nodes up into segments."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import sympy

from rpcompile.device_kernels import Kernels
from rpcompile.errors import InvalidArgument
from rpcompile.ir import ClassCost, Segment, SegmentChain, TiedWeight
from rpcompile.passes._segment_memory import SegmentMemories
from rpcompile.roofline import Work, node_seconds, seconds
from rpcompile.sizes import Sizes, symbol, tensors

if TYPE_CHECKING:
    from torch.fx import Node

    from rpcompile.ir import CostedGraph, Hardware, NodeCost, TensorSpec


@dataclass(frozen=True)
class BindChain:
    """Prices segments for one microbatch size on one kind of GPU, by roofline.

    `rpcompile/roofline.py` says how; the shares of the peaks that kernels reach come with the hardware.
    Memory is exact, by `rpcompile/peak_memory.py`.

    Args:
        bindings: Symbol name -> size of one microbatch, e.g. {"batch": 4, "sequence": 2048}.
        hardware: The GPU.
        kernels: Of which device the memory is; by default the CPU's for hardware called "cpu", else CUDA's.
    """

    name: ClassVar[str] = "bind-chain"
    bindings: Mapping[str, int]
    hardware: Hardware
    kernels: Kernels | None = None

    def run(self, costed: CostedGraph) -> SegmentChain:
        """Price the segments between `costed.capture.cuts`.

        Rematerialised nodes are charged to the first segment that needs them, though every stage
        runs them: they are cheap.

        Raises:
            InvalidArgument: A size is missing, unknown or out of the captured range.
        """
        _check(self.bindings, costed.capture.symbols)
        kernels = self.kernels or Kernels("cpu" if self.hardware.name == "cpu" else "cuda")
        binder = _Binder(costed, self.bindings, self.hardware)
        binder.memory = SegmentMemories(costed.capture, self.bindings, kernels)
        segments = tuple(binder.segment(index) for index in range(len(costed.capture.cuts) + 1))
        tied, classes = binder.tied(segments), binder.op_classes()
        return SegmentChain(segments, dict(self.bindings), self.hardware, tied, classes)

    def seconds(self, costed: CostedGraph) -> list[tuple[float, float]]:
        """Forward and backward seconds of each segment, as in `run`, and nothing else."""
        binder = _Binder(costed, self.bindings, self.hardware)
        return [binder.seconds(binder.costs(index)) for index in range(len(costed.capture.cuts) + 1)]


def _check(bindings: Mapping[str, int], ranges: Mapping[str, tuple[int, int]]) -> None:
    known = ", ".join(ranges) or "none: every size is fixed"
    for name in bindings:
        if name not in ranges:
            raise InvalidArgument(
                f"size {name!r} is not one that the graph was captured with ({known}); leave it out"
            )
    for name, (low, high) in ranges.items():
        if name not in bindings:
            raise InvalidArgument(f"size {name!r} is missing; give it a value from {low} to {high}")
        if not low <= bindings[name] <= high:
            raise InvalidArgument(
                f"{name}={bindings[name]} is outside the captured range {low} to {high}; "
                "choose a value in the range, or capture the model with a wider one"
            )


class _Evaluator:
    """Numbers for expressions; models repeat the same few hundred expressions thousands of times."""

    def __init__(self, bindings: Mapping[str, int]) -> None:
        self._values = {symbol(name): sympy.Integer(value) for name, value in bindings.items()}
        self._known: dict[sympy.Expr, float] = {}

    def number(self, expression: sympy.Expr) -> float:
        if expression not in self._known:
            self._known[expression] = float(sympy.Float(expression.xreplace(self._values)))
        return self._known[expression]

    def nbytes(self, expression: sympy.Expr) -> int:
        return math.ceil(self.number(expression))


class _Binder:
    """Adds up segments, in order; `memory` is set where their memory is asked for."""

    memory: SegmentMemories

    def __init__(self, costed: CostedGraph, bindings: Mapping[str, int], hardware: Hardware) -> None:
        capture = costed.capture
        self._capture = capture
        self._costs = costed.costs
        self._hardware = hardware
        self._evaluate = _Evaluator(bindings)
        self._sizes = Sizes(capture.graph_module.meta.get("symbols", {}))
        self._nodes: dict[str, Node] = {node.name: node for node in capture.graph_module.graph.nodes}
        self._position = {name: index for index, name in enumerate(self._nodes)}
        self._weights = {spec.placeholder: spec for spec in (*capture.parameters, *capture.buffers)}
        self._parameters = {spec.placeholder for spec in capture.parameters}
        self._inputs = {spec.placeholder: spec for spec in capture.inputs}
        self._charged: set[str] = set()

    def costs(self, index: int) -> list[NodeCost]:
        """Of segment `index`; to be called in order, since rematerialised nodes are charged once."""
        names = self._names(index)
        rematerialised, _ = self._needs(names)
        charged = [*names, *(name for name in rematerialised if name not in self._charged)]
        self._charged.update(rematerialised)
        return [self._costs[name] for name in charged]

    def seconds(self, costs: Sequence[NodeCost]) -> tuple[float, float]:
        """Forward and backward seconds of a segment's nodes."""
        forward_s = seconds((self._forward(cost) for cost in costs), self._hardware)
        return forward_s, seconds((self._backward(cost) for cost in costs), self._hardware)

    def _names(self, index: int) -> tuple[str, ...]:
        order, cuts = self._capture.order, self._capture.cuts
        begin = cuts[index - 1].position if index else 0
        return order[begin : cuts[index].position if index < len(cuts) else len(order)]

    def segment(self, index: int) -> Segment:
        """Segment `index`; to be called in order."""
        capture, cuts = self._capture, self._capture.cuts
        cut = cuts[index] if index < len(cuts) else None
        names = self._names(index)
        _, placeholders = self._needs(names)
        weights = self._distinct(placeholders)
        trainable = [spec for spec in weights if spec.trainable]
        inputs = [name for name in placeholders if name in self._inputs]
        boundary, gradients = (cut.values, cut.gradients) if cut else ((), ())
        costs = self.costs(index)
        forward_s, backward_s = self.seconds(costs)
        memory = self.memory.segment(index)
        return Segment(
            name=cut.name if cut else capture.last_name,
            nodes=names,
            parameters=tuple(spec.name for spec in weights if spec.placeholder in self._parameters),
            inputs=tuple(self._inputs[name].name for name in inputs),
            boundary=boundary,
            boundary_gradients=gradients,
            forward_s=forward_s,
            backward_s=backward_s,
            forward_flops=sum(self._evaluate.number(cost.forward_flops) for cost in costs),
            backward_flops=sum(self._evaluate.number(cost.backward_flops) for cost in costs),
            weight_bytes=sum(spec.nbytes for spec in weights),
            gradient_bytes=sum(spec.nbytes for spec in trainable),
            state_bytes=self._state_bytes(names),
            input_bytes=self._nbytes(inputs),
            boundary_bytes=self._nbytes(boundary),
            boundary_gradient_bytes=self._nbytes(gradients),
            saved_bytes=memory.saved_bytes,
            peak_bytes=memory.peak_bytes,
            needs_backward=bool(trainable) or (index > 0 and bool(cuts[index - 1].gradients)),
            source="estimated",
            forward_peak_bytes=memory.forward_peak_bytes,
            saved_input_bytes=memory.saved_input_bytes,
            rematerialised_bytes=memory.rematerialised_bytes,
        )

    def tied(self, segments: tuple[Segment, ...]) -> tuple[TiedWeight, ...]:
        """The parameters that several segments read, in the order of the capture."""
        tied: dict[str, TiedWeight] = {}
        for spec in self._capture.parameters:
            readers = tuple(i for i, segment in enumerate(segments) if spec.name in segment.parameters)
            if len(readers) > 1:
                gradient_bytes = spec.nbytes if spec.trainable else 0
                tied[spec.name] = TiedWeight(spec.name, readers, spec.nbytes, gradient_bytes)
        return tuple(tied.values())

    def op_classes(self) -> tuple[ClassCost, ...]:
        """Costs by class of operator, each node once, the classes in alphabetical order."""
        works: dict[str, list[tuple[Work, Work]]] = {}
        for name in (*sorted(self._capture.rematerialised), *self._capture.order):
            cost = self._costs[name]
            works.setdefault(cost.op_class, []).append((self._forward(cost), self._backward(cost)))
        return tuple(
            ClassCost(
                op_class,
                *(sum(pair[side].flops for pair in pairs) for side in (0, 1)),
                *(sum(pair[side].nbytes for pair in pairs) for side in (0, 1)),
                *(sum(node_seconds(pair[side], self._hardware) for pair in pairs) for side in (0, 1)),
            )
            for op_class, pairs in sorted(works.items())
        )

    # ---------------------------------------------------------------------- what a segment reads

    def _needs(self, names: Iterable[str]) -> tuple[list[str], list[str]]:
        """The rematerialised nodes and the placeholders that `names` read, directly or through the former.

        Sizes are handed to a stage as numbers: taking the size of a tensor does not read it.
        """
        rematerialised: dict[str, None] = {}
        placeholders: dict[str, None] = {}
        pending = [self._nodes[name] for name in names]
        while pending:
            for source in pending.pop().all_input_nodes:
                if not tensors(source):
                    continue
                if source.op == "placeholder":
                    placeholders[source.name] = None
                elif source.name in self._capture.rematerialised and source.name not in rematerialised:
                    rematerialised[source.name] = None
                    pending.append(source)
        return self._in_graph_order(rematerialised), self._in_graph_order(placeholders)

    def _in_graph_order(self, names: Iterable[str]) -> list[str]:
        return sorted(names, key=self._position.__getitem__)

    def _distinct(self, placeholders: Iterable[str]) -> list[TensorSpec]:
        """The weights among `placeholders`, each tensor once: tied ones share their canonical name."""
        specs = (self._weights[name] for name in placeholders if name in self._weights)
        return list({spec.name: spec for spec in specs}.values())

    # ---------------------------------------------------------------------- sums

    def _nbytes(self, names: Iterable[str]) -> int:
        return sum(self._evaluate.nbytes(self._sizes.nbytes(self._nodes[name])) for name in names)

    def _forward(self, cost: NodeCost) -> Work:
        number = self._evaluate.number
        nbytes = number(cost.read_bytes) + number(cost.write_bytes)
        return Work(cost.op_class, number(cost.forward_flops), nbytes)

    def _backward(self, cost: NodeCost) -> Work:
        number = self._evaluate.number
        nbytes = number(cost.backward_read_bytes) + number(cost.backward_write_bytes)
        return Work(cost.op_class, number(cost.backward_flops), nbytes, backward=True)

    def _state_bytes(self, names: Iterable[str]) -> int:
        inside = set(names)
        changed = {buffer for buffer, node in self._capture.mutations.items() if node in inside}
        return sum(spec.nbytes for spec in self._capture.buffers if spec.name in changed)
