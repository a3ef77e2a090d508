"""What a chain must be for any partition of it: times that are times, and segments that fit."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rpcompile.errors import InvalidArgument, PartitionError, StageTooLarge
from rpcompile.ir import Stage, StageKind
from rpcompile.units import size as size_text

if TYPE_CHECKING:
    from rpcompile.ir import Hardware, SegmentChain
    from rpcompile.round_robin_time import StageCost, StageCosts


def check_chain(chain: SegmentChain, training: bool) -> None:
    """Times and rates are finite, on every kind of GPU, and there is something to train.

    Raises:
        InvalidArgument: A time or rate is not one.
        PartitionError: `training`, but no segment has a backward.
    """
    segments = chain.segments
    timed = [("", segment, segment.forward_s, segment.backward_s) for segment in segments]
    for kind in chain.kinds:
        on = f" on {kind.hardware.name}"
        timed += [(on, *each) for each in zip(segments, kind.forward_s, kind.backward_s, strict=True)]
    for on, segment, forward_s, backward_s in timed:
        for field, seconds in (("forward_s", forward_s), ("backward_s", backward_s)):
            if not 0 <= seconds < math.inf:
                raise InvalidArgument(
                    f"{field} of segment {segment.name}{on} is {seconds}; give a finite time >= 0"
                )
    for hardware in (chain.hardware, *(kind.hardware for kind in chain.kinds)):
        _check_links(hardware)
    if training and chain.first_backward == len(segments):
        raise PartitionError(
            f"none of the {len(segments)} segments has a backward, so there is nothing to train; set"
            ' requires_grad on some parameters, or use mode="forward"'
        )


def _check_links(hardware: Hardware) -> None:
    for field in ("h2d_bytes_per_s", "d2h_bytes_per_s"):
        if not getattr(hardware, field) > 0:
            raise InvalidArgument(
                f"{field} of {hardware.name} is {getattr(hardware, field)}; give a rate > 0"
            )
    if not 0 <= hardware.latency_s < math.inf:
        raise InvalidArgument(
            f"latency_s of {hardware.name} is {hardware.latency_s}; give a finite time >= 0"
        )


def check_segments(
    costs: StageCosts, limit: int, forward_only: bool, hardware: Hardware | None = None
) -> None:
    """Every segment fits on a GPU in some stage, other jobs left aside.

    Args:
        costs: Prices stages.
        limit: Bytes that may be used of the GPU.
        forward_only: Whether there is no backward.
        hardware: The GPU, for the message; None for the chain's.

    Raises:
        InvalidArgument: The limit is below 1.
        StageTooLarge: A segment does not fit.
    """
    chain = costs.chain
    if limit < 1:
        raise InvalidArgument(f"the memory limit of {limit} bytes must be at least 1; set memory_limit_bytes")
    alone = [_alone_bytes(costs, index, forward_only) for index in range(len(chain.segments))]
    # The one that is named is the one that takes most.
    for index in sorted(range(len(alone)), key=alone.__getitem__, reverse=True):
        if alone[index] <= limit:
            return
        segment, least = chain.segments[index], _least(costs, index, forward_only)
        if least.memory_bytes > limit:
            size = ", ".join(f"{symbol}={value}" for symbol, value in chain.bindings.items())
            weights = least.weight_bytes + least.gradient_bytes
            copies = costs.sets * (least.load_bytes + least.store_bytes)
            raise StageTooLarge(
                f"{segment.name} needs {size_text(least.memory_bytes)} for one microbatch of {size} but"
                f" {(hardware or chain.hardware).name} has {size_text(limit)} usable. Use more microbatches"
                " (smaller ones), shorter sequences or GPUs with more memory. It takes"
                f" {size_text(weights)} for weights and gradients,"
                f" {size_text(least.memory_bytes - weights - copies)} for activations and"
                f" {size_text(copies)} for what is copied while it computes."
            )


def _alone_bytes(costs: StageCosts, segment: int, forward_only: bool) -> int:
    """Bytes in which the segment can run all its passes in stages of its own."""
    kinds = [StageKind.F]
    if not forward_only and segment == len(costs.chain.segments) - 1:
        kinds = [StageKind.FB]
    elif not forward_only and segment >= costs.chain.first_backward:
        kinds.append(StageKind.B)
    return max(costs.of(Stage(0, kind, segment, segment)).memory_bytes for kind in kinds)


def _least(costs: StageCosts, segment: int, forward_only: bool) -> StageCost:
    """The stage that takes most memory of all that run the segment's passes, at its least."""
    last = len(costs.chain.segments) - 1

    def least(kind: StageKind, lowest: int, highest: int) -> StageCost:
        firsts, lasts = range(lowest, segment + 1), range(segment, highest + 1)
        return min((costs.of(Stage(0, kind, i, k)) for i in firsts for k in lasts), key=_memory)

    if forward_only:
        return least(StageKind.F, 0, last)
    fused = min((costs.of(Stage(0, StageKind.FB, i, last)) for i in range(segment + 1)), key=_memory)
    if segment == last:
        return fused
    apart = least(StageKind.F, 0, last - 1)
    if segment >= costs.chain.first_backward:
        apart = max(apart, least(StageKind.B, costs.chain.first_backward, last - 1), key=_memory)
    return min(fused, apart, key=_memory)


def _memory(cost: StageCost) -> int:
    return cost.memory_bytes
