"""Proves that a schedule is right, from what the runtime will do with it: queues, events and names.

What happens before what follows from queues and events alone (`rpcompile/ordering.py`); reads and
writes say what has to. The checks know nothing of the passes that made the schedule.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from rpcompile import buffers
from rpcompile.buffer_uses import BufferUses, Role
from rpcompile.collection import collection_paused
from rpcompile.errors import ScheduleError
from rpcompile.ir import Op
from rpcompile.memory_bound import gpu_memory_bounds
from rpcompile.ordering import ActionGraph, HappensBefore
from rpcompile.simulate import simulate
from rpcompile.verify_actions import check_actions
from rpcompile.verify_iterations import check_iterations, memory_limits

if TYPE_CHECKING:
    from rpcompile.buffers import ParsedNames
    from rpcompile.ir import Partition, Schedule, SegmentChain

_RESULTS = ("gradients", "state", "loss", "updated", "norm")


@collection_paused()
def verify_schedule(
    schedule: Schedule,
    chain: SegmentChain,
    partition: Partition,
    host_limit_bytes: int | None = None,
) -> None:
    """Checks every property of a schedule that its execution relies on.

    - Every action has an id of its own that says what it is, is on the right queue and belongs to a job.
    - Every event has one recorder, nothing waits in a circle, and all of `after` is enforced.
    - Every (segment, microbatch) has one forward, and one backward where one is needed, in the job that
      it belongs to; compute actions read and write exactly what their segments call for.
    - Copies carry one value from one side to the other, with matching sizes; buffers are as large as what
      they hold.
    - Every buffer is written, then updated in place, then read, then freed; what the
      program makes is freed once, except for its results.
    - Every gradient that a job makes leaves once, and every changed buffer, by one job; every loss
      reaches the host.
    - With optimizer updates: each segment that has a gradient is updated once, from the gradients of
      all its jobs, each counted once, and only after the last upload of its weights.
    - However long actions take, no GPU holds more than its limit; the simulated host does not either.
    - Iterations can follow one another, each with the weights that its mode asks for; see
      `rpcompile/verify_iterations.py`.

    Args:
        schedule: With transfers and events.
        chain: The segments.
        partition: The stages that the jobs run, and the memory limit of a GPU where all are alike.
        host_limit_bytes: What the host may hold; None does not check it.

    Raises:
        ScheduleError: A property does not hold; the message names the action and the property.
    """
    names = buffers.ParsedNames()
    check_actions(schedule, chain, partition, names)
    order = _Order(schedule, names)
    _check_writers(order)
    promised = any(names[buffer].kind == "updated" for buffer in schedule.buffers)
    totals = _check_sums(order, promised)
    _check_order(order)
    _check_results(order, schedule)
    _check_updates(order, chain, promised, totals)
    limits = memory_limits(chain, partition, schedule.gpus)
    for gpu, peak in enumerate(gpu_memory_bounds(schedule, order, order.uses)):
        if peak > limits[gpu]:
            raise ScheduleError(
                f"gpu{gpu} may need {peak:,} bytes at its peak, over the limit of "
                f"{limits[gpu]:,}; use smaller stages or microbatches"
            )
    check_iterations(schedule, chain, limits)
    if host_limit_bytes is not None and (peak := simulate(schedule).host_peak_bytes) > host_limit_bytes:
        raise ScheduleError(
            f"the host needs {peak:,} bytes at its simulated peak, over the limit of {host_limit_bytes:,}; "
            "use fewer or smaller microbatches"
        )


class _Order(HappensBefore):
    """Happens-before by queues and events, with the uses of every buffer."""

    def __init__(self, schedule: Schedule, names: ParsedNames) -> None:
        super().__init__(ActionGraph.from_events(schedule))
        self.actions = self.graph.actions
        self.uses = BufferUses.of(self.actions, self.order)
        self.parsed = names
        self.names = [names[buffer] for buffer in self.uses.buffers]

    def require(self, first: int, second: int, reason: str) -> None:
        """Raises unless `first` is over before `second` starts."""
        if not self.before(first, second):
            raise ScheduleError(
                f"{self.actions[second].id} does not wait for {self.actions[first].id}, {reason}"
            )

    def ids(self, numbers: list[int]) -> str:
        return " and ".join(self.actions[number].id for number in numbers) or "no action"


def _check_writers(order: _Order) -> None:
    """One action writes a buffer from scratch and one frees it; nobody touches what the caller owns."""
    uses = order.uses
    owned = np.array([_is_owned(name) for name in order.names], np.bool_)
    stays = owned | np.array([_is_result(name) for name in order.names], np.bool_)
    makers, frees = uses.count(Role.MAKE), uses.count(Role.FREE)
    wrong = (makers != np.where(owned, 0, 1)) | (frees != np.where(stays, 0, 1))
    wrong |= owned & (uses.count(Role.UPDATE) > 0)
    for number in np.flatnonzero(wrong).tolist():
        _refuse_writers(order, number)


def _refuse_writers(order: _Order, number: int) -> None:
    uses, buffer, name = order.uses, order.uses.buffers[number], order.names[number]
    makers, frees = uses.users(number, Role.MAKE), uses.users(number, Role.FREE)
    if _is_owned(name):
        culprit = uses.users(number, Role.MAKE, Role.UPDATE, Role.FREE)[:1]
        raise ScheduleError(f"{order.ids(culprit)} writes or frees {buffer}, which the caller owns")
    if len(makers) != 1:
        user = [*makers, *uses.users(number)][:1]
        raise ScheduleError(
            f"{order.ids(user)} uses {buffer}, which {order.ids(makers)} writes from scratch; one action must"
        )
    end = "it is a result and stays" if _is_result(name) else "one action must"
    raise ScheduleError(f"{buffer}, written by {order.ids(makers)}, is freed by {order.ids(frees)}; {end}")


def _check_order(order: _Order) -> None:
    """Writer first, then updates, then readers, FREE at the end; and all of `after`.

    Of all pairs in the wrong order the one that is reported has the earliest action that fails to
    wait, and the last that it fails to wait for: if one wait is missing, its two ends.
    """
    behind = [(number, action) for number, action in enumerate(order.actions) if action.after]
    named = {name for _, action in behind for name in action.after}
    numbers = {action.id: number for number, action in enumerate(order.actions) if action.id in named}
    after: list[tuple[int, int]] = []
    for number, action in behind:
        for name in action.after:
            if name not in numbers:
                raise ScheduleError(f"{action.id} must come after {name}, which the schedule does not have")
            after.append((numbers[name], number))
    uses = order.uses
    buffer, user, role = uses.buffer, uses.action, uses.role
    maker, free = uses.last(Role.MAKE)[buffer], uses.last(Role.FREE)[buffer]
    updater = uses.last(Role.UPDATE)[buffer]
    slots = np.array(after, np.int32).reshape(-1, 2)
    rules = (
        ((maker >= 0) & (role != Role.MAKE), maker, user, "which writes {}"),
        # What updates a buffer in place shares a queue (a job's computes, the host's sums): the last will do.
        (
            (updater >= 0) & (role == Role.READ),
            updater,
            user,
            "the last to update {} that it reads",
        ),
        ((free >= 0) & (role != Role.FREE), user, free, "which uses {} that it frees"),
        (np.ones(len(slots), np.bool_), slots[:, 0], slots[:, 1], "which frees the memory it needs"),
    )
    place = np.empty(len(order.actions), np.int64)
    place[order.order] = np.arange(len(order.actions))
    found: list[tuple[int, int, int, int]] = []
    for rule, (applies, first, second, _) in enumerate(rules):
        for number in np.flatnonzero(applies & ~order.all_before(first, second)).tolist():
            found.append((int(place[second[number]]), -int(place[first[number]]), rule, number))
    if found:
        _, _, rule, number = min(found)
        _, first, second, reason = rules[rule]
        about = uses.buffers[buffer[number]] if "{}" in reason else ""
        order.require(int(first[number]), int(second[number]), reason.format(about))


def _is_owned(name: buffers.BufferName) -> bool:
    """The caller has it before the program begins, and after."""
    return name.space == buffers.HOST and name.kind in ("weights", "inputs")


def _is_result(name: buffers.BufferName) -> bool:
    return name.space == buffers.HOST and name.kind in _RESULTS


def _check_results(order: _Order, schedule: Schedule) -> None:
    """Every gradient leaves once; so does every loss, and every changed buffer, from one job."""
    uses = order.uses
    updated = uses.count(Role.UPDATE)
    carriers: dict[int, int] = {}
    for number, name in enumerate(order.names):
        if name.space == buffers.HOST:
            if name.kind == "state" and name.segment is not None and name.job is not None:
                other = carriers.setdefault(name.segment, name.job)
                if other != name.job:
                    raise ScheduleError(
                        f"{order.ids(uses.users(number, Role.MAKE))} brings down buffers of segment "
                        f"{name.segment} that job {name.job} changed, and so does job {other}; one job must"
                    )
            continue
        if name.kind == "gradients" or (name.kind == "weights" and updated[number]):
            op = Op.GRADIENT if name.kind == "gradients" else Op.OFFLOAD
            downloads = [user for user in uses.users(number, Role.READ) if order.actions[user].op is op]
            if len(downloads) != 1:
                raise ScheduleError(
                    f"{uses.buffers[number]} is downloaded by {order.ids(downloads)}; one {op.name} must"
                )
    present = set(uses.buffers)
    for microbatch in range(schedule.microbatches):
        if buffers.loss(buffers.HOST, microbatch) not in present:
            raise ScheduleError(f"the loss of microbatch {microbatch} never reaches the host")


def _check_sums(order: _Order, promised: bool) -> dict[int, list[str]]:
    """A segment's gradients are added to that of its first job, in job order, where anything is updated.

    Where nothing is, and there is no SUM at all, the runtime adds them in that order itself.

    Args:
        order: The schedule's.
        promised: Whether its buffers speak of updated weights.

    Returns:
        Segment -> the buffer that has its gradient in the end.
    """
    sums: dict[str, list[int]] = defaultdict(list)
    made: dict[int, list[str]] = defaultdict(list)
    for number, action in enumerate(order.actions):
        if action.op is Op.SUM:
            sums[action.writes[0] if action.writes else ""].append(number)
    if not promised and not any(action.op in (Op.SUM, Op.UPDATE) for action in order.actions):
        return made
    for buffer, name in zip(order.uses.buffers, order.names, strict=True):
        if name.space == buffers.HOST and name.kind == "gradients" and name.segment is not None:
            made[name.segment].append(buffer)
    for segment, names in made.items():
        total, *parts = sorted(names, key=lambda name: order.parsed[name].job or 0)
        adders = sums.pop(total, [])
        for number in adders:
            action = order.actions[number]
            if action.writes != (total,) or action.reads != (total, *parts[: len(action.reads) - 1]):
                wanted = parts[0] if parts else "nothing more"
                raise ScheduleError(f"{action.id} reads {action.reads}; it is to add {wanted} to {total}")
            parts = parts[len(action.reads) - 1 :]
        if parts:
            raise ScheduleError(f"{parts[0]} is never added to {total}; one sum must")
        for first, second in pairwise(adders):
            order.require(first, second, f"which adds to {total} before it")
        made[segment] = [total]
    for number in (number for found in sums.values() for number in found):
        raise ScheduleError(f"{order.actions[number].id} adds to no gradient of a segment's first job")
    return made


def _check_updates(order: _Order, chain: SegmentChain, promised: bool, made: dict[int, list[str]]) -> None:
    """Each gradient goes into one update, which comes after every upload of the old weights.

    A schedule that speaks of no updated weights leaves updates to the caller. A tied tensor is updated with
    the first of its segments, from the gradients of all of them.
    """
    updates = [number for number, action in enumerate(order.actions) if action.op is Op.UPDATE]
    uploads: dict[int, list[int]] = {}
    for number, name in enumerate(order.names):
        if name.space == buffers.HOST and name.kind == "weights" and name.segment is not None:
            uploads[name.segment] = order.uses.users(number)
    tied = [found for found in chain.tied if found.gradient_bytes and made[min(found.segments)]]
    norms = [number for number in updates if buffers.NORM in order.actions[number].writes]
    updated: dict[int, list[int]] = defaultdict(list)
    for number in updates:
        action = order.actions[number]
        segment = order.parsed[action.writes[0]].segment if action.writes else None
        wanted = [name for names in made.values() for name in names]
        if segment is not None:
            updated[segment].append(number)
            mine, before = {segment}, set[int]()
            for found in tied:
                mine |= set(found.segments) if min(found.segments) == segment else set()
                before |= {min(found.segments)} - {segment} if segment in found.segments else set()
            wanted = [name for other in mine for name in made[other]]
            wanted += map(buffers.updated, before)
            wanted += [buffers.NORM] * len(norms)
            for other in sorted(mine):
                for upload in uploads.get(other, []):
                    order.require(
                        upload, number, f"which uploads weights of segment {other} that it replaces"
                    )
        target = buffers.NORM if segment is None else buffers.updated(segment)
        if action.writes != (target,):
            raise ScheduleError(f"{action.id} writes {action.writes}; an update writes one segment's weights")
        for name in Counter(wanted) - Counter(action.reads):
            raise ScheduleError(f"{action.id} leaves out {name}, which goes into {target}")
        for name in Counter(action.reads) - Counter(wanted):
            raise ScheduleError(f"{action.id} reads {name}, which does not go into {target}")
    for segment in sorted(made) if updates or promised else ():
        if made[segment] and len(updated[segment]) != 1:
            names = order.ids(updated[segment])
            raise ScheduleError(f"{made[segment][0]} goes into {names}; one update of segment {segment} must")
