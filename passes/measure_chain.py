"""SegmentChain -> SegmentChain: times each distinct segment on a device."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from types import FunctionType
from typing import TYPE_CHECKING, ClassVar, Protocol

import sympy
import torch
from torch.fx import GraphModule, Node
from tqdm import tqdm

from rpcompile.errors import ExecutionError
from rpcompile.files import cache_folder, write_in_one_step
from rpcompile.ir import Capture, Partition, SegmentChain, Stage, StageGraph, StageKind
from rpcompile.passes.extract_stages import ExtractStages
from rpcompile.random_streams import seeded
from rpcompile.sizes import Sizes, symbol

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

Tensors = dict[str, torch.Tensor]


class Timer(Protocol):
    """What runs the stages: `rpcompile.runtime.stopwatch.Stopwatch`, which documents the methods."""

    def machine(self) -> dict[str, str]: ...

    def seconds(
        self,
        graph: StageGraph,
        loss: str,
        weights: Tensors,
        inputs: Tensors,
        values: Tensors,
        gradients: Tensors,
        sizes: Mapping[str, int],
    ) -> float: ...


@dataclass(frozen=True)
class MeasureChain:
    """Replaces a chain's seconds by measured ones.

    A segment runs alone on made-up tensors of the right shapes, so the model may be on the meta device.
    Its forward is timed without autograd; its backward is the difference between recompute with backward
    and that forward. The part of a forward that is attention stays as it was estimated. Segments that run
    the same operators on the same shapes are timed once, and once for all on one machine: times are kept on
    disk.

    Args:
        capture: The graph that the chain's segments are of.
        timer: Runs and times stages.
        cache: Folder for times, `$XDG_CACHE_HOME/rpcompile/measurements` by default.
        progress: Show a progress bar behind two seconds; default: if standard error is a terminal.
    """

    name: ClassVar[str] = "measure-chain"
    capture: Capture
    timer: Timer
    cache: Path | None = None
    progress: bool | None = None

    def run(self, chain: SegmentChain) -> SegmentChain:
        """Measure at the sizes that `chain` is bound to.

        Returns:
            The chain with other `forward_s` and `backward_s`, whose source is "measured".

        Raises:
            ExecutionError: A segment fails on the device, e.g. for lack of memory.
        """
        bench = _Bench(self, chain)
        segments = []
        disable = None if self.progress is None else not self.progress
        for index in tqdm(range(len(chain.segments)), "measure", delay=2, leave=False, disable=disable):
            forward_s, backward_s = bench.times(index)
            segment = chain.segments[index]
            segments.append(segment.timed(forward_s, backward_s, "measured"))
        return replace(chain, segments=tuple(segments))


class _Bench:
    def __init__(self, options: MeasureChain, chain: SegmentChain) -> None:
        self._capture, self._timer, self._chain = options.capture, options.timer, chain
        self._machine = options.timer.machine()
        self._extract = ExtractStages(options.capture, chain)
        self._sizes = Sizes(options.capture.graph_module.meta.get("symbols", {}))
        self._bindings = {symbol(name): sympy.Integer(size) for name, size in chain.bindings.items()}
        self._nodes = {node.name: node for node in options.capture.graph_module.graph.nodes}
        self._folder = options.cache or cache_folder() / "measurements"
        self._known: dict[str, tuple[float, float]] = {}

    def times(self, index: int) -> tuple[float, float]:
        """Forward and backward seconds of one segment."""
        segment = self._chain.segments[index]
        stages = [Stage(0, StageKind.F, index, index)]
        if segment.needs_backward:
            last = index == len(self._chain.segments) - 1
            stages.append(Stage(1, StageKind.FB if last else StageKind.B, index, index))
        graphs = self._extract.run(Partition(tuple(stages), 0, 0.0, 0.0, "GIVEN", 0.0, "none"))
        key = self._fingerprint(graphs)
        if key not in self._known:
            self._known[key] = self._load(key) or self._measure(segment.name, graphs, key)
        return self._known[key]

    def _measure(self, name: str, graphs: tuple[StageGraph, ...], key: str) -> tuple[float, float]:
        try:
            forward_s, *both = [self._seconds(graph) for graph in graphs]
        except RuntimeError as error:
            raise ExecutionError(
                f"segment {name} cannot be measured on {self._machine['device']} at {self._chain.bindings}: "
                f"{error}; measure smaller sizes, or use estimated seconds"
            ) from error
        # Noise can make a tiny segment's backward come out below nothing.
        times = forward_s, max(0.0, both[0] - forward_s) if both else 0.0
        content = {"forward_s": times[0], "backward_s": times[1], **self._machine}
        write_in_one_step(self._folder / f"{key}.json", json.dumps(content, indent=1, sort_keys=True) + "\n")
        return times

    def _load(self, key: str) -> tuple[float, float] | None:
        try:
            content = json.loads((self._folder / f"{key}.json").read_text(encoding="utf-8"))
            return float(content["forward_s"]), float(content["backward_s"])
        except (OSError, ValueError, KeyError, TypeError):
            return None  # it was not measured yet, or the file is damaged: measure

    def _seconds(self, graph: StageGraph) -> float:
        capture = self._capture
        tensors = (*capture.parameters, *capture.buffers, *capture.inputs)
        placeholders = {spec.name: spec.placeholder for spec in tensors}
        return self._timer.seconds(
            graph,
            capture.outputs[0],
            {name: self._tensor(placeholders[name]) for name in (*graph.parameters, *graph.buffers)},
            {name: self._tensor(placeholders[name]) for name in graph.inputs},
            {name: self._tensor(name) for name in graph.values},
            {name: self._tensor(name) for name in graph.gradients_in},
            self._chain.bindings,
        )

    def _tensor(self, name: str) -> torch.Tensor:
        """Shape and dtype of a node's value."""
        value: torch.Tensor = self._nodes[name].meta["val"]
        return torch.empty(self._shape(value), dtype=value.dtype, device="meta")

    def _shape(self, tensor: torch.Tensor) -> tuple[int, ...]:
        return tuple(int(sympy.Integer(size.xreplace(self._bindings))) for size in self._sizes.shape(tensor))

    def _fingerprint(self, graphs: tuple[StageGraph, ...]) -> str:
        """Hash of everything that a segment's times depend on."""
        content: list[object] = [sorted(self._machine.items())]
        content += [(graph.stage.kind, self._text(graph)) for graph in graphs]
        return hashlib.sha256(repr(content).encode()).hexdigest()

    def _text(self, graph: StageGraph) -> list[object]:
        """The stage's graph with numbers instead of names."""
        capture = self._capture
        leaves = {s.placeholder for s in capture.parameters if s.name in graph.trainable}
        leaves.update(graph.gradients_out)
        changed = {s.placeholder for s in capture.buffers if s.name in graph.mutated}
        number: dict[Node, int] = {}
        lines: list[object] = []
        for node in graph.graph_module.graph.nodes:
            number[node] = len(number)
            args = node.args
            if node.target is seeded:  # which stream it draws from does not matter
                args = (args[0], *args[2:])
            plain = torch.fx.map_arg((args, node.kwargs), lambda arg: f"%{number[arg]}")
            target = "" if node.op == "placeholder" else _target(graph.graph_module, node)
            source = self._nodes.get(node.name)
            value = None if source is None else source.meta.get("val")
            form = (self._shape(value), str(value.dtype)) if isinstance(value, torch.Tensor) else None
            roles = (node.name in leaves, node.name in graph.gradients_in, node.name in changed)
            lines.append((node.op, target, str(plain), form, roles))
        return lines


def _target(module: GraphModule, node: Node) -> str:
    """The operator, or the code of the graph that a higher-order operator calls."""
    inner = getattr(module, node.target, None) if isinstance(node.target, str) else None
    if isinstance(node.target, FunctionType):
        return node.target.__name__  # its text has an address
    return inner.code if isinstance(inner, GraphModule) else str(node.target)
