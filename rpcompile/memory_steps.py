"""Memory of every GPU and of the host over time, from when the actions of a schedule run."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from rpcompile import buffers
from rpcompile.errors import ScheduleError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from rpcompile.event_loop import Events

    Floats = NDArray[np.float64]
    Integers = NDArray[np.int64]


@dataclass(frozen=True)
class MemorySteps:
    """Memory in use: `nbytes[i]` from `times_s[i]` on."""

    times_s: tuple[float, ...]
    nbytes: tuple[int, ...]

    @property
    def peak_bytes(self) -> int:
        return max(self.nbytes, default=0)


def memory_steps(events: Events, starts: Floats, ends: Floats) -> list[MemorySteps]:
    """Memory of each GPU, then of the host.

    A buffer takes memory from the start of the first action that writes it to the end of the one that
    frees it, or for good; in a later iteration what was never freed is used again. The model's weights
    are on the host from the start.

    Raises:
        ScheduleError: A buffer has no size.
    """
    gpus, sizes, actions = events.schedule.gpus, events.schedule.buffers, events.actions
    spaces = {buffers.gpu(gpu): gpu for gpu in range(gpus)} | {buffers.HOST: gpus}
    index = {name: number for number, name in enumerate(sizes)}
    try:
        written = _users([action.writes for action in actions], index)
        freed = _users([action.frees for action in actions], index)
    except KeyError as error:
        raise ScheduleError(f"{error.args[0]} has no size; add it to the schedule's buffers") from None
    space = np.array([spaces[name.partition(":")[0]] for name in sizes], np.int64)
    nbytes = np.array([*sizes.values()], np.int64)
    busy = [number for number, action in enumerate(actions) if action.workspace_bytes]
    busy_gpu = np.array([actions[number].gpu for number in busy], np.int64)
    busy_bytes = np.array([actions[number].workspace_bytes for number in busy], np.int64)
    is_new = np.zeros(len(sizes), np.bool_)
    is_new[written[1]] = True
    stays = is_new.copy()
    stays[freed[1]] = False

    where, when, change = [], [], []
    for iteration in range(events.iterations):
        begin = iteration * len(actions)
        start, end = (found[begin : begin + len(actions)] for found in (starts, ends))
        born = np.full(len(sizes), np.inf)
        np.minimum.at(born, written[1], start[written[0]])
        for gpu, time, delta in (
            (space[is_new], born[is_new], nbytes[is_new]),
            (space[freed[1]], end[freed[0]], -nbytes[freed[1]]),
            (busy_gpu, start[busy], busy_bytes),
            (busy_gpu, end[busy], -busy_bytes),
        ):
            where.append(np.where(gpu < gpus, (gpu + iteration * events.rotate) % gpus, gpu))
            when.append(time)
            change.append(delta)
        is_new = is_new & ~stays
    places, times, changes = map(np.concatenate, (where, when, change))
    on_host = f"{buffers.HOST}:weights."
    base = sum(size for name, size in sizes.items() if name.startswith(on_host))
    # The smaller the type, the faster it is sorted.
    order = np.argsort(places.astype(np.min_scalar_type(gpus)), kind="stable")
    bounds = np.searchsorted(places[order], np.arange(gpus + 2)).tolist()
    return [
        _steps(times[order[begin:end]], changes[order[begin:end]], base if place == gpus else 0)
        for place, (begin, end) in enumerate(pairwise(bounds))
    ]


def _users(operands: Sequence[tuple[str, ...]], index: dict[str, int]) -> tuple[Integers, Integers]:
    """Who names which buffer: numbers of actions, and of what they name."""
    counts = np.fromiter(map(len, operands), np.int64, len(operands))
    named = np.array([index[buffer] for buffers in operands for buffer in buffers], np.int64)
    return np.repeat(np.arange(len(operands)), counts), named


def _steps(times: Floats, changes: Integers, base: int) -> MemorySteps:
    """Sums changes up. Those of one moment count as one: what comes then takes the place of what goes."""
    moments, index = np.unique(np.append(0.0, times), return_inverse=True)
    totals = np.zeros(len(moments), np.int64)
    np.add.at(totals, index, np.append(base, changes))
    return MemorySteps(tuple(moments.tolist()), tuple(np.cumsum(totals).tolist()))
