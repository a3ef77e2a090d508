"""Predicts when every action of a schedule runs and what memory that takes.

Each queue runs its actions in order; an action starts when the one before it on its queue and the
actions that record the events it waits for are over. On one direction of a GPU's link activations go first:
while they move, weights (up) and gradients (down) have what is left of it. `links` says what else transfers
and host work share: host memory, PCIe roots and both directions of a link.

What that leaves out: a copy that is under way cannot be stopped, so an activation waits for the piece of
weights in front of it, `CHUNK_BYTES` of `rpcompile/runtime/weight_arenas.py` at most.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from rpcompile.errors import InvalidArgument, ScheduleError
from rpcompile.event_loop import chain_events, run_shared
from rpcompile.idle_time import IdleTime, divide_idle, steady_period
from rpcompile.ir import COMPUTE_OPS, Op, Stream
from rpcompile.memory_steps import MemorySteps, memory_steps
from rpcompile.shared_links import SharedLinks

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from rpcompile.event_loop import Events
    from rpcompile.ir import Action, Schedule

    Floats = NDArray[np.float64]

__all__ = ["MemorySteps", "Step", "Timeline", "measured", "simulate", "simulate_steady"]

_FEWEST_ITERATIONS, _MOST_ITERATIONS = 8, 20  # that are chained to see them settle
_MOST_ACTIONS = 400_000  # in all of them, from the fewest on

_BOUNDS = {
    Op.PREFETCH: "upload",
    Op.LOAD: "upload",
    Op.RECEIVE: "hop",
    Op.HANDOFF: "hop",
    Op.OFFLOAD: "download",
    Op.GRADIENT: "download",
    Op.SUM: "host",
    Op.UPDATE: "host",
}


@dataclass(frozen=True)
class Step:
    """One action on the critical path.

    Attributes:
        id: The action.
        seconds: How long it took.
        bound: What takes that time: "compute", "upload", "download", "hop" (from GPU to GPU) or "host".
        wait_s: The part of `seconds` that is due to sharing links or host memory.
    """

    id: str
    seconds: float
    bound: str
    wait_s: float


class Moments(Mapping[str, float]):
    """A time for each action by id, in the order of their numbers.

    The ids of several iterations are long to write out, and most who simulate ask for none of them.
    """

    def __init__(self, events: Events, times: Floats) -> None:
        self._events = events
        self._times = times

    @cached_property
    def _by_id(self) -> dict[str, float]:
        return dict(zip(self._events.names(), self._times.tolist(), strict=True))

    def __getitem__(self, id: str) -> float:
        return self._by_id[id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_id)

    def __len__(self) -> int:
        return len(self._times)


@dataclass(frozen=True)
class Timeline:
    """When a schedule's actions run, from second 0.

    Where several iterations were simulated, ids of later ones have `#1`, `#2`, ... behind them, and
    figures are of all iterations together.

    Attributes:
        start_s: Start of each action, by id.
        end_s: End of each action, by id.
        makespan_s: End of the last action.
        busy_s: Seconds that each (GPU, stream) has an action running.
        bubble: Share of the GPUs' compute time that is idle: 1 - busy / (gpus * makespan).
        gpu_memory: Memory in use on each GPU: buffers, and the workspace of running compute actions.
        host_memory: Memory in use on the host: what the program makes there, and the model's
            weights. The caller's inputs are left out.
        steps: The critical path: actions, each starting when the one before it ends, up to the last end.
        idle: Where the GPUs' idle compute time lies; see `rpcompile/idle_time.py`.
        weight_bytes: Weights and buffers uploaded.
        upload_bytes: All bytes uploaded.
        download_bytes: All bytes downloaded.
        iteration_end_s: End of the last action of each iteration.
        rotate: GPUs by which each iteration is shifted against the one before.
    """

    start_s: Mapping[str, float]
    end_s: Mapping[str, float]
    makespan_s: float
    busy_s: Mapping[tuple[int, Stream], float]
    bubble: float
    gpu_memory: tuple[MemorySteps, ...]
    host_memory: MemorySteps
    steps: tuple[Step, ...]
    idle: IdleTime
    weight_bytes: int
    upload_bytes: int
    download_bytes: int
    iteration_end_s: tuple[float, ...]
    rotate: int

    @property
    def gpu_peak_bytes(self) -> tuple[int, ...]:
        return tuple(steps.peak_bytes for steps in self.gpu_memory)

    @property
    def host_peak_bytes(self) -> int:
        return self.host_memory.peak_bytes

    @property
    def critical_path(self) -> tuple[str, ...]:
        """Ids of the critical path."""
        return tuple(step.id for step in self.steps)

    @property
    def bound_s(self) -> Mapping[str, float]:
        """Seconds of the critical path by what takes them, "wait" being what sharing adds."""
        found: dict[str, float] = defaultdict(float)
        for step in self.steps:
            found[step.bound] += step.seconds - step.wait_s
            found["wait"] += step.wait_s
        return {bound: seconds for bound, seconds in found.items() if seconds > 0}

    @property
    def period_s(self) -> float:
        """Seconds an iteration takes once iterations have settled; see `steady_period`.

        Where they rotate and do not repeat yet, the mean over the last ones that begin on every GPU once.

        Raises:
            InvalidArgument: Only one iteration was simulated.
        """
        if len(self.iteration_end_s) < 2:
            raise InvalidArgument("one iteration has no period; use simulate(schedule, iterations=16) or so")
        # Nothing follows the last one and takes bandwidth from it: it may end early.
        ends_s = self.iteration_end_s[:-1] if len(self.iteration_end_s) > 2 else self.iteration_end_s
        period_s, repeats = steady_period(ends_s)
        gpus = len(self.gpu_memory)
        turn = gpus // math.gcd(self.rotate, gpus)
        if not repeats and turn < len(ends_s):
            span = turn * max(1, len(ends_s) // 2 // turn)
            period_s = (ends_s[-1] - ends_s[-1 - span]) / span
        # What has not settled may seem faster for a while than the GPU with most work can be for long.
        busy_s = [seconds for (_, stream), seconds in self.busy_s.items() if stream is Stream.COMPUTE]
        most_s = sum(busy_s) / gpus if self.rotate else max(busy_s, default=0.0)
        return max(period_s, most_s / len(self.iteration_end_s))

    @property
    def steady_bubble(self) -> float:
        """Share of the GPUs' compute time that is idle once iterations have settled.

        Raises:
            InvalidArgument: Only one iteration was simulated.
        """
        computing = (1 - self.bubble) * self.makespan_s / len(self.iteration_end_s)
        return max(0.0, 1 - computing / self.period_s) if self.period_s else 0.0


def simulate(
    schedule: Schedule,
    *,
    links: SharedLinks | None = None,
    iterations: int = 1,
    mode: str | None = None,
    rotate: int | None = None,
) -> Timeline:
    """Runs a schedule on paper.

    Args:
        schedule: With events; without them, queues run independently of each other.
        links: What transfers and host work share besides each GPU's link; None for nothing.
        iterations: How many, one behind the other; GPUs do not pause between them.
        mode: How they are chained: "sync" (an upload waits for its segment's UPDATE in the iteration
            before; without UPDATEs, for everything) or "async" (for that of the iteration before the last);
            None: as the schedule says.
        rotate: GPUs by which each iteration is shifted against the one before; None: as the schedule says.

    Returns:
        The timeline. A buffer takes memory from the start of the first action that writes it to the
        end of the one that frees it, or for good.

    Raises:
        InvalidArgument: An argument is out of range, or an action's time is negative or not finite.
        ScheduleError: A deadlock, an event that nobody or more than one action records, or a buffer
            without a size.
    """
    mode = mode or ("async" if schedule.mode == "async" else "sync")
    events = chain_events(schedule, iterations, mode, schedule.rotate if rotate is None else rotate)
    starts, ends = run_shared(events, links or SharedLinks(None))
    timeline = _timeline(events, starts, ends)
    return replace(timeline, steps=_critical_path(events, starts, ends))


def simulate_steady(schedule: Schedule, links: SharedLinks | None = None) -> Timeline:
    """Runs as many iterations as show what each takes once they have settled.

    Where iterations rotate, that is the mean over the GPUs on which the schedule may begin, as far as
    `_MOST_ITERATIONS` and `_MOST_ACTIONS` reach.

    Args:
        schedule: With events; its mode and rotation say how iterations follow one another.
        links: As for `simulate`.
    """
    turn = schedule.gpus // math.gcd(schedule.rotate, schedule.gpus)
    within = _MOST_ACTIONS // max(1, sum(len(queue.actions) for queue in schedule.queues))
    most = max(_FEWEST_ITERATIONS, min(_MOST_ITERATIONS, within))
    iterations = max(_FEWEST_ITERATIONS, min(2 * turn + 2, most))
    timeline = simulate(schedule, links=links, iterations=iterations)
    # Turns that are not those of the rotation show when each has come twice.
    if not steady_period(timeline.iteration_end_s[:-1])[1] and 2 * iterations <= most:
        return simulate(schedule, links=links, iterations=2 * iterations)
    return timeline


def measured(schedule: Schedule, times: Mapping[str, tuple[float, float]]) -> Timeline:
    """The timeline of a run, in the form that `simulate` gives a prediction.

    Args:
        schedule: What was run.
        times: Start and end of every action by id, in seconds of any clock.

    Returns:
        The timeline from second 0, without UPDATEs, which `step` does later. Its memory is that of the
        schedule's buffers, by their predicted sizes, at the measured times; it has no critical path.

    Raises:
        ScheduleError: An action has no times.
    """
    queues = (
        replace(queue, actions=tuple(action for action in queue.actions if action.op is not Op.UPDATE))
        for queue in schedule.queues
    )
    events = chain_events(replace(schedule, queues=tuple(queues)), 1, "sync", 0)
    missing = [action.id for action in events.actions if action.id not in times]
    if missing:
        raise ScheduleError(f"{missing[0]} has no measured times; record the run of this schedule")
    zero = min((times[action.id][0] for action in events.actions), default=0.0)
    starts = np.array([times[action.id][0] - zero for action in events.actions], np.float64)
    ends = np.array([times[action.id][1] - zero for action in events.actions], np.float64)
    return _timeline(events, starts, ends)


def _timeline(events: Events, starts: Floats, ends: Floats) -> Timeline:
    """Everything but the critical path."""
    gpus, iterations = events.schedule.gpus, events.iterations
    makespan_s = float(ends.max(initial=0.0))
    busy_s, compute = _queues(events, starts, ends)
    compute_s = sum(seconds for (_, stream), seconds in busy_s.items() if stream is Stream.COMPUTE)
    memory = memory_steps(events, starts, ends)
    last_s = ends.reshape(iterations, len(events.actions)).max(axis=1, initial=0.0)
    weights, up, down = (_nbytes(events.actions, ops) * iterations for ops in (_WEIGHTS, _UP, _DOWN))
    return Timeline(
        start_s=Moments(events, starts),
        end_s=Moments(events, ends),
        makespan_s=makespan_s,
        busy_s=busy_s,
        bubble=1 - compute_s / (gpus * makespan_s) if makespan_s else 0.0,
        gpu_memory=tuple(memory[:-1]),
        host_memory=memory[-1],
        steps=(),
        idle=_idle(events, compute, starts, ends, makespan_s),
        weight_bytes=weights,
        upload_bytes=up,
        download_bytes=down,
        iteration_end_s=tuple(last_s.tolist()),
        rotate=events.rotate,
    )


_WEIGHTS = frozenset({Op.PREFETCH})
_UP = frozenset({Op.PREFETCH, Op.LOAD, Op.RECEIVE})
_DOWN = frozenset({Op.HANDOFF, Op.OFFLOAD, Op.GRADIENT})


def _nbytes(actions: Sequence[Action], ops: frozenset[Op]) -> int:
    return sum(action.nbytes for action in actions if action.op in ops)


def _queues(
    events: Events, starts: Floats, ends: Floats
) -> tuple[dict[tuple[int, Stream], float], list[NDArray[np.int32]]]:
    """Busy seconds of each queue, and the numbers of each GPU's compute actions in order."""
    busy_s: dict[tuple[int, Stream], float] = {}
    compute = [np.zeros(0, np.int32)] * events.schedule.gpus
    computes = np.array([action.op in COMPUTE_OPS for action in events.actions], np.bool_)
    for order in events.order:
        if not len(order):
            continue
        stream = events.actions[order[0] % len(events.actions)].stream
        gpu = events.gpu(int(order[0]))
        busy_s[gpu, stream] = sum((ends[order] - starts[order]).tolist())
        if stream is Stream.COMPUTE:
            compute[gpu] = order[computes[order % len(events.actions)]]
    return busy_s, compute


