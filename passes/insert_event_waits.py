"""Turns what actions need of one another into events between queues, as few as do.

Before -> after::

    gpu0 d2h  0H0          gpu0 d2h  0H0>e7
    gpu1 h2d  1V0          gpu1 h2d  e7>1V0
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from rpcompile import buffers
from rpcompile.buffer_uses import BufferUses, Role
from rpcompile.errors import ScheduleError
from rpcompile.ordering import ActionGraph, HappensBefore

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rpcompile.ir import Action, Schedule

    Numbers = NDArray[np.int32]


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
        actions = tuple(schedule.actions())
        queue_of = [number for number, queue in enumerate(schedule.queues) for _ in queue.actions]
        edges = _latest(_needs(actions, np.array(queue_of, np.int32)), np.array(queue_of, np.int32))
        needed = _reduced(schedule, edges)
        sources = sorted({source for found in needed for source in found})
        events = {source: f"e{number}" for number, source in enumerate(sources)}
        numbered = iter(enumerate(actions))
        queues = tuple(
            replace(
                queue, actions=tuple(_with_events(*next(numbered), needed, events) for _ in queue.actions)
            )
            for queue in schedule.queues
        )
        return replace(schedule, queues=queues)


def _with_events(number: int, action: Action, needed: list[list[int]], events: dict[int, str]) -> Action:
    waits = tuple(events[source] for source in needed[number])
    records = (events[number],) if number in events else ()
    if (waits, records) == (action.waits, action.records):
        return action
    return replace(action, waits=waits, records=records)


def _needs(actions: tuple[Action, ...], queue_of: Numbers) -> tuple[Numbers, Numbers]:
    """Pairs (source, action): the source must be over before the action starts."""
    numbers = {action.id: number for number, action in enumerate(actions)}
    after: list[tuple[int, int]] = []
    for number, action in enumerate(actions):
        for name in action.after:
            if name not in numbers:
                raise ScheduleError(f"{action.id} must come after {name}, which the schedule does not have")
            after.append((numbers[name], number))
    uses = BufferUses.of(actions, range(len(actions)))
    _check_writers(uses, actions, queue_of)
    buffer, user, role = uses.buffer, uses.action, uses.role
    maker = uses.last(Role.MAKE)[buffer]
    updater = uses.last(Role.UPDATE)[buffer]
    free = uses.last(Role.FREE)[buffer]
    made = (maker >= 0) & (role != Role.MAKE)
    # On the updaters' own queue the order of the queue says which update a reader sees.
    changed = (updater >= 0) & (role == Role.READ) & (queue_of[user] != queue_of[updater])
    freed = (free >= 0) & ((role == Role.READ) | (role == Role.UPDATE))
    extra = np.array(after, np.int32).reshape(-1, 2)
    return (
        np.concatenate((maker[made], updater[changed], user[freed], extra[:, 0])),
        np.concatenate((user[made], user[changed], free[freed], extra[:, 1])),
    )


def _check_writers(uses: BufferUses, actions: tuple[Action, ...], queue_of: Numbers) -> None:
    """One action writes a buffer from scratch, none what the caller owns; updates share a queue."""
    makers = uses.count(Role.MAKE)
    for number in np.flatnonzero(makers != 1).tolist():
        buffer = uses.buffers[number]
        if makers[number] > 1:
            names = " and ".join(actions[maker].id for maker in uses.users(number, Role.MAKE))
            raise ScheduleError(f"{buffer} is written from scratch more than once: by {names}")
        name = buffers.parse(buffer)
        if name.space != buffers.HOST or name.kind not in ("weights", "inputs"):
            user = actions[uses.users(number)[0]].id
            raise ScheduleError(f"{user} uses {buffer}, which no action writes; run insert-transfers")
    updated = uses.role == Role.UPDATE
    last = uses.last(Role.UPDATE)[uses.buffer[updated]]
    for number in uses.buffer[updated][queue_of[uses.action[updated]] != queue_of[last]].tolist():
        names = " and ".join(actions[user].id for user in uses.users(number, Role.UPDATE))
        raise ScheduleError(
            f"{uses.buffers[number]} is updated in place from several queues, in no order: {names}"
        )


def _latest(edges: tuple[Numbers, Numbers], queue_of: Numbers) -> tuple[Numbers, Numbers]:
    """Of the sources on one queue that an action needs, the last; none that its own queue implies."""
    source, target = edges
    implied = (queue_of[source] == queue_of[target]) & (source < target)
    source, target = source[~implied], target[~implied]
    order = np.lexsort((source, queue_of[source], target))
    source, target = source[order], target[order]
    last = np.ones(len(source), np.bool_)
    last[:-1] = (target[1:] != target[:-1]) | (queue_of[source[1:]] != queue_of[source[:-1]])
    return source[last], target[last]


def _reduced(schedule: Schedule, edges: tuple[Numbers, Numbers]) -> list[list[int]]:
    """The sources of each action that its queue and its other sources do not imply, in ascending order.

    Over all actions these are the edges between queues of the graph's transitive reduction.
    """
    found: list[list[int]] = [[] for _ in schedule.actions()]
    for source, target in zip(*(side.tolist() for side in edges), strict=True):
        found[target].append(source)
    graph = ActionGraph.build(schedule, found)
    order = HappensBefore(graph)
    for number, sources in enumerate(found):
        if not sources:
            continue
        previous = graph.previous(number)
        others = sources if previous is None else [*sources, previous]
        if len(others) > 1:
            found[number] = [
                source for source in sources if not any(order.before(source, other) for other in others)
            ]
        found[number].sort()
    return found
