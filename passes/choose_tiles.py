"""SegmentChain -> SegmentChain: runs token-wise regions in chunks where a segment does not fit otherwise."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import sympy

from rpcompile.device_kernels import Kernels
from rpcompile.errors import InvalidArgument
from rpcompile.ir import Partition, SegmentChain, Stage, StageKind
from rpcompile.passes._segment_memory import SegmentMemories, tiled_piece
from rpcompile.passes._token_regions import find_regions
from rpcompile.passes.extract_stages import ExtractStages
from rpcompile.random_streams import microbatch_seed
from rpcompile.sizes import symbol

if TYPE_CHECKING:
    from rpcompile.ir import CostedGraph, Segment, StageGraph
    from rpcompile.passes._token_regions import TokenRegion
    from rpcompile.peak_memory import Piece, PieceMemory

# Shorter chunks would leave a GPU's matrix units idle.
_LEAST_TOKENS = 256
# What a loss may take of a GPU's memory before it is tiled. Its chunks cost no time, for its forward and
# backward run together, and the memory that it leaves makes larger stages.
_LOSS_SHARE = 0.125
# What a segment's own need may take of the memory that its weights, gradients and boundaries leave.
_SHARE = 0.9
_NAMED = ("auto", "loss")


@dataclass(frozen=True)
class ChooseTiles:
    """Doubles the number of chunks of each segment until what it needs fits.

    A segment that mixes tokens somewhere (attention) runs its regions twice in the backward when it is
    tiled, which its `backward_s` then holds. One that is token-wise throughout (`reruns`) runs its forward
    only once, in the backward, if it is the last of its stage; elsewhere that time is not priced.

    Attributes:
        costed: The graph that the chain was bound from.
        tiles: "auto"; "loss": the same for the segment that ends in the loss, and no other; or the number
            of chunks of every region, 1 for none.
        kernels: Of which device the memory is; as in `BindChain`.
    """

    name: ClassVar[str] = "choose-tiles"
    costed: CostedGraph
    tiles: str | int = "auto"
    kernels: Kernels | None = None

    def run(self, chain: SegmentChain) -> SegmentChain:
        """Sets `tiles`, memory and seconds of the segments.

        Raises:
            InvalidArgument: `tiles` is something else.
        """
        if self.tiles not in _NAMED and (not isinstance(self.tiles, int) or self.tiles < 1):
            raise InvalidArgument(
                f"tiles={self.tiles!r}; it must be 'auto', 'loss' or a number of chunks from 1 on"
            )
        if self.tiles == 1 or "sequence" not in chain.bindings:
            return chain
        kernels = self.kernels or Kernels("cpu" if chain.hardware.name == "cpu" else "cuda")
        chooser = _Chooser(self, chain, kernels)
        segments = tuple(chooser.tiled(index) for index in range(len(chain.segments)))
        return replace(chain, segments=segments)


@dataclass(frozen=True)
class _Choice:
    """What tiling makes of one kind of segment.

    `again` is the share of its forward that runs twice; None where all of it is in the backward.
    """

    tiles: int
    saved_bytes: int
    peak_bytes: int
    forward_peak_bytes: int
    again: float | None


class _Chooser:
    def __init__(self, options: ChooseTiles, chain: SegmentChain, kernels: Kernels) -> None:
        self._options, self._chain = options, chain
        self._capture = options.costed.capture
        self._names = self._capture.graph_module.meta.get("symbols", {})
        self._pieces = SegmentMemories(self._capture, chain.bindings, kernels)
        self._whole = self._pieces.peak
        self._sizes = {symbol(name): sympy.Integer(size) for name, size in chain.bindings.items()}
        self._known: dict[object, _Choice | None] = {}

    def tiled(self, index: int) -> Segment:
        segment = self._chain.segments[index]
        tiles, last = self._options.tiles, index == len(self._chain.segments) - 1
        if not segment.needs_backward or (tiles == "loss" and not last):
            return segment
        if tiles in _NAMED and self._fits(index, segment):
            return segment
        key = self._whole.key(self._pieces.piece(index, index)), segment.weight_bytes
        if key not in self._known:
            self._known[key] = self._choose(index)
        choice = self._known[key]
        if choice is None:
            return segment
        return replace(
            segment,
            tiles=choice.tiles,
            saved_bytes=choice.saved_bytes,
            peak_bytes=choice.peak_bytes,
            forward_peak_bytes=choice.forward_peak_bytes,
            backward_s=segment.backward_s + (choice.again or 0.0) * segment.forward_s,
            reruns=choice.again is None,
        )

    def _fits(self, index: int, segment: Segment | _Choice) -> bool:
        """Whether the segment can be a stage of its own."""
        return segment.saved_bytes + segment.peak_bytes <= _SHARE * self._free(index)

    def _free(self, index: int) -> int:
        """What weights, gradients and boundaries leave of a GPU for the segment's own need."""
        chain = self._chain
        own, usable = chain.segments[index], chain.hardware.usable_bytes
        before = chain.segments[index - 1] if index else None
        crossing = own.boundary_bytes + own.boundary_gradient_bytes + own.input_bytes
        crossing += before.boundary_bytes + before.boundary_gradient_bytes if before else 0
        free = usable - 2 * (own.weight_bytes + own.gradient_bytes + crossing)
        return min(free, int(_LOSS_SHARE * usable)) if index == len(chain.segments) - 1 else free

    def _choose(self, index: int) -> _Choice | None:
        """Fewest chunks that fit, else those that need least; None where tiling does not help."""
        segment, tokens = self._chain.segments[index], self._chain.bindings["sequence"]
        regions = self._regions(index)
        if not regions:
            return None
        if self._options.tiles not in _NAMED:
            return self._measure(index, regions, int(self._options.tiles))
        best, least = None, segment.saved_bytes + segment.peak_bytes
        free = _SHARE * self._free(index)
        # What a segment needs falls no faster than its chunks.
        tiles = 2 ** max(1, math.ceil(math.log2(least / free))) if free > 0 else 2
        while tokens >= tiles * _LEAST_TOKENS:
            found = self._measure(index, regions, tiles)
            if self._fits(index, found):
                return found
            need = found.saved_bytes + found.peak_bytes
            if need < least:
                best, least = found, need
            tiles *= 2
        return best

    def _regions(self, index: int) -> list[TokenRegion]:
        segment_of = dict.fromkeys(self._chain.segments[index].nodes, index)
        kind = StageKind.FB if index == len(self._chain.segments) - 1 else StageKind.B
        return find_regions(self._stage(index, kind, 1).graph_module.graph, self._names, segment_of)

    def _measure(self, index: int, regions: list[TokenRegion], tiles: int) -> _Choice:
        piece, last = self._pieces.piece(index, index), index == len(self._chain.segments) - 1
        found = self._run(self._stage(index, StageKind.FB if last else StageKind.B, tiles), piece)
        # A backward stage need not make what it returns; a forward stage has to.
        forward = found if last else self._run(self._stage(index, StageKind.F, tiles), piece)
        nbytes = self._whole.nbytes
        gradients_out = sum(map(nbytes, piece.gradients_out))
        return _Choice(
            tiles=tiles,
            saved_bytes=found.saved_bytes,
            peak_bytes=max(0, found.training_bytes - found.saved_bytes - gradients_out),
            forward_peak_bytes=forward.forward_bytes - sum(map(nbytes, piece.boundary)),
            again=self._again(index, regions),
        )

    def _stage(self, index: int, kind: StageKind, tiles: int) -> StageGraph:
        """The segment as a stage of its own."""
        stage = Stage(0, kind, index, index)
        segments = list(self._chain.segments)
        segments[index] = replace(segments[index], tiles=tiles)
        chain = replace(self._chain, segments=tuple(segments))
        partition = Partition((stage,), 0, 0.0, 0.0, "GIVEN", 0.0, "none")
        return ExtractStages(self._capture, chain).run(partition)[0]

    def _run(self, stage: StageGraph, piece: Piece) -> PieceMemory:
        """What the stage's graph needs, found as that of a piece of the capture is."""
        memory, tiled = tiled_piece(self._whole, stage, piece)
        with microbatch_seed(0):  # which a stage's random operators ask for
            return memory.of(tiled)

    def _again(self, index: int, regions: list[TokenRegion]) -> float | None:
        names = set(self._chain.segments[index].nodes)
        tiled = {node.name for region in regions for node in (*region.members, region.last)} & names
        costs = self._options.costed.costs
        outside = [name for name in names - tiled if costs[name].op_class in ("matmul", "attention")]
        if not outside:
            return None
        numbers = ((name, costs[name].forward_flops.xreplace(self._sizes)) for name in names)
        flops = {name: float(sympy.Float(number)) for name, number in numbers}
        return sum(flops[name] for name in tiled) / max(1.0, sum(flops.values()))
