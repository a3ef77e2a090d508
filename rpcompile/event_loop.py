"""The order of one or several iterations of a schedule, as numbers, and runs through it.

Action `number` of iteration `i` of a schedule with n actions has the number `i * n + number`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from rpcompile import buffers, fluid_rates
from rpcompile.errors import InvalidArgument, ScheduleError, require_at_least
from rpcompile.ir import DOWN_STREAMS, UP_STREAMS, Op, Stream
from rpcompile.ordering import ActionGraph

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rpcompile.ir import Action, Schedule
    from rpcompile.shared_links import SharedLinks

LAGS = {"sync": 1, "async": 2}  # iterations from an update to the first upload of what it has changed
_RESIDENT_JOBS = 2
_URGENT = frozenset({Op.LOAD, Op.RECEIVE, Op.HANDOFF, Op.OFFLOAD})


@dataclass(frozen=True)
class Events:
    """Iterations of a schedule, each queue's one behind the other.

    Attributes:
        schedule: What is repeated.
        actions: The actions of one iteration.
        iterations: How often it runs.
        rotate: GPUs by which each iteration is shifted against the one before.
        order: By physical queue, the numbers that it runs.
        sources: By number, the numbers of other queues that it waits for.
    """

    schedule: Schedule
    actions: tuple[Action, ...]
    iterations: int
    rotate: int
    order: list[list[int]]
    sources: list[tuple[int, ...]]

    def gpu(self, number: int) -> int:
        """The GPU that runs an action; what is on the host's queue is not shifted."""
        iteration, action = divmod(number, len(self.actions))
        return (self.actions[action].gpu + iteration * self.rotate) % self.schedule.gpus

    def names(self) -> list[str]:
        """The actions' ids, from the second iteration on with `#1`, `#2`, ... behind them."""
        ids = [action.id for action in self.actions]
        return ids + [f"{id}#{i}" for i in range(1, self.iterations) for id in ids]


def chain_events(schedule: Schedule, iterations: int, mode: str, rotate: int) -> Events:
    """Puts iterations one behind the other, with what each needs of those before.

    An upload waits for the update of its segment, "sync" in the iteration before and "async" in the one
    before that; where the schedule has no UPDATE, an "async" upload waits for the segment's GRADIENTs in
    its place, and a "sync" iteration for the end of the one before, for the caller steps between them. What
    segments share is updated with the first of them, from the GRADIENTs of all.
    Of weights, a GPU holds those of two jobs, across iterations as well; slots of activations start
    anew with each iteration.

    Raises:
        InvalidArgument: A number is out of range, or an action's time cannot be.
        ScheduleError: An event is recorded twice, or waited for and never recorded.
    """
    if mode not in LAGS:
        raise InvalidArgument(f"mode is {mode!r}; iterations are chained 'sync' or 'async'")
    require_at_least(1, iterations=iterations)
    actions = tuple(schedule.actions())
    for action in actions:
        if not 0 <= action.seconds < math.inf:
            raise InvalidArgument(
                f"{action.id} takes {action.seconds} seconds; give its segments and links finite times, "
                "0 or more"
            )
    sources = _event_sources(schedule, actions)
    count = len(actions)
    queues: dict[tuple[int, Stream], list[int]] = defaultdict(list)
    for i in range(iterations):
        number = i * count
        for queue in schedule.queues:
            shift = 0 if queue.stream is Stream.HOST else i * rotate
            numbers = range(number, number + len(queue.actions))
            queues[(queue.gpu + shift) % schedule.gpus, queue.stream] += numbers
            number += len(queue.actions)
    chained = [tuple(s + i * count for s in found) for i in range(iterations) for found in sources]
    events = Events(schedule, actions, iterations, rotate, [*queues.values()], chained)
    if iterations > 1:
        for target, source in (*_update_edges(events, mode), *_slot_edges(events)):
            chained[target] += (source,)
    return events


def _event_sources(schedule: Schedule, actions: tuple[Action, ...]) -> list[tuple[int, ...]]:
    recorders: dict[str, int] = {}
    records = 0
    for number, action in enumerate(actions):
        for event in action.records:
            recorders[event] = number
            records += 1
    try:
        sources = [tuple([recorders[event] for event in action.waits]) for action in actions]
    except KeyError:
        sources = []
    if records != len(recorders) or len(sources) != len(actions):
        _named_errors(schedule)
        raise AssertionError("the order of events is wrong, and nobody says where")
    return sources


def _update_edges(events: Events, mode: str) -> list[tuple[int, int]]:
    """(upload, update that it waits for) of neighbouring iterations."""
    count, edges = len(events.actions), []
    updates: dict[int, list[int]] = defaultdict(list)
    gradients: dict[int, list[int]] = defaultdict(list)
    for number, action in enumerate(events.actions):
        if action.op in (Op.UPDATE, Op.SUM, Op.GRADIENT):
            for name in action.writes:
                _, kind, segment = name.partition(":updated.s")
                if kind:
                    updates[int(segment)].append(number)
                elif action.op is not Op.UPDATE:
                    gradients[buffers.segment_of(name)].append(number)
    if mode == "sync" and not updates:
        return _barrier_edges(events)
    made = updates or gradients
    with_it: dict[int, set[int]] = defaultdict(set)
    for together in events.schedule.tied:
        for segment in together:
            with_it[segment].update([min(together)] if updates else together)
    lag = LAGS[mode]
    for number, action in enumerate(events.actions):
        if action.op is not Op.PREFETCH:
            continue
        for segment in {buffers.segment_of(name) for name in action.reads}:
            needed = [source for other in {segment, *with_it[segment]} for source in made[other]]
            for i in range(lag, events.iterations):
                edges += [(number + i * count, source + (i - lag) * count) for source in needed]
    return edges


