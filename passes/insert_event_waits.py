"""Turns what actions need of one another into events between queues, as few as do.

Before -> after::

    gpu0 d2h  0H0          gpu0 d2h  0H0>e7
    gpu1 h2d  1V0          gpu1 h2d  e7>1V0
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rpcompile import buffers
from rpcompile.errors import ScheduleError
from rpcompile.ordering import ActionGraph, HappensBefore, buffer_uses

if TYPE_CHECKING:
    from rpcompile.ir import Action, Schedule
    from rpcompile.ordering import BufferUses


@dataclass(frozen=True)
class InsertEventWaits:
    """Schedule -> Schedule, with `records` and `waits`; events that were there are replaced.

    An action needs: the action that wrote what it reads, from scratch or last in place; for FREE,
    everything that uses what it frees; and all of `after`. Of these needs the transitive reduction
    is kept (queues run in order, and needs are implied by others). One action records at most one
    event, which all that wait for it share.
    """

    name = "insert-event-waits"

    def run(self, schedule: Schedule) -> Schedule:
        """Adds the events.

        Args:
            schedule: With transfers.

        Raises:
            ScheduleError: A buffer is read and never written, is written in a way that leaves its
                content open, or actions need one another in a circle.
        """
        graph = ActionGraph.build(schedule, _needs(schedule))
        order = HappensBefore(graph)
        needed = [order.needed(number) for number in range(len(graph.actions))]
        sources = sorted({source for found in needed for source in found})
        events = {source: f"e{number}" for number, source in enumerate(sources)}
        actions = iter(enumerate(graph.actions))
        queues = tuple(
            replace(queue, actions=tuple(_with_events(*next(actions), needed, events) for _ in queue.actions))
            for queue in schedule.queues
        )
        return replace(schedule, queues=queues)


def _with_events(number: int, action: Action, needed: list[list[int]], events: dict[int, str]) -> Action:
    waits = tuple(events[source] for source in sorted(needed[number]))
    return replace(action, waits=waits, records=(events[number],) if number in events else ())


def _needs(schedule: Schedule) -> list[set[int]]:
    """For each action, in the schedule's order, the actions that must be over before it."""
    actions = list(schedule.actions())
    numbers = {action.id: number for number, action in enumerate(actions)}
    queue_of = [index for index, queue in enumerate(schedule.queues) for _ in queue.actions]
    needs: list[set[int]] = [set() for _ in actions]
    for number, action in enumerate(actions):
        for name in action.after:
            if name not in numbers:
                raise ScheduleError(f"{action.id} must come after {name}, which the schedule does not have")
            needs[number].add(numbers[name])
    for buffer, uses in buffer_uses(actions, range(len(actions))).items():
        first = _maker(buffer, uses, actions)
        if len({queue_of[number] for number in uses.updaters}) > 1:
            names = " and ".join(actions[number].id for number in uses.updaters)
            raise ScheduleError(f"{buffer} is updated in place from several queues, in no order: {names}")
        for number in (*uses.readers, *uses.updaters, *uses.frees):
            needs[number].update(first)
        for number in uses.readers:
            # On the updaters' own queue the order of the queue says which update a reader sees.
            if uses.updaters and queue_of[number] != queue_of[uses.updaters[0]]:
                needs[number].add(uses.updaters[-1])
        for number in uses.frees:
            needs[number].update(uses.readers, uses.updaters)
    return needs


def _maker(buffer: str, uses: BufferUses, actions: list[Action]) -> list[int]:
    """The action that writes a buffer from scratch; none for what the caller owns."""
    if len(uses.makers) > 1:
        names = " and ".join(actions[number].id for number in uses.makers)
        raise ScheduleError(f"{buffer} is written from scratch more than once: by {names}")
    name = buffers.parse(buffer)
    owned = name.space == buffers.HOST and name.kind in ("weights", "inputs")
    users = [*uses.readers, *uses.updaters, *uses.frees]
    if not uses.makers and not owned and users:
        raise ScheduleError(
            f"{actions[users[0]].id} uses {buffer}, which no action writes; run insert-transfers"
        )
    return uses.makers
