"""From a chain to a schedule that fits: what is tried, and which of it is taken."""

from __future__ import annotations

import logging
import math
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from rpcompile import stage_bytes
from rpcompile.errors import InvalidArgument, PartitionError, require_at_least
from rpcompile.ir import Partition
from rpcompile.memory_bound import gpu_memory_bounds
from rpcompile.passes.dispatch_round_robin import DispatchRoundRobin
from rpcompile.passes.insert_transfers import InsertTransfers
from rpcompile.passes.partition_stages import PartitionStages
from rpcompile.passes.propose_partitions import ProposePartitions
from rpcompile.round_robin_time import StageCosts, stages_between
from rpcompile.simulate import Timeline, simulate, simulate_steady
from rpcompile.variations import dispatch_of, host_rate, lay_out

if TYPE_CHECKING:
    from collections.abc import Callable

    from tqdm import tqdm

    from rpcompile.ir import Capture, Dispatch, Schedule, SegmentChain
    from rpcompile.shared_links import SharedLinks

EFFORTS = {"fast": 2.0, "normal": 20.0, "thorough": 90.0}
"""Names and seconds of wall time for all that `effort` asks for; the search's own `EFFORTS` counts moves."""
MODES = ("sync", "async", "forward")
_PROPOSING = 0.2  # share of that time in which CP-SAT proposes partitions
_SEARCHED = 0.7  # share of that time after which the search is over: copies, events and the proof take theirs
_LEAST_SEARCH = 0.2  # share of that time that a search has, however late it is
_SHARE_STEP, _LEAST_SHARE = 0.005, 0.5  # of memory, where what was made does not fit after all; steps double
_log = logging.getLogger("rpcompile")


@dataclass(frozen=True)
class PlanOptions:
    """What a plan is made for.

    Attributes:
        gpus: Number of GPUs.
        microbatches: Parts that each batch is split into.
        mode: "sync" or "async" (training), or "forward" (evaluation). "async" plans for the shortest
            steady state of iterations that follow one another without a pause, "sync" for the shortest
            single iteration.
        solver_time_s: Seconds the partition solver may take.
        seed: Seed of the partition solver and of the search.
        effort: None: one job a stage, and gradients summed in the order of microbatches: the solver's stages,
            round robin; in mode "async", or where GPUs differ, searched for as with "fast". "fast" (2 s),
            "normal" (20 s) or "thorough" (90 s): searches for stages, replicas and order together, from
            partitions that the solver proposes, and takes what is predicted to be faster. Replicas'
            gradients are summed job by job, which rounds otherwise than one sum over microbatches.
        max_traffic: Most uploads of weights in an iteration, in units of `SearchedSchedule.traffic`; None
            for no limit.
        links: What transfers and host work share; None for an idle machine, where nothing is shared.
        attention: "auto": attention outputs are offloaded and loaded where a plan with that is simulated to
            be faster than one that recomputes them; "recompute": never; "offload": wherever it is possible;
            "as is": as the chain's segments say.
        host_bytes: What the host has, for attention outputs and gradients of replicas to fit in; None if that
            is not known.
        update_s_per_byte: What the optimizer takes on the host for each byte of gradient. Above 0, updates
            are part of the schedule: each segment's behind the norm of all gradients, first layers first,
            and the next iteration's forward right behind them; plans are then for the shortest steady
            state of such iterations.
        fused_segments: Most segments in the fused stage of a search, which are not computed twice; 1 for the
            last one only, as published schedules have it. None for as many as pay.
        time_limit_s: Wall time of all that `effort` asks for, instead of its own. Where a search is not ended
            by it, the same seed gives the same plan.
    """

    gpus: int
    microbatches: int
    mode: str = "sync"
    solver_time_s: float = 3.0
    seed: int = 0
    effort: str | None = "fast"
    max_traffic: float | None = None
    links: SharedLinks | None = None
    attention: str = "auto"
    host_bytes: int | None = None
    update_s_per_byte: float = 0.0
    fused_segments: int | None = None
    time_limit_s: float | None = None

    @property
    def chained(self) -> bool:
        """Whether what counts is the steady state of iterations that follow one another."""
        return self.mode == "async" or self.update_s_per_byte > 0


class Found(NamedTuple):
    """A schedule that fits.

    Attributes:
        partition: Its stages.
        schedule: With transfers and events.
        timeline: Of one iteration.
        steady: Of iterations that follow one another, in mode "async" or with updates.
    """

    partition: Partition
    schedule: Schedule
    timeline: Timeline
    steady: Timeline | None

    @property
    def iteration_s(self) -> float:
        """What each iteration takes."""
        return self.timeline.makespan_s if self.steady is None else self.steady.period_s


