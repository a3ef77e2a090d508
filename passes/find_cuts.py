"""Capture -> Capture: where the graph may be divided, and what crosses there."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from rpcompile.errors import UnsupportedModel
from rpcompile.graphs import (
    AliasSets,
    bytes_hint,
    gradient_nodes,
    is_random,
    is_tensor,
    module_path,
    mutated_arguments,
    read_arguments,
    value_of,
)
from rpcompile.ir import Capture, Cut

_ATEN = torch.ops.aten
_CONTRACTIONS = {
    _ATEN.scaled_dot_product_attention.default,
    _ATEN.matmul.default,
    _ATEN.bmm.default,
    _ATEN.baddbmm.default,
}


@dataclass(frozen=True)
class FindCuts:
    """Finds the cut points worth considering.

    A cut is *legal* if every value that crosses it is a tensor, and no storage that is changed in
    place is alive before and changed after it. Nodes that depend on no parameter, no random number
    and no floating-point input are computed again in every stage and never cross.

    Of the legal cuts the narrowest between two operators that do real work are considered. Bumps
    among them, cuts wider than the nearest ones on both sides (inside an MLP, say), are left out, the
    widest first, unless the segment would then hold more than `largest_bump` operators with weights:
    what is wide over a long stretch, as between the two halves of a UNet or in a decoder that reads
    an encoder, is divided all the same. A segment that then holds more than `largest_share` of the
    parameters is divided further where that is less than twice as wide as its ends.

    Options:
        largest_share: Share of the model's parameters above which a segment is divided further.
        largest_bump: Number of operators with weights above which a segment is never made by
            leaving out wide cuts.
    """

    largest_share: float = 1 / 16
    largest_bump: int = 16
    name = "find-cuts"

    def run(self, capture: Capture) -> Capture:
        """Fills `order`, `rematerialised`, `requires_grad`, `random`, `mutations` and `cuts`.

        Raises:
            UnsupportedModel: A parameter or an input is changed in place, or the loss depends on a
                buffer that the forward changes.
        """
        graph = _Liveness(capture)
        cuts = [graph.cut(position) for position in self._choose(graph)]
        names = graph.segment_names([cut.position for cut in cuts])
        named = tuple(replace(cut, name=name) for cut, name in zip(cuts, names, strict=False))
        return replace(
            capture,
            order=tuple(node.name for node in graph.order),
            rematerialised=frozenset(node.name for node in graph.rematerialised),
            requires_grad=frozenset(node.name for node in graph.gradients),
            random=tuple(node.name for node in graph.order if is_random(node)),
            mutations=graph.buffer_mutations,
            cuts=named,
            last_name=names[-1],
        )

    def _choose(self, graph: _Liveness) -> list[int]:
        candidates = graph.narrowest_between_work()
        widths = {position: graph.width(position) for position in candidates}
        kept = self._without_bumps(graph, candidates, widths)
        total = max(1, graph.weight(0, len(graph.order)))
        bounds = [0, *kept, len(graph.order)]
        chosen: list[int] = []
        for start, end in itertools.pairwise(bounds):
            inner = [position for position in candidates if start < position < end]
            chosen += self._divide(graph, widths, inner, start, end, total)
            chosen.append(end)
        return chosen[:-1]

    def _without_bumps(self, graph: _Liveness, candidates: list[int], widths: dict[int, int]) -> list[int]:
        kept = candidates
        for width in sorted(set(widths.values()), reverse=True):
            runs = [list(run) for _, run in itertools.groupby(kept, key=widths.__getitem__)]
            remaining: list[int] = []
            for index, run in enumerate(runs):
                # Before the first candidate lies the model's input, which no cut can make narrower.
                before = widths[runs[index - 1][0]] if index else math.inf
                after = widths[runs[index + 1][0]] if index + 1 < len(runs) else 0
                start = runs[index - 1][-1] if index else 0
                end = runs[index + 1][0] if index + 1 < len(runs) else len(graph.order)
                is_bump = widths[run[0]] == width and before < width > after
                if not is_bump or graph.weighted(start, end) > self.largest_bump:
                    remaining += run
            kept = remaining
        return kept

    def _divide(
        self, graph: _Liveness, widths: dict[int, int], inner: list[int], start: int, end: int, total: int
    ) -> list[int]:
        if not inner or graph.weight(start, end) <= self.largest_share * total:
            return []
        middle = min(inner, key=lambda position: (widths[position], abs(2 * position - start - end)))
        ends = (widths.get(start, graph.input_bytes), widths.get(end, 0))
        if widths[middle] >= 2 * max(ends):
            return []
        left = [position for position in inner if position < middle]
        right = [position for position in inner if position > middle]
        return [
            *self._divide(graph, widths, left, start, middle, total),
            middle,
            *self._divide(graph, widths, right, middle, end, total),
        ]


class _Liveness:
    """What is alive at each position of the graph's execution order."""

    def __init__(self, capture: Capture) -> None:
        nodes = list(capture.graph_module.graph.nodes)
        self._capture = capture
        self._parameters = {spec.placeholder for spec in capture.parameters}
        trainable = {spec.placeholder for spec in capture.parameters if spec.trainable}
        self.gradients = gradient_nodes(nodes, trainable)
        aliases = AliasSets(nodes)
        mutations = [(node, aliases.root(arg)) for node in nodes for arg in mutated_arguments(node)]
        self.buffer_mutations = self._check_mutations(mutations)
        changed = {root for _, root in mutations}
        self.rematerialised = self._find_rematerialised(nodes, aliases, changed)
        self.order = [n for n in nodes if n.op == "call_function" and n not in self.rematerialised]
        self._position = {node: index for index, node in enumerate(self.order)}
        loss = next(node for node in nodes if node.name == capture.outputs[0])
        self._check_recompute(nodes, aliases, changed, loss)
        self._last_use = self._last_uses(loss)
        self._illegal = self._illegal_positions(aliases, mutations, changed)
        self._crossing = self._sweep()
        floats = [spec for spec in capture.inputs if spec.dtype.startswith(("float", "bfloat"))]
        by_name = {node.name: node for node in nodes}
        self.input_bytes = sum(bytes_hint(by_name[spec.placeholder]) for spec in floats)

    def _check_mutations(self, mutations: list[tuple[Node, Node]]) -> dict[str, str]:
        buffers = {spec.placeholder: spec.name for spec in self._capture.buffers}
        inputs = {spec.placeholder: spec.name for spec in (*self._capture.inputs, *self._capture.parameters)}
        result: dict[str, str] = {}
        for node, root in mutations:
            if root.name in inputs:
                raise UnsupportedModel(
                    f"{self._capture.model_name} changes {inputs[root.name]!r} in place "
                    f"({node.target} in {module_path(node) or 'forward'}); assign a new tensor instead"
                )
            if root.name in buffers:
                result[buffers[root.name]] = node.name
        return result

    def _check_recompute(self, nodes: list[Node], aliases: AliasSets, changed: set[Node], loss: Node) -> None:
        """A stage recomputed in the backward would see another value of a buffer than its forward did."""
        buffers = {spec.placeholder: spec.name for spec in self._capture.buffers}
        source = {root: root.name for root in changed if root.name in buffers}
        if not source:
            return
        for node in nodes:
            tainted = [
                source[aliases.root(arg)] for arg in read_arguments(node) if aliases.root(arg) in source
            ]
            for made in [node, *mutated_arguments(node)] if tainted and node.op != "output" else ():
                source.setdefault(aliases.root(made), tainted[0])
        if (name := source.get(aliases.root(loss))) is not None:
            change = next(n for n in nodes for arg in mutated_arguments(n) if aliases.root(arg).name == name)
            raise UnsupportedModel(
                f"{self._capture.model_name}'s loss depends on the buffer {buffers[name]!r}, which its "
                f"forward changes ({change.target} in {module_path(change) or 'forward'}): recomputed in the "
                f"backward, it would be another one. Change the buffer outside of forward"
            )

    def _find_rematerialised(self, nodes: list[Node], aliases: AliasSets, changed: set[Node]) -> set[Node]:
        buffers = {spec.placeholder for spec in self._capture.buffers}
        whole = {spec.placeholder for spec in self._capture.inputs if "float" not in spec.dtype}
        cheap: set[Node] = set()
        for node in nodes:
            if node.op == "placeholder":
                known = node.name in buffers or node.name in whole or node.name.startswith("sym_")
                if known and node not in changed:
                    cheap.add(node)
            elif node.op == "get_attr":
                cheap.add(node)
            elif node.op == "call_function":
                fixed = not is_random(node) and not mutated_arguments(node)
                if fixed and aliases.root(node) not in changed and set(node.all_input_nodes) <= cheap:
                    cheap.add(node)
        return {node for node in cheap if node.op != "placeholder"}

    def _last_uses(self, loss: Node) -> dict[Node, int]:
        last: dict[Node, int] = {}
        for index, node in enumerate(self.order):
            for source in node.all_input_nodes:
                last[source] = index
        last[loss] = len(self.order)
        return last

    def _illegal_positions(
        self, aliases: AliasSets, mutations: list[tuple[Node, Node]], changed: set[Node]
    ) -> set[int]:
        placeholders = {root for root in changed if root.op == "placeholder"}
        first: dict[Node, int] = {}
        last: dict[Node, int] = {}
        for index, node in enumerate(self.order):
            touched = [aliases.root(node), *(aliases.root(arg) for arg in node.all_input_nodes)]
            for root in touched:
                if root in changed:
                    first.setdefault(root, index)
                    if root in placeholders:
                        last[root] = index
        for node, root in mutations:
            last[root] = max(last.get(root, 0), self._position[node])
        illegal: set[int] = set()
        for root, start in first.items():
            illegal.update(range(start + 1, last[root] + 1))
        return illegal

    def _sweep(self) -> dict[int, tuple[Node, ...]]:
        """Position -> values that cross, for legal positions."""
        crossing: dict[int, tuple[Node, ...]] = {}
        alive: dict[Node, int] = {}
        for index, node in enumerate(self.order[:-1]):
            if self._last_use.get(node, -1) > index:
                alive[node] = self._last_use[node]
            for dead in [item for item, end in alive.items() if end <= index]:
                del alive[dead]
            position = index + 1
            if position not in self._illegal and alive and all(is_tensor(item) for item in alive):
                crossing[position] = tuple(alive)
        return crossing

    def width(self, position: int) -> int:
        """Bytes that cross, at the example's sizes."""
        return sum(bytes_hint(node) for node in self._crossing[position])

    def _works(self, node: Node) -> bool:
        return node.target in _CONTRACTIONS or self._reads_weight(node)

    def _reads_weight(self, node: Node) -> bool:
        return any(arg.name in self._parameters and value_of(arg).ndim >= 2 for arg in node.all_input_nodes)

    def narrowest_between_work(self) -> list[int]:
        """For each gap between two working operators, its narrowest legal position (the last of equals)."""
        work = [index for index, node in enumerate(self.order) if self._works(node)]
        result: list[int] = []
        for start, end in itertools.pairwise(work):
            legal = [position for position in range(start + 1, end + 1) if position in self._crossing]
            if legal:
                result.append(min(legal, key=lambda position: (self.width(position), -position)))
        return result

    def weighted(self, start: int, end: int) -> int:
        """How many of the nodes in [start, end) read a weight of two dimensions or more."""
        return sum(self._reads_weight(node) for node in self.order[start:end])

    def weight(self, start: int, end: int) -> int:
        """Elements of the parameters that the nodes in [start, end) read."""
        read = {
            arg
            for node in self.order[start:end]
            for arg in node.all_input_nodes
            if arg.name in self._parameters
        }
        return sum(value_of(arg).numel() for arg in read)

    def cut(self, position: int) -> Cut:
        values = self._crossing[position]
        gradients = tuple(node.name for node in values if node in self.gradients)
        return Cut(position, "", tuple(node.name for node in values), gradients)

    def segment_names(self, positions: list[int]) -> list[str]:
        """A name a segment: the module that holds all its working operators, made unique."""
        bounds = [0, *positions, len(self.order)]
        names: list[str] = []
        for start, end in itertools.pairwise(bounds):
            nodes = self.order[start:end]
            paths = [module_path(node) for node in nodes if self._works(node)]
            paths = [path for path in paths if path] or [module_path(node) for node in nodes]
            levels = zip(*(path.split(".") for path in paths), strict=False)
            common = itertools.takewhile(lambda level: len(set(level)) == 1, levels)
            name = ".".join(level[0] for level in common) or next((path for path in paths if path), "model")
            names.append(name if name not in names else f"{name}#{names.count(name) + 1}")
        return names
