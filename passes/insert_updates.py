"""Adds the optimizer's work on the host to a schedule, segment by segment.

Before -> after, one segment::

    gpu0 gradients  0G@0.0         gpu0 gradients  0G@0.0
    gpu1 gradients  0G@1.0         gpu1 gradients  0G@1.0
                                   gpu0 host       0S@1.0   adds host:gradients.j1.s0 to host:gradients.j0.s0
                                                   0U@1.0   reads host:gradients.j0.s0, writes host:updated.s0

There is one host queue, under GPU 0. Gradients of several jobs are summed as they land, in the order of
the jobs, into the first one's buffer; what landed while the host was busy is added in one pass. An UPDATE
belongs to the last job that makes a gradient of its segment. `host:updated.s0` takes the place of
`host:weights.s0`, which every upload of this iteration has read by then: it adds no memory, and the next
iteration's uploads of segment 0 wait for it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from itertools import accumulate
from typing import TYPE_CHECKING

from rpcompile import buffers, stage_bytes
from rpcompile.errors import InvalidArgument, ScheduleError
from rpcompile.event_loop import chained, run_shared
from rpcompile.ir import Action, ActionId, Op, Queue, Schedule, Stream
from rpcompile.passes.insert_event_waits import needed_order
from rpcompile.shared_links import SharedLinks

if TYPE_CHECKING:
    from rpcompile.ir import SegmentChain

_NORM_BYTES = 4

_Work = tuple[Op, int, int]  # SUM or UPDATE, segment, job whose gradient is added


@dataclass(frozen=True)
class InsertUpdates:
    """Schedule -> Schedule, with one UPDATE for each segment that has a gradient, and the SUMs before it.

    A SUM adds gradients of a segment to those of the jobs before; an UPDATE steps the segment's
    parameters. A tied tensor is updated with its first segment, from the gradients of all its segments.

    Attributes:
        chain: The segments.
        seconds_per_parameter: Of the optimizer's step on the host. Default: 30 bytes a parameter
            (AdamW on float32 masters, with the cast to 16 bits) at 200 GB/s.
        parameter_bytes: Size of one element of a gradient.
        host_bytes_per_s: Memory bandwidth for sums and norms.
        clip: Scale gradients by their global norm: one more UPDATE writes `host:norm`, for which all others
            wait. The norm of a gradient that one job made is taken on its GPU and costs nothing here; of
            what several made it is taken with the last SUM, which reads the gradient once more.
        order: Segments in the order of their updates. None: the lowest that is ready comes first, in
            simulated time (with `clip` all are ready at once).
        updates: Whether UPDATEs are added; without them, SUMs alone: the caller's optimizer does the rest.
    """

    chain: SegmentChain
    seconds_per_parameter: float = 0.15e-9
    parameter_bytes: int = 2
    host_bytes_per_s: float = 200e9
    clip: bool = False
    order: tuple[int, ...] | None = None
    updates: bool = True

    name = "insert-updates"

    def run(self, schedule: Schedule) -> Schedule:
        """Adds the host's queue.

        Args:
            schedule: With transfers; before `insert-event-waits`.

        Returns:
            The schedule; as it is if there is nothing to add.

        Raises:
            InvalidArgument: A price is negative, a size or rate not above 0, or `order` does not name
                each segment with a gradient once, or puts a tied segment before the first one.
            ScheduleError: The schedule has updates already.
        """
        self._check_options()
        made: dict[int, dict[int, str]] = defaultdict(dict)  # segment -> job -> its gradient
        for action in schedule.actions():
            if action.op is Op.UPDATE:
                raise ScheduleError(f"{action.id} is an update; insert-updates runs once")
            if action.op is Op.GRADIENT:
                for buffer in action.writes:
                    made[buffers.segment_of(buffer)][action.job] = buffer
        if not made or not (self.updates or any(len(jobs) > 1 for jobs in made.values())):
            return schedule
        work = _Updates(self, schedule, {s: dict(sorted(jobs.items())) for s, jobs in sorted(made.items())})
        order = None if self.order is None else self._checked_order(work)
        actions = work.in_order(order)
        made_here = (name for action in actions if action.op is Op.UPDATE for name in action.writes)
        sizes = dict.fromkeys(made_here, 0)
        if self.clip:
            sizes[buffers.NORM] = _NORM_BYTES
        queues = [*schedule.queues, Queue(0, Stream.HOST, tuple(actions))]
        queues.sort(key=lambda queue: (queue.gpu, tuple(Stream).index(queue.stream)))
        return replace(schedule, queues=tuple(queues), buffers={**schedule.buffers, **sizes})

    def _check_options(self) -> None:
        if self.seconds_per_parameter < 0:
            raise InvalidArgument(
                f"seconds_per_parameter is {self.seconds_per_parameter}; it must not be negative"
            )
        for option, value in (
            ("parameter_bytes", self.parameter_bytes),
            ("host_bytes_per_s", self.host_bytes_per_s),
        ):
            if value <= 0:
                raise InvalidArgument(f"{option} is {value}; it must be above 0")

    def _checked_order(self, work: _Updates) -> tuple[int, ...]:
        order = self.order or ()
        if sorted(order) != list(work.made):
            raise InvalidArgument(f"order is {order}; it must have each of {tuple(work.made)} once")
        for segment in order:
            late = [first for first in work.firsts(segment) if order.index(first) > order.index(segment)]
            if late:
                raise InvalidArgument(
                    f"order has segment {segment} before segment {late[0]}, with which its tied weights "
                    "are updated"
                )
        return order


class _Updates:
    """The updates of one schedule; `made` is segment -> job -> gradient on the host."""

    def __init__(self, options: InsertUpdates, schedule: Schedule, made: dict[int, dict[int, str]]) -> None:
        self.options = options
        self.schedule = schedule
        self.made = made
        chain = options.chain
        self.own_bytes = stage_bytes.gradient_bytes(chain, range(len(chain.segments)))
        self.tied = [tied for tied in chain.tied if tied.gradient_bytes and min(tied.segments) in made]

    def firsts(self, segment: int) -> list[int]:
        """The segments with which tied weights of this one are updated."""
        found = {min(tied.segments) for tied in self.tied if segment in tied.segments}
        return sorted(found - {segment})

    def members(self, segment: int) -> list[int]:
        """The segment, and those with gradients of a tensor that is updated with it."""
        mine = {segment}
        for tied in self.tied:
            mine |= set(tied.segments) if min(tied.segments) == segment else set()
        return sorted(mine & self.made.keys())

    def total(self, segment: int) -> str:
        """The buffer that holds the sum of a segment's gradients in the end."""
        return next(iter(self.made[segment].values()))

    def in_order(self, order: tuple[int, ...] | None) -> list[Action]:
        """The host's queue.

        Sums come as gradients land, in simulated time; so do updates, unless they wait for the norm or
        there is an `order`: the lowest of those that are ready, behind all sums that are.
        """
        landed = self._landed()
        coming = [
            (moment, (Op.SUM, segment, job))
            for segment, jobs in self.made.items()
            for job, moment in list(zip(jobs, accumulate(landed[segment], max), strict=True))[1:]
        ]
        if not self.options.updates:
            return self._as_they_come(coming)
        if not self.options.clip and order is None:
            for segment in self.made:
                moment = max(max(landed[member]) for member in self.members(segment))
                coming.append((moment, (Op.UPDATE, segment, 0)))
            return self._as_they_come(coming)
        actions = self._as_they_come(coming)
        actions += [self.norm()] * self.options.clip
        return actions + [self.update(segment) for segment in order or self.made]

    def sum(self, segment: int, jobs: list[int]) -> Action:
        """Adds gradients of some jobs, each in turn, in one pass over memory."""
        passes = len(jobs) + 2  # the others, and the total to and fro
        passes += 1 if self.options.clip and jobs[-1] == max(self.made[segment]) else 0
        seconds = passes * self.own_bytes[segment] / self.options.host_bytes_per_s
        total = self.total(segment)
        reads = [total, *(self.made[segment][job] for job in jobs)]
        return self._action(Op.SUM, jobs[-1], segment, seconds, reads, total)

    def norm(self) -> Action:
        reads = [*map(self.total, self.made)]
        seconds = sum(map(self._tied_s, self.made))
        job = max(self.made[max(self.made)])
        return self._action(Op.UPDATE, job, None, seconds, reads, buffers.NORM)

    def update(self, segment: int) -> Action:
        options = self.options
        reads = [*map(self.total, self.members(segment)), *map(buffers.updated, self.firsts(segment))]
        seconds = self.own_bytes[segment] / options.parameter_bytes * options.seconds_per_parameter
        if options.clip:
            reads.append(buffers.NORM)
        else:
            seconds += self._tied_s(segment)
        job = max(self.made[segment])
        return self._action(Op.UPDATE, job, segment, seconds, reads, buffers.updated(segment))

    def _tied_s(self, segment: int) -> float:
        """Of adding up what the segments of tied weights made that are updated with this one."""
        added = 0
        for tied in self.tied:
            if min(tied.segments) == segment:
                # Where two uses lie in one stage, its job has summed them.
                jobs = {job for other in tied.segments for job in self.made.get(other, {})}
                added += len(jobs - self.made[segment].keys()) * tied.gradient_bytes
        return 3 * added / self.options.host_bytes_per_s

    def _action(
        self, op: Op, job: int, part: int | None, seconds: float, reads: list[str], target: str
    ) -> Action:
        stage = self.schedule.jobs[job].stage
        return Action(
            id=str(ActionId(stage, op, job=job, part=part)),
            gpu=0,
            stream=Stream.HOST,
            op=op,
            job=job,
            stage=stage,
            seconds=seconds,
            reads=tuple(reads),
            writes=(target,),
        )

    def _landed(self) -> dict[int, list[float]]:
        """When each segment's gradients are on the host, by job, in simulated time."""
        events = chained(self.schedule, needed_order(self.schedule), 1, "sync", 0)
        _, ends = run_shared(events, SharedLinks(None))
        landed = {
            buffer: end
            for action, end in zip(events.actions, ends.tolist(), strict=True)
            if action.op is Op.GRADIENT
            for buffer in action.writes
        }
        return {segment: [landed[name] for name in jobs.values()] for segment, jobs in self.made.items()}

    def _as_they_come(self, coming: list[tuple[float, _Work]]) -> list[Action]:
        """The work in the order in which it is ready when the host is free."""
        coming = sorted(coming)
        ready: list[_Work] = []
        updated: set[int] = set()
        actions: list[Action] = []
        now = 0.0
        while coming or ready:
            while coming and (coming[0][0] <= now or not ready):
                moment, work = coming.pop(0)
                now = max(now, moment)
                heappush(ready, work)
            op, segment, job = work = heappop(ready)
            if op is Op.SUM:
                jobs = [job]
                while ready and ready[0][:2] == work[:2]:
                    jobs.append(heappop(ready)[2])
                actions.append(self.sum(segment, jobs))
                now += actions[-1].seconds
                continue
            # Tied weights that are updated with a lower segment have to wait for it.
            behind = [first for first in self.firsts(segment) if first not in updated]
            if behind:
                moment = max(moment for moment, other in coming if other[0] is op and other[1] in behind)
                coming = sorted([*coming, (moment, work)])
                continue
            updated.add(segment)
            actions.append(self.update(segment))
            now += actions[-1].seconds
        return actions
