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

_STREAMS = (Stream.COMPUTE, Stream.H2D, Stream.D2H)


def gpu_memory_bounds(
    schedule: Schedule, order: HappensBefore | None = None, uses: BufferUses | None = None
) -> tuple[int, ...]:
    """Peak bytes of each GPU over all timings that queues and events allow.

    The simulated peak is that of one timing, and no larger. A moment is given by the last actions that
    have begun on the compute and on the h2d queue, as far as neither contradicts the other; made is
    what they and those before them on their queues write, and freed only what must have been before
    one of the two could begin. What is freed otherwise may still be there.

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
    made, freed = np.zeros(len(actions), np.int64), np.zeros(len(actions), np.int64)
    sizes = np.array(
        [0 if name.startswith(buffers.HOST) else schedule.buffers[name] for name in uses.buffers], np.int64
    )
    for change, role in ((made, Role.MAKE), (freed, Role.FREE)):
        mine = uses.role == role
        np.add.at(change, uses.action[mine], sizes[uses.buffer[mine]])
    # One below 0 is over as soon as its action is, which may be before the next one begins.
    workspace = np.array([max(0, action.workspace_bytes) for action in actions], np.int64)
    queues = {(queue.gpu, queue.stream): number for number, queue in enumerate(schedule.queues)}
    return tuple(
        _peak(order, [queues.get((gpu, stream)) for stream in _STREAMS], made, freed, workspace)
        for gpu in range(schedule.gpus)
    )


def _peak(
    order: HappensBefore,
    queues: Sequence[int | None],
    made: Numbers,
    freed: Numbers,
    workspace: Numbers,
) -> int:
    compute, h2d, d2h = (_Queue(order, queue, made, freed) for queue in queues)
    # Moment i of the compute queue: its action i - 1 has begun, action i has not. So for h2d.
    clocks, later = compute.clocks(), np.arange(compute.length + 1)
    first, last = h2d.over(clocks), h2d.begun(compute)
    counts = last - first + 1
    moment = np.repeat(later, counts)
    other = np.arange(len(moment)) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(first, counts)
    uploads = h2d.clocks()
    # Of the compute queue itself, what lies before action i - 1 is over, and what its h2d needed.
    over_compute = np.maximum(np.maximum(moment - 1, 0), compute.over(uploads)[other])
    over_h2d = np.maximum(h2d.over(clocks)[moment], np.maximum(other - 1, 0))
    over_d2h = np.maximum(d2h.over(clocks)[moment], d2h.over(uploads)[other])
    nbytes = compute.made[moment] + h2d.made[other] + d2h.made[d2h.length]
    nbytes -= compute.freed[over_compute] + h2d.freed[over_h2d] + d2h.freed[over_d2h]
    # While the last compute action that began may still run, its workspace counts.
    running = np.where(moment > over_compute, compute.per_action(workspace)[moment], 0)
    return int((nbytes + running).max(initial=0))


class _Queue:
    """Prefix sums over one queue: entry i is for its first i actions."""

    def __init__(self, order: HappensBefore, queue: int | None, made: Numbers, freed: Numbers) -> None:
        self._order = order
        self._queue = queue
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
        if self._queue is None:
            return np.zeros(len(clocks), np.int64)
        return np.searchsorted(self.actions, clocks[:, self._queue], side="right")

    def begun(self, compute: _Queue) -> Numbers:
        """Entry i: how many of this queue's actions may have begun before compute action i has."""
        found = np.full(compute.length + 1, self.length)
        if self.length and compute.length:
            needs = self._order.clocks[self.actions, compute._queue]
            found[:-1] = np.searchsorted(needs, compute.actions)
        return found
