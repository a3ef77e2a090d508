"""The part of `rpcompile/verify.py` that looks at several iterations, one behind the other.

Iteration i is to compute, forward and backward, with the weights after i updates, asynchronously after
max(i - 1, 0). Which weights an upload finds on the host follows from the order of uploads and updates alone:
there is one set of weights, asynchronously there are two, which updates write in turn and iterations read in
turn. So the last update of its set that must be over by then is the least that an upload can find there,
and the last one that can begin before the upload is over is the most. Both are to be what is asked for.

A tied tensor is read by the uploads of all its segments, and changed by the update of the first of them.
Where the caller steps, an update is as good as under way once all gradients that go into it are there, and
those of the updates before it: updates come one after another.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rpcompile import buffers
from rpcompile.errors import ScheduleError
from rpcompile.event_loop import LAGS, chain_events, raise_deadlock, run_shared
from rpcompile.ir import Op
from rpcompile.memory_steps import memory_steps
from rpcompile.ordering import ActionGraph, HappensBefore
from rpcompile.shared_links import SharedLinks

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rpcompile.event_loop import Events
    from rpcompile.ir import Partition, Schedule, SegmentChain, TiedWeight
    from rpcompile.ordering import Numbers

# The third iteration is the first to wait for an update asynchronously, the fourth for the one behind it. All
# later ones are ordered among themselves and after those before in the same way.
_ITERATIONS = 4


def memory_limits(chain: SegmentChain, partition: Partition, gpus: int) -> list[int]:
    """What may be used of each GPU, in bytes."""
    if chain.kinds:
        return [chain.hardware_of(gpu).usable_bytes for gpu in range(gpus)]
    return [partition.memory_limit_bytes] * gpus


def check_iterations(schedule: Schedule, chain: SegmentChain, limits: Sequence[int]) -> None:
    """Checks that iterations of a schedule can follow one another.

    - Every upload finds exactly the weights that the schedule's mode asks for.
    - Iterations do not wait for one another in a circle.
    - Asynchronously, `rotate` shifts iterations among GPUs that are alike, and no GPU's simulated peak over
      overlapping iterations is above its limit.

    Args:
        schedule: Of one iteration.
        chain: The segments.
        limits: Bytes that may be used of each GPU.

    Raises:
        ScheduleError: A property does not hold.
    """
    if schedule.mode != "async":
        if schedule.rotate:
            raise ScheduleError(
                f"iterations are shifted by {schedule.rotate} GPUs in mode {schedule.mode!r}, where they do "
                "not overlap; use rotate=0"
            )
        if any(action.op is Op.UPDATE for action in schedule.actions()):
            check_versions(chain_events(schedule, _ITERATIONS, "sync", 0), chain.tied, "sync")
        return
    if not 0 <= schedule.rotate < schedule.gpus:
        raise ScheduleError(
            f"iterations are shifted by {schedule.rotate} of {schedule.gpus} GPUs; "
            f"use 0 to {schedule.gpus - 1}"
        )
    if schedule.rotate and chain.kinds:
        raise ScheduleError(
            f"iterations are shifted by {schedule.rotate} GPUs, but the GPUs are not alike; use rotate=0"
        )
    events = chain_events(schedule, _ITERATIONS, "async", schedule.rotate)
    check_versions(events, chain.tied, "async")
    memory = memory_steps(events, *run_shared(events, SharedLinks(None)))
    for gpu, (steps, limit) in enumerate(zip(memory[:-1], limits, strict=True)):
        if steps.peak_bytes > limit:
            raise ScheduleError(
                f"gpu{gpu} needs {steps.peak_bytes:,} bytes at its simulated peak where iterations overlap, "
                f"over the limit of {limit:,}; use smaller stages or microbatches"
            )


@dataclass(frozen=True)
class Seen:
    """What one upload of chained iterations can find on the host, of one segment's own or one tied weight.

    Attributes:
        upload: Number of the PREFETCH.
        weight: What of it, for messages.
        wanted: The number of updates that it is to have gone through.
        least: The fewest that it can have gone through, over all orders that are allowed.
        most: The most.
        late: An action of the update wanted last that need not be over when the upload begins.
        early: An action of the last update that can begin before the upload is over.
    """

    upload: int
    weight: str
    wanted: int
    least: int
    most: int
    late: int | None
    early: int | None


def check_versions(events: Events, tied: Sequence[TiedWeight], mode: str) -> None:
    """Every upload finds the weights that DESIGN asks for, in whatever order things happen.

    Raises:
        ScheduleError: One may find others, and is named with what it does not wait for, or what does not
            wait for it; or iterations wait for one another in a circle.
    """
    names = events.names()
    for seen in versions_seen(events, tied, mode):
        if seen.least == seen.wanted == seen.most:
            continue
        count, first, second = seen.most, seen.early, seen.upload
        if seen.least < seen.wanted:
            count, first, second = seen.least, seen.upload, seen.late
        assert first is not None
        assert second is not None
        raise ScheduleError(
            f"{names[seen.upload]} may upload {seen.weight} after {count} updates, where mode {mode!r} asks "
            f"for those after {seen.wanted}: {names[first]} does not wait for {names[second]}"
        )


def versions_seen(events: Events, tied: Sequence[TiedWeight], mode: str) -> Iterator[Seen]:
    """What each upload can find, from the order of all iterations alone.

    Args:
        events: The iterations.
        tied: Tensors that several segments read.
        mode: "sync" or "async": how many sets of weights there are, and which of them an iteration reads.

    Raises:
        ScheduleError: Iterations wait for one another in a circle.
    """
    lag, count = LAGS[mode], len(events.actions)
    order, place = _chained_order(events)
    changes = _changes(events, tied)
    shifts = np.arange(events.iterations) * count
    for number, action in enumerate(events.actions):
        if action.op is not Op.PREFETCH:
            continue
        for weight, found in changes[buffers.segment_of(action.reads[0])]:
            uploads, sources = number + shifts, np.array(found) + shifts[:, None]
            # By iteration, update and source.
            first, second = place[uploads][:, None, None], place[sources][None]
            lacks = ~order.all_before(second, first)
            # Updates come one after another: behind one that cannot have begun, none can.
            cannot = np.logical_or.accumulate(order.all_before(first, second).any(axis=2), axis=1)
            for i, upload in enumerate(uploads.tolist()):
                wanted = max(0, i + 1 - lag)
                least = most = 0
                late = early = None
                for version in range(1, events.iterations + 1):
                    if (version - wanted) % lag:
                        continue  # is written to the other set
                    lacking = lacks[i, version - 1]
                    if not lacking.any():
                        least = version
                    elif version == wanted:
                        late = int(sources[version - 1, lacking.argmax()])
                    if not lacking.any() or not cannot[i, version - 1]:
                        most, early = version, int(sources[version - 1, 0])
                yield Seen(upload, weight, wanted, least, most, late, early)


def _changes(events: Events, tied: Sequence[TiedWeight]) -> dict[int, list[tuple[str, list[int]]]]:
    """Segment -> what its upload reads that is updated, and the UPDATE or the GRADIENTs of one iteration."""
    updates: dict[int, list[int]] = defaultdict(list)
    gradients: dict[int, list[int]] = defaultdict(list)
    for number, action in enumerate(events.actions):
        changed = {Op.UPDATE: updates, Op.GRADIENT: gradients, Op.SUM: gradients}.get(action.op)
        for name in action.writes if changed is not None else ():
            segment = buffers.parse(name).segment
            if changed is not None and segment is not None:
                changed[segment].append(number)
    made = updates or gradients
    found: dict[int, list[tuple[str, list[int]]]] = defaultdict(list)
    for segment, numbers in made.items():
        found[segment].append((f"the weights of segment {segment}", numbers))
    for each in tied:
        if not each.gradient_bytes:  # frozen, beside weights of its segments that may be trained
            continue
        owners = [min(each.segments)] if updates else each.segments
        numbers = [number for segment in owners for number in made.get(segment, ())]
        for segment in each.segments if numbers else ():
            found[segment].append((each.name, numbers))
    return found


def _chained_order(events: Events) -> tuple[HappensBefore, Numbers]:
    """Who is before whom in all iterations, and the number that each action has there: queue by queue."""
    numbers = np.concatenate(events.order)
    place = np.empty(len(numbers), np.int32)
    place[numbers] = np.arange(len(numbers))
    graph = ActionGraph(
        actions=tuple([events.actions[number] for number in (numbers % len(events.actions)).tolist()]),
        queue_of=np.repeat(np.arange(len(events.order), dtype=np.int32), [*map(len, events.order)]),
        edges=events.edges.renumbered(numbers, place),
    )
    try:
        return HappensBefore(graph), place
    except ScheduleError:
        raise_deadlock(events)
        raise
