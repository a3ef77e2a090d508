"""What each segment of a capture needs in memory, from running each distinct one once."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from rpcompile.ir import Partition, Stage, StageKind
from rpcompile.passes.extract_stages import ExtractStages
from rpcompile.peak_memory import PeakMemory, Piece, PieceMemory
from rpcompile.random_streams import microbatch_seed
from rpcompile.tiling import TiledRegion

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch.fx import Node

    from rpcompile.device_kernels import Kernels
    from rpcompile.ir import Capture, SegmentChain, StageGraph


class SegmentMemory(NamedTuple):
    """The fields of `ir.Segment` that say what its activations need, in bytes."""

    saved_bytes: int
    peak_bytes: int
    forward_peak_bytes: int
    saved_input_bytes: int
    rematerialised_bytes: int


class LoneMemory(NamedTuple):
    """What a segment needs as a stage of its own, in bytes; as the fields of `ir.Segment` of these names.

    What has buffers of its own besides (attention outputs that leave or come in) is left out, too.
    """

    saved_bytes: int
    peak_bytes: int
    forward_peak_bytes: int
    rematerialised_bytes: int

    @property
    def need_bytes(self) -> int:
        """Of its backward."""
        return self.saved_bytes + self.peak_bytes


class SegmentMemories:
    """Finds the memory of the segments between a capture's cuts, in order.

    Attributes:
        peak: What runs them.
    """

    def __init__(self, capture: Capture, bindings: Mapping[str, int], kernels: Kernels) -> None:
        self._capture = capture
        self.peak = PeakMemory(capture, bindings, kernels)
        self._position = {name: index for index, name in enumerate(self.peak.nodes)}
        self._known: dict[object, PieceMemory] = {}
        self._held: set[str] = set()  # values that a segment so far holds for its backward

    def segment(self, index: int) -> SegmentMemory:
        """Segment `index`; to be called in order: what several segments hold is charged to the first."""
        piece = self.piece(index, index)
        key = self.peak.key(piece)
        if key not in self._known:
            self._known[key] = self.peak.of(piece)
        found, nbytes = self._known[key], self.peak.nbytes
        own = {name for name, kept in zip(piece.values, found.keeps_value, strict=True) if kept} - self._held
        behind_others = found.recompute_bytes + sum(map(nbytes, {*piece.values} - self._held))
        made = zip(piece.boundary, found.keeps_boundary, strict=True)
        self._held |= own | {name for name, kept in made if kept}
        gradients_out, saved_input_bytes = sum(map(nbytes, piece.gradients_out)), sum(map(nbytes, own))
        # While it recomputes there are no gradients yet, but all that the segments before it hand on.
        recompute = behind_others - saved_input_bytes - gradients_out - sum(map(nbytes, piece.gradients_in))
        return SegmentMemory(
            saved_bytes=found.saved_bytes,
            # Autograd may let go of what it saved before it makes the gradients that go out.
            peak_bytes=max(0, max(found.training_bytes - gradients_out, recompute) - found.saved_bytes),
            forward_peak_bytes=found.forward_bytes - sum(map(nbytes, piece.boundary)),
            saved_input_bytes=saved_input_bytes,
            rematerialised_bytes=found.rematerialised_bytes,
        )

    def alone(self, chain: SegmentChain, index: int) -> LoneMemory:
        """Segment `index` of a chain as a stage of its own, divided and offloaded as the chain says."""
        piece, last = self.piece(index, index), index == len(chain.segments) - 1
        found = self._run(chain, index, StageKind.FB if last else StageKind.B, piece)
        # A backward stage need not make what it returns; a forward stage has to.
        forward = found if last else self._run(chain, index, StageKind.F, piece)
        nbytes = self.peak.nbytes
        gradients_out = sum(map(nbytes, piece.gradients_out))
        handed_on = chain.segments[index].kept_bytes + sum(map(nbytes, piece.boundary))
        return LoneMemory(
            saved_bytes=found.saved_bytes,
            peak_bytes=max(0, found.training_bytes - found.saved_bytes - gradients_out),
            forward_peak_bytes=forward.forward_bytes - handed_on,
            rematerialised_bytes=max(found.rematerialised_bytes, forward.rematerialised_bytes),
        )

    def _run(self, chain: SegmentChain, index: int, kind: StageKind, piece: Piece) -> PieceMemory:
        """What the graph of a stage needs, found as that of a piece of the capture is."""
        partition = Partition((Stage(0, kind, index, index),), 0, 0.0, 0.0, "GIVEN", 0.0, "none")
        (stage,) = ExtractStages(self._capture, chain).run(partition)
        memory, alone = tiled_piece(self.peak, stage, piece)
        with microbatch_seed(0):  # which a stage's random operators ask for
            return memory.of(alone)

    def stage_piece(self, first: int, last: int) -> Piece:
        """`piece` as a stage of these segments runs it: what is rematerialised lives as all else does."""
        piece = self.piece(first, last)
        nodes = sorted((*piece.rematerialised, *piece.nodes), key=lambda node: self._position[node.name])
        return replace(piece, nodes=tuple(nodes), rematerialised=())

    def piece(self, first: int, last: int) -> Piece:
        """The nodes of the segments `first..last`, both included."""
        order, cuts = self._capture.order, self._capture.cuts
        begin, end = cuts[first - 1] if first else None, cuts[last] if last < len(cuts) else None
        names = order[begin.position if begin else 0 : end.position if end else len(order)]
        return Piece(
            nodes=tuple(self.peak.nodes[name] for name in names),
            rematerialised=self._rematerialised(names),
            values=begin.values if begin else (),
            gradients_out=begin.gradients if begin else (),
            boundary=end.values if end else (),
            gradients_in=end.gradients if end else (),
        )

    def _rematerialised(self, names: Iterable[str]) -> tuple[Node, ...]:
        nodes = self.peak.nodes
        wanted: dict[Node, None] = {}
        pending = [nodes[name] for name in names]
        while pending:
            for source in pending.pop().all_input_nodes:
                if source.name in self._capture.rematerialised and source not in wanted:
                    wanted[source] = None
                    pending.append(source)
        return tuple(sorted(wanted, key=lambda node: self._position[node.name]))


def tiled_piece(memory: PeakMemory, stage: StageGraph, piece: Piece) -> tuple[PeakMemory, Piece]:
    """The piece as the graph of a stage runs it; and what runs that graph.

    Token-wise regions are run in chunks. Attention outputs that are offloaded leave with the piece's
    boundary, and those that are loaded come in with its values.
    """
    module = stage.graph_module
    module.meta["symbols"] = memory.capture.graph_module.meta.get("symbols", {})
    for region in module.modules():
        if isinstance(region, TiledRegion):
            region.at_most = 3
    names = {node.name for node in piece.rematerialised}
    nodes: list[Node] = []
    shared: list[Node] = []
    for node in module.graph.nodes:
        if node.op in ("call_function", "call_module"):
            # What a region makes is its own, even where it was rematerialised before.
            apart = node.op == "call_module" or not set(nodes).isdisjoint(node.all_input_nodes)
            (shared if node.name in names and not apart else nodes).append(node)
    kept = tuple(name for names in stage.keeps.values() for name in names)
    if kept and stage.stage.kind is StageKind.F:
        piece = replace(piece, boundary=(*piece.boundary, *kept))
    elif kept:
        piece = replace(piece, values=(*piece.values, *kept))
    tiled = replace(piece, nodes=tuple(nodes), rematerialised=tuple(shared))
    capture = replace(memory.capture, graph_module=module)
    return PeakMemory(capture, memory.bindings, memory.kernels), tiled
