"""When every microbatch of every job runs, by compute and hops alone: the model of published bubbles.

No copies, streams or memory: `rpcompile/simulate.py` has those. What is left of a dispatch is, for each
GPU, an order of compute actions, and for each action the earlier ones whose results it needs.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from rpcompile import stage_bytes
from rpcompile.errors import InvalidArgument, ScheduleError
from rpcompile.idle_time import IdleTime, divide_idle, steady_period
from rpcompile.ir import ActionId, Op, StageKind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rpcompile.ir import Dispatch, Partition, SegmentChain, Stage

_OPS = {StageKind.F: Op.FORWARD, StageKind.FB: Op.FUSED, StageKind.B: Op.BACKWARD}
SEMANTICS = ("strict", "published")
_FIRST_ITERATIONS, _MOST_ITERATIONS = 16, 256
_Action = tuple[int, int]  # job, microbatch


@dataclass(frozen=True)
class DispatchTimeline:
    """When a dispatch's compute actions run.

    Attributes:
        start_s: By GPU, the start of each action of `Dispatch.order`.
        end_s: The same for ends.
        makespan_s: End of the last one.
        work_s: Seconds of compute of all GPUs.
        idle: Where the rest went; see `rpcompile/idle_time.py`.
    """

    start_s: tuple[tuple[float, ...], ...]
    end_s: tuple[tuple[float, ...], ...]
    makespan_s: float
    work_s: float
    idle: IdleTime

    @property
    def bubble(self) -> float:
        """Share of the GPUs' time that is idle."""
        return 1 - self.work_s / (len(self.start_s) * self.makespan_s)


@dataclass(frozen=True)
class SteadyState:
    """Iterations that follow one another without a pause.

    Attributes:
        period_s: Seconds an iteration; a mean where iterations of different length take turns.
        bubble: Share of the GPUs' time that is idle.
    """

    period_s: float
    bubble: float


class StageTime(NamedTuple):
    """Seconds of one microbatch of a stage: `ahead_s`, which need no gradient, then `rest_s`.

    Of a backward stage the two are RECOMPUTE and BACKWARD.
    """

    ahead_s: float
    rest_s: float

    @property
    def seconds(self) -> float:
        return self.ahead_s + self.rest_s


def stage_time(chain: SegmentChain, stage: Stage, gpu: int = 0) -> StageTime:
    """What one microbatch of a stage costs on a GPU.

    A backward stage recomputes its segments, without attention that is offloaded, but for the chain's last
    one: where that has a forward of its own (no fused stage), its few activations are kept, as published
    schedules do. Where the last of its segments is one whose backward runs all of the forward in tiles, that
    forward is not ahead.
    """
    each = [chain.seconds_on(gpu, index) for index in stage.segments]
    forward_s = sum(seconds for seconds, _ in each)
    if stage.kind is StageKind.F:
        return StageTime(0.0, forward_s)
    backward_s = sum(seconds for _, seconds in each)
    if stage.kind is StageKind.FB:
        return StageTime(forward_s, backward_s)
    again = [chain.recompute_s_on(gpu, index) for index in stage.segments]
    if chain.segments[stage.last].reruns:
        return StageTime(sum(again[:-1]), again[-1] + backward_s)
    if stage.last == len(chain.segments) - 1:
        return StageTime(sum(again[:-1]), backward_s)
    return StageTime(sum(again), backward_s)


def simulate_dispatch(
    chain: SegmentChain,
    partition: Partition,
    dispatch: Dispatch,
    *,
    hop_s: float | None = None,
    semantics: str = "strict",
) -> DispatchTimeline:
    """Runs the compute actions of a dispatch on paper.

    Args:
        chain: Prices of the segments.
        partition: Stages in execution order; with or without a fused stage.
        dispatch: Who runs what, in which order. Where `recompute_ahead` is set, a backward's recompute (and
            only it) may run before the gradient is there.
        hop_s: Seconds from the end of an action to the use of its result on another GPU. Default: its
            bytes down one link and up another.
        semantics: "strict": nothing starts before its input exists. "published": where `recompute_ahead`
            is set, recompute and the fused stage's forward wait for nothing, as in the artifact that the
            published figures of round-robin dispatch are from.

    Raises:
        InvalidArgument: `semantics` is unknown, or a time is negative, not finite, or all are zero.
        ScheduleError: Actions wait for one another, or for what no job runs; the message names the circle.
    """
    if semantics not in SEMANTICS:
        raise InvalidArgument(f"semantics is {semantics!r}; choose one of {', '.join(SEMANTICS)}")
    check_times(chain, hop_s)
    run = _Run(chain, partition, dispatch, hop_s, semantics)
    run.finish()
    starts, ends = (
        tuple(tuple(found[action] for action in order) for order in dispatch.order)
        for found in (run.start_s, run.end_s)
    )
    makespan_s = max((gpu[-1] for gpu in ends if gpu), default=0.0)
    work_s = sum(
        run.times[gpu][dispatch.jobs[job].stage].seconds
        for gpu, order in enumerate(dispatch.order)
        for job, _ in order
    )
    if not work_s > 0:
        raise InvalidArgument("all compute times are zero; a bubble needs at least one that is not")
    backward = tuple(
        tuple(partition.stages[dispatch.jobs[job].stage].kind is not StageKind.F for job, _ in order)
        for order in dispatch.order
    )
    holds = all(stage.kind is not StageKind.FB for stage in partition.stages)
    idle = divide_idle(starts, ends, backward, makespan_s, whole_warm_up=holds)
    return DispatchTimeline(starts, ends, makespan_s, work_s, idle)


