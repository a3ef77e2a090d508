"""Why GPUs idle: every gap between compute actions, and what each part of it waits for.

The wait of an action is traced back from its start: the action that ended just then is to blame for the
time it ran, what that one waited for is to blame for the time before, and so on to the gap's beginning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rpcompile.ir import Op, Stream
from rpcompile.ordering import ActionGraph

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


def gaps(schedule: Schedule, timeline: Timeline) -> tuple[Gap, ...]:
    """Every gap of every GPU from second 0 to the end of the last action, by GPU, then time.

    Args:
        schedule: With events.
        timeline: Its simulation.
    """
    graph = ActionGraph.from_events(schedule)
    number_of = {action.id: number for number, action in enumerate(graph.actions)}
    found: list[Gap] = []
    working = {queue.gpu: queue.actions for queue in schedule.queues if queue.stream is Stream.COMPUTE}
    for gpu in range(schedule.gpus):
        free_s = 0.0
        for action in working.get(gpu, ()):
            if action.op is Op.FREE:
                continue
            start_s = timeline.start_s[action.id]
            if start_s > free_s + _SMALLEST_S:
                causes = _blame(graph, timeline, number_of[action.id], free_s)
                found.append(Gap(gpu, free_s, start_s, action.id, action.stage, causes))
            free_s = max(free_s, timeline.end_s[action.id])
        if timeline.makespan_s > free_s + _SMALLEST_S:
            rest = timeline.makespan_s - free_s
            found.append(Gap(gpu, free_s, timeline.makespan_s, None, None, {DRAIN: rest}))
    return tuple(found)


def _blame(graph: ActionGraph, timeline: Timeline, number: int, since_s: float) -> dict[str, float]:
    """Seconds from `since_s` to an action's start, by cause."""
    causes: dict[str, float] = {}
    job = graph.actions[number].job
    until_s = timeline.start_s[graph.actions[number].id]
    while until_s > since_s + _SMALLEST_S:
        source = _last_source(graph, timeline, number)
        if source is None:
            causes[COPY] = causes.get(COPY, 0.0) + until_s - since_s
            break
        action = graph.actions[source]
        began_s = max(since_s, timeline.start_s[action.id])
        if began_s < until_s:
            cause = _cause(action, job)
            causes[cause] = causes.get(cause, 0.0) + until_s - began_s
            until_s = began_s
        number = source
    return causes


def _last_source(graph: ActionGraph, timeline: Timeline, number: int) -> int | None:
    previous = graph.previous(number)
    sources = graph.predecessors[number] if previous is None else (previous, *graph.predecessors[number])
    return max(sources, key=lambda source: timeline.end_s[graph.actions[source].id], default=None)


def _cause(action: Action, job: int) -> str:
    if action.op is Op.PREFETCH:
        return UPLOAD if action.job == job else OTHER_UPLOAD
    return _CAUSES.get(action.op, OTHER_STAGE)