def _idle(
    events: Events, compute: list[NDArray[np.int32]], starts: Floats, ends: Floats, makespan_s: float
) -> IdleTime:
    """A recompute counts as if it ended where its backward starts: their wait lies before both."""
    begin: list[list[float]] = []
    end: list[list[float]] = []
    backward: list[list[bool]] = []
    again = np.array([action.op is Op.RECOMPUTE for action in events.actions], np.bool_)
    forward = np.array([action.op is Op.FORWARD for action in events.actions], np.bool_)
    for order in compute:
        action = order % max(1, len(events.actions))
        ahead_s = np.where(again[action], ends[order] - starts[order], 0.0)
        own = np.flatnonzero(~again[action])
        ahead_s = np.concatenate(([0.0], ahead_s))[own]  # of the action in front of each
        begin.append((starts[order[own]] - ahead_s).tolist())
        end.append(ends[order[own]].tolist())
        backward.append((~forward[action[own]]).tolist())
    return divide_idle(begin, end, backward, makespan_s, whole_warm_up=False)


def _critical_path(events: Events, starts: Floats, ends: Floats) -> tuple[Step, ...]:
    """From the last end backwards, each time to what an action waited for last."""
    before = events.before()
    path: list[Step] = []
    number = int(ends.argmax()) if len(ends) else -1
    while number >= 0:
        action = events.actions[number % len(events.actions)]
        seconds = float(ends[number] - starts[number])
        wait_s = seconds - action.seconds if seconds > action.seconds * (1 + 1e-9) else 0.0
        path.append(Step(events.name(number), seconds, _BOUNDS.get(action.op, "compute"), wait_s))
        sources = [int(before[number])] if before[number] >= 0 else []
        sources += events.edges.of(number)
        number = max(sources, key=ends.__getitem__, default=-1)
    return tuple(reversed(path))