def find_schedule(
    chain: SegmentChain,
    options: PlanOptions,
    bar: tqdm[Any] | None = None,
    capture: Capture | None = None,
) -> Found:
    """Stages and schedule whose peak fits, however long actions take; the fastest that was found.

    Args:
        chain: The segments, priced.
        options: What is wanted.
        bar: Is advanced by one for each pass.
        capture: The graph, to find the memory of stages by running them where a bound on it does not fit.

    Raises:
        InvalidArgument: An option is out of range.
        PartitionError: Nothing fits in the memory or the traffic allowed.
    """
    _check(chain, options)
    finding = _Finding(chain, options, bar, capture)
    try:
        if options.mode == "forward" or (
            options.effort is None and options.mode == "sync" and not chain.kinds
        ):
            return finding.fitting(finding.round_robin)
        return finding.searched()
    except PartitionError:
        if (found := finding.finest()) is None:
            raise
        return found


def with_exact_memory(chain: SegmentChain, found: Found, options: PlanOptions, capture: Capture) -> Found:
    """The same stages and order, with the memory that each stage is found to take, not a bound on it.

    Args:
        chain: The segments.
        found: What fits.
        options: What it was found for.
        capture: The graph of the model.
    """
    if all(stage.workspace_bytes is not None for stage in found.partition.stages):
        return found
    partition = _with_found_memory(chain, found.partition, capture)
    exact, peaks = _Finding(chain, options, None, None)._laid_out(partition, dispatch_of(found.schedule))
    # A bound was seen to be low by 0.8 % of a stage; what fits by it is not made anew for that.
    fits = all(peak <= chain.hardware_of(gpu).usable_bytes for gpu, peak in enumerate(peaks))
    return exact if fits else found


def _with_found_memory(chain: SegmentChain, partition: Partition, capture: Capture) -> Partition:
    # It loads torch, for which who has no graph need not wait.
    from rpcompile.passes.find_stage_memory import FindStageMemory

    return FindStageMemory(capture, chain).run(partition)


def on_its_stages(
    chain: SegmentChain, found: Found, options: PlanOptions, bound_s: float, capture: Capture | None = None
) -> Found | None:
    """The stages and the order of a schedule that was found for another chain; None if they do not fit.

    Args:
        chain: The same segments, priced otherwise.
        found: The schedule.
        options: What it was found for.
        bound_s: A lower bound on what any stages of `chain` take.
        capture: As for `find_schedule`.
    """
    costs = StageCosts(chain, options.gpus, options.microbatches)
    objective_s = costs.iteration_s([costs.of(stage) for stage in found.partition.stages])
    # What stages were found to take is not true of this chain.
    stages = tuple(replace(stage, workspace_bytes=None) for stage in found.partition.stages)
    partition = replace(
        found.partition, stages=stages, objective_s=objective_s, bound_s=bound_s, status="FEASIBLE"
    )
    try:
        return _Finding(chain, options, None, capture)._fit(partition, dispatch_of(found.schedule))
    except _DoesNotFit:
        return None


def traffic_of(chain: SegmentChain, schedule: Schedule, timeline: Timeline) -> float:
    """Weights uploaded in an iteration, in units of `upload_unit_bytes`."""
    uploaded = timeline.weight_bytes / len(timeline.iteration_end_s)
    unit = stage_bytes.upload_unit_bytes(chain, schedule.gpus, schedule.microbatches, schedule.mode)
    return uploaded / unit


def _check(chain: SegmentChain, options: PlanOptions) -> None:
    require_at_least(1, gpus=options.gpus, microbatches=options.microbatches)
    if options.mode not in MODES:
        raise InvalidArgument(f"mode={options.mode!r}; it must be {', '.join(map(repr, MODES))}")
    if options.effort not in (None, *EFFORTS):
        raise InvalidArgument(f"effort={options.effort!r}; it must be None, {', '.join(map(repr, EFFORTS))}")
    if options.max_traffic is not None and not options.max_traffic > 0:
        raise InvalidArgument(
            f"max_traffic={options.max_traffic}; it must be above 0, or None to lift the limit"
        )
    if not 0 <= options.update_s_per_byte < math.inf:
        raise InvalidArgument(
            f"update_s_per_byte={options.update_s_per_byte}; it must be finite, and not negative"
        )
    if options.update_s_per_byte and options.mode == "forward":
        raise InvalidArgument(
            'mode="forward" has no gradients to update weights with; leave the optimizer out'
        )
    if options.time_limit_s is not None:
        require_at_least(0, time_limit_s=options.time_limit_s)
    if options.fused_segments is not None:
        if options.fused_segments < 1:
            raise InvalidArgument(f"fused_segments={options.fused_segments} must be at least 1: the loss is")
        if options.effort is None:
            raise InvalidArgument(
                f"fused_segments={options.fused_segments} is for a search; set effort to "
                f"{', '.join(map(repr, EFFORTS))}"
            )
    if not any(segment.forward_s or segment.backward_s for segment in chain.segments):
        raise InvalidArgument(
            f"all times of the {len(chain.segments)} segments are 0; give what they take, or estimate it"
        )
    if chain.kinds and len(chain.kind_of) != options.gpus:
        raise InvalidArgument(
            f"gpus={options.gpus}, but the chain was priced for {len(chain.kind_of)} GPUs of different "
            "kinds; bind it to as many"
        )


