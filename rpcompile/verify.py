"""Proves that a schedule is right, from what the runtime will do with it: queues, events and names.

What happens before what follows from queues and events alone (`rpcompile/ordering.py`); reads and
writes say what has to. The checks know nothing of the passes that made the schedule.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from rpcompile import buffers
from rpcompile.errors import ScheduleError
from rpcompile.ir import Op
from rpcompile.ordering import ActionGraph, HappensBefore, buffer_uses
from rpcompile.simulate import simulate
from rpcompile.verify_actions import check_actions

if TYPE_CHECKING:
    from rpcompile.ir import Partition, Schedule, SegmentChain
    from rpcompile.ordering import BufferUses


def verify_schedule(schedule: Schedule, chain: SegmentChain, partition: Partition) -> None:
    """Checks every property of a schedule that its execution relies on.

    - Every action has an id of its own that says what it is, is on the right queue and belongs to a job.
    - Every event has one recorder, nothing waits in a circle, and all of `after` is enforced.
    - Every (segment, microbatch) has one forward, and one backward where one is needed; compute
      actions read and write exactly what their segments call for.
    - Copies carry one value from one side to the other, with matching sizes.
    - Every buffer is written, then updated in place, then read, then freed; what the
      program makes is freed once, except for its results.
    - Gradients, changed buffers and losses reach the host once.
    - No GPU can hold the weights of more than two jobs; its simulated peak is within the limit.

    Args:
        schedule: With transfers and events.
        chain: The segments.
        partition: The stages that the jobs run, and the memory limit.

    Raises:
        ScheduleError: A property does not hold; the message names the action and the property.
    """
    check_actions(schedule, chain, partition)
    order = _Order(schedule)
    _check_after(order)
    for buffer, uses in order.uses.items():
        _check_uses(order, buffer, uses)
    _check_results(order, schedule)
    _check_residency(order)
    for gpu, peak in enumerate(simulate(schedule).gpu_peak_bytes):
        if peak > partition.memory_limit_bytes:
            raise ScheduleError(
                f"gpu{gpu} needs {peak:,} bytes at its peak, over the limit of "
                f"{partition.memory_limit_bytes:,}; use smaller stages or microbatches"
            )


class _Order(HappensBefore):
    """Happens-before by queues and events, with the uses of every buffer."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__(ActionGraph.from_events(schedule))
        self.actions = self.graph.actions
        self.uses = buffer_uses(self.actions, self.order)

    def require(self, first: int, second: int, reason: str) -> None:
        """Raises unless `first` is over before `second` starts."""
        if not self.before(first, second):
            raise ScheduleError(
                f"{self.actions[second].id} does not wait for {self.actions[first].id}, {reason}"
            )


def _check_after(order: _Order) -> None:
    numbers = {action.id: number for number, action in enumerate(order.actions)}
    for number, action in enumerate(order.actions):
        for name in action.after:
            if name not in numbers:
                raise ScheduleError(f"{action.id} must come after {name}, which the schedule does not have")
            order.require(numbers[name], number, "which frees the memory it needs")


def _check_uses(order: _Order, buffer: str, uses: BufferUses) -> None:
    """One writer first, then updates in order, then readers, and one FREE at the end."""
    name, actions = buffers.parse(buffer), order.actions
    every = [*uses.makers, *uses.updaters, *uses.readers]
    if name.space == buffers.HOST and name.kind in ("weights", "inputs"):
        for number in (*uses.makers, *uses.updaters, *uses.frees):
            raise ScheduleError(f"{actions[number].id} writes or frees {buffer}, which the caller owns")
        return
    if len(uses.makers) != 1:
        user = actions[[*every, *uses.frees][0]].id
        names = " and ".join(actions[number].id for number in uses.makers) or "no action"
        raise ScheduleError(f"{user} uses {buffer}, which {names} writes from scratch; one action must")
    for number in (*uses.updaters, *uses.readers, *uses.frees):
        order.require(uses.makers[0], number, f"which writes {buffer}")
    # Only compute actions update in place, and those of one job share a queue: the last one will do.
    for number in uses.readers:
        for update in uses.updaters[-1:]:
            order.require(update, number, f"the last to update {buffer} that it reads")
    maker = actions[uses.makers[0]].id
    names = " and ".join(actions[number].id for number in uses.frees) or "no action"
    if name.space == buffers.HOST and name.kind in ("gradients", "state", "loss"):
        if uses.frees:
            raise ScheduleError(
                f"{buffer}, written by {maker}, is freed by {names}; it is a result and stays"
            )
    elif len(uses.frees) != 1:
        raise ScheduleError(f"{buffer}, written by {maker}, is freed by {names}; one action must")
    for free in uses.frees:
        for number in every:
            order.require(number, free, f"which uses {buffer} that it frees")


def _check_results(order: _Order, schedule: Schedule) -> None:
    """Gradients and changed buffers leave once; so does every loss."""
    for buffer, uses in order.uses.items():
        name = buffers.parse(buffer)
        if name.space == buffers.HOST or not (
            name.kind == "gradients" or (name.kind == "weights" and uses.updaters)
        ):
            continue
        op = Op.GRADIENT if name.kind == "gradients" else Op.OFFLOAD
        downloads = [number for number in uses.readers if order.actions[number].op is op]
        if len(downloads) != 1:
            names = " and ".join(order.actions[number].id for number in downloads) or "no action"
            raise ScheduleError(f"{buffer} is downloaded by {names}; one {op.name} must")
    for microbatch in range(schedule.microbatches):
        if buffers.loss(buffers.HOST, microbatch) not in order.uses:
            raise ScheduleError(f"the loss of microbatch {microbatch} never reaches the host")


def _check_residency(order: _Order) -> None:
    """No three jobs of a GPU whose weights no wait keeps from being there together."""
    starts: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    ends: dict[int, list[int]] = defaultdict(list)
    for buffer, uses in order.uses.items():
        name = buffers.parse(buffer)
        if name.kind == "weights" and name.job is not None:
            starts[name.space][name.job] += uses.makers
            ends[name.job] += uses.frees
    for space, jobs in starts.items():
        in_order = list(jobs)  # of their first use, as `order.uses` is
        together: dict[int, set[int]] = defaultdict(set)
        for position, late in enumerate(in_order):
            for early in in_order[:position]:
                if not all(order.before(end, start) for end in ends[early] for start in jobs[late]):
                    together[late].add(early)
            for middle in together[late]:
                for early in together[middle] & together[late]:
                    blocked = order.actions[jobs[late][0]].id
                    raise ScheduleError(
                        f"{space} may hold the weights of jobs {early}, {middle} and {late} at once; "
                        f"{blocked} must wait until those of two are freed down to one"
                    )
