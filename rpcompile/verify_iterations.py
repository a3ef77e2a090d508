"""The part of `rpcompile/verify.py` that looks at several iterations, one behind the other.

Asynchronous training computes iteration i, forward and backward, with the weights after max(i - 1, 0)
updates. Within one iteration every upload reads the same `host:weights` buffer, which nothing in it may
write (`verify` proves both), so both passes see one version. What is left to prove is which version
that is, and that iterations which overlap neither wait in a circle nor take too much memory.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from rpcompile import buffers
from rpcompile.errors import ScheduleError
from rpcompile.event_loop import chain_events
from rpcompile.ir import Op
from rpcompile.simulate import simulate

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rpcompile.event_loop import Events
    from rpcompile.ir import Partition, Schedule, SegmentChain

_ITERATIONS = 4  # the third is the first to wait for an update, the fourth for the one behind it
_LAG = 2  # iterations from a gradient to the first upload of what it has changed


def memory_limits(chain: SegmentChain, partition: Partition, gpus: int) -> list[int]:
    """What may be used of each GPU, in bytes."""
    if chain.kinds:
        return [chain.hardware_of(gpu).usable_bytes for gpu in range(gpus)]
    return [partition.memory_limit_bytes] * gpus


def check_iterations(schedule: Schedule, chain: SegmentChain, limits: Sequence[int]) -> None:
    """Checks that iterations of a schedule can follow one another asynchronously.

    - `rotate` shifts iterations among GPUs that are alike.
    - Iterations do not wait for one another in a circle.
    - Every upload of iteration i comes behind what updates its segment in iteration i - 2: its weights
      are never more than one update behind.
    - No GPU's simulated peak over overlapping iterations is above its limit.

    Args:
        schedule: Of one iteration.
        chain: The segments.
        limits: Bytes that may be used of each GPU.

    Raises:
        ScheduleError: A property does not hold.
    """
    if not 0 <= schedule.rotate < schedule.gpus:
        raise ScheduleError(
            f"iterations are shifted by {schedule.rotate} of {schedule.gpus} GPUs; "
            f"use 0 to {schedule.gpus - 1}"
        )
    if schedule.mode != "async":
        raise ScheduleError(
            f"iterations are shifted by {schedule.rotate} GPUs in mode {schedule.mode!r}, where they do not "
            "overlap; use rotate=0"
        )
    if schedule.rotate and chain.kinds:
        raise ScheduleError(
            f"iterations are shifted by {schedule.rotate} GPUs, but the GPUs are not alike; use rotate=0"
        )
    check_versions(chain_events(schedule, _ITERATIONS, "async", schedule.rotate))
    peaks = simulate(schedule, iterations=_ITERATIONS).gpu_peak_bytes
    for gpu, (peak, limit) in enumerate(zip(peaks, limits, strict=True)):
        if peak > limit:
            raise ScheduleError(
                f"gpu{gpu} needs {peak:,} bytes at its simulated peak where iterations overlap, over the "
                f"limit of {limit:,}; use smaller stages or microbatches"
            )


def check_versions(events: Events) -> None:
    """Every upload waits for what updates its segment, two iterations before.

    Raises:
        ScheduleError: One does not; names it.
    """
    count, names = len(events.actions), events.names()
    changes = _changes(events)
    for number, action in enumerate(events.actions):
        if action.op is not Op.PREFETCH:
            continue
        needed = [source for name in action.reads for source in changes.get(buffers.segment_of(name), ())]
        for i in range(_LAG, events.iterations):
            late = {source + (i - _LAG) * count for source in needed}
            late -= set(events.sources[number + i * count])
            if late:
                raise ScheduleError(
                    f"{names[number + i * count]} does not wait for {names[min(late)]}, and may upload "
                    "weights that are more than one update behind"
                )


def _changes(events: Events) -> Mapping[int, list[int]]:
    """Segment -> its update, or the gradients from which the caller updates it."""
    updates: dict[int, list[int]] = defaultdict(list)
    gradients: dict[int, list[int]] = defaultdict(list)
    for number, action in enumerate(events.actions):
        found = {Op.UPDATE: updates, Op.GRADIENT: gradients, Op.SUM: gradients}.get(action.op)
        for name in action.writes if found is not None else ():
            segment = buffers.parse(name).segment
            if found is not None and segment is not None:
                found[segment].append(number)
    return gradients | updates