def simulate_steady_state(
    chain: SegmentChain,
    partition: Partition,
    dispatch: Dispatch,
    *,
    hop_s: float | None = None,
    semantics: str = "strict",
    rotate: int = 0,
) -> SteadyState:
    """Asynchronous iterations: each GPU goes on with the next iteration as soon as it is done with one.

    The weights of an iteration are those after the update before the last, which is over by then.

    Args:
        chain, partition, dispatch, hop_s, semantics: As for `simulate_dispatch`.
        rotate: GPUs by which each iteration is shifted against the one before. Round-robin dispatch that
            never stops counting has `len(dispatch.jobs) % dispatch.gpus`.

    Raises:
        InvalidArgument, ScheduleError: As for `simulate_dispatch`.
    """
    iterations = _FIRST_ITERATIONS
    while True:
        chained = _repeat(dispatch, iterations, rotate)
        timeline = simulate_dispatch(chain, partition, chained, hop_s=hop_s, semantics=semantics)
        ends = [0.0] * iterations
        for order, gpu in zip(chained.order, timeline.end_s, strict=True):
            for (job, _), end in zip(order, gpu, strict=True):
                iteration = job // len(dispatch.jobs)
                ends[iteration] = max(ends[iteration], end)
        period_s, repeats = steady_period(ends)
        if repeats or iterations >= _MOST_ITERATIONS:
            return SteadyState(period_s, 1 - timeline.work_s / iterations / (dispatch.gpus * period_s))
        iterations *= 2


def upload_bytes(chain: SegmentChain, partition: Partition, dispatch: Dispatch) -> int:
    """Weights that all jobs upload; a job uploads its stage once."""
    stages = [sum(stage_bytes.weight_bytes(chain, stage.segments).values()) for stage in partition.stages]
    return sum(stages[job.stage] for job in dispatch.jobs)


def check_times(chain: SegmentChain, hop_s: float | None = None) -> None:
    """Refuses times that nothing can take.

    Raises:
        InvalidArgument: Naming the first segment and time that is negative or not finite.
    """
    for segment in chain.segments:
        for field in ("forward_s", "backward_s"):
            value = getattr(segment, field)
            if not 0 <= value < math.inf:
                raise InvalidArgument(
                    f"segment {segment.name} has {field} = {value}; give a finite number of seconds, "
                    "0 or more"
                )
    if hop_s is not None and not 0 <= hop_s < math.inf:
        raise InvalidArgument(f"hop_s is {hop_s}; give a finite number of seconds, 0 or more")


def _repeat(dispatch: Dispatch, iterations: int, rotate: int) -> Dispatch:
    """Iterations one behind the other, each on GPUs shifted by `rotate`."""
    count, gpus = len(dispatch.jobs), dispatch.gpus
    jobs = tuple(
        replace(
            job,
            index=job.index + i * count,
            gpu=(job.gpu + i * rotate) % gpus,
            microbatches=tuple(m + i * dispatch.microbatches for m in job.microbatches),
        )
        for i in range(iterations)
        for job in dispatch.jobs
    )
    order: list[list[_Action]] = [[] for _ in range(gpus)]
    for i in range(iterations):
        for gpu, actions in enumerate(dispatch.order):
            shifted = ((job + i * count, m + i * dispatch.microbatches) for job, m in actions)
            order[(gpu + i * rotate) % gpus] += shifted
    return replace(
        dispatch, jobs=jobs, order=tuple(map(tuple, order)), microbatches=iterations * dispatch.microbatches
    )


