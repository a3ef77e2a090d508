"""Searches for stages and their dispatch together: which segments, how many jobs, which GPU, in which order.

Regular dispatches of many shapes (`_dispatch_starts`), and the partitions that CP-SAT proposes, are
annealed with a fast model of time in the loop (`rpcompile.dispatch_time`): first with GPUs dealt out
stage by stage, then with every microbatch of every stage on a GPU of its own choice.
"""

from __future__ import annotations

import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from threading import Event
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from rpcompile.dispatch_costs import price_stages
from rpcompile.dispatch_time import SLICES, Machine, play
from rpcompile.errors import InvalidArgument, PartitionError, require_at_least
from rpcompile.ir import Dispatch, Job, Partition
from rpcompile.passes._check_chain import check_chain, check_segments
from rpcompile.passes._dispatch_bound import least_seconds
from rpcompile.passes._dispatch_moves import State, anneal, stages_of
from rpcompile.passes._dispatch_starts import Problem, Starts, first_starts
from rpcompile.round_robin_time import StageCosts, stages_between
from rpcompile.stage_bytes import upload_unit_bytes
from rpcompile.units import size as size_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rpcompile.ir import SegmentChain

_MODES = ("sync", "async")
_WIDEST = 64  # GPUs
_MOST_MICROBATCHES = 512
_CHAINED = 6  # iterations that show the steady state
_PIECES = 20  # of an annealing run, between which the clock is looked at
_MOVES_A_PLACE = 20_000  # moves of one run for each position on the line; more do not pay on short ones


class _Round(NamedTuple):
    """A round of annealing.

    Attributes:
        share: Of all work.
        hot: Share of the time that a move may cost at first.
        cold: The same at last.
        walks: States that are annealed.
        ahead: How many of the best states of the round before they begin from, the best one only once.
    """

    share: float
    hot: float
    cold: float
    walks: int
    ahead: int


# A walk that is hotter at first ends better, if it has the time to cool down. In the last round each
# microbatch has a GPU of its own choice; on a ring it has not, and many short walks do better there.
_SHORT_ROUNDS = (
    _Round(0.25, 3e-3, 3e-4, 8, 8),
    _Round(0.4, 1e-3, 3e-5, 3, 3),
    _Round(0.35, 1e-4, 1e-5, 3, 3),
)
_ROUNDS = (_Round(0.4, 2e-2, 1e-4, 16, 16), _Round(0.4, 2e-3, 3e-5, 4, 4), _Round(0.2, 1e-4, 1e-5, 4, 4))
_SHORT_RING_ROUNDS = (_Round(0.5, 1e-3, 1e-4, 12, 12), _Round(0.5, 1e-3, 3e-5, 9, 2))
_RING_ROUNDS = (_Round(0.5, 1e-3, 1e-4, 32, 32), _Round(0.5, 1e-3, 3e-5, 33, 2))


@dataclass(frozen=True)
class Effort:
    """How long to search: work is counted, so the result does not depend on the clock.

    Attributes:
        work: What all moves together may take, in the units of `Played.work`: about 5 ns each.
        limit_s: Wall time after which the search stops with what it has.
    """

    work: float
    limit_s: float


EFFORTS = {"fast": Effort(1.5e8, 2.0), "normal": Effort(3.5e9, 20.0), "thorough": Effort(1.8e10, 90.0)}


@dataclass(frozen=True)
class SearchedSchedule:
    """What the search found, and how good it is.

    Attributes:
        partition: The stages; its objective and bound are seconds of one iteration.
        dispatch: Which GPU runs what, in which order.
        upload_bytes: Weights uploaded in one iteration.
        traffic: `upload_bytes` over one upload per segment and pass in each round of as many
            microbatches as there are GPUs.
        bubble: Share of the GPUs' time that they do not compute, by the fast model.
        unused_gpus: GPUs that have nothing to do, because there is not enough work.
        ended_by: "moves" (all that the effort allows), or "clock" (its limit; another run may differ).
    """

    partition: Partition
    dispatch: Dispatch
    upload_bytes: float
    traffic: float
    bubble: float
    unused_gpus: tuple[int, ...]
    ended_by: str


