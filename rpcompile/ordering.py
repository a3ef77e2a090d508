"""What happens before what: the order that queues and events enforce, and how to ask for it.

Actions are numbered queue by queue, so the action before another one on its queue has the number
before it. Happens-before is decided with vector clocks: each action knows, for every queue, the last
action there that is over when it starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numba import njit  # pyright: ignore[reportMissingTypeStubs]

from rpcompile.errors import ScheduleError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rpcompile.ir import Action, Schedule

    Numbers = NDArray[np.int32]


@dataclass(frozen=True)
class Edges:
    """What each of some actions waits for, besides those before it on its queue.

    Attributes:
        starts: Where the sources of each action begin, and at last where they end.
        sources: Numbers of the actions waited for; those of action n are at `starts[n]:starts[n + 1]`.
    """

    starts: Numbers
    sources: Numbers

    @classmethod
    def of_pairs(cls, sources: Numbers, waiters: Numbers, count: int) -> Edges:
        """Of `count` actions, pair by pair; each one's sources stay in the order in which they are given."""
        order = np.argsort(waiters, kind="stable")
        counts = np.bincount(waiters, minlength=count)
        return cls.of_counts(sources[order], counts)

    @classmethod
    def of_counts(cls, sources: Numbers, counts: NDArray[np.integer]) -> Edges:
        """The sources of one action behind those of another, `counts[n]` of action n."""
        starts = np.concatenate((np.zeros(1, np.int32), np.cumsum(counts, dtype=np.int32)))
        return cls(starts, sources.astype(np.int32, copy=False))

    def counts(self) -> Numbers:
        """How many sources each action has."""
        return np.diff(self.starts)

    def waiters(self) -> Numbers:
        """Who waits for each of `sources`."""
        return np.repeat(np.arange(len(self.starts) - 1, dtype=np.int32), self.counts())

    def of(self, number: int) -> list[int]:
        """The sources of one action."""
        return self.sources[self.starts[number] : self.starts[number + 1]].tolist()

    def followers(self) -> Edges:
        """The other way round: who waits for each action, in the order of their numbers."""
        return Edges(*_followers(self.starts, self.sources))

    def renumbered(self, numbers: Numbers, place: Numbers) -> Edges:
        """With action `numbers[i]` as action i, `place` being the inverse."""
        counts = self.counts()[numbers]
        begin = np.repeat(self.starts[numbers] - np.cumsum(counts) + counts, counts)
        return self.of_counts(place[self.sources[begin + np.arange(len(begin))]], counts)


@dataclass(frozen=True)
class ActionGraph:
    """A schedule's actions and what each has to wait for.

    Attributes:
        actions: Every action, queue by queue.
        queue_of: Number of each action's queue.
        edges: What each one waits for.
    """

    actions: tuple[Action, ...]
    queue_of: Numbers
    edges: Edges

    @classmethod
    def from_events(cls, schedule: Schedule) -> ActionGraph:
        """The order that the runtime enforces: queues, and events from `records` to `waits`.

        Raises:
            ScheduleError: An event is recorded twice, or waited for and never recorded.
        """
        recorders: dict[str, int] = {}
        actions = tuple(schedule.actions())
        for number, action in enumerate(actions):
            for event in action.records:
                if event in recorders:
                    raise ScheduleError(
                        f"event {event} is recorded by {actions[recorders[event]].id} and by {action.id}; "
                        "an event has one recorder"
                    )
                recorders[event] = number
        waits = [action.waits for action in actions]
        try:
            sources = [recorders[event] for found in waits for event in found]
        except KeyError as error:
            event = error.args[0]
            waiter = next(action for action in actions if event in action.waits)
            raise ScheduleError(f"{waiter.id} waits for event {event}, which no action records") from None
        counts = np.fromiter(map(len, waits), np.int32, len(waits))
        return cls(actions, queue_numbers(schedule), Edges.of_counts(np.array(sources, np.int32), counts))

    def previous(self, number: int) -> int | None:
        """The action before this one on its queue."""
        return number - 1 if number and self.queue_of[number - 1] == self.queue_of[number] else None

    def execution_order(self) -> Numbers:
        """The actions in an order in which each comes behind all it waits for.

        Raises:
            ScheduleError: Actions wait for one another; the message names them.
        """
        order = _order(self.queue_of, self.edges.starts, self.edges.sources)
        if len(order) < len(self.actions):
            raise ScheduleError(self._describe_deadlock(set(order.tolist())))
        return order

    def _describe_deadlock(self, over: set[int]) -> str:
        """Names the actions of one cycle and where they are."""
        import networkx  # takes part of a second, and few have to say who waits for whom

        graph = networkx.DiGraph()
        for number in range(len(self.actions)):
            if number in over:
                continue
            previous = self.previous(number)
            if previous is not None:
                graph.add_edge(number, previous)
            graph.add_edges_from((number, source) for source in self.edges.of(number))
        cycle: list[tuple[int, int]] = networkx.find_cycle(graph)
        waits = [source in self.edges.of(waiter) for waiter, source in cycle]
        # Begin with a wait, so that each run of neighbours on a queue can be told as one step.
        start = waits.index(True)
        cycle, waits = cycle[start:] + cycle[:start], waits[start:] + waits[:start]
        first = self.actions[cycle[0][0]]
        text = f"deadlock: {first.id} (gpu{first.gpu} {first.stream})"
        for (_, source), waited, next_waited in zip(cycle, waits, [*waits[1:], True], strict=True):
            if waited or next_waited:
                action = self.actions[source]
                reason = "waits for" if waited else "is queued behind"
                text += f" {reason} {action.id} (gpu{action.gpu} {action.stream}), which"
        return text.removesuffix(", which")


