"""Turns what actions need of one another into events between queues, as few as do.

Before -> after::

    gpu0 d2h  0H0          gpu0 d2h  0H0>e7
    gpu1 h2d  1V0          gpu1 h2d  e7>1V0
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from rpcompile import buffers
from rpcompile.buffer_uses import BufferUses, Role
from rpcompile.collection import collection_paused
from rpcompile.errors import ScheduleError
from rpcompile.ordering import ActionGraph, Edges, HappensBefore, queue_numbers

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

    @collection_paused()
    def run(self, schedule: Schedule) -> Schedule:
        """Adds the events.

        Args:
            schedule: With transfers.

        Raises:
            ScheduleError: A buffer is read and never written, is written in a way that leaves its
                content open, or actions need one another in a circle.
        """
        needed = needed_order(schedule)
        source, target = _reduced(needed)
        events = {number: (f"e{place}",) for place, number in enumerate(np.unique(source).tolist())}
        waits: dict[int, tuple[str, ...]] = defaultdict(tuple)
        for first, second in zip(source.tolist(), target.tolist(), strict=True):
            waits[second] += events[first]
        ordered = (
            _with_events(action, waits.get(number, ()), events.get(number, ()))
            for number, action in enumerate(needed.actions)
        )
        queues = (
            replace(queue, actions=tuple(islice(ordered, len(queue.actions)))) for queue in schedule.queues
        )
        return replace(schedule, queues=tuple(queues))


def _with_events(action: Action, waits: tuple[str, ...], records: tuple[str, ...]) -> Action:
    if (waits, records) == (action.waits, action.records):
        return action
    return action.ordered(action.after, waits, records)


def needed_order(schedule: Schedule) -> ActionGraph:
    """What actions need of one another; many of these needs are implied by others.

    Raises:
        ScheduleError: A buffer is read and never written, or is written in a way that leaves its content
            open.
    """
    actions, queues = tuple(schedule.actions()), queue_numbers(schedule)
    source, target = _latest(_needs(actions, queues), queues)
    return ActionGraph(actions, queues, Edges.of_pairs(source, target, len(actions)))


def _needs(actions: tuple[Action, ...], queue_of: Numbers) -> tuple[Numbers, Numbers]:
    """Pairs (source, action): the source must be over before the action starts."""
    behind = [(number, action) for number, action in enumerate(actions) if action.after]
    named = {name for _, action in behind for name in action.after}
    numbers = {action.id: number for number, action in enumerate(actions) if action.id in named}
    after: list[tuple[int, int]] = []
    for number, action in behind:
        for name in action.after:
            if name not in numbers:
                raise ScheduleError(f"{action.id} must come after {name}, which the schedule does not have")
            after.append((numbers[name], number))
    uses = BufferUses.of(actions, np.arange(len(actions), dtype=np.int32))
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
    queues = 1 + int(queue_of.max(initial=0))
    order = np.argsort((target.astype(np.int64) * queues + queue_of[source]) * len(queue_of) + source)
    source, target = source[order], target[order]
    last = np.ones(len(source), np.bool_)
    last[:-1] = (target[1:] != target[:-1]) | (queue_of[source[1:]] != queue_of[source[:-1]])
    return source[last], target[last]


def _reduced(needed: ActionGraph) -> tuple[Numbers, Numbers]:
    """The edges that the target's queue and its other sources do not imply, by target, then source.

    These are the edges between queues of the graph's transitive reduction.
    """
    source, target = needed.edges.sources, needed.edges.waiters()
    order = HappensBefore(needed)
    # What else each target waits for: its other sources, and the action before it on its queue.
    queued = np.flatnonzero(np.diff(order.queue_of, prepend=-1) == 0).astype(np.int32)
    queued = queued[np.isin(queued, target)]
    others, waiters = np.concatenate((source, queued - 1)), np.concatenate((target, queued))
    by_waiter = np.argsort(waiters, kind="stable")
    others, waiters = others[by_waiter], waiters[by_waiter]
    begin = np.searchsorted(waiters, target)
    counts = np.searchsorted(waiters, target, side="right") - begin
    places = np.cumsum(counts) - counts
    pairs = np.arange(counts.sum()) + np.repeat(begin - places, counts)
    implied = order.all_before(np.repeat(source, counts), others[pairs])
    kept = ~np.logical_or.reduceat(implied, places) if len(source) else np.zeros(0, np.bool_)
    source, target = source[kept], target[kept]
    in_order = np.lexsort((source, target))
    return source[in_order], target[in_order]
