"""Predicts when every action of a schedule runs and what memory that takes.

Each queue runs its actions in order; an action starts when the one before it on its queue and the
actions that record the events it waits for are over. Queues do not slow one another down: shared
PCIe roots and host bandwidth are not modelled.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from rpcompile import buffers
from rpcompile.errors import ScheduleError
from rpcompile.ir import Stream
from rpcompile.ordering import ActionGraph

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from rpcompile.ir import Schedule


@dataclass(frozen=True)
class MemorySteps:
    """Memory in use: `nbytes[i]` from `times_s[i]` on."""

    times_s: tuple[float, ...]
    nbytes: tuple[int, ...]

    @property
    def peak_bytes(self) -> int:
        return max(self.nbytes, default=0)


@dataclass(frozen=True)
class Timeline:
    """When a schedule's actions run, on an idle machine, from second 0.

    Attributes:
        start_s: Start of each action, by id.
        end_s: End of each action, by id.
        makespan_s: End of the last action.
        busy_s: Seconds of work of each (GPU, stream).
        bubble: Share of the GPUs' compute time that is idle: 1 - busy / (gpus * makespan).
        gpu_memory: Memory in use on each GPU: buffers, and the workspace of running compute actions.
        host_memory: Memory in use on the host: what the program makes there, and the model's
            weights. The caller's inputs are left out.
        critical_path: Ids of actions, each starting when the one before it ends, up to the last end.
    """

    start_s: Mapping[str, float]
    end_s: Mapping[str, float]
    makespan_s: float
    busy_s: Mapping[tuple[int, Stream], float]
    bubble: float
    gpu_memory: tuple[MemorySteps, ...]
    host_memory: MemorySteps
    critical_path: tuple[str, ...]

    @property
    def gpu_peak_bytes(self) -> tuple[int, ...]:
        return tuple(steps.peak_bytes for steps in self.gpu_memory)

    @property
    def host_peak_bytes(self) -> int:
        return self.host_memory.peak_bytes


def simulate(schedule: Schedule) -> Timeline:
    """Runs a schedule on paper.

    Args:
        schedule: With events; without them, queues run independently of each other.

    Returns:
        The timeline. A buffer takes memory from the start of the first action that writes it to the
        end of the one that frees it, or for good.

    Raises:
        ScheduleError: A deadlock, an event that nobody or more than one action records, or a buffer
            without a size.
    """
    graph = ActionGraph.from_events(schedule)
    starts = [0.0] * len(graph.actions)
    ends = list(starts)
    causes: list[int | None] = [None] * len(graph.actions)
    for number in graph.execution_order():
        previous = graph.previous(number)
        sources = graph.predecessors[number] if previous is None else (previous, *graph.predecessors[number])
        if sources:
            causes[number] = max(sources, key=ends.__getitem__)
            starts[number] = max(ends[source] for source in sources)
        ends[number] = starts[number] + graph.actions[number].seconds
    busy_s = {
        (queue.gpu, queue.stream): sum(action.seconds for action in queue.actions)
        for queue in schedule.queues
    }
    makespan_s = max(ends, default=0.0)
    compute_s = sum(seconds for (_, stream), seconds in busy_s.items() if stream is Stream.COMPUTE)
    memory = _memory(schedule, starts, ends)
    return Timeline(
        start_s={action.id: start for action, start in zip(graph.actions, starts, strict=True)},
        end_s={action.id: end for action, end in zip(graph.actions, ends, strict=True)},
        makespan_s=makespan_s,
        busy_s=busy_s,
        bubble=1 - compute_s / (schedule.gpus * makespan_s) if makespan_s else 0.0,
        gpu_memory=tuple(memory[buffers.gpu(gpu)] for gpu in range(schedule.gpus)),
        host_memory=memory[buffers.HOST],
        critical_path=_critical_path(graph, ends, causes),
    )


def measured(schedule: Schedule, times: Mapping[str, tuple[float, float]]) -> Timeline:
    """The timeline of a run, in the form that `simulate` gives a prediction.

    Args:
        schedule: What was run.
        times: Start and end of every action by id, in seconds of any clock.

    Returns:
        The timeline from second 0. Its memory is that of the schedule's buffers, by their predicted sizes, at
        the measured times; its critical path is empty.

    Raises:
        ScheduleError: An action has no times.
    """
    actions = list(schedule.actions())
    missing = [action.id for action in actions if action.id not in times]
    if missing:
        raise ScheduleError(f"{missing[0]} has no measured times; record the run of this schedule")
    zero = min((times[action.id][0] for action in actions), default=0.0)
    starts = [times[action.id][0] - zero for action in actions]
    ends = [times[action.id][1] - zero for action in actions]
    makespan_s = max(ends, default=0.0)
    busy_s: dict[tuple[int, Stream], float] = defaultdict(float)
    for action, start, end in zip(actions, starts, ends, strict=True):
        busy_s[action.gpu, action.stream] += end - start
    compute_s = sum(seconds for (_, stream), seconds in busy_s.items() if stream is Stream.COMPUTE)
    memory = _memory(schedule, starts, ends)
    return Timeline(
        start_s={action.id: start for action, start in zip(actions, starts, strict=True)},
        end_s={action.id: end for action, end in zip(actions, ends, strict=True)},
        makespan_s=makespan_s,
        busy_s=dict(busy_s),
        bubble=1 - compute_s / (schedule.gpus * makespan_s) if makespan_s else 0.0,
        gpu_memory=tuple(memory[buffers.gpu(gpu)] for gpu in range(schedule.gpus)),
        host_memory=memory[buffers.HOST],
        critical_path=(),
    )


def _critical_path(graph: ActionGraph, ends: list[float], causes: list[int | None]) -> tuple[str, ...]:
    path: list[str] = []
    number = max(range(len(ends)), key=ends.__getitem__) if ends else None
    while number is not None:
        path.append(graph.actions[number].id)
        number = causes[number]
    return tuple(reversed(path))


def _memory(schedule: Schedule, starts: list[float], ends: list[float]) -> dict[str, MemorySteps]:
    """Memory of every space over time."""
    born: dict[str, float] = {}
    changes: dict[str, list[tuple[float, int]]] = defaultdict(list)
    base = 0
    for (number, action), start in zip(enumerate(schedule.actions()), starts, strict=True):
        for buffer in action.writes:
            born[buffer] = min(start, born.get(buffer, start))
        for buffer in action.frees:
            changes[buffers.space_of(buffer)].append((ends[number], -_size(schedule, buffer)))
        if action.workspace_bytes:
            space = changes[buffers.gpu(action.gpu)]
            space += [(start, action.workspace_bytes), (ends[number], -action.workspace_bytes)]
    for buffer, start in born.items():
        changes[buffers.space_of(buffer)].append((start, _size(schedule, buffer)))
    for buffer, nbytes in schedule.buffers.items():
        name = buffers.parse(buffer)
        base += nbytes if name.space == buffers.HOST and name.kind == "weights" else 0
    spaces = [buffers.HOST, *map(buffers.gpu, range(schedule.gpus))]
    return {space: _steps(changes[space], base if space == buffers.HOST else 0) for space in spaces}


def _size(schedule: Schedule, buffer: str) -> int:
    if buffer not in schedule.buffers:
        raise ScheduleError(f"{buffer} has no size; add it to the schedule's buffers")
    return schedule.buffers[buffer]


def _steps(changes: Iterable[tuple[float, int]], base: int) -> MemorySteps:
    """Sums changes up. Those of one moment count as one: what comes then takes the place of what goes."""
    ordered = sorted(changes)
    totals = list(accumulate((change for _, change in ordered), initial=base))[1:]
    times: list[float] = [0.0]
    nbytes: list[int] = [base]
    for (time, _), total in zip(ordered, totals, strict=True):
        if time == times[-1]:
            nbytes[-1] = total
        else:
            times.append(time)
            nbytes.append(total)
    return MemorySteps(tuple(times), tuple(nbytes))
