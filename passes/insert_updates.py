"""Adds the optimizer's work on the host to a schedule, segment by segment.

Before -> after, one segment::

    gpu0 d2h   0G@0.0              gpu0 d2h   0G@0.0
                                   gpu0 host  0U@0.0      reads host:gradients.j0.s0, writes host:updated.s0

There is one host queue, under GPU 0. An UPDATE belongs to the last job that makes a gradient of its
segment. `host:updated.s0` takes the place of `host:weights.s0`, which every upload of this iteration
has read by then: it adds no memory, and the next iteration's uploads of segment 0 wait for it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from typing import TYPE_CHECKING

from rpcompile import buffers, stage_bytes
from rpcompile.errors import InvalidArgument, ScheduleError
from rpcompile.ir import Action, ActionId, Op, Queue, Schedule, Stream
from rpcompile.passes.insert_event_waits import InsertEventWaits
from rpcompile.simulate import simulate

if TYPE_CHECKING:
    from rpcompile.ir import SegmentChain

_NORM_BYTES = 4


@dataclass(frozen=True)
class InsertUpdates:
    """Schedule -> Schedule, with one UPDATE for each segment that has a gradient.

    An UPDATE sums the gradients of all jobs in job order and steps the segment's parameters. A tied
    tensor is updated with its first segment, from the gradients of all its segments.

    Attributes:
        chain: The segments.
        seconds_per_parameter: Of the optimizer's step on the host. Default: 30 bytes a parameter
            (AdamW on float32 masters, with the cast to 16 bits) at 200 GB/s.
        parameter_bytes: Size of one element of a gradient.
        host_bytes_per_s: Memory bandwidth for sums and norms.
        clip: Scale gradients by their global norm: one more UPDATE sums what several jobs made and
            writes `host:norm`, for which all others wait. The norm of a gradient that one job made is
            taken on its GPU and costs nothing here.
        order: Segments in the order of their updates. None: the lowest that is ready comes first, in
            simulated time (with `clip` all are ready at once).
    """

    chain: SegmentChain
    seconds_per_parameter: float = 0.15e-9
    parameter_bytes: int = 2
    host_bytes_per_s: float = 200e9
    clip: bool = False
    order: tuple[int, ...] | None = None

    name = "insert-updates"

    def run(self, schedule: Schedule) -> Schedule:
        """Adds the host's queue.

        Args:
            schedule: With transfers; before `insert-event-waits`.

        Returns:
            The schedule; as it is if no segment has a gradient.

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
        if not made:
            return schedule
        work = _Updates(self, schedule, {s: dict(sorted(jobs.items())) for s, jobs in sorted(made.items())})
        order = work.ready_order() if self.order is None else self._checked_order(work)
        actions = [work.norm()] if self.clip else []
        actions += [work.update(segment) for segment in order]
        sizes = dict.fromkeys((name for action in actions for name in action.writes), 0)
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

    def gradients(self, segment: int) -> list[str]:
        """Those of the segment, and of segments that share a tensor that is updated with it."""
        mine = {segment}
        for tied in self.tied:
            mine |= set(tied.segments) if min(tied.segments) == segment else set()
        return [name for other in sorted(mine) for name in self.made.get(other, {}).values()]

    def update(self, segment: int) -> Action:
        options = self.options
        reads = [*self.gradients(segment), *map(buffers.updated, self.firsts(segment))]
        seconds = self.own_bytes[segment] / options.parameter_bytes * options.seconds_per_parameter
        if options.clip:
            reads.append(buffers.NORM)
        else:
            seconds += self._sum_s(segment)
        return self._action(segment, segment, seconds, reads, buffers.updated(segment))

    def norm(self) -> Action:
        seconds = 0.0
        for segment, jobs in self.made.items():
            if len(jobs) > 1:
                seconds += self._sum_s(segment) + self.own_bytes[segment] / self.options.host_bytes_per_s
        reads = [name for jobs in self.made.values() for name in jobs.values()]
        return self._action(max(self.made), None, seconds, reads, buffers.NORM)

    def _sum_s(self, segment: int) -> float:
        """Of adding up what several jobs made; one addition reads two numbers and writes one."""
        added = (len(self.made[segment]) - 1) * self.own_bytes[segment]
        for tied in self.tied:
            if min(tied.segments) == segment:
                # Where two uses lie in one stage, its job has summed them.
                jobs = {job for other in tied.segments for job in self.made.get(other, {})}
                added += len(jobs - self.made[segment].keys()) * tied.gradient_bytes
        return 3 * added / self.options.host_bytes_per_s

    def _action(
        self, segment: int, part: int | None, seconds: float, reads: list[str], target: str
    ) -> Action:
        job = self.schedule.jobs[max(self.made[segment])]
        return Action(
            id=str(ActionId(job.stage, Op.UPDATE, job=job.index, part=part)),
            gpu=0,
            stream=Stream.HOST,
            op=Op.UPDATE,
            job=job.index,
            stage=job.stage,
            seconds=seconds,
            reads=tuple(reads),
            writes=(target,),
        )

    def ready_order(self) -> tuple[int, ...]:
        """Lowest first among those whose gradients are there when the host is free."""
        if self.options.clip:
            return tuple(self.made)
        timed = simulate(InsertEventWaits().run(self.schedule))
        ends = {
            buffer: timed.end_s[action.id]
            for action in self.schedule.actions()
            if action.op is Op.GRADIENT
            for buffer in action.writes
        }
        coming = sorted((max(ends[name] for name in self.gradients(s)), s) for s in self.made)
        ready: list[int] = []
        order: list[int] = []
        now = 0.0
        while coming or ready:
            while coming and (coming[0][0] <= now or not ready):
                moment, segment = coming.pop(0)
                now = max(now, moment)
                heappush(ready, segment)
            segment = heappop(ready)
            # Tied weights that are updated with a lower segment have to wait for it.
            behind = [first for first in self.firsts(segment) if first not in order]
            if behind:
                moment = max(moment for moment, first in coming if first in behind)
                coming = sorted([*coming, (moment, segment)], key=lambda pair: (pair[0], pair[1]))
                continue
            order.append(segment)
            now += self.update(segment).seconds
        return tuple(order)
