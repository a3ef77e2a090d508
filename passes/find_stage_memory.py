"""Partition -> Partition: what each stage needs in memory, from running it on tensors without data."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from rpcompile.device_kernels import Kernels
from rpcompile.ir import Partition, StageKind
from rpcompile.passes._segment_memory import SegmentMemories, tiled_piece
from rpcompile.passes.extract_stages import ExtractStages
from rpcompile.random_streams import microbatch_seed
from rpcompile.stage_bytes import kept_bytes

if TYPE_CHECKING:
    from rpcompile.ir import Capture, SegmentChain, Stage, StageGraph
    from rpcompile.peak_memory import Piece


@dataclass(frozen=True)
class FindStageMemory:
    """Runs the stages that were chosen, each distinct one once.

    `rpcompile/stage_bytes.py` bounds every stage there could be from tables of segments, in which a boundary
    is one number. What a whole stage needs follows from which of its values live how long.

    Attributes:
        capture: The graph.
        chain: Its segments, at the sizes planned for, tiled as they will run.
        kernels: Of which device the memory is; as in `BindChain`.
    """

    name: ClassVar[str] = "find-stage-memory"
    capture: Capture
    chain: SegmentChain
    kernels: Kernels | None = None

    def run(self, partition: Partition) -> Partition:
        """Sets `workspace_bytes` of every stage."""
        finder = _Finder(self, partition)
        return replace(partition, stages=tuple(finder.found(stage) for stage in partition.stages))


class _Finder:
    def __init__(self, options: FindStageMemory, partition: Partition) -> None:
        self._capture, self._chain, self._partition = options.capture, options.chain, partition
        kernels = options.kernels or Kernels("cpu" if options.chain.hardware.name == "cpu" else "cuda")
        self._segments = SegmentMemories(options.capture, options.chain.bindings, kernels)
        # Boundaries that a forward stage hands on also where it goes on behind them.
        self._saved = {stage.first - 1 for stage in partition.stages if stage.kind is StageKind.B}
        self._known: dict[object, int] = {}

    def found(self, stage: Stage) -> Stage:
        segments = [self._chain.segments[index] for index in stage.segments]
        piece, has_buffers = self._segments.stage_piece(stage.first, stage.last), 0
        if stage.kind is StageKind.F:
            piece = replace(piece, boundary=self._results(stage))
            has_buffers = sum(self._chain.segments[cut].boundary_bytes for cut in self._emits(stage))
            has_buffers += sum(kept_bytes(self._chain, stage).values())
        elif stage.first:
            has_buffers = self._chain.segments[stage.first - 1].boundary_gradient_bytes
        variant = tuple((segment.tiles, segment.offloads, segment.head_groups) for segment in segments)
        key = stage.kind, variant, self._segments.peak.key(piece)
        if key not in self._known:
            self._known[key] = self._run(stage, piece)
        nbytes = self._known[key] - has_buffers
        if stage.kind is StageKind.B:  # copies of buffers that its recompute must not change
            nbytes += sum(segment.state_bytes for segment in segments)
        # Only a forward hands on what it was given; a gradient that goes out is always another tensor.
        return replace(stage, workspace_bytes=nbytes if stage.kind is StageKind.F else max(0, nbytes))

    def _emits(self, stage: Stage) -> list[int]:
        last = len(self._chain.segments) - 1
        return [cut for cut in stage.segments if cut != last and (cut == stage.last or cut in self._saved)]

    def _results(self, stage: Stage) -> tuple[str, ...]:
        """What a forward stage holds to its end: what it hands on, and what the model returns."""
        names = [name for cut in self._emits(stage) for name in self._chain.segments[cut].boundary]
        if stage.last == len(self._chain.segments) - 1:
            names += [name for name in self._capture.outputs if name in self._capture.order]
        return tuple(dict.fromkeys(names))

    def _run(self, stage: Stage, piece: Piece) -> int:
        memory = self._segments.peak
        segments = [self._chain.segments[index] for index in stage.segments]
        if any(segment.tiles > 1 or segment.offloads or segment.head_groups > 1 for segment in segments):
            memory, piece = tiled_piece(memory, self._graphs[stage.index], piece)
        with microbatch_seed(0):  # which the random operators of an extracted stage ask for
            return memory.peak_bytes(piece, train=stage.kind is not StageKind.F)

    @functools.cached_property
    def _graphs(self) -> dict[int, StageGraph]:
        graphs = ExtractStages(self._capture, self._chain).run(self._partition)
        return {graph.stage.index: graph for graph in graphs}
