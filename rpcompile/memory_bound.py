"""The most memory that a schedule can take on each GPU, however long its actions take."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from rpcompile import buffers
from rpcompile.buffer_uses import BufferUses, Role
from rpcompile.ir import Stream
from rpcompile.ordering import ActionGraph, HappensBefore

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from rpcompile.ir import Schedule

    Numbers = NDArray[np.int64]

_FREEING = (Stream.COMPUTE, Stream.H2D, Stream.D2H, Stream.GRADIENTS)


def gpu_memory_bounds(
    schedule: Schedule, order: HappensBefore | None = None, uses: BufferUses | None = None
) -> tuple[int, ...]:
    """Peak bytes of each GPU over all timings that queues and events allow.

    The simulated peak is that of one timing, and no larger. A moment is given by the last actions that
    have begun on the compute and on the h2d queue, as far as neither contradicts the other; made is
    what they and those before them on their queues write, and freed only what must have been before
    one of the two could begin. What is freed otherwise may still be there. Weights, which are all that the
    weights queue makes, are looked at apart, with that queue in the place of h2d; a moment of the compute
    queue has the most of both.

    Args:
        schedule: With events; each buffer is made and freed at most once.
        order: Its order, if it is known.
        uses: Its buffers' uses, if they are known.

    Raises:
        ScheduleError: The schedule deadlocks.
    """
    order = order or HappensBefore(ActionGraph.from_events(schedule))
    actions = order.graph.actions
    uses = uses or BufferUses.of(actions, order.order)
    sizes = np.array(
        [0 if name.startswith(buffers.HOST) else schedule.buffers[name] for name in uses.buffers], np.int64
    )
    maker = uses.last(Role.MAKE)
    bulk = np.array([action.stream is Stream.WEIGHTS for action in actions], np.bool_)[maker] & (maker >= 0)
    changes: dict[Stream, tuple[Numbers, Numbers]] = {}
    for feed, nbytes in ((Stream.H2D, np.where(bulk, 0, sizes)), (Stream.WEIGHTS, np.where(bulk, sizes, 0))):
        made, freed = np.zeros(len(actions), np.int64), np.zeros(len(actions), np.int64)
        for change, role in ((made, Role.MAKE), (freed, Role.FREE)):
            mine = uses.role == role
            np.add.at(change, uses.action[mine], nbytes[uses.buffer[mine]])
        changes[feed] = made, freed
    # One below 0 is over as soon as its action is, which may be before the next one begins.
    workspace = np.array([max(0, action.workspace_bytes) for action in actions], np.int64)
    queues = {(queue.gpu, queue.stream): number for number, queue in enumerate(schedule.queues)}
    peaks: list[int] = []
    for gpu in range(schedule.gpus):
        rest, weights = (
            _moments(
                _Queue(order, queues.get((gpu, feed)), made, freed),
                [_Queue(order, queues.get((gpu, stream)), made, freed) for stream in _FREEING],
                workspace if feed is Stream.H2D else np.zeros_like(workspace),
            )
            for feed, (made, freed) in changes.items()
        )
        peaks.append(int((rest + weights).max(initial=0)))
    return tuple(peaks)


def _moments(feed: _Queue, queues: Sequence[_Queue], workspace: Numbers) -> Numbers:
    """For each moment of the compute queue the most bytes at any moment of another queue, `feed`.

    Args:
        feed: The queue that uploads.
        queues: The queues that free, the compute queue first; `feed` may be one of them.
        workspace: Bytes of each action while it runs.
    """
    compute = queues[0]
    # Moment i of the compute queue: its action i - 1 has begun, action i has not. So for the other queue.
    clocks = compute.clocks()
    first, last = feed.over(clocks), feed.begun(compute)
    counts = last - first + 1
    begin = np.cumsum(counts) - counts
    moment = np.repeat(np.arange(compute.length + 1), counts)
    other = np.arange(len(moment)) - np.repeat(begin - first, counts)
    uploads = feed.clocks()
    # Of the compute queue itself, what lies before action i - 1 is over, and what the other one needed.
    over_compute = np.maximum(np.maximum(moment - 1, 0), compute.over(uploads)[other])
    nbytes = compute.made[moment] + feed.made[other] - compute.freed[over_compute]
    for queue in queues[1:]:
        over = np.maximum(queue.over(clocks)[moment], queue.over(uploads)[other])
        if queue.number == feed.number:
            over = np.maximum(over, other - 1)
        else:
            nbytes += queue.made[queue.length]
        nbytes -= queue.freed[over]
    # While the last compute action that began may still run, its workspace counts.
    nbytes += np.where(moment > over_compute, compute.per_action(workspace)[moment], 0)
    return np.maximum.reduceat(nbytes, begin)


class _Queue:
    """Prefix sums over one queue: entry i is for its first i actions."""

    def __init__(self, order: HappensBefore, queue: int | None, made: Numbers, freed: Numbers) -> None:
        self._order = order
        self.number = queue
        self.actions = np.flatnonzero(order.queue_of == queue) if queue is not None else np.zeros(0, np.int64)
        self.length = len(self.actions)
        self.made = np.concatenate(([0], np.cumsum(made[self.actions])))
        self.freed = np.concatenate(([0], np.cumsum(freed[self.actions])))

    def per_action(self, values: Numbers) -> Numbers:
        """Entry i: the value of action i - 1; 0 for entry 0."""
        return np.concatenate(([0], values[self.actions]))

    def clocks(self) -> NDArray[np.int32]:
        """Entry i: what is over when action i - 1 begins; for entry 0 nothing."""
        clocks = self._order.clocks
        return np.concatenate((np.full((1, clocks.shape[1]), -1, np.int32), clocks[self.actions]))

    def over(self, clocks: NDArray[np.int32]) -> Numbers:
        """How many of this queue's actions are over by each of some clocks."""
        if self.number is None:
            return np.zeros(len(clocks), np.int64)
        return np.searchsorted(self.actions, clocks[:, self.number], side="right")

    def begun(self, compute: _Queue) -> Numbers:
        """Entry i: how many of this queue's actions may have begun before compute action i has."""
        found = np.full(compute.length + 1, self.length)
        if self.length and compute.length:
            needs = self._order.clocks[self.actions, compute.number]
            found[:-1] = np.searchsorted(needs, compute.actions)
        return found