@dataclass(frozen=True)
class SearchSchedule:
    """SegmentChain -> SearchedSchedule.

    Attributes:
        gpus: Number of GPUs, at most 64.
        microbatches: Number of microbatches, at most 512.
        mode: "sync": shortest single iteration, gradients on the host. "async": shortest steady state
            of iterations chained back to back; of equal GPUs, each iteration continues the ring of
            GPUs where the last one ended (`Dispatch.rotate`).
        max_traffic: Most uploads, in units of `SearchedSchedule.traffic`; None for no limit.
        effort: "fast" (2 s), "normal" (20 s) or "thorough" (90 s): wall time at most, on two cores.
        seed: The same seed gives the same result, unless the clock ends the search.
        time_limit_s: Wall time instead of the effort's.
        memory_limit_bytes: What may be used of each GPU, or of each one by one; None for
            what the chain says.
        fused_segments: Most segments in the fused stage, which keeps all that its backward needs; None
            for as many as fit.
        host_bytes_per_s: Host memory bandwidth for all transfers, sums and updates together.
        update_s_per_byte: Optimizer seconds per byte of gradient, with clipping by the global norm;
            0 leaves it out of the schedule.
        partitions: More partitions to begin from.
        replicas: Whether a stage may have several jobs. With one, gradients are summed over microbatches in
            their order.
    """

    gpus: int
    microbatches: int
    mode: str = "sync"
    max_traffic: float | None = None
    effort: str = "normal"
    seed: int = 0
    time_limit_s: float | None = None
    memory_limit_bytes: int | tuple[int, ...] | None = None
    fused_segments: int | None = None
    host_bytes_per_s: float = 200e9
    update_s_per_byte: float = 0.0
    partitions: tuple[Partition, ...] = ()
    replicas: bool = True

    name = "search-schedule"

    def run(self, chain: SegmentChain) -> SearchedSchedule:
        """Search.

        Raises:
            InvalidArgument: An option is out of range, or a time or rate of the chain is not one.
            PartitionError: Nothing to train, or nothing fits in the memory or the traffic allowed.
            StageTooLarge: One segment alone does not fit.
        """
        began = time.monotonic()
        self._check_options()
        check_chain(chain, training=True)
        limits = self._limits(chain)
        largest = chain.hardware_of(limits.index(max(limits)))
        check_segments(StageCosts(chain, max(2, self.gpus), self.microbatches), max(limits), False, largest)
        problem, bound_s = self._problem(chain, limits)
        _compile(problem)
        state, ended_by = self._improve(problem, bound_s)
        return self._answer(chain, problem, state, bound_s, ended_by, began)

    # ------------------------------------------------------------------ checks

    def _check_options(self) -> None:
        for option, value, most in (
            ("gpus", self.gpus, _WIDEST),
            ("microbatches", self.microbatches, _MOST_MICROBATCHES),
        ):
            if not 1 <= value <= most:
                raise InvalidArgument(f"{option}={value} must be from 1 to {most}")
        for option, value, choices in (("mode", self.mode, _MODES), ("effort", self.effort, tuple(EFFORTS))):
            if value not in choices:
                raise InvalidArgument(f"{option}={value!r} is unknown; use one of {', '.join(choices)}")
        if self.max_traffic is not None and not self.max_traffic > 0:
            raise InvalidArgument(f"max_traffic={self.max_traffic} must be above 0; None lifts the limit")
        if self.time_limit_s is not None:
            require_at_least(0, time_limit_s=self.time_limit_s)
        if self.fused_segments is not None and self.fused_segments < 1:
            raise InvalidArgument(f"fused_segments={self.fused_segments} must be at least 1: the loss is")
        if not self.host_bytes_per_s > 0:
            raise InvalidArgument(f"host_bytes_per_s={self.host_bytes_per_s} must be above 0")
        if not 0 <= self.update_s_per_byte < math.inf:
            raise InvalidArgument(f"update_s_per_byte={self.update_s_per_byte} must be finite, at least 0")

    def _limits(self, chain: SegmentChain) -> tuple[int, ...]:
        given = self.memory_limit_bytes
        if given is None:
            given = tuple(chain.hardware_of(gpu).usable_bytes for gpu in range(self.gpus))
        limits = (given,) * self.gpus if isinstance(given, int) else given
        if len(limits) != self.gpus or min(limits) < 1:
            raise InvalidArgument(
                f"memory_limit_bytes={given} must be at least 1, once or for each of {self.gpus} GPUs"
            )
        return limits

    def _problem(self, chain: SegmentChain, limits: Sequence[int]) -> tuple[Problem, float]:
        """What to search, and a lower bound on its time."""
        tables = price_stages(chain, self.gpus, self.microbatches, self.fused_segments)
        chained, every = self.mode == "async", [chain.hardware_of(gpu) for gpu in range(self.gpus)]
        speeds = [_speeds(chain, gpu) for gpu in range(self.gpus)]
        alike = len(set(limits)) == 1 and not chain.kinds
        # The search knows one speed of each GPU and one link; the slowest, so that it hides behind none.
        machine = Machine(
            speed=np.array([mean for mean, _ in speeds]),
            limit_bytes=np.array(limits, float),
            up_bytes_per_s=min(hardware.h2d_bytes_per_s for hardware in every),
            down_bytes_per_s=min(hardware.d2h_bytes_per_s for hardware in every),
            latency_s=max(hardware.latency_s for hardware in every),
            host_bytes_per_s=self.host_bytes_per_s,
            update_s_per_byte=self.update_s_per_byte,
            slice_s=1.0,
            iterations=_CHAINED if chained else 1,
            ring=chained and alike,
        )
        fastest = machine._replace(
            speed=np.array([most for _, most in speeds]),
            up_bytes_per_s=max(hardware.h2d_bytes_per_s for hardware in every),
            down_bytes_per_s=max(hardware.d2h_bytes_per_s for hardware in every),
            latency_s=min(hardware.latency_s for hardware in every),
        )
        most = math.inf if self.max_traffic is None else self.max_traffic * self._unit_bytes(chain)
        most_jobs = None if self.replicas else 1
        bound_s = least_seconds(chain, tables, fastest, self.microbatches, most, most_jobs)
        if bound_s <= 0:
            raise InvalidArgument("all times of the chain are 0; give what the segments take")
        # Twice the bound, for bandwidth is only scarce where the time is near it.
        machine = machine._replace(slice_s=2 * bound_s * machine.iterations / SLICES)
        return Problem(tables, machine, self.microbatches, most, self.gpus if self.replicas else 1), bound_s

    def _unit_bytes(self, chain: SegmentChain) -> float:
        return upload_unit_bytes(chain, self.gpus, self.microbatches)

    # ------------------------------------------------------------------ search

    def _improve(self, problem: Problem, bound_s: float) -> tuple[State, str]:
        """The best state that is found, and what ended the search."""
        limit_s = EFFORTS[self.effort].limit_s if self.time_limit_s is None else self.time_limit_s
        ends = time.monotonic() + limit_s
        starts = first_starts(problem, self.partitions)
        states: list[State] = []
        found: list[State] = []
        late = False
        for effort in ("fast", self.effort)[self.effort == "fast" :]:  # which no other effort is worse than
            states, ended = self._anneal_rounds(problem, bound_s, effort, starts, found, ends)
            found, late = states[:1], late or ended
        longer = replace(problem, machine=_longer(problem.machine))
        best = min(states, key=lambda state: longer.energy(state)[1::-1])
        return best, "clock" if late else "moves"

    def _anneal_rounds(
        self,
        problem: Problem,
        bound_s: float,
        effort: str,
        starts: Starts,
        found: list[State],
        ends: float,
    ) -> tuple[list[State], bool]:
        """Anneals states as they are dealt out, then the best of them, at last GPU by GPU.

        Args:
            problem: What is searched.
            bound_s: A time that ends the search.
            effort: How much.
            starts: Where it begins.
            found: States that are in the last round, too.
            ends: When it has to end; each round may take its share of what is left till then.

        Returns:
            All states of the last round, the best first, and whether the clock ended it.
        """
        ring = problem.machine.ring or problem.widest == 1
        rounds = {
            (True, True): _SHORT_RING_ROUNDS,
            (True, False): _SHORT_ROUNDS,
            (False, True): _RING_ROUNDS,
            (False, False): _ROUNDS,
        }[effort == "fast", ring]
        states = starts.best(rounds[0].walks)
        left, late = 1.0, False
        for now in rounds:
            ahead = states[: now.ahead]
            states = ahead
            if now.ahead < now.walks:
                states = ahead[:1] + [_copy(ahead[i % len(ahead)]) for i in range(now.walks - 1)]
            if now is rounds[-1]:
                states += found
                for state in states if not ring else ():
                    problem.energy(state)
                    state.wanted[:] = 0
            work = now.share * EFFORTS[effort].work / len(states)
            begins = time.monotonic()
            until = begins + (ends - begins) * now.share / left
            left -= now.share
            run = _Run(problem, bound_s, work, now.hot, now.cold, until)
            states, ended = self._anneal(run, states)
            late = late or ended
        return states, late

    def _anneal(self, run: _Run, states: list[State]) -> tuple[list[State], bool]:
        """All states annealed, the best first, and whether the clock ended it."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            seeds = range(self.seed, self.seed + len(states))
            try:
                results = list(pool.map(run.anneal, states, seeds))
            except BaseException:  # an interrupt, for which the pool would wait until all are done
                run.stopped.set()
                raise
        ranked = sorted((value, number) for number, (value, _) in enumerate(results))
        return [states[number] for _, number in ranked], any(late for _, late in results)

    # ------------------------------------------------------------------ answer

    def _answer(
        self,
        chain: SegmentChain,
        problem: Problem,
        state: State,
        bound_s: float,
        ended_by: str,
        began: float,
    ) -> SearchedSchedule:
        size = int(state.size[0])
        cuts = state.cuts[: size + 1].tolist()
        order, ends = np.empty((size, self.microbatches), np.int64), np.empty((size, self.microbatches))
        stages = stages_of(problem.tables, size, state.cuts)
        machine, wanted = problem.machine, state.wanted[:size]
        machine = _longer(machine)
        played = play(machine, stages, state.gpu_of[:size], wanted, order, ends, math.inf)
        if played.excess_bytes > 0:
            raise self._nothing_fits(chain, problem, played.excess_bytes)
        if played.upload_bytes > problem.most_bytes * (1 + 1e-9):
            raise PartitionError(
                f"max_traffic={self.max_traffic} allows {size_text(int(problem.most_bytes))} of uploads, but "
                f"the least found is {size_text(int(played.upload_bytes))}; set max_traffic to "
                f"{math.ceil(100 * played.upload_bytes / self._unit_bytes(chain)) / 100:.2f} or more"
            )
        jobs, by_gpu = _dispatched(state.gpu_of[:size], order, self.gpus)
        rotate = len(jobs) % self.gpus if machine.ring else 0
        work_s = float(stages.compute_s.sum()) * self.microbatches
        unused = tuple(gpu for gpu in range(self.gpus) if not by_gpu[gpu])
        bound_s = min(bound_s, played.time_s)
        return SearchedSchedule(
            partition=Partition(
                stages=stages_between(cuts, problem.tables.segments),
                memory_limit_bytes=int(machine.limit_bytes.max()),
                objective_s=float(played.time_s),
                bound_s=bound_s,
                status="OPTIMAL" if bound_s >= played.time_s * (1 - 1e-9) else "FEASIBLE",
                solve_s=time.monotonic() - began,
                solver=f"search ({self.effort}, ended by {ended_by})",
            ),
            dispatch=Dispatch("searched", self.gpus, self.microbatches, jobs, by_gpu, rotate=rotate),
            upload_bytes=float(played.upload_bytes),
            traffic=float(played.upload_bytes) / max(1.0, self._unit_bytes(chain)),
            bubble=1 - work_s / float(machine.speed.sum()) / float(played.time_s),
            unused_gpus=() if rotate else unused,
            ended_by=ended_by,
        )

    def _nothing_fits(self, chain: SegmentChain, problem: Problem, excess: float) -> PartitionError:
        tables = problem.tables
        finest = [row[1] for row in tables.runs[:, :, 4]] + [float(tables.fused[-1, 4])]
        worst = int(np.argmax(finest))
        n = tables.segments
        where = (
            "the fused stage of the last segment"
            if worst == tables.line
            else f"the forward of {chain.segments[worst].name}"
            if worst < n
            else f"the backward of {chain.segments[2 * n - 1 - worst].name}"
        )
        return PartitionError(
            f"no dispatch was found that fits: the best one is {size_text(int(excess))} over the "
            f"{size_text(int(problem.machine.limit_bytes.min()))} that may be used. The tightest is {where}, "
            f"which alone takes {size_text(int(max(finest)))}, beside the weights that are uploaded ahead. "
            "Use more microbatches (smaller ones), shorter sequences or GPUs with more memory."
        )


@dataclass(frozen=True)
class _Run:
    """Annealing of one state: how much, how hot, and until when, or until it is stopped."""

    problem: Problem
    bound_s: float
    work: float
    hot: float
    cold: float
    ends: float
    stopped: Event = field(default_factory=Event)

    def anneal(self, state: State, seed: int) -> tuple[float, bool]:
        """Improves a state in place; its energy, and whether the clock ended it."""
        problem = self.problem
        now, then = _copy(state), _copy(state)
        most = _MOVES_A_PLACE * problem.tables.line * problem.energy(state)[-1]
        work, done, value = min(self.work, most), 0.0, math.inf
        for piece in range(_PIECES):
            value, done = anneal(
                problem.tables,
                problem.machine,
                problem.most_bytes,
                problem.widest,
                state,
                now,
                then,
                done,
                (piece + 1) * work / _PIECES,
                work,
                self.hot,
                self.cold,
                seed * _PIECES + piece,
            )
            if value <= self.bound_s * (1 + 1e-9) or self.stopped.is_set():
                break
            if time.monotonic() > self.ends and piece < _PIECES - 1:
                return value, True
        return value, False


def _longer(machine: Machine) -> Machine:
    """With iterations enough for any pattern over several of them to show, if they are chained."""
    if machine.iterations == 1:
        return machine
    return machine._replace(iterations=4 * machine.iterations, slice_s=4 * machine.slice_s)


def _copy(state: State) -> State:
    return State(*(array.copy() for array in state))


def _speeds(chain: SegmentChain, gpu: int) -> tuple[float, float]:
    """Compute speed of a GPU relative to the one that the chain's times are for: over all, and at most."""
    if not chain.kinds:
        return 1.0, 1.0
    own = [chain.seconds_on(gpu, index) for index in range(len(chain.segments))]
    pairs = [
        pair
        for segment, (forward_s, backward_s) in zip(chain.segments, own, strict=True)
        for pair in ((2 * segment.forward_s, 2 * forward_s), (segment.backward_s, backward_s))
        if pair[0] > 0 and pair[1] > 0
    ]
    reference_s, own_s = (sum(seconds) for seconds in zip(*pairs, strict=True)) if pairs else (1.0, 1.0)
    return reference_s / own_s, max((a / b for a, b in pairs), default=1.0)


