"""Where the search for a dispatch begins: regular dispatches of many shapes, and how good they are.

Four ideas make them. What cannot be divided, like a head, or is better not, like a long fused stage, is dealt
out to several GPUs, and the stages around it take microbatches as fast as those together hand them on, or
are parts of that. Small stages dealt out to all GPUs at both ends of an iteration leave no GPU without work
there, and cost uploads; one job a stage in the middle costs least; and two jobs or more everywhere divide the
work most evenly.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, chain, product
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from rpcompile.passes._dispatch_moves import State, energy, stages_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from rpcompile.dispatch_costs import Tables
    from rpcompile.dispatch_time import Machine
    from rpcompile.ir import Partition

_FUSED_LENGTHS = 12  # fused stages tried, from the smallest to the longest
_RING_LENGTHS = 24  # the same on a ring, where there are fewer shapes
_VARIED = 100  # best patterns that are varied
_PACES = 8  # of the fused stage: as many jobs of it as that
_LENGTHS = (1, 2, 3, 4, 6)  # of backward stages, in units of the longest segment's
# Stages of which part of the fused stage's pace: backward ones, forward ones.
_PARTS = ((1, 1), (1, 2), (1, 4), (2, 2), (2, 4), (2, 8), (4, 8), (8, 8), (8, 1))
_RING_PARTS = ((1, 1), (1, 2), (2, 1), (2, 2), (2, 8))
# Small stages at the first and the last end, how often halved.
_ENDS = ((0, 2), (2, 2), (0, 4), (4, 4))
_STRETCHES = (0.8, 1.0)  # of the pace on a ring, where a job that comes late holds up the next iteration
_LONGER = 1.5  # the first two stages on a ring: queues of chained iterations let them take longer
_TAPER = (3, 6)  # stages at each end that are dealt out equally wide

_Ends = tuple[tuple[float, int], ...]  # from the outermost stage inwards: part of the usual length, GPUs
_Shape = tuple[tuple[int, ...], tuple[int, ...]]  # cuts, and how many GPUs each stage is dealt out to


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

    def energy(self, state: State) -> tuple[float, bool, float]:
        """What the search minimises (`_dispatch_moves.energy`); deals out the stages that are not yet."""
        shape = state.gpu_of.shape
        room = np.empty(shape, np.int64), np.empty(shape)
        return energy(self.tables, self.machine, self.most_bytes, state, *room, math.inf)


class _Pattern(NamedTuple):
    """Stages around a fused stage, each a part of its pace.

    Attributes:
        begin: First segment of the fused stage.
        width: GPUs that it is dealt out to, if there are so many.
        pace_s: Seconds in which they take one microbatch.
        up: Forward stages are so many times shorter than the pace.
        down: The same of backward stages.
    """

    begin: int
    width: int
    pace_s: float
    up: int
    down: int


class _Start(NamedTuple):
    """A dispatch, and how good it is."""

    energy: float
    cuts: tuple[int, ...]
    wanted: tuple[int, ...]


@dataclass(frozen=True)
class Starts:
    """All starts, the best first, those of given partitions apart."""

    problem: Problem
    given: list[_Start]
    regular: list[_Start]

    def best(self, count: int) -> list[State]:
        """The best start for each of the best ways to cut, the best first.

        Up to half of them are of given partitions: these may be good only after a search has been at them.
        """
        given = self.given[: count // 2]
        known = {entry.cuts for entry in given}
        regular = [entry for entry in self.regular if entry.cuts not in known]
        # Half of the rest have fused stages of different lengths: few moves lead from one length to another.
        places = count - len(given)
        leaders = {self.problem.fused_begin(entry.cuts): entry for entry in reversed(regular)}
        chosen = sorted(leaders.values())[: places // 2]
        known = {entry.cuts for entry in chosen}
        chosen += [entry for entry in regular if entry.cuts not in known]
        return [self.problem.state(*entry[1:]) for entry in sorted([*given, *chosen[:places]])]


def first_starts(problem: Problem, partitions: Sequence[Partition]) -> Starts:
    """Regular dispatches of many shapes, and of the given partitions; the best for each way to cut."""
    cuttings = [_cuts_of(partition, problem.tables) for partition in partitions]
    first = problem.tables.first_fused
    cuttings = [cuts for cuts in cuttings if problem.fused_begin(cuts) >= first]
    given = _unique(_ranked(problem, _given(problem, cuttings)))
    patterns: dict[_Shape, _Pattern] = {}
    for pattern in _patterns(problem):
        cuts, wanted = _regular(problem, pattern)
        patterns.setdefault((cuts, wanted), pattern)
        patterns.setdefault((cuts, (problem.widest,) * len(wanted)), pattern)
    ranked = _ranked(problem, patterns)
    leaders = {problem.fused_begin(start.cuts): start for start in reversed(ranked)}
    varied = {patterns[start[1:]] for start in [*leaders.values(), *ranked[:_VARIED]]}
    more = {shape for pattern in varied for shape in _variations(problem, pattern)} - patterns.keys()
    return Starts(problem, given, _unique([*ranked, *_ranked(problem, more)]))


def _ranked(problem: Problem, shapes: Iterable[_Shape]) -> list[_Start]:
    """Starts, the best first."""

    def starts(some: list[_Shape]) -> list[_Start]:
        return [_Start(problem.energy(problem.state(*shape))[0], *shape) for shape in some]

    shapes = list(shapes)
    with ThreadPoolExecutor(2) as pool:  # more would wait for one another's Python
        return sorted(chain.from_iterable(pool.map(starts, (shapes[::2], shapes[1::2]))))


def _unique(starts: Iterable[_Start]) -> list[_Start]:
    """The best way to deal out the stages of each cutting, the best first."""
    best: dict[tuple[int, ...], _Start] = {}
    for start in sorted(starts):
        best.setdefault(start.cuts, start)
    return list(best.values())


def _given(problem: Problem, cuttings: Iterable[tuple[int, ...]]) -> Iterator[_Shape]:
    """Each cutting with stages dealt out to few or many GPUs."""
    tables, gpus = problem.tables, problem.widest
    for cuts in cuttings:
        fused = sum(cut < tables.segments for cut in cuts) - 1
        compute_s = stages_of(tables, len(cuts) - 1, np.array(cuts)).compute_s
        others_s = float(np.delete(compute_s, fused).max(initial=0.0))
        # So many that the fused stage takes microbatches in, and hands them on, as fast as the others.
        pace = round(float(compute_s[fused]) / others_s) if others_s else 1
        for heads in sorted({min(max(1, width), gpus) for width in (1, pace, gpus)}):
            wanted = [1] * (len(cuts) - 1)
            wanted[fused] = heads
            yield cuts, tuple(wanted)
            yield from _wider(problem, cuts, wanted)


def _patterns(problem: Problem) -> Iterator[_Pattern]:
    """All that are tried."""
    tables, gpus, parts = problem.tables, problem.widest, _RING_PARTS if problem.machine.ring else _PARTS
    widths = {round(gpus ** (i / (_PACES - 1))) for i in range(_PACES)} | set(range(1, _PACES + 1))
    longest_s = float(tables.runs[tables.segments :, 1, 0].max(initial=0.0))
    for begin in _fused_begins(problem):
        fused_s = float(tables.fused[begin, 0])
        paces = {(width, fused_s / width) for width in widths}
        if longest_s:  # a short fused stage waits for the others
            paces |= {
                (max(1, round(fused_s / (length * longest_s))), length * longest_s) for length in _LENGTHS
            }
        for (width, pace_s), (down, up) in product(sorted(paces), parts):
            yield _Pattern(begin, width, pace_s, up, down)


def _regular(problem: Problem, pattern: _Pattern, up_ends: _Ends = (), down_ends: _Ends = ()) -> _Shape:
    """Stages of equal time around a fused stage, but for those at the ends."""
    tables = problem.tables
    end = min(2 * tables.segments - pattern.begin, tables.line)
    seconds = tables.runs[:, 1, 0].tolist()
    up = _divided(seconds[: pattern.begin][::-1], pattern.pace_s / pattern.up, up_ends, tables.longest)
    down = _divided(seconds[end:], pattern.pace_s / pattern.down, down_ends, tables.longest)
    lengths = (*up[0][::-1], end - pattern.begin, *down[0])
    return tuple(accumulate(lengths, initial=0)), (*up[1][::-1], min(pattern.width, problem.widest), *down[1])


def _variations(problem: Problem, pattern: _Pattern) -> Iterator[_Shape]:
    """A pattern with other ends, and with its stages dealt out more widely."""
    gpus = problem.widest
    if problem.machine.ring:
        for stretch in _STRETCHES:
            stretched = pattern._replace(pace_s=stretch * pattern.pace_s)
            yield _regular(problem, stretched)
            yield _regular(problem, stretched, ((_LONGER, 1),) * 2)
    elif gpus > 1:
        for up, down in _ENDS:
            yield _regular(problem, pattern, _halved(up, gpus), _halved(down, gpus))
    cuts, wanted = _regular(problem, pattern)
    yield from _wider(problem, cuts, wanted)


def _wider(problem: Problem, cuts: tuple[int, ...], wanted: Sequence[int]) -> Iterator[_Shape]:
    """The same cuts with all stages dealt out to two GPUs, to all, or to more at both ends."""
    gpus = problem.widest
    if gpus == 1:
        return
    for least in sorted({2, gpus}):
        yield cuts, tuple(max(least, width) for width in wanted)
    if not problem.machine.ring:
        for taper in _TAPER:
            yield cuts, _tapered(problem, cuts, list(wanted), taper)


def _fused_begins(problem: Problem) -> list[int]:
    """Where the fused stage may begin: from the smallest stage to the longest that fits."""
    tables, limit = problem.tables, float(problem.machine.limit_bytes.max())
    n, most = tables.segments, _RING_LENGTHS if problem.machine.ring else _FUSED_LENGTHS
    fitting = [begin for begin in range(tables.first_fused, n) if tables.fused[begin, 4] <= limit]
    longest = n - 1 - min(fitting, default=n - 1)
    return sorted({n - 1 - round(longest * part / (most - 1)) for part in range(most)})


def _halved(times: int, gpus: int) -> _Ends:
    """Ends so that each stage is half as long as the next one, and dealt out twice as wide."""
    return tuple((0.5**k, min(gpus, 2**k)) for k in range(times, 0, -1))


def _divided(seconds: list[float], pace_s: float, ends: _Ends, longest: int) -> tuple[list[int], list[int]]:
    """Lengths and widths of stages of about equal time on one side of the fused stage, outwards.

    Args:
        seconds: Of each segment, outwards.
        pace_s: Seconds of a stage; what is left for the outermost of these may be less.
        ends: Stages that differ, from the outermost one inwards.
        longest: Most segments of a stage.
    """
    outer: list[int] = []
    left = len(seconds)
    for part, _ in ends:
        if left:
            outer.append(_length(seconds[:left][::-1], part * pace_s, longest))
            left -= outer[-1]
    inner: list[int] = []
    begin = 0
    while begin < left:
        inner.append(_length(seconds[begin:left], pace_s, longest))
        begin += inner[-1]
    widths = [width for _, width in ends[: len(outer)]]
    return inner + outer[::-1], [1] * len(inner) + widths[::-1]


def _length(seconds: list[float], wish_s: float, longest: int) -> int:
    """How many of these segments take about as long as that, at least one."""
    length, total_s = 1, seconds[0]
    while length < min(longest, len(seconds)) and total_s + seconds[length] / 2 <= wish_s:
        total_s += seconds[length]
        length += 1
    return length


def _cuts_of(partition: Partition, tables: Tables) -> tuple[int, ...]:
    n = tables.segments
    cuts = [stage.first for stage in partition.stages if stage.kind != "B"]
    cuts += [2 * n - 1 - stage.last for stage in partition.stages if stage.kind == "B"]
    return (*cuts, tables.line)


def _tapered(problem: Problem, cuts: Sequence[int], wanted: list[int], taper: int) -> tuple[int, ...]:
    """Deals the stages at both ends out to all GPUs, then to half as many, ..., as traffic allows."""
    weights = stages_of(problem.tables, len(wanted), np.array(cuts)).weight_bytes.tolist()
    left = problem.most_bytes - sum(map(float.__mul__, weights, map(float, wanted)))
    ends = [stage for i in range(len(wanted) // 2) for stage in (i, len(wanted) - 1 - i)]
    for number, stage in enumerate(ends):
        width = len(problem.machine.speed) >> (number // (2 * taper))
        more = (width - wanted[stage]) * weights[stage]
        if cuts[stage + 1] >= problem.tables.segments > cuts[stage] or more > left:  # the fused stage
            break
        if width > wanted[stage]:
            wanted[stage] = width
            left -= more
    return tuple(wanted)
