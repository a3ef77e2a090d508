"""What one segment's stage needs in memory, from running the graph that the stage would run."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from rpcompile.ir import Partition, Stage, StageKind
from rpcompile.passes.extract_stages import ExtractStages
from rpcompile.peak_memory import PeakMemory
from rpcompile.random_streams import microbatch_seed
from rpcompile.tiling import TiledRegion

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.fx import Node

    from rpcompile.device_kernels import Kernels
    from rpcompile.ir import Capture, SegmentChain, StageGraph
    from rpcompile.peak_memory import Piece, PieceMemory


class StagePieces:
    """Extracts single segments as stages, as their chain says, and runs them on tensors without data."""

    def __init__(self, capture: Capture, bindings: Mapping[str, int], kernels: Kernels) -> None:
        self._capture, self._bindings, self._kernels = capture, bindings, kernels
        self._names = capture.graph_module.meta.get("symbols", {})

    def stage(self, chain: SegmentChain, index: int, kind: StageKind) -> StageGraph:
        """A segment as a stage of its own."""
        stage = Stage(0, kind, index, index)
        partition = Partition((stage,), 0, 0.0, 0.0, "GIVEN", 0.0, "none")
        return ExtractStages(self._capture, chain).run(partition)[0]

    def memory(self, stage: StageGraph, piece: Piece) -> PieceMemory:
        """What a stage's graph needs; `piece` is the same segment of the capture.

        What is offloaded leaves with the piece's boundary, and what is loaded comes in with its values.
        """
        module = stage.graph_module
        module.meta["symbols"] = self._names
        for region in module.modules():
            if isinstance(region, TiledRegion):
                region.at_most = 3
        memory = PeakMemory(replace(self._capture, graph_module=module), self._bindings, self._kernels)
        names = {node.name for node in piece.rematerialised}
        nodes: list[Node] = []
        shared: list[Node] = []
        for node in module.graph.nodes:
            if node.op in ("call_function", "call_module"):
                # What a region makes is its own, even where it was rematerialised before.
                apart = node.op == "call_module" or not set(nodes).isdisjoint(node.all_input_nodes)
                (shared if node.name in names and not apart else nodes).append(node)
        run = replace(piece, nodes=tuple(nodes), rematerialised=tuple(shared), **_kept(stage, piece))
        with microbatch_seed(0):  # which a stage's random operators ask for
            return memory.of(run)


def _kept(stage: StageGraph, piece: Piece) -> dict[str, tuple[str, ...]]:
    if not stage.keeps:
        return {}
    if stage.stage.kind is StageKind.B:
        return {"values": stage.values}
    outputs = next(iter(reversed(stage.graph_module.graph.nodes))).all_input_nodes
    return {"boundary": tuple(dict.fromkeys((*piece.boundary, *(node.name for node in outputs))))}
