"""What happens before what: the order that queues and events enforce, and how to ask for it.

Actions are numbered queue by queue, so the action before another one on its queue has the number
before it. Happens-before is decided with vector clocks: each action knows, for every queue, the last
action there that is over when it starts.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import networkx

from rpcompile.errors import ScheduleError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rpcompile.ir import Action, Schedule


@dataclass(frozen=True)
class ActionGraph:
    """A schedule's actions and what each has to wait for.

    Attributes:
        actions: Every action, queue by queue.
        queue_of: Number of each action's queue.
        predecessors: Numbers of the actions each one waits for besides those before it on its queue.
    """

    actions: tuple[Action, ...]
    queue_of: tuple[int, ...]
    predecessors: tuple[tuple[int, ...], ...]

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
        for action in actions:
            for event in action.waits:
                if event not in recorders:
                    raise ScheduleError(f"{action.id} waits for event {event}, which no action records")
        return cls.build(schedule, [[recorders[event] for event in action.waits] for action in actions])

    @classmethod
    def build(cls, schedule: Schedule, predecessors: Iterable[Iterable[int]]) -> ActionGraph:
        """The graph of a schedule whose actions, in order, wait for `predecessors`."""
        queue_of = tuple(number for number, queue in enumerate(schedule.queues) for _ in queue.actions)
        return cls(tuple(schedule.actions()), queue_of, tuple(tuple(found) for found in predecessors))

    def previous(self, number: int) -> int | None:
        """The action before this one on its queue."""
        return number - 1 if number and self.queue_of[number - 1] == self.queue_of[number] else None

    def execution_order(self) -> list[int]:
        """The actions in an order in which each comes behind all it waits for.

        Raises:
            ScheduleError: Actions wait for one another; the message names them.
        """
        waiting = [
            len(found) + (self.previous(number) is not None) for number, found in enumerate(self.predecessors)
        ]
        successors: list[list[int]] = [[] for _ in self.actions]
        for number, found in enumerate(self.predecessors):
            for source in found:
                successors[source].append(number)
        ready = [number for number, count in enumerate(waiting) if count == 0]
        order: list[int] = []
        while ready:
            number = ready.pop()
            order.append(number)
            following = number + 1
            if following < len(self.actions) and self.previous(following) is not None:
                successors[number].append(following)
            for successor in successors[number]:
                waiting[successor] -= 1
                if waiting[successor] == 0:
                    ready.append(successor)
        if len(order) < len(self.actions):
            raise ScheduleError(self._describe_deadlock(set(order)))
        return order

    def _describe_deadlock(self, over: set[int]) -> str:
        """Names the actions of one cycle and where they are."""
        graph = networkx.DiGraph()
        for number, found in enumerate(self.predecessors):
            if number in over:
                continue
            previous = self.previous(number)
            if previous is not None:
                graph.add_edge(number, previous)
            graph.add_edges_from((number, source) for source in found)
        cycle: list[tuple[int, int]] = networkx.find_cycle(graph)
        waits = [source in self.predecessors[waiter] for waiter, source in cycle]
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
        self.order = graph.execution_order()
        nothing = [-1] * (max(graph.queue_of, default=0) + 1)
        self._clocks: list[list[int]] = [nothing] * len(graph.actions)
        for number in self.order:
            self._clocks[number] = self._clock(number)

    def _clock(self, number: int) -> list[int]:
        previous = self.graph.previous(number)
        sources = self.graph.predecessors[number]
        if previous is not None:
            sources = (previous, *sources)
        clock = list(self._clocks[number])
        for source in sources:
            clock = list(map(max, clock, self._clocks[source]))
            queue = self.graph.queue_of[source]
            clock[queue] = max(clock[queue], source)
        return clock

    def before(self, first: int, second: int) -> bool:
        """Whether action `first` is over before action `second` starts, by their numbers."""
        return self._clocks[second][self.graph.queue_of[first]] >= first

    def needed(self, number: int) -> list[int]:
        """The predecessors of an action that its queue and its other predecessors do not imply.

        Over all actions these are the edges between queues of the graph's transitive reduction.
        """
        queue_of, previous = self.graph.queue_of, self.graph.previous(number)
        latest = {queue_of[source]: source for source in sorted(self.graph.predecessors[number])}
        latest.pop(queue_of[number], None)
        others = [*latest.values()] + ([] if previous is None else [previous])
        return [
            source for source in latest.values() if not any(self.before(source, other) for other in others)
        ]


class BufferUses:
    """Numbers of the actions that use one buffer."""

    def __init__(self) -> None:
        self.makers: list[int] = []  # write it from scratch
        self.updaters: list[int] = []  # read and write it, in place
        self.readers: list[int] = []
        self.frees: list[int] = []


def buffer_uses(actions: Sequence[Action], order: Iterable[int]) -> dict[str, BufferUses]:
    """Who uses each buffer, every list in the given order of action numbers."""
    found: dict[str, BufferUses] = defaultdict(BufferUses)
    for number in order:
        action = actions[number]
        for buffer in action.reads:
            uses = found[buffer]
            (uses.updaters if buffer in action.writes else uses.readers).append(number)
        for buffer in action.writes:
            if buffer not in action.reads:
                found[buffer].makers.append(number)
        for buffer in action.frees:
            found[buffer].frees.append(number)
    return dict(found)
