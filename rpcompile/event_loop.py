"""The order of one or several iterations of a schedule, as numbers, and runs through it.

Action `number` of iteration `i` of a schedule with n actions has the number `i * n + number`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from rpcompile import buffers, fluid_rates
from rpcompile.errors import InvalidArgument, ScheduleError, require_at_least
from rpcompile.ir import DOWN_STREAMS, UP_STREAMS, Op, Stream
from rpcompile.ordering import ActionGraph, Edges

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rpcompile.ir import Action, Schedule
    from rpcompile.ordering import Numbers
    from rpcompile.shared_links import SharedLinks

    Floats = NDArray[np.float64]

LAGS = {"sync": 1, "async": 2}  # iterations from an update to the first upload of what it has changed
_RESIDENT_JOBS = 2
_URGENT = frozenset({Op.LOAD, Op.RECEIVE, Op.HANDOFF, Op.OFFLOAD})


@dataclass(frozen=True)
class Events:
    """Iterations of a schedule, each queue's one behind the other.

    Attributes:
        schedule: What is repeated.
        graph: The actions of one iteration and their order.
        iterations: How often it runs.
        rotate: GPUs by which each iteration is shifted against the one before.
        order: By physical queue, the numbers that it runs.
        edges: By number, the numbers of other queues that it waits for.
    """

    schedule: Schedule
    graph: ActionGraph
    iterations: int
    rotate: int
    order: list[Numbers]
    edges: Edges

    @property
    def actions(self) -> tuple[Action, ...]:
        return self.graph.actions

    def gpu(self, number: int) -> int:
        """The GPU that runs an action; what is on the host's queue is not shifted."""
        iteration, action = divmod(number, len(self.actions))
        return (self.actions[action].gpu + iteration * self.rotate) % self.schedule.gpus

    def gpus(self) -> Numbers:
        """`gpu` of every number."""
        gpu = np.array([action.gpu for action in self.actions], np.int32)
        return np.concatenate([(gpu + i * self.rotate) % self.schedule.gpus for i in range(self.iterations)])

    def name(self, number: int) -> str:
        """An action's id, from the second iteration on with `#1`, `#2`, ... behind it."""
        iteration, action = divmod(number, len(self.actions))
        return self.actions[action].id + (f"#{iteration}" if iteration else "")

    def names(self) -> list[str]:
        """`name` of every number."""
        ids = [action.id for action in self.actions]
        return ids + [f"{id}#{i}" for i in range(1, self.iterations) for id in ids]

    def before(self) -> Numbers:
        """By number, the one before it on its queue; -1 for none."""
        found = np.full(self.iterations * len(self.actions), -1, np.int32)
        for queue in self.order:
            found[queue[1:]] = queue[:-1]
        return found


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
    for action in schedule.actions():
        if not 0 <= action.seconds < math.inf:
            raise InvalidArgument(
                f"{action.id} takes {action.seconds} seconds; give its segments and links finite times, "
                "0 or more"
            )
    graph = ActionGraph.from_events(schedule)
    return chained(schedule, graph, iterations, mode, rotate)


def chained(schedule: Schedule, graph: ActionGraph, iterations: int, mode: str, rotate: int) -> Events:
    """As `chain_events`, with the order of one iteration as `graph` has it, not as events do."""
    count = len(graph.actions)
    queues: dict[tuple[int, Stream], list[Numbers]] = defaultdict(list)
    for i in range(iterations):
        number = i * count
        for queue in schedule.queues:
            shift = 0 if queue.stream is Stream.HOST else i * rotate
            numbers = np.arange(number, number + len(queue.actions), dtype=np.int32)
            queues[(queue.gpu + shift) % schedule.gpus, queue.stream].append(numbers)
            number += len(queue.actions)
    order = [np.concatenate(found) for found in queues.values()]
    shifts = np.arange(iterations, dtype=np.int32)[:, None] * count
    sources = (graph.edges.sources + shifts).ravel()
    edges = Edges.of_counts(sources, np.tile(graph.edges.counts(), iterations))
    events = Events(schedule, graph, iterations, rotate, order, edges)
    if iterations == 1:
        return events
    more = np.concatenate((_update_edges(events, mode), _slot_edges(events)))
    waiters, sources = np.concatenate((np.stack((edges.waiters(), edges.sources), axis=1), more)).T
    return replace(events, edges=Edges.of_pairs(sources, waiters, iterations * count))