def _compile(problem: Problem) -> None:
    """Compiles what the search calls, or loads it from the cache, before the clock runs."""
    line, n = problem.tables.line, problem.tables.segments
    cuts = [*range(n), *range(min(n + 1, line), line + 1)]
    best, now, then = (problem.state(cuts, np.ones(len(cuts) - 1)) for _ in range(3))
    limit = problem.most_bytes
    anneal(problem.tables, problem.machine, limit, 1, best, now, then, 0.0, 0.0, 1.0, 1.0, 1.0, 0)
    problem.energy(best)


def _dispatched(
    gpu_of: np.ndarray, order: np.ndarray, gpus: int
) -> tuple[tuple[Job, ...], tuple[tuple[tuple[int, int], ...], ...]]:
    """Jobs in the order of their stages, and what each GPU runs."""
    jobs: list[Job] = []
    by_gpu: list[list[tuple[int, int]]] = [[] for _ in range(gpus)]
    for stage, arriving in enumerate(order.tolist()):
        mine: dict[int, list[int]] = {}
        for microbatch in arriving:
            mine.setdefault(int(gpu_of[stage, microbatch]), []).append(microbatch)
        for replica, (gpu, microbatches) in enumerate(mine.items()):
            by_gpu[gpu] += [(len(jobs), microbatch) for microbatch in microbatches]
            jobs.append(Job(len(jobs), stage, 0, replica, tuple(microbatches), gpu))
    return tuple(jobs), tuple(map(tuple, by_gpu))
