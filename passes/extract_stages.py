"""Capture, SegmentChain, Partition -> one StageGraph a stage."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Graph, GraphModule, Node

from rpcompile.graphs import is_random
from rpcompile.ir import Capture, Partition, SegmentChain, Stage, StageGraph, StageKind
from rpcompile.passes.group_heads import GroupHeads
from rpcompile.passes.keep_attention import KeepAttention
from rpcompile.passes.keep_kernels import KeepKernels
from rpcompile.passes.tile_tokens import TileTokens
from rpcompile.random_streams import seeded


@dataclass(frozen=True)
class ExtractStages:
    """Copies each stage's nodes, with the rematerialised ones it needs, into a graph of its own.

    Random operators become `seeded(operator, stream number, ...)`, so that a recompute draws
    what the forward drew.

    Options:
        outputs: The fused stage returns everything that the model returns and it makes, not the loss alone.
    """

    capture: Capture
    chain: SegmentChain
    outputs: bool = False
    name = "extract-stages"

    def run(self, partition: Partition) -> tuple[StageGraph, ...]:
        """One graph a stage, in stage order, attention kept, tokens and heads divided as the segments say."""
        saved = {stage.first - 1 for stage in partition.stages if stage.kind is StageKind.B}
        keep = KeepAttention(self.chain)
        tile = TileTokens(self.chain, self.capture.graph_module.meta.get("symbols", {}))
        group = GroupHeads(self.chain, self.capture.requires_grad)
        kernels = KeepKernels(self.capture.requires_grad)
        trains = any(stage.kind is not StageKind.F for stage in partition.stages)
        graphs = (keep.run(self._extract(stage, saved)) for stage in partition.stages)
        divided = (group.run(tile.run(graph)) for graph in graphs)
        # What is only evaluated wants no gradient in plain PyTorch either.
        return tuple(
            kernels.run(graph) if trains and graph.stage.kind is StageKind.F else graph for graph in divided
        )

    def segment_tensors(self) -> tuple[tuple[tuple[str, ...], ...], tuple[tuple[str, ...], ...]]:
        """Per segment: names of the parameters and buffers it reads, and of the buffers it changes."""
        weights: list[tuple[str, ...]] = []
        states: list[tuple[str, ...]] = []
        tensors = {s.placeholder: s.name for s in (*self.capture.parameters, *self.capture.buffers)}
        for segment in self.chain.segments:
            nodes = self._with_rematerialised(segment.nodes)
            read = {arg.name for node in nodes for arg in node.all_input_nodes if arg.op == "placeholder"}
            names = tuple(name for placeholder, name in tensors.items() if placeholder in read)
            changed = {name for name, node in self.capture.mutations.items() if node in segment.nodes}
            weights.append(names)
            states.append(tuple(name for name in names if name in changed))
        return tuple(weights), tuple(states)

    def _extract(self, stage: Stage, saved: set[int]) -> StageGraph:
        segments = self.chain.segments
        last = segments[stage.last]
        values = segments[stage.first - 1].boundary if stage.first else ()
        emits = self._emits(stage, saved)
        final = stage.last == len(segments) - 1
        if stage.kind is StageKind.FB and not self.outputs:
            outputs: tuple[str, ...] = self.capture.outputs[:1]
        elif final:
            outputs = self._final_outputs()
        else:
            outputs = tuple(dict.fromkeys(name for names in emits.values() for name in names))
        wanted = [name for index in stage.segments for name in segments[index].nodes]
        module, used = self._build(wanted, values, outputs)
        parameters = tuple(s.name for s in self.capture.parameters if s.placeholder in used)
        backward = stage.kind is not StageKind.F
        return StageGraph(
            stage=stage,
            graph_module=module,
            parameters=parameters,
            trainable=frozenset(
                s.name for s in self.capture.parameters if backward and s.trainable and s.name in parameters
            ),
            buffers=tuple(s.name for s in self.capture.buffers if s.placeholder in used),
            mutated=frozenset(name for name, node in self.capture.mutations.items() if node in wanted),
            inputs=tuple(s.name for s in self.capture.inputs if s.placeholder in used),
            values=values,
            gradients_out=segments[stage.first - 1].boundary_gradients if backward and stage.first else (),
            sizes=tuple(name for name in self.capture.symbols if f"sym_{name}" in used),
            outputs=outputs,
            emits=emits,
            gradients_in=last.boundary_gradients if stage.kind is StageKind.B else (),
            autocast=self.capture.autocast,
        )

    def _emits(self, stage: Stage, saved: set[int]) -> dict[int, tuple[str, ...]]:
        last = len(self.chain.segments) - 1
        if stage.kind is StageKind.B:
            cuts = {stage.last}
        else:
            cuts = {index for index in stage.segments if index in saved or index == stage.last}
        return {index: self.chain.segments[index].boundary for index in sorted(cuts) if index != last}

    def _final_outputs(self) -> tuple[str, ...]:
        mine = {*self.chain.segments[-1].nodes, *self.capture.rematerialised}
        return tuple(name for name in self.capture.outputs if name in mine)

    def _with_rematerialised(self, names: tuple[str, ...] | list[str]) -> list[Node]:
        """The named nodes and the cheap ones they need, in graph order."""
        nodes = {node.name: node for node in self.capture.graph_module.graph.nodes}
        wanted: set[Node] = set()
        stack = [nodes[name] for name in names]
        while stack:
            node = stack.pop()
            if node in wanted:
                continue
            wanted.add(node)
            stack += [arg for arg in node.all_input_nodes if arg.name in self.capture.rematerialised]
        return [node for node in nodes.values() if node in wanted]

    def _build(
        self, names: list[str], values: tuple[str, ...], outputs: tuple[str, ...]
    ) -> tuple[GraphModule, set[str]]:
        """The graph, and the placeholders of the capture that it reads."""
        nodes = self._with_rematerialised([*names, *(o for o in outputs if o in self.capture.rematerialised)])
        sources = {arg for node in nodes for arg in node.all_input_nodes}
        used = {arg.name for arg in sources if arg.op == "placeholder"}
        streams = {name: number for number, name in enumerate(self.capture.random)}
        graph = Graph()
        copies: dict[str, Node] = {}
        originals = {node.name: node for node in self.capture.graph_module.graph.nodes}
        for name in [*(n for n in self._placeholder_order() if n in used), *values]:
            copies[name] = graph.placeholder(name)
            copies[name].meta = dict(originals[name].meta)
        for node in nodes:
            copies[node.name] = graph.node_copy(node, lambda arg: copies[arg.name])
            if is_random(node):
                copy = copies[node.name]
                copy.args = (node.target, streams[node.name], *copy.args)  # type: ignore[assignment]
                copy.target = seeded
        graph.output(tuple(copies[name] for name in outputs))
        return GraphModule(self.capture.graph_module, graph), used

    def _placeholder_order(self) -> list[str]:
        capture = self.capture
        tensors = (*capture.parameters, *capture.buffers, *capture.inputs)
        return [*(spec.placeholder for spec in tensors), *(f"sym_{name}" for name in capture.symbols)]