class _Run:
    """One run: GPUs go as far as they can, and wait by name for what is missing."""

    def __init__(
        self,
        chain: SegmentChain,
        partition: Partition,
        dispatch: Dispatch,
        hop_s: float | None,
        semantics: str,
    ) -> None:
        self.stages, self.dispatch, self.semantics = partition.stages, dispatch, semantics
        by_kind: dict[int, list[StageTime]] = {}
        for gpu, kind in enumerate(chain.kind_of or (0,)):
            if kind not in by_kind:
                by_kind[kind] = [stage_time(chain, stage, gpu) for stage in self.stages]
        # By GPU, the times of its stages.
        self.times = [by_kind[kind] for kind in chain.kind_of or (0,) * dispatch.gpus]
        self.hops = [_hop_s(chain, stage) if hop_s is None else hop_s for stage in self.stages]
        self.owner: dict[_Action, int] = {
            (dispatch.jobs[job].stage, microbatch): job
            for order in dispatch.order
            for job, microbatch in order
        }
        self.input_stages = [_input_stage(self.stages, stage) for stage in self.stages]
        self.start_s: dict[_Action, float] = {}
        self.end_s: dict[_Action, float] = {}
        self.position = [0] * dispatch.gpus
        self.free_s = [0.0] * dispatch.gpus

    def finish(self) -> None:
        waiting: dict[_Action, list[int]] = {}
        runnable = deque(range(self.dispatch.gpus))
        while runnable:
            gpu = runnable.popleft()
            order = self.dispatch.order[gpu]
            while self.position[gpu] < len(order):
                action = order[self.position[gpu]]
                missing = self._advance(gpu, action)
                if missing is not None:
                    waiting.setdefault(missing, []).append(gpu)
                    break
                self.position[gpu] += 1
                runnable.extend(waiting.pop(action, ()))
        if waiting:
            raise ScheduleError(self._describe_deadlock())

    def _advance(self, gpu: int, action: _Action) -> _Action | None:
        """Runs an action; or returns one whose result it lacks."""
        job, microbatch = action
        stage = self.dispatch.jobs[job].stage
        seconds, ahead_s = self.times[gpu][stage].seconds, self.times[gpu][stage].ahead_s
        start_s = self.free_s[gpu]
        for source_stage, early in self._sources(stage):
            if (source_stage, microbatch) not in self.owner:
                raise ScheduleError(f"no job runs microbatch {microbatch} of stage {source_stage}")
            source = (self.owner[source_stage, microbatch], microbatch)
            if source not in self.end_s:
                return source
            hop_s = self.hops[source_stage] if self.dispatch.jobs[source[0]].gpu != gpu else 0.0
            ready_s = self.end_s[source] + hop_s
            start_s = max(start_s, ready_s - ahead_s if early else ready_s)
        self.start_s[action], self.end_s[action] = start_s, start_s + seconds
        self.free_s[gpu] = start_s + seconds
        return None

    def _sources(self, stage: int) -> list[tuple[int, bool]]:
        """Stages whose results a stage needs, and whether its first `ahead_s` can do without."""
        if stage == 0:
            return []
        kind, ahead = self.stages[stage].kind, self.dispatch.recompute_ahead
        published = self.semantics == "published"
        early = ahead and (kind is StageKind.B or (kind is StageKind.FB and published))
        sources = [(stage - 1, early)]
        saved = self.input_stages[stage]
        if saved is not None and not published:
            sources.append((saved, False))
        return sources

    def _describe_deadlock(self) -> str:
        """Names the GPUs of one circle, each with the action that it is stuck at."""
        seen: list[int] = []
        gpu = next(g for g, order in enumerate(self.dispatch.order) if self.position[g] < len(order))
        while gpu not in seen:
            seen.append(gpu)
            gpu = self._stuck_behind(gpu)[1]
        text = "deadlock: "
        for member in seen[seen.index(gpu) :]:
            missing, _ = self._stuck_behind(member)
            stuck = self.dispatch.order[member][self.position[member]]
            text += (
                f"{self._name(stuck)} (gpu{member}) waits for {self._name(missing)}, which is queued behind "
            )
        return text + f"{self._name(self.dispatch.order[gpu][self.position[gpu]])} (gpu{gpu})"

    def _stuck_behind(self, gpu: int) -> tuple[_Action, int]:
        missing = self._advance(gpu, self.dispatch.order[gpu][self.position[gpu]])
        assert missing is not None
        return missing, self.dispatch.jobs[missing[0]].gpu

    def _name(self, action: _Action) -> str:
        stage = self.dispatch.jobs[action[0]].stage
        return str(ActionId(stage, _OPS[self.stages[stage].kind], action[1]))


def _input_stage(stages: Sequence[Stage], stage: Stage) -> int | None:
    """The forward stage that makes a backward stage's saved input; None for the caller's own input."""
    if stage.kind is not StageKind.B or stage.first == 0:
        return None
    return next(s.index for s in stages if s.kind is StageKind.F and s.first < stage.first <= s.last + 1)


def _hop_s(chain: SegmentChain, stage: Stage) -> float:
    """From the end of a stage to the use of its result on another GPU."""
    if stage.kind is StageKind.F:
        nbytes = chain.segments[stage.last].boundary_bytes
    else:
        nbytes = chain.segments[stage.first - 1].boundary_gradient_bytes if stage.first else 0
    hardware = chain.hardware
    return nbytes / hardware.d2h_bytes_per_s + nbytes / hardware.h2d_bytes_per_s + 2 * hardware.latency_s
