"""What no dispatch of a chain can beat, whatever the stages, the replicas and the traffic."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rpcompile.ir import Stage, StageKind
from rpcompile.round_robin_time import StageCosts

if TYPE_CHECKING:
    from rpcompile.dispatch_costs import Tables
    from rpcompile.dispatch_time import Machine
    from rpcompile.ir import SegmentChain


def least_seconds(chain: SegmentChain, tables: Tables, machine: Machine, microbatches: int) -> float:
    """A lower bound on the time of one iteration, under the model of `dispatch_time`.

    All work must be done, by GPUs of these speeds; no GPU computes before the first segment's
    weights are somewhere, nor after the last backward, whose gradient must still leave. One
    microbatch goes forward and back through all segments one after the other, while other GPUs may
    recompute. Every segment's weights are uploaded at least once for each pass. Chained iterations hide
    both ends, and nothing else.

    Args:
        chain: The segments.
        tables: Their prices.
        machine: What they run on.
        microbatches: Number of microbatches.
    """
    segments, n = chain.segments, tables.segments
    forward = [segment.forward_s for segment in segments]
    both = [segment.forward_s + segment.backward_s for segment in segments]
    costs = StageCosts(chain, machine.speed.size, microbatches)
    first, largest = chain.first_backward, float(machine.limit_bytes.max())
    # The longer the fused stage, the less is computed twice; it must fit on some GPU.
    begins = [
        begin
        for begin in range(tables.first_fused, n)
        if costs.of(Stage(0, StageKind.FB, begin, n - 1)).memory_bytes <= largest
    ]
    microbatch_s = min(
        (sum(forward[:begin]) + sum(both[first:begin]) + sum(both[begin:]) for begin in begins), default=0.0
    )
    path_s = sum(forward) + sum(segment.backward_s for segment in segments[first:])
    begin = min(begins, default=n)
    uploads = sum(s.weight_bytes for s in segments) + sum(s.weight_bytes for s in segments[first:begin])
    uploads -= sum(t.weight_bytes * 2 * len(t.segments) for t in chain.tied)
    work_s = microbatch_s * microbatches / float(machine.speed.sum())
    link_s = max(0, uploads) / machine.up_bytes_per_s / machine.speed.size
    update_s = float(tables.updated_bytes[-1]) * machine.update_s_per_byte
    if machine.iterations > 1:
        return max(work_s, link_s, update_s)
    ends_s = 0.0
    if segments[0].weight_bytes:
        ends_s += segments[0].weight_bytes / machine.up_bytes_per_s + machine.latency_s
        ends_s += segments[0].gradient_bytes * machine.update_s_per_byte
    if segments[first].gradient_bytes:
        ends_s += segments[first].gradient_bytes / machine.down_bytes_per_s + machine.latency_s
    return ends_s + max(work_s, path_s / float(machine.speed.max()), link_s - ends_s)
