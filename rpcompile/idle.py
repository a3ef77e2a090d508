"""Why GPUs idle: every gap between compute actions, and what each part of it waits for.

The wait of an action is traced back from its start: the action that ended just then is to blame for the
time it ran, what that one waited for is to blame for the time before, and so on to the gap's beginning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rpcompile.event_loop import chain_events
from rpcompile.ir import Op, Stream

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rpcompile.ir import Action, Schedule
    from rpcompile.simulate import Timeline

UPLOAD, OTHER_UPLOAD, COPY = "upload", "another upload", "copy"
OTHER_STAGE, DOWNLOAD, DRAIN = "another stage", "download", "drain"
"""What a wait is for. UPLOAD: the job's own weights, on their way up. OTHER_UPLOAD: those of a job that this
one waits for. COPY: an activation or input on its way. OTHER_STAGE: the compute that makes it. DOWNLOAD: room
that a download makes. DRAIN: nothing; no work is left."""
PHRASES = {
    UPLOAD: "waiting for weights to arrive",
    OTHER_UPLOAD: "waiting for stages that wait for their weights",
    COPY: "waiting for activations to arrive",
    OTHER_STAGE: "waiting for other stages",
    DOWNLOAD: "waiting for downloads to make room",
    DRAIN: "with no work left (drain)",
}
_CAUSES = {
    Op.LOAD: COPY,
    Op.RECEIVE: COPY,
    Op.HANDOFF: COPY,
    Op.OFFLOAD: DOWNLOAD,
    Op.GRADIENT: DOWNLOAD,
    Op.FREE: DOWNLOAD,
}
_SMALLEST_S = 1e-12


@dataclass(frozen=True)
class Gap:
    """Time in which a GPU computes nothing.

    Attributes:
        gpu: The GPU.
        start_s: When it begins.
        end_s: When it ends.
        action: Id of the compute action that then starts; None if none follows.
        stage: Stage of that action; None if none follows.
        causes: Seconds by what they were spent waiting for: they add up to the gap.
    """

    gpu: int
    start_s: float
    end_s: float
    action: str | None
    stage: int | None
    causes: Mapping[str, float]

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s


def gaps(
    schedule: Schedule, timeline: Timeline, window: tuple[float, float] | None = None
) -> tuple[Gap, ...]:
    """Every gap of every GPU, by GPU, then time.

    Args:
        schedule: With events.
        timeline: Its simulation, of one or several iterations.
        window: Seconds to look at; None: from second 0 to the end of the last action.
    """
    order = _Order(schedule, timeline)
    begin_s, end_s = window or (0.0, timeline.makespan_s)
    found: list[Gap] = []
    for gpu, working in enumerate(order.compute()):
        free_s = begin_s
        for number in working:
            action = order.action(number)
            start_s = min(order.start_s[number], end_s)
            if start_s > free_s + _SMALLEST_S:
                causes = order.blame(number, free_s, start_s)
                found.append(Gap(gpu, free_s, start_s, order.names[number], action.stage, causes))
            free_s = max(free_s, order.end_s[number])
        if end_s > free_s + _SMALLEST_S:
            found.append(Gap(gpu, free_s, end_s, None, None, {DRAIN: end_s - free_s}))
    return tuple(found)


class _Order:
    """Chained iterations as numbers, with their times."""

    def __init__(self, schedule: Schedule, timeline: Timeline) -> None:
        mode = "async" if schedule.mode == "async" else "sync"
        self.events = chain_events(schedule, len(timeline.iteration_end_s), mode, timeline.rotate)
        self.names = self.events.names()
        self.start_s = [timeline.start_s[name] for name in self.names]
        self.end_s = [timeline.end_s[name] for name in self.names]
        self._before = self.events.before()

    def action(self, number: int) -> Action:
        return self.events.actions[number % len(self.events.actions)]

    def compute(self) -> list[list[int]]:
        """The numbers that each GPU computes, in order."""
        found: list[list[int]] = [[] for _ in range(self.events.schedule.gpus)]
        for order in self.events.order:
            numbers: list[int] = order.tolist()
            if numbers and self.action(numbers[0]).stream is Stream.COMPUTE:
                working = [number for number in numbers if self.action(number).op is not Op.FREE]
                found[self.events.gpu(numbers[0])] = working
        return found

    def blame(self, number: int, since_s: float, until_s: float) -> dict[str, float]:
        """Seconds of an action's wait, by cause."""
        causes: dict[str, float] = {}
        job, iteration = self.action(number).job, number // len(self.events.actions)
        while until_s > since_s + _SMALLEST_S:
            source = self._last_source(number)
            if source is None:
                causes[COPY] = causes.get(COPY, 0.0) + until_s - since_s
                break
            began_s = max(since_s, self.start_s[source])
            if began_s < until_s:
                own = iteration == source // len(self.events.actions)
                cause = _cause(self.action(source), job if own else None)
                causes[cause] = causes.get(cause, 0.0) + until_s - began_s
                until_s = began_s
            number = source
        return causes

    def _last_source(self, number: int) -> int | None:
        sources = self.events.edges.of(number)
        if self._before[number] >= 0:
            sources.append(int(self._before[number]))
        return max(sources, key=self.end_s.__getitem__, default=None)


def _cause(action: Action, job: int | None) -> str:
    if action.op is Op.PREFETCH:
        return UPLOAD if action.job == job else OTHER_UPLOAD
    return _CAUSES.get(action.op, OTHER_STAGE)
