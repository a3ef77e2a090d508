"""Compiled annealing of dispatches: where the line is cut, and which GPU runs which microbatch of a stage.

A state is a run of `cuts` through the unrolled line (`round_robin_time.stages_between`) and, by stage,
either how many GPUs it is dealt out to (`wanted`) or the GPU of each microbatch (`gpu_of`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit  # pyright: ignore[reportMissingTypeStubs]

from rpcompile.dispatch_costs import AHEAD, Tables
from rpcompile.dispatch_time import Machine, Stages, play

_PENALTY = 10.0  # a tenth too much memory or traffic weighs as much as twice the time
_MOVE_WORK = 400.0  # of every move but playing it, in the units of `Played.work`
_EVENNESS = 0.05  # weight of idle seconds at the end, which show the way where the makespan is flat


class State(NamedTuple):
    """A dispatch under search; arrays have room for the finest partition.

    Attributes:
        size: (1,) number of stages.
        cuts: (most + 1,) positions on the line.
        wanted: (most,) GPUs to deal a stage out to, 0 to keep `gpu_of`.
        gpu_of: (most, microbatches) GPU of each microbatch.
    """

    size: np.ndarray
    cuts: np.ndarray
    wanted: np.ndarray
    gpu_of: np.ndarray


@njit(cache=True, nogil=True)
def stages_of(tables: Tables, size: int, cuts: np.ndarray) -> Stages:
    """The costs of the stages between cuts."""
    compute, loaded, weights = np.empty(size), np.empty(size), np.empty(size)
    gradients, memory, hop = np.empty(size), np.empty(size), np.empty(size)
    handed, updated, lingering = np.empty(size), np.zeros(size), np.empty(size)
    ahead, saved_by, saved_hop = np.zeros(size), np.full(size, -1), np.zeros(size)
    stored, kept = np.empty(size), np.zeros(size)
    n, maker = tables.segments, size
    for s in range(size):
        begin, end = cuts[s], cuts[s + 1]
        if end < n or begin >= n:
            row = tables.runs[begin, end - begin]
            ahead[s] = row[AHEAD]
        else:
            row = tables.fused[begin]
        if begin >= n and end < 2 * n:
            # The input that its recompute begins from crosses the cut before its lowest segment.
            lowest = 2 * n - end
            maker = min(maker, s)
            while cuts[maker] >= lowest:
                maker -= 1
            saved_by[s], saved_hop[s] = maker, tables.saved_s[lowest]
            if 0 < lowest < cuts[maker + 1]:
                kept[maker] += tables.handed_bytes[lowest]
        compute[s], loaded[s], weights[s], gradients[s], memory[s] = row[0], row[1], row[2], row[3], row[4]
        lingering[s], stored[s] = row[5], row[6]
        hop[s], handed[s] = tables.hop_s[begin], tables.handed_bytes[begin]
        if begin < n:
            updated[s] = tables.updated_bytes[min(end, n)] - tables.updated_bytes[begin]
    for s in range(size):
        stored[s] += kept[s]
    return Stages(
        compute,
        ahead,
        saved_by,
        saved_hop,
        hop,
        handed,
        loaded,
        weights,
        gradients,
        updated,
        memory,
        lingering,
        stored,
        kept,
    )


@njit(cache=True, nogil=True)
def energy(
    tables: Tables,
    machine: Machine,
    most_bytes: float,
    state: State,
    order: np.ndarray,
    ends: np.ndarray,
    limit_s: float,
) -> tuple[float, float]:
    """Seconds, with penalties for what breaks a limit; infinite if they are bound to exceed `limit_s`.

    Also the work that it took to find out (`Played.work`).
    """
    size = state.size[0]
    stages = stages_of(tables, size, state.cuts)
    played = play(
        machine, stages, state.gpu_of[:size], state.wanted[:size], order[:size], ends[:size], limit_s
    )
    smallest = machine.limit_bytes[0]
    for gpu in range(1, machine.speed.size):
        smallest = min(smallest, machine.limit_bytes[gpu])
    over = played.excess_bytes / smallest
    if played.upload_bytes > most_bytes:
        over += played.upload_bytes / most_bytes - 1.0
    value = played.time_s + (_EVENNESS if machine.iterations == 1 else 1.0) * played.idle_s
    return value * (1.0 + _PENALTY * over), played.work


@njit(cache=True, nogil=True)
def _copy(source: State, target: State) -> None:
    size = source.size[0]
    target.size[0] = size
    target.cuts[size] = source.cuts[size]
    for s in range(size):
        target.cuts[s] = source.cuts[s]
        _copy_stage(source, s, target, s)


@njit(cache=True, nogil=True)
def _copy_stage(source: State, s: int, target: State, t: int) -> None:
    """Gives a stage the jobs of another."""
    # A loop, because numba takes seconds to compile an assignment of slices.
    target.wanted[t] = source.wanted[s]
    for m in range(source.gpu_of.shape[1]):
        target.gpu_of[t, m] = source.gpu_of[s, m]


@njit(cache=True, nogil=True)
def _fused(tables: Tables, state: State) -> int:
    """The fused stage."""
    s = 0
    while state.cuts[s + 1] < tables.segments:
        s += 1
    return s


@njit(cache=True, nogil=True)
def _remove(state: State, cut: int) -> None:
    """Merges the stages around a cut; the new one has the jobs of the first."""
    size = state.size[0]
    for k in range(cut, size):
        state.cuts[k] = state.cuts[k + 1]
    for k in range(cut, size - 1):
        _copy_stage(state, k + 1, state, k)
    state.size[0] = size - 1


@njit(cache=True, nogil=True)
def _split(state: State, s: int, position: int) -> None:
    """Divides a stage; both parts have its jobs."""
    size = state.size[0]
    for k in range(size + 1, s + 1, -1):
        state.cuts[k] = state.cuts[k - 1]
    for k in range(size, s, -1):
        _copy_stage(state, k - 1, state, k)
    state.cuts[s + 1] = position
    state.size[0] = size + 1


@njit(cache=True, nogil=True)
def _move_cuts(tables: Tables, state: State) -> bool:
    """Shifts one cut, or a few neighbours, by one, two or four positions."""
    size, f = state.size[0], _fused(tables, state)
    first = np.random.randint(1, size) if size > 1 else 0
    last = first + (np.random.randint(0, 6) if np.random.random() < 0.3 else 0)
    step = (1 if np.random.random() < 0.5 else -1) * (1 << np.random.randint(0, 3))
    if first == 0 or last >= size or first <= f <= last or first <= f + 1 <= last:
        return False
    for cut in range(first, last + 1):
        state.cuts[cut] += step
    low, high = state.cuts[first - 1], state.cuts[last + 1]
    if state.cuts[first] <= low or state.cuts[last] >= high:
        return False
    return _short(tables, state, first - 1) and _short(tables, state, last)


@njit(cache=True, nogil=True)
def _short(tables: Tables, state: State, s: int) -> bool:
    begin, end = state.cuts[s], state.cuts[s + 1]
    return begin < tables.segments <= end or end - begin <= tables.longest


@njit(cache=True, nogil=True)
def _move_count(tables: Tables, state: State) -> bool:
    """Divides a stage or merges two."""
    size, f = state.size[0], _fused(tables, state)
    s = np.random.randint(0, size)
    if np.random.random() < 0.5:
        begin, end = state.cuts[s], state.cuts[s + 1]
        if s == f or end - begin < 2:
            return False
        _split(state, s, int(np.random.randint(begin + 1, end)))
        return True
    if s == 0 or s == f or s == f + 1:
        return False
    _remove(state, s)
    return _short(tables, state, s - 1)


@njit(cache=True, nogil=True)
def _move_fused(tables: Tables, state: State) -> bool:
    """Moves the begin of the fused stage, and its end with it."""
    n, f = tables.segments, _fused(tables, state)
    begin = state.cuts[f] + np.random.randint(-2, 3)
    if begin == state.cuts[f] or begin < tables.first_fused or begin >= n:
        return False
    end = min(2 * n - begin, tables.line)
    if f > 0 and begin < state.cuts[f]:
        if begin < state.cuts[f - 1]:
            return False
        if begin == state.cuts[f - 1]:
            _remove(state, f)
            f -= 1
    elif f == 0:
        _split(state, 0, begin)
        f = 1
    while f + 2 <= state.size[0] and state.cuts[f + 2] <= end:
        _remove(state, f + 1)
    if f + 1 == state.size[0] and end < tables.line:
        _split(state, f, end)
    state.cuts[f] = begin
    state.cuts[f + 1] = end
    behind = f + 1 < state.size[0]
    return (f == 0 or _short(tables, state, f - 1)) and (not behind or _short(tables, state, f + 1))


@njit(cache=True, nogil=True)
def _move_wanted(state: State, gpus: int) -> bool:
    """Another number of jobs for a stage or some neighbours."""
    size = state.size[0]
    first = np.random.randint(0, size)
    last = min(size, first + 1 + (np.random.randint(0, 8) if np.random.random() < 0.3 else 0))
    kind, old = np.random.random(), state.wanted[first]
    new = np.random.randint(1, gpus + 1)
    if kind < 0.4:
        new = old + (1 if np.random.random() < 0.5 else -1)
    elif kind < 0.6:
        new = old * 2 if np.random.random() < 0.5 else old // 2
    new = max(1, min(gpus, new))
    if new == old and last == first + 1:
        return False
    for s in range(first, last):
        state.wanted[s] = new
    return True


@njit(cache=True, nogil=True)
def _move_jobs(state: State, gpus: int) -> bool:
    """Gives some microbatches of a stage, or of a run of stages, to other GPUs."""
    size, microbatches = state.size[0], state.gpu_of.shape[1]
    s, m = np.random.randint(0, size), np.random.randint(0, microbatches)
    source, kind = state.gpu_of[s, m], np.random.random()
    target = np.random.randint(0, gpus)
    if np.random.random() < 0.5:  # a GPU that is already there, or just before or behind
        near = min(size - 1, max(0, s + np.random.randint(-1, 2)))
        target = state.gpu_of[near, np.random.randint(0, microbatches)]
    if kind < 0.25:
        other = np.random.randint(0, microbatches)
        target = state.gpu_of[s, other]
        state.gpu_of[s, m], state.gpu_of[s, other] = target, source
        return source != target
    if source == target:
        return False
    if kind < 0.5:
        state.gpu_of[s, m] = target
    elif kind < 0.75:
        share = 1.0 if np.random.random() < 0.5 else 0.5
        for k in range(microbatches):
            if state.gpu_of[s, k] == source and np.random.random() < share:
                state.gpu_of[s, k] = target
    else:
        last = min(size, s + 1 + np.random.randint(0, 2 * gpus))
        if np.random.random() < 0.3:
            last = size
        for t in range(s, last):
            for k in range(microbatches):
                if state.gpu_of[t, k] == source:
                    state.gpu_of[t, k] = target
                elif state.gpu_of[t, k] == target:
                    state.gpu_of[t, k] = source
    return True


@njit(cache=True, nogil=True)
def _move(tables: Tables, state: State, gpus: int, dealing: bool) -> bool:
    """One random change; False if it came to nothing, and the state is to be thrown away.

    While stages are dealt out, `gpus` is the most that one goes to.
    """
    kind = np.random.random()
    if kind < 0.3:
        return _move_cuts(tables, state)
    if kind < 0.45:
        return _move_count(tables, state)
    if kind < 0.5:
        return _move_fused(tables, state)
    if dealing:
        return _move_wanted(state, gpus)
    return _move_jobs(state, gpus)


@njit(cache=True, nogil=True)
def anneal(
    tables: Tables,
    machine: Machine,
    most_bytes: float,
    widest: int,
    best: State,
    now: State,
    then: State,
    done: float,
    until: float,
    work: float,
    hot: float,
    cold: float,
    seed: int,
) -> tuple[float, float]:
    """Improves `best` by random moves, ever less of which may be for the worse.

    A run of so much `work` can be made in pieces, so that a clock can end it between two.

    Args:
        tables: Costs of stages.
        machine: What they run on.
        most_bytes: Most bytes to upload in an iteration.
        widest: Most GPUs that a stage is dealt out to.
        best: The state to begin from; replaced by the best one found.
        now: As large as `best`; where the walk is. Begins at `best` if nothing is `done`.
        then: As large as `best`; room to work in.
        done: Work of the pieces before this one.
        until: Work at which this one ends.
        work: All of the run, in the units of `Played.work`.
        hot: Which share of the seconds a move may cost at first.
        cold: The same at last.
        seed: Of the moves.

    Returns:
        The energy of `best`, and the work done by now.
    """
    np.random.seed(seed)
    most, microbatches = best.gpu_of.shape
    order, ends = np.empty((most, microbatches), np.int64), np.empty((most, microbatches))
    gpus = machine.speed.size
    least, _ = energy(tables, machine, most_bytes, best, order, ends, np.inf)
    if done == 0.0:
        _copy(best, now)
    walk = now
    value, _ = energy(tables, machine, most_bytes, now, order, ends, np.inf)
    while done < until:
        _copy(now, then)
        done += _MOVE_WORK
        dealing = now.wanted[0] > 0
        if not _move(tables, then, widest if dealing else gpus, dealing):
            continue
        heat = least * hot * (cold / hot) ** (done / work)
        limit = value - heat * np.log(1.0 - np.random.random())
        new, spent = energy(tables, machine, most_bytes, then, order, ends, limit)
        done += spent
        if new <= limit:
            now, then = then, now
            value = new
            if new < least:
                least = new
                _copy(now, best)
    _copy(now, walk)
    return least, done
