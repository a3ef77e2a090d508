"""Runs actions that slow one another down: an event loop with shared rates, compiled by numba."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numba
import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Integers = NDArray[np.int64]


@numba.njit(cache=True)
def run_shared(
    seconds: Floats,
    demand: Floats,
    urgent: Any,
    line: Integers,
    uses: Integers,
    capacity: Floats,
    waiting: Any,
    following: Any,
    first: Any,
    followers: Any,
    start_s: Floats,
    end_s: Floats,
) -> int:
    """Runs every action as soon as all it waits for is over; a transfer's rate follows what is shared.

    Args:
        seconds: Time of each action on an idle machine.
        demand: Bytes per second that it moves then; 0 for actions that share nothing.
        urgent: Whether it takes its rate before those that are not urgent share the rest.
        line: Number of the line that it is on, -1 for none; one urgent action and one that is not may be at a
            time. The share of its full rate that the urgent one has is what the other one lacks.
        uses: [action, 3] what it draws on, -1 for nothing.
        capacity: Bytes per second of each of those.
        waiting: How many actions each waits for; used up.
        following: Who is behind it on its queue, -1 for nobody.
        first: Where each action's part of `followers` begins, and where the last one ends.
        followers: Who waits for it besides.
        start_s: Filled with starts.
        end_s: Filled with ends.

    Returns:
        How many actions ran; fewer than all in a deadlock.
    """
    count = seconds.shape[0]
    running = np.empty(count, np.int64)
    left = np.zeros(count)  # seconds left at full rate, since `since`
    since = np.zeros(count)
    share = np.ones(count)  # of the full rate
    taken = np.zeros(line.max() + 2) if count else np.zeros(1)  # of each line; the last one is no line
    ready = np.empty(count, np.int64)
    active = ready_count = done = 0
    now, changed = 0.0, False
    for action in range(count):
        if waiting[action] == 0:
            ready[ready_count] = action
            ready_count += 1
    while True:
        for k in range(ready_count):
            action = ready[k]
            start_s[action], end_s[action] = now, now + seconds[action]
            left[action], since[action] = seconds[action], now
            running[active] = action
            active += 1
            changed = changed or demand[action] > 0
        ready_count = 0
        if active == 0:
            return done
        if changed:
            _share(
                running[:active], demand, urgent, line, taken, uses, capacity, share, left, since, end_s, now
            )
        now, changed = np.inf, False
        for k in range(active):
            now = min(now, float(end_s[running[k]]))
        k = 0
        while k < active:
            action = running[k]
            if end_s[action] > now:
                k += 1
                continue
            active -= 1
            running[k] = running[active]
            done += 1
            changed = changed or demand[action] > 0
            for edge in range(first[action] - 1, first[action + 1]):
                waiter = followers[edge] if edge >= first[action] else following[action]
                if waiter < 0:
                    continue
                waiting[waiter] -= 1
                if waiting[waiter] == 0:
                    ready[ready_count] = waiter
                    ready_count += 1


@numba.njit(cache=True)
def _share(
    running: Integers,
    demand: Floats,
    urgent: Any,
    line: Integers,
    taken: Floats,
    uses: Integers,
    capacity: Floats,
    share: Floats,
    left: Floats,
    since: Floats,
    end_s: Floats,
    now: float,
) -> None:
    """Gives the running actions their rates, and moves the ends of those whose rate changes."""
    free = capacity.copy()
    rates = np.zeros(running.shape[0])
    wanted = demand[running]
    _fill(running, wanted, urgent, True, uses, free, rates)
    taken[:] = 0
    for k in range(running.shape[0]):
        if rates[k] > 0 and line[running[k]] >= 0:
            taken[line[running[k]]] = rates[k] / wanted[k]
    for k in range(running.shape[0]):
        if not urgent[running[k]]:
            wanted[k] *= max(0.0, 1.0 - taken[line[running[k]]])
    _fill(running, wanted, urgent, False, uses, free, rates)
    for k in range(running.shape[0]):
        action = running[k]
        if demand[action] <= 0:
            continue
        new = 1.0 if rates[k] >= demand[action] else rates[k] / demand[action]
        if new == share[action]:
            continue
        left[action] -= (now - since[action]) * share[action]
        since[action], share[action] = now, new
        end_s[action] = now + max(0.0, left[action]) / new if new > 0 else np.inf


@numba.njit(cache=True)
def _fill(
    running: Integers,
    wanted: Floats,
    urgent: Any,
    kind: bool,
    uses: Integers,
    free: Floats,
    rates: Floats,
) -> None:
    """Max-min fair rates of the actions of one kind, out of what is free; none has more than `wanted`."""
    count = running.shape[0]
    is_open = np.zeros(count, np.bool_)
    remaining = 0
    for k in range(count):
        is_open[k] = wanted[k] > 0 and urgent[running[k]] == kind
        remaining += is_open[k]
    users = np.zeros(free.shape[0], np.int64)
    while remaining:
        users[:] = 0
        for k in range(count):
            if is_open[k]:
                for resource in uses[running[k]]:
                    if resource >= 0:
                        users[resource] += 1
        # The level up to which everyone who is open can rise together.
        level, tight = np.inf, -1
        for resource in range(free.shape[0]):
            if users[resource] and free[resource] / users[resource] < level:
                level, tight = max(0.0, free[resource]) / users[resource], resource
        smallest = np.inf
        for k in range(count):
            if is_open[k]:
                smallest = min(smallest, wanted[k])
        content = smallest <= level
        for k in range(count):
            action = running[k]
            if not is_open[k]:
                continue
            at_bottleneck = False
            for resource in uses[action]:
                at_bottleneck = at_bottleneck or resource == tight
            if (content and wanted[k] <= level) or (not content and at_bottleneck):
                rates[k] = min(wanted[k], level)
                is_open[k] = False
                remaining -= 1
                for resource in uses[action]:
                    if resource >= 0:
                        free[resource] -= rates[k]