def _barrier_edges(events: Events) -> list[tuple[int, int]]:
    """Everything of an iteration behind everything of the one before."""
    count, edges = len(events.actions), []
    firsts: dict[int, list[int]] = defaultdict(list)
    lasts: dict[int, list[int]] = defaultdict(list)
    for queue in events.order:
        ends = {number // count: number for number in queue}
        begins = {number // count: number for number in reversed(queue)}
        for i in ends:
            firsts[i].append(begins[i])
            lasts[i].append(ends[i])
    for before, after in pairwise(range(events.iterations)):
        edges += [(first, last) for first in firsts[after] for last in lasts[before]]
    return edges


def _slot_edges(events: Events) -> list[tuple[int, int]]:
    """(upload, what frees the weights of the job two before on its GPU), where that is an iteration ago."""
    count, edges = len(events.actions), []
    frees: dict[int, list[int]] = defaultdict(list)
    uploads: dict[int, list[int]] = defaultdict(list)
    for number, action in enumerate(events.actions):
        if action.op is Op.PREFETCH:
            uploads[action.job].append(number)
        elif action.op is Op.FREE and any(":weights." in name for name in action.frees):
            frees[action.job].append(number)
    by_gpu: dict[int, list[int]] = defaultdict(list)
    for job, numbers in uploads.items():
        by_gpu[events.actions[numbers[0]].gpu].append(job)
    gpus = events.schedule.gpus
    for gpu in range(gpus):
        sequence = [
            (i, job) for i in range(events.iterations) for job in by_gpu[(gpu - i * events.rotate) % gpus]
        ]
        for (i, before), (j, job) in zip(sequence, sequence[_RESIDENT_JOBS:], strict=False):
            if i < j:
                edges += [(u + j * count, f + i * count) for u in uploads[job] for f in frees[before]]
    return edges


def run_shared(events: Events, links: SharedLinks) -> tuple[list[float], list[float]]:
    """Starts and ends: each action as soon as what it waits for is over.

    Activations slow down weights and gradients that cross the same link in the same direction, by all that
    they take of it; besides, transfers and host work share what `links` says.

    Raises:
        ScheduleError: A deadlock; the message names a circle.
    """
    gpus, total = events.schedule.gpus, events.iterations * len(events.actions)
    seconds = np.array([action.seconds for action in events.actions] * events.iterations)
    demand = np.array([_demand(action, links) for action in events.actions] * events.iterations)
    urgent = np.array([action.op in _URGENT for action in events.actions] * events.iterations)
    line = _lines(events)
    uses = np.full((total, 3), -1)
    for number in np.flatnonzero(demand).tolist():
        action = events.actions[number % len(events.actions)]
        uses[number] = links.used_by(action, events.gpu(number), gpus)
    edges = [pair for queue in events.order for pair in pairwise(queue)]
    edges += [(source, number) for number, found in enumerate(events.sources) for source in found]
    heads, tails = np.array(edges, np.int64).reshape(-1, 2).T
    by_head = np.argsort(heads, kind="stable")
    first = np.searchsorted(heads[by_head], np.arange(total + 1))
    starts, ends = np.zeros(total), np.zeros(total)
    done = fluid_rates.run_shared(
        seconds,
        demand,
        urgent,
        line,
        uses,
        np.array(links.capacities(gpus)),
        np.bincount(tails, minlength=total),
        first,
        tails[by_head],
        starts,
        ends,
    )
    if done < total:
        raise_deadlock(events)
    return starts.tolist(), ends.tolist()


def _lines(events: Events) -> NDArray[np.int64]:
    """By action, which direction of which GPU's link it is on; -1 for none."""
    ways = {**dict.fromkeys(UP_STREAMS, 0), **dict.fromkeys(DOWN_STREAMS, 1)}
    way = np.array([ways.get(action.stream, -1) for action in events.actions], np.int64)
    gpu = np.array([action.gpu for action in events.actions], np.int64)
    shifted = [(gpu + i * events.rotate) % events.schedule.gpus for i in range(events.iterations)]
    return np.concatenate([np.where(way < 0, -1, 2 * found + way) for found in shifted])


def _demand(action: Action, links: SharedLinks) -> float:
    """Bytes per second that an action moves on an idle machine; 0 for those that share nothing."""
    if action.seconds == 0:
        return 0.0
    if action.stream is Stream.HOST and not action.nbytes:
        # An update that does not say what it moves is bound by host memory.
        return links.host_bytes_per_s or 0.0
    return action.nbytes / action.seconds


def raise_deadlock(events: Events) -> None:
    """Raises the error that names a circle of actions that wait for one another."""
    _named_errors(events.schedule)
    raise ScheduleError(
        f"deadlock between iterations: {events.iterations} iterations of this schedule wait for one another "
        f"when shifted by {events.rotate} GPUs, though one alone runs; use rotate=0"
    )


def _named_errors(schedule: Schedule) -> None:
    """Raises what is wrong with the order of one iteration, with names."""
    ActionGraph.from_events(schedule).execution_order()