class HappensBefore:
    """Answers whether one action is over before another starts, whatever the timing.

    Args:
        graph: The order to ask about.

    Raises:
        ScheduleError: The graph has a cycle.
    """

    def __init__(self, graph: ActionGraph) -> None:
        self.graph = graph
        self.order, self.queue_of = graph.execution_order(), graph.queue_of
        queues = 1 + int(self.queue_of.max(initial=0))
        # By action and queue; -1 where nothing is over.
        self.clocks = _clocks(self.order, self.queue_of, graph.edges.starts, graph.edges.sources, queues)

    def before(self, first: int, second: int) -> bool:
        """Whether action `first` is over before action `second` starts, by their numbers."""
        return bool(self.clocks[second, self.queue_of[first]] >= first)

    def all_before(self, first: Numbers, second: Numbers) -> NDArray[np.bool_]:
        """`before`, pair by pair."""
        return self.clocks[second, self.queue_of[first]] >= first


def queue_numbers(schedule: Schedule) -> Numbers:
    """The number of each action's queue."""
    lengths = [len(queue.actions) for queue in schedule.queues]
    return np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)


@njit(cache=True)
def _followers(starts: Numbers, sources: Numbers) -> tuple[Numbers, Numbers]:
    """The edges turned round: those who wait for action n are at places[n]:places[n + 1] of the second."""
    count = len(starts) - 1
    places = np.zeros(count + 1, np.int32)
    for source in sources:
        places[source + 1] += 1
    for number in range(count):
        places[number + 1] += places[number]
    followers = np.empty(len(sources), np.int32)
    filled = places[:-1].copy()
    for number in range(count):
        for source in sources[starts[number] : starts[number + 1]]:
            followers[filled[source]] = number
            filled[source] += 1
    return places, followers


@njit(cache=True)
def _order(queue_of: Numbers, starts: Numbers, sources: Numbers) -> Numbers:
    """As many actions as can run, in an order in which they can."""
    count = len(queue_of)
    waiting = np.zeros(count, np.int32)
    for number in range(count):
        waiting[number] = starts[number + 1] - starts[number]
        if number > 0 and queue_of[number - 1] == queue_of[number]:
            waiting[number] += 1
    places, followers = _followers(starts, sources)
    ready = np.empty(count, np.int32)
    order = np.empty(count, np.int32)
    pending = 0
    done = 0
    for number in range(count):
        if waiting[number] == 0:
            ready[pending] = number
            pending += 1
    while pending:
        pending -= 1
        number = ready[pending]
        order[done] = number
        done += 1
        following = number + 1
        if following < count and queue_of[following] == queue_of[number]:
            waiting[following] -= 1
            if waiting[following] == 0:
                ready[pending] = following
                pending += 1
        for follower in followers[places[number] : places[number + 1]]:
            waiting[follower] -= 1
            if waiting[follower] == 0:
                ready[pending] = follower
                pending += 1
    return order[:done]


@njit(cache=True)
def _clocks(order: Numbers, queue_of: Numbers, starts: Numbers, sources: Numbers, queues: int) -> Numbers:
    """For each action the last action of each queue that is over when it starts."""
    clocks = np.full((len(queue_of), queues), -1, np.int32)
    for number in order:
        clock = clocks[number]
        if number > 0 and queue_of[number - 1] == queue_of[number]:
            clock[:] = clocks[number - 1]
            clock[queue_of[number]] = number - 1
        for source in sources[starts[number] : starts[number + 1]]:
            other = clocks[source]
            for queue in range(queues):
                if other[queue] > clock[queue]:
                    clock[queue] = other[queue]
            if source > clock[queue_of[source]]:
                clock[queue_of[source]] = source
    return clocks
