"""Bytes that a stage's weights, gradients and transients take where several segments come together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rpcompile.ir import StageKind

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rpcompile.ir import SegmentChain, Stage


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


def workspace_bytes(chain: SegmentChain, stage: Stage) -> int:
    """Device memory that one microbatch of a stage needs besides its buffers.

    F runs without autograd, so one segment's transients at a time. FB and B hold what every segment
    saves; B also holds scratch copies of the buffers that its recompute must not change.
    """
    segments = [chain.segments[index] for index in stage.segments]
    nbytes = max(segment.peak_bytes for segment in segments)
    if stage.kind is not StageKind.F:
        nbytes += sum(segment.saved_bytes for segment in segments)
    if stage.kind is StageKind.B:
        nbytes += sum(segment.state_bytes for segment in segments)
    return nbytes