def _update_edges(events: Events, mode: str) -> Numbers:
    """(upload, update that it waits for) of neighbouring iterations."""
    edges: list[tuple[int, int]] = []
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
    for number, action in enumerate(events.actions):
        if action.op is not Op.PREFETCH:
            continue
        for segment in {buffers.segment_of(name) for name in action.reads}:
            for other in {segment, *with_it[segment]}:
                edges += [(number, source) for source in made[other]]
    own, lag, count = _pairs(edges), LAGS[mode], len(events.actions)
    shifts = (np.array((i * count, (i - lag) * count), np.int32) for i in range(lag, events.iterations))
    return np.concatenate((_pairs([]), *(own + shift for shift in shifts)))


def _barrier_edges(events: Events) -> Numbers:
    """Everything of an iteration behind everything of the one before."""
    found = [_pairs([])]
    iteration_of = [queue // len(events.actions) for queue in events.order]
    for before, after in pairwise(range(events.iterations)):
        ends, begins = (
            [queue[of == i] for queue, of in zip(events.order, iteration_of, strict=True)]
            for i in (before, after)
        )
        lasts = np.array([numbers[-1] for numbers in ends if len(numbers)], np.int32)
        firsts = np.array([numbers[0] for numbers in begins if len(numbers)], np.int32)
        found.append(np.stack((np.repeat(firsts, len(lasts)), np.tile(lasts, len(firsts))), axis=1))
    return np.concatenate(found)


def _slot_edges(events: Events) -> Numbers:
    """(upload, what frees the weights of the job two before on its GPU), where that is an iteration ago."""
    count = len(events.actions)
    edges: list[tuple[int, int]] = []
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
    return _pairs(edges)


def _pairs(edges: list[tuple[int, int]]) -> Numbers:
    """[n, 2]."""
    return np.array(edges, np.int32).reshape(-1, 2)


def run_shared(events: Events, links: SharedLinks) -> tuple[Floats, Floats]:
    """Starts and ends: each action as soon as what it waits for is over.

    Activations slow down weights and gradients that cross the same link in the same direction, by all that
    they take of it; besides, transfers and host work share what `links` says.

    Raises:
        ScheduleError: A deadlock; the message names a circle.
    """
    actions, gpus, iterations = events.actions, events.schedule.gpus, events.iterations
    total = iterations * len(actions)
    seconds = np.array([action.seconds for action in actions], np.float64)
    demand = np.tile(np.array([_demand(action, links) for action in actions], np.float64), iterations)
    urgent = np.array([action.op in _URGENT for action in actions], np.bool_)
    streams = np.tile(np.array([_PLACES[action.stream] for action in actions], np.int64), iterations)
    gpu, before, followers = events.gpus(), events.before(), events.edges.followers()
    following = np.full(total, -1, np.int32)
    queued = np.flatnonzero(before >= 0)
    following[before[queued]] = queued
    starts, ends = np.zeros(total), np.zeros(total)
    done = fluid_rates.run_shared(
        np.tile(seconds, iterations),
        demand,
        np.tile(urgent, iterations),
        np.where(_WAYS[streams] < 0, -1, 2 * gpu + _WAYS[streams]),
        np.where(demand[:, None] == 0, -1, _uses(links, gpus)[gpu, streams]),
        np.array(links.capacities(gpus)),
        events.edges.counts() + (before >= 0),
        following,
        followers.starts,
        followers.sources,
        starts,
        ends,
    )
    if done < total:
        raise_deadlock(events)
    return starts, ends


_PLACES = {stream: place for place, stream in enumerate(Stream)}
# By stream, which direction of its GPU's link it is on; -1 for none.
_WAYS = np.array([0 if s in UP_STREAMS else 1 if s in DOWN_STREAMS else -1 for s in Stream])


def _uses(links: SharedLinks, gpus: int) -> NDArray[np.int64]:
    """[gpu, stream, 3] of what is drawn on."""
    return np.array([[links.used_by(stream, gpu, gpus) for stream in Stream] for gpu in range(gpus)])


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
    events.graph.execution_order()
    raise ScheduleError(
        f"deadlock between iterations: {events.iterations} iterations of this schedule wait for one another "
        f"when shifted by {events.rotate} GPUs, though one alone runs; use rotate=0"
    )
