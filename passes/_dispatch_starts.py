"""Where the search for a dispatch begins: regular dispatches of many shapes, and how good they are.

Three ideas make them. Small stages dealt out to all GPUs at both ends of an iteration leave no GPU
without work there, and cost uploads; one job a stage in the middle costs least; and what cannot be
divided, like a head, is dealt out to several GPUs so that it does not hold up the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from rpcompile.passes._dispatch_moves import State, energy, stages_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from rpcompile.dispatch_costs import Tables
    from rpcompile.dispatch_time import Machine
    from rpcompile.ir import Partition

_FORWARD_LENGTHS = (1, 2, 3, 4, 6, 8, 12)
_BACKWARD_LENGTHS = (1, 2, 4)
_FUSED_LENGTHS = 4  # steps from the smallest fused stage to the longest, and as many of one segment
_TAPER = (3, 6)  # stages at each end that are dealt out equally wide


@dataclass(frozen=True)
class Problem:
    """What is searched: costs, machine and limits.

    Attributes:
        tables: Costs of stages.
        machine: What they run on.
        microbatches: Number of microbatches.
        most_bytes: Most bytes to upload in an iteration.
        widest: Most GPUs that a stage is dealt out to, at first.
    """

    tables: Tables
    machine: Machine
    microbatches: int
    most_bytes: float
    widest: int

    def state(self, cuts: Sequence[int], wanted: Sequence[int] | np.ndarray) -> State:
        """A state with room for the finest partition; every stage is to be dealt out."""
        most, size = self.tables.line, len(cuts) - 1
        state = State(
            np.array([size]),
            np.zeros(most + 1, np.int64),
            np.zeros(most, np.int64),
            np.zeros((most, self.microbatches), np.int64),
        )
        state.cuts[: size + 1] = cuts
        state.wanted[:size] = wanted
        return state

    def fused_begin(self, cuts: Sequence[int]) -> int:
        """The first segment of the fused stage."""
        return max(cut for cut in cuts if cut < self.tables.segments)

    def energy(self, state: State) -> tuple[float, float]:
        """What the search minimises, and the work of finding out; deals out the stages that are not yet."""
        shape = state.gpu_of.shape
        room = np.empty(shape, np.int64), np.empty(shape)
        return energy(self.tables, self.machine, self.most_bytes, state, *room, math.inf)


def first_states(problem: Problem, partitions: Sequence[Partition], count: int) -> list[State]:
    """The best start for each of the best ways to cut, the best first.

    Up to half of them are of the given partitions: these may be good only after a search has been at them.
    """
    cuttings = [_cuts_of(partition, problem.tables) for partition in partitions]
    first = problem.tables.first_fused
    given = _best(problem, [cuts for cuts in cuttings if problem.fused_begin(cuts) >= first])
    given = given[: count // 2]
    known = {entry.cuts for entry in given}
    regular = [entry for entry in _best(problem, _regular(problem)) if entry.cuts not in known]
    # Half of the rest have fused stages of different lengths: few moves lead from one length to another.
    places = count - len(given)
    leaders = {problem.fused_begin(entry.cuts): entry for entry in reversed(regular)}
    chosen = sorted(leaders.values(), key=lambda entry: entry.energy)[: places // 2]
    chosen += [entry for entry in regular if all(entry is not other for other in chosen)]
    entries = [*given, *chosen[:places]]
    return [entry.state for entry in sorted(entries, key=lambda entry: entry.energy)]


class _Start(NamedTuple):
    """A state, how good it is, and where it is cut."""

    energy: float
    state: State
    cuts: tuple[int, ...]


def _best(problem: Problem, cuttings: Sequence[list[int]]) -> list[_Start]:
    """The best way to deal out the stages of each cutting, the best first."""
    best: dict[tuple[int, ...], _Start] = {}
    for cuts, wanted in _shapes(problem, cuttings):
        state = problem.state(cuts, wanted)
        entry = _Start(problem.energy(state)[0], state, tuple(cuts))
        best[entry.cuts] = min(best.get(entry.cuts, entry), entry, key=lambda entry: entry.energy)
    return sorted(best.values(), key=lambda entry: entry.energy)


def _regular(problem: Problem) -> list[list[int]]:
    """Stages of equal length around a fused stage, of many lengths."""
    tables = problem.tables
    lengths = list(product(_FORWARD_LENGTHS, _BACKWARD_LENGTHS, _fused_begins(problem)))
    cuttings = [_regular_cuts(tables, *found) for found in lengths]
    if problem.machine.ring:
        # The queues of chained iterations let the first stages take longer than those behind them.
        cuttings += [_regular_cuts(tables, *found, 3 * found[0] // 2) for found in lengths]
    return cuttings


def _shapes(problem: Problem, cuttings: Iterable[list[int]]) -> Iterator[tuple[list[int], np.ndarray]]:
    """Each cutting with stages dealt out to few or many GPUs."""
    tables, gpus = problem.tables, problem.widest
    for cuts in cuttings:
        fused = sum(cut < tables.segments for cut in cuts) - 1
        compute_s = stages_of(tables, len(cuts) - 1, np.array(cuts)).compute_s
        others_s = float(np.delete(compute_s, fused).max(initial=0.0))
        # So many that the fused stage takes microbatches in, and hands them on, as fast as the others.
        pace = round(float(compute_s[fused]) / others_s) if others_s else 1
        for middle, heads in product(
            sorted({1, min(2, gpus), gpus}), sorted({min(max(1, count), gpus) for count in (1, pace, gpus)})
        ):
            wanted = np.full(len(cuts) - 1, middle)
            wanted[fused] = max(middle, heads)
            yield cuts, wanted
            if middle == 1 and gpus > 1:
                for taper in _TAPER:
                    yield cuts, _tapered(problem, cuts, wanted.copy(), fused, taper)


def _fused_begins(problem: Problem) -> list[int]:
    """Where the fused stage may begin: from the smallest stage to the longest that fits."""
    tables, limit = problem.tables, float(problem.machine.limit_bytes.max())
    n = tables.segments
    fitting = [begin for begin in range(tables.first_fused, n) if tables.fused[begin, 4] <= limit]
    longest = n - 1 - min(fitting, default=n - 1)
    parts = range(_FUSED_LENGTHS + 1)
    more = {min(part, longest) for part in parts} | {longest * part // _FUSED_LENGTHS for part in parts}
    return sorted(n - 1 - segments for segments in more)


def _regular_cuts(tables: Tables, forward: int, backward: int, begin: int, first: int = 0) -> list[int]:
    """Stages of equal numbers of segments around a fused stage; the first two may differ."""
    n, line = tables.segments, tables.line
    forward, backward = min(forward, tables.longest), min(backward, tables.longest)
    first = min(first or forward, tables.longest)
    firsts = {cut for cut in (first, 2 * first) if cut < begin}
    up = range(2 * first, begin, forward)
    return sorted({0, *firsts, *up, begin, *range(min(2 * n - begin, line), line, backward), line})


def _cuts_of(partition: Partition, tables: Tables) -> list[int]:
    n = tables.segments
    cuts = [stage.first for stage in partition.stages if stage.kind != "B"]
    return [*cuts, *(2 * n - 1 - stage.last for stage in partition.stages if stage.kind == "B"), tables.line]


def _tapered(problem: Problem, cuts: list[int], wanted: np.ndarray, fused: int, taper: int) -> np.ndarray:
    """Deals the stages at both ends out to all GPUs, then to half as many, ..., as traffic allows."""
    weights = stages_of(problem.tables, len(wanted), np.array(cuts)).weight_bytes
    left = problem.most_bytes - float((weights * wanted).sum())
    ends = [stage for i in range(len(wanted) // 2) for stage in (i, len(wanted) - 1 - i)]
    for number, stage in enumerate(ends):
        width = len(problem.machine.speed) >> (number // (2 * taper))
        more = (width - wanted[stage]) * weights[stage]
        if stage == fused or more > left:
            break
        if width > wanted[stage]:
            wanted[stage] = width
            left -= more
    return wanted
