"""Bytes that a stage's weights, gradients and transients take where several segments come together."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, NamedTuple

from rpcompile.ir import StageKind

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rpcompile.ir import SegmentChain, Stage, TiedWeight


def weight_bytes(chain: SegmentChain, segments: Iterable[int]) -> dict[int, int]:
    """Bytes of each segment's weights when `segments` are in one place, by segment.

    A tied tensor counts once, for the first of `segments` that reads it.
    """
    sizes = {segment: chain.segments[segment].weight_bytes for segment in segments}
    for tied in chain.tied:
        for segment in sorted(sizes.keys() & set(tied.segments))[1:]:
            sizes[segment] -= tied.weight_bytes
    return sizes


def gradient_bytes(chain: SegmentChain, segments: Iterable[int]) -> dict[int, int]:
    """Bytes of each segment's weight gradients when `segments` are one stage, as in `weight_bytes`."""
    sizes = {segment: chain.segments[segment].gradient_bytes for segment in segments}
    for tied in chain.tied:
        for segment in sorted(sizes.keys() & set(tied.segments))[1:]:
            sizes[segment] -= tied.gradient_bytes
    return sizes


def upload_unit_bytes(chain: SegmentChain, gpus: int, microbatches: int, mode: str = "sync") -> float:
    """What counts as an upload traffic of 1: every segment once for each of its passes in each round.

    A round is as many microbatches as there are GPUs; the last segment has one pass, and so have those in
    front of the first backward, and all in mode "forward". At least one byte, for models without weights.
    """
    weights = [segment.weight_bytes for segment in chain.segments]
    backward = 0 if mode == "forward" else sum(weights[chain.first_backward : -1])
    return max(1.0, max(1.0, microbatches / gpus) * (sum(weights) + backward))


def kept_bytes(chain: SegmentChain, stage: Stage) -> dict[int, int]:
    """Attention outputs that one microbatch of a training stage offloads (F) or loads (B), by segment."""
    if stage.kind is StageKind.FB:
        return {}
    sizes = {segment: chain.segments[segment].kept_bytes for segment in stage.segments}
    return {segment: size for segment, size in sizes.items() if size}


class BackwardTables(NamedTuple):
    """By segment, a_i of `Workspaces`: of an inner segment, of a stage's last one, and what lies below it."""

    inner: list[int]
    last: list[int]
    base: list[int]


class Workspaces:
    """Device memory that one microbatch of a stage needs besides its buffers, from tables.

    A stage's need is the largest of its segments' needs, each on top of what is there at that time. With
    b the bytes that cross a cut, d those of their gradients, and P the prefix sums of what is saved::

        F      the values in front of and behind segment i, and its own need      e_i = b + b + forward_peak
        B, FB  what is saved up to segment i, its own need, gradients around it   a_i = P_{i+1} + peak + d + d

    Buffers are left out: of a stage low <= i < high, the values in front of it and the gradients behind it
    while the segment next to them runs, and its results from the beginning on. What a stage shares is
    counted once: results of rematerialised nodes, and values that several segments hold for their backwards.
    Attention outputs that are offloaded have buffers too: F and B have tables of their own for them.

    This bounds a stage's need from above, for those that choose stages. Too much: values that only pass by a
    segment of a model whose cuts are several tensors wide, and values in front of a segment that a forward
    drops before that segment's peak, or that have a buffer since a backward stage begins there. The gradient
    of a weight counts twice while it is made, as from the second microbatch on: what is accumulated and what
    is added. A stage whose need was found by running it says so itself; see `planned`.
    """

    def __init__(self, chain: SegmentChain) -> None:
        segments = chain.segments
        self._chain = chain
        # What crosses the cut in front of each segment; nothing crosses the ends.
        self.crossing = [0, *(s.boundary_bytes for s in segments[:-1]), 0]
        self.crossing_gradients = [0, *(s.boundary_gradient_bytes for s in segments[:-1]), 0]
        around = map(sum, pairwise(self.crossing))
        self.inner_forward = [
            (s.kept or s).forward_peak_bytes + b for s, b in zip(segments, around, strict=True)
        ]
        self.first_forward = [e - b for e, b in zip(self.inner_forward, self.crossing, strict=False)]
        fused = again = self._backward([(s.saved_bytes, s.peak_bytes) for s in segments])
        if any(s.offloads for s in segments):
            needs = (s.kept or s for s in segments)
            again = self._backward([(need.saved_bytes, need.peak_bytes) for need in needs])
        self.backward = {StageKind.FB: fused, StageKind.B: again}
        self.rematerialised = [s.rematerialised_bytes for s in segments]
        self._states = list(accumulate((s.state_bytes for s in segments), initial=0))

    def _backward(self, sizes: list[tuple[int, int]]) -> BackwardTables:
        """The tables of one kind of stage, from what each of its segments saves and needs on top."""
        inputs = [segment.saved_input_bytes for segment in self._chain.segments]
        saved = list(
            accumulate((size + own for (size, _), own in zip(sizes, inputs, strict=True)), initial=0)
        )
        around = map(sum, pairwise(self.crossing_gradients))
        inner = [after + peak + d for after, (_, peak), d in zip(saved[1:], sizes, around, strict=True)]
        behind = self.crossing_gradients[1:]
        return BackwardTables(
            inner=inner,
            last=[a - d for a, d in zip(inner, behind, strict=True)],
            base=[b + own + d for b, own, d in zip(saved, inputs, self.crossing_gradients, strict=False)],
        )

    def planned(self, stage: Stage) -> int:
        """What a plan counts for a stage: its need if that was found, else the bound on it."""
        return self.of(stage) if stage.workspace_bytes is None else stage.workspace_bytes

    def of(self, stage: Stage) -> int:
        """Bytes of one stage.

        B also holds scratch copies of the buffers that its recompute must not change, and a tied weight's
        first gradient until the last one is made.
        """
        low, high = stage.first, stage.last + 1
        if stage.kind is StageKind.F:
            inner = max(self.inner_forward[low + 1 : high], default=0)
            own = max(inner, self.first_forward[low]) - self.crossing[high]
        else:
            tables = self.backward[stage.kind]
            own = max(max(tables.inner[low : high - 1], default=0), tables.last[high - 1]) - tables.base[low]
            for tied in self._chain.tied:
                own += duplicates(tied, low, high) * tied.gradient_bytes
        if stage.kind is StageKind.B:
            own += self._states[high] - self._states[low]
        return max(0, own + max(self.rematerialised[low:high]))


def duplicates(tied: TiedWeight, low: int, high: int) -> int:
    """Users of a tied tensor among the segments `low <= s < high` that need no copy of their own."""
    return max(0, sum(low <= user < high for user in tied.segments) - 1)
