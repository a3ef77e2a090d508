"""What no dispatch of a chain can beat, whatever the stages, the replicas and the traffic."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rpcompile.ir import Stage, StageKind
from rpcompile.round_robin_time import StageCosts

if TYPE_CHECKING:
    from rpcompile.dispatch_costs import Tables
    from rpcompile.dispatch_time import Machine
    from rpcompile.ir import SegmentChain


def least_seconds(
    chain: SegmentChain, tables: Tables, machine: Machine, microbatches: int, most_bytes: float = math.inf
) -> float:
    """A lower bound on the time of one iteration, under the model of `dispatch_time`.

    All work must be done, by GPUs of these speeds; no GPU computes before the first segment's
    weights are somewhere, nor after the last backward, whose gradient must still leave. One
    microbatch goes forward and back through all segments one after the other, while other GPUs may
    recompute. Every segment's weights are uploaded at least once for each pass. Chained iterations hide
    both ends, and nothing else; but an upload waits for its segment's gradients of the iteration two before.

    The longer the fused stage, the less is computed twice; but it must fit on some GPU, and of its r jobs
    one has M / r microbatches, which come one after the other, or r are too many for the traffic allowed.

    Args:
        chain: The segments.
        tables: Their prices.
        machine: What they run on.
        microbatches: Number of microbatches.
        most_bytes: Most bytes to upload in an iteration.
    """
    segments, n = chain.segments, tables.segments
    forward = [segment.forward_s for segment in segments]
    costs = StageCosts(chain, machine.speed.size, microbatches)
    first, largest = chain.first_backward, float(machine.limit_bytes.max())
    begins = [
        begin
        for begin in range(tables.first_fused, n)
        if costs.of(Stage(0, StageKind.FB, begin, n - 1)).memory_bytes <= largest
    ]
    path_s = sum(forward) + sum(segment.backward_s for segment in segments[first:])
    begin = min(begins, default=n)
    uploads = sum(s.weight_bytes for s in segments) + sum(s.weight_bytes for s in segments[first:begin])
    uploads -= sum(t.weight_bytes * 2 * len(t.segments) for t in chain.tied)
    work_s = min((_busy_s(chain, begin, machine, microbatches, most_bytes) for begin in begins), default=0.0)
    work_s = 0.0 if math.isinf(work_s) else work_s
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


def _busy_s(chain: SegmentChain, begin: int, machine: Machine, microbatches: int, most_bytes: float) -> float:
    """What all GPUs, and the fused job that has most to do, need at least if the fused stage begins there.

    Infinite if even one job of that stage is too much traffic.
    """
    before, fused = chain.segments[:begin], chain.segments[begin:]
    behind = before[chain.first_backward :]
    tied = sum(t.weight_bytes * len(t.segments) for t in chain.tied)
    fused_bytes = sum(s.weight_bytes for s in fused) - tied
    others_bytes = sum(s.weight_bytes for s in (*before, *behind)) - 2 * tied
    room = (most_bytes * (1 + 1e-9) - others_bytes) / max(1, fused_bytes)
    jobs = math.floor(min(room, machine.speed.size, microbatches))
    if jobs < 1:
        return math.inf
    forward_s = sum(s.forward_s for s in before)
    fused_s = sum(s.forward_s + s.backward_s for s in fused)
    again_s = sum(s.recompute_s + s.backward_s for s in behind)
    all_s = microbatches * (forward_s + fused_s + again_s) / float(machine.speed.sum())
    line_s = math.ceil(microbatches / jobs) * fused_s
    if machine.iterations > 1:
        # From a segment's upload to its gradients, which the upload of the iteration two behind waits for.
        updated = [i for i, s in enumerate(chain.segments) if s.weight_bytes and s.gradient_bytes]
        first = min(updated, default=len(chain.segments))
        line_s += sum(s.forward_s + s.backward_s for s in before[first:])
        line_s = line_s / 2 if updated else 0.0
    else:
        line_s += forward_s + sum(s.backward_s for s in behind)
    return max(all_s, line_s / float(machine.speed.max()))