class _DoesNotFit(PartitionError):
    """One schedule takes more memory than a GPU has; of what it takes, `fits_share` is there."""

    def __init__(self, message: str, fits_share: float) -> None:
        super().__init__(message)
        self.fits_share = fits_share


_Made = tuple["Partition", "Dispatch"]


@dataclass(frozen=True)
class _Finding:
    """One question: a chain, and what is wanted of it."""

    chain: SegmentChain
    options: PlanOptions
    bar: tqdm[Any] | None
    capture: Capture | None

    def searched(self) -> Found:
        """The best of a search, and of the proposed partitions round robin."""
        options, effort = self.options, self.options.effort or "fast"
        limit_s = EFFORTS[effort] if options.time_limit_s is None else options.time_limit_s
        ends, least_s = time.monotonic() + _SEARCHED * limit_s, _LEAST_SEARCH * limit_s
        self.announce(ProposePartitions.name)
        proposing = ProposePartitions(
            options.gpus, options.microbatches, _PROPOSING * EFFORTS[effort], options.seed
        )
        proposed = proposing.run(self.chain)
        tried: list[Partition] = []

        def search(share: float) -> _Made:
            partitions = (*tried, *proposed)
            made = self._search(effort, share, partitions, max(least_s, ends - time.monotonic()))
            tried[:] = [made[0]]
            return made

        found = [self.fitting(search)]
        if self._may_beat(proposed, found[0]):
            with suppress(PartitionError):
                found.append(self._fit(*self._dispatched(proposed[0])))
        # The last first: if times are equal, sums are taken in the order of plain PyTorch.
        best = min(reversed(found), key=lambda item: item.iteration_s)
        # The search's bound is one for every schedule of the chain.
        bound_s = min(best.iteration_s, max(item.partition.bound_s for item in (best, found[0])))
        partition = replace(best.partition, objective_s=best.iteration_s, bound_s=bound_s)
        return best._replace(partition=partition)

    def _may_beat(self, proposed: tuple[Partition, ...], found: Found) -> bool:
        """Whether the best proposed partition may be as fast; its time leaves downloads out."""
        options = self.options
        limited = options.max_traffic is not None or options.fused_segments is not None or self.chain.kinds
        if not proposed or options.mode != "sync" or limited:
            return False
        # Chained iterations hide some of a single one's ends.
        return options.chained or proposed[0].objective_s <= found.iteration_s * (1 + 1e-9)

    def round_robin(self, share: float) -> _Made:
        """The solver's stages, one job each."""
        chain, options = self.chain, self.options
        forward = options.mode == "forward"
        self.announce(PartitionStages.name)
        partition = PartitionStages(
            min(options.gpus, len(chain.segments)) if forward else options.gpus,
            options.microbatches,
            memory_limit_bytes=int(share * chain.hardware.usable_bytes),
            time_limit_s=options.solver_time_s,
            seed=options.seed,
            mode=options.mode,
        ).run(chain)
        self._check_traffic(partition)
        return self._dispatched(partition)

    def finest(self) -> Found | None:
        """One segment a stage, which takes least memory; None if that does not fit, or makes no stages."""
        chain, options = self.chain, self.options
        segments = len(chain.segments)
        # More GPUs than segments are refused where the solver's stages are all that is asked for.
        few = options.gpus > segments and options.effort is None and options.mode == "sync"
        if options.mode == "forward" or few:
            return None
        cuts = [*range(segments), *range(segments + 1, 2 * segments - chain.first_backward + 1)]
        stages, costs = stages_between(cuts, segments), StageCosts(chain, options.gpus, options.microbatches)
        partition = Partition(
            stages=stages,
            memory_limit_bytes=chain.hardware.usable_bytes,
            objective_s=costs.iteration_s([costs.of(stage) for stage in stages]),
            bound_s=0.0,
            status="FEASIBLE",
            solve_s=0.0,
            solver="one segment a stage",
        )
        with suppress(PartitionError):
            self._check_traffic(partition)
            return self._fit(*self._dispatched(partition))
        return None

    def _dispatched(self, partition: Partition) -> _Made:
        return partition, DispatchRoundRobin(self.options.gpus, self.options.microbatches).run(partition)

    def _check_traffic(self, partition: Partition) -> None:
        """Each stage is uploaded once: no schedule of these stages uploads less.

        Raises:
            PartitionError: It is more than allowed.
        """
        options, chain = self.options, self.chain
        stages = [sum(stage_bytes.weight_bytes(chain, stage.segments).values()) for stage in partition.stages]
        unit = stage_bytes.upload_unit_bytes(chain, options.gpus, options.microbatches, options.mode)
        least = sum(stages) / unit
        if options.max_traffic is not None and least > options.max_traffic * (1 + 1e-9):
            search = options.effort is None and options.mode != "forward"
            raise PartitionError(
                f"max_traffic={options.max_traffic}, but one upload a stage takes {least:.2f}; set "
                f"max_traffic to {math.ceil(100 * least) / 100:.2f} or more"
                + (', or search for other stages with effort="fast"' if search else "")
            )

    def _search(self, effort: str, share: float, partitions: tuple[Partition, ...], limit_s: float) -> _Made:
        # It compiles its inner loop; who does not search need not wait for that.
        from rpcompile.passes.search_schedule import SearchSchedule

        chain, options = self.chain, self.options
        self.announce(SearchSchedule.name)
        found = SearchSchedule(
            options.gpus,
            options.microbatches,
            mode=options.mode,
            max_traffic=options.max_traffic,
            # A second try, where the first did not fit after all, is a short one, and cools down sooner.
            effort=effort if share == 1.0 else "fast",
            seed=options.seed,
            time_limit_s=limit_s,
            memory_limit_bytes=tuple(
                int(share * chain.hardware_of(gpu).usable_bytes) for gpu in range(options.gpus)
            ),
            partitions=partitions,
            replicas=options.effort is not None,
            host_bytes_per_s=host_rate(options.links),
            update_s_per_byte=options.update_s_per_byte,
            fused_segments=options.fused_segments,
        ).run(chain)
        if found.unused_gpus:
            names = ", ".join(map(str, found.unused_gpus))
            _log.warning("there is not enough work for %d GPUs; idle: %s", options.gpus, names)
        return found.partition, found.dispatch

    def fitting(self, make: Callable[[float], _Made]) -> Found:
        """Makes a dispatch for a smaller and smaller share of the memory until its schedule fits.

        A partition is held to a bound on what its schedule takes, which the schedule's own can exceed.
        """
        problem: _DoesNotFit | None = None
        share, step = 1.0, _SHARE_STEP
        while share >= _LEAST_SHARE:
            try:
                partition, dispatch = make(share)
            except PartitionError:
                if problem is not None:
                    break
                raise
            try:
                return self._fit(partition, dispatch)
            except _DoesNotFit as error:
                problem = error
                share, step = min(share - step, share * error.fits_share), 2 * step
        assert problem is not None
        raise problem

    def _fit(self, partition: Partition, dispatch: Dispatch) -> Found:
        """A dispatch laid out and timed.

        Raises:
            _DoesNotFit: Its peak is over what a GPU has.
        """
        chain, options = self.chain, self.options
        self.announce(InsertTransfers.name)
        usable = [chain.hardware_of(gpu).usable_bytes for gpu in range(options.gpus)]
        found, peaks = self._laid_out(replace(partition, memory_limit_bytes=max(usable)), dispatch)
        excess, worst = max((peak - usable[gpu], gpu) for gpu, peak in enumerate(peaks))
        if excess > 0 and self.capture is not None:
            self.announce("find-stage-memory")
            partition = _with_found_memory(chain, found.partition, self.capture)
            found, peaks = self._laid_out(partition, dispatch)
            excess, worst = max((peak - usable[gpu], gpu) for gpu, peak in enumerate(peaks))
        if excess > 0:
            raise _DoesNotFit(
                f"no schedule was found whose peak fits in the {usable[worst]:,} usable bytes of "
                f"{chain.hardware_of(worst).name} (GPU {worst}): the last one needs {peaks[worst]:,}. Use "
                "more microbatches (smaller ones) or GPUs with more memory",
                usable[worst] / peaks[worst],
            )
        return found

    def _laid_out(self, partition: Partition, dispatch: Dispatch) -> tuple[Found, tuple[int, ...]]:
        """A dispatch with its times, and the peak of each GPU."""
        options, links = self.options, self.options.links
        schedule = lay_out(self.chain, partition, dispatch, options.mode, options.update_s_per_byte, links)
        peaks, steady = gpu_memory_bounds(schedule), None
        if options.chained:
            steady = simulate_steady(schedule, links)
            peaks = tuple(map(max, peaks, steady.gpu_peak_bytes))
        return Found(partition, schedule, simulate(schedule, links=links), steady), peaks

    def announce(self, step: str) -> None:
        """Shows that a step begins."""
        if self.bar is not None:
            self.bar.update()
            self.bar.set_description(step)
