"""Writes a dispatch out as compute actions, with the buffers that each reads and writes.

The result holds compute actions only; `insert-transfers` adds the copies between them. What one job
hands to the next on the same GPU is read where it was made, if it may wait there; a boundary kept
for recompute always goes to the host and comes back.

A microbatch of a backward stage is two actions, one right behind the other: RECOMPUTE reads what was saved
and leaves a tape, BACKWARD reads the tape and the gradient, whose way here the recompute hides. The tape is
as large as all that the two need besides other buffers, for it is there as long as either runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from rpcompile import buffers, stage_bytes
from rpcompile.errors import InvalidArgument, PartitionError, ScheduleError
from rpcompile.ir import Action, ActionId, Op, Queue, Schedule, StageKind, Stream
from rpcompile.simulate_dispatch import stage_time

if TYPE_CHECKING:
    from rpcompile.ir import Dispatch, Job, Partition, SegmentChain, Stage

_OPS = {
    StageKind.F: (Op.FORWARD,),
    StageKind.FB: (Op.FUSED,),
    StageKind.B: (Op.RECOMPUTE, Op.BACKWARD),
}

# The size of the loss on its way to the host. In evaluation the same buffer carries every output of
# the model; a chain does not know their sizes, so they are not priced.
_LOSS_BYTES = 4


@dataclass(frozen=True)
class LayOutDispatch:
    """Dispatch -> Schedule of compute actions.

    Attributes:
        chain: The segments that the partition divides.
        partition: Stages in execution order.
        mode: "sync" or "async" (training; how iterations follow one another), or "forward" (evaluation;
            the partition has F stages only).
        waiting_bytes: How much of what jobs hand to later jobs of the same GPU may wait on that GPU;
            what is over takes the way over the host. What the very next compute action reads is not
            counted. None: all stays, and the schedule's peak has it.
    """

    chain: SegmentChain
    partition: Partition
    mode: str = "sync"
    waiting_bytes: int | None = None

    name = "lay-out-dispatch"

    def run(self, dispatch: Dispatch) -> Schedule:
        """Makes the compute actions of each microbatch of each job.

        Args:
            dispatch: Jobs, and the order of their microbatches on each GPU.

        Returns:
            A schedule without transfers and events; `buffers` holds what lives on the GPUs.

        Raises:
            InvalidArgument: `mode` is unknown, or `waiting_bytes` below 0.
            PartitionError: The stages do not make up one iteration over the chain.
            ScheduleError: The dispatch contradicts itself, leaves out or repeats a microbatch of a stage,
                or divides a stage that changes buffers of the model among jobs.
        """
        if self.mode not in ("sync", "async", "forward"):
            raise InvalidArgument(f"mode is {self.mode!r}; schedules are for 'sync', 'async' and 'forward'")
        if self.waiting_bytes is not None and self.waiting_bytes < 0:
            raise InvalidArgument(f"waiting_bytes is {self.waiting_bytes}; it must be at least 0, or None")
        stages = self.partition.stages
        self._check_stages(stages)
        jobs_of = check_dispatch(dispatch, stages)
        self._check_state(dispatch)
        spilled = self._spilled(dispatch, jobs_of)
        saved = frozenset(stage.first - 1 for stage in stages if stage.kind is StageKind.B)
        workspaces = [*map(stage_bytes.Workspaces(self.chain).planned, stages)]
        nbytes: dict[str, int] = {}
        layouts: dict[int, _JobLayout] = {}
        queues: list[Queue] = []
        for gpu, order in enumerate(dispatch.order):
            actions: list[Action] = []
            for index, microbatch in order:
                job = dispatch.jobs[index]
                source = jobs_of.get((job.stage - 1, microbatch), job)
                # What was made right here is read in place. Otherwise this job receives a copy.
                if source.gpu != gpu or (job.stage, microbatch) in spilled:
                    source = job
                begins = index not in layouts
                if begins:
                    layouts[index] = _JobLayout(self, stages[job.stage], job, saved, workspaces[job.stage])
                layout = layouts[index]
                for op in _OPS[layout.stage.kind]:
                    reads = layout.reads(op, microbatch, source.index, begins)
                    writes = layout.writes(op, microbatch)
                    nbytes |= reads
                    nbytes |= writes
                    actions.append(layout.action(op, microbatch, tuple(reads), tuple(writes)))
            queues += [Queue(gpu, Stream.COMPUTE, tuple(actions))] * bool(actions)
        return Schedule(
            dispatch.policy,
            self.mode,
            dispatch.gpus,
            dispatch.microbatches,
            dispatch.jobs,
            tuple(queues),
            nbytes,
            dispatch.rotate,
            tuple(tied.segments for tied in self.chain.tied if tied.gradient_bytes),
        )

    def _check_state(self, dispatch: Dispatch) -> None:
        """Buffers that a forward changes (running statistics) go through all microbatches in one job."""
        if self.mode == "forward":
            return
        first: dict[int, Job] = {}
        for job in dispatch.jobs:
            stage = self.partition.stages[job.stage]
            other = first.setdefault(job.stage, job)
            changes = [index for index in stage.segments if self.chain.segments[index].state_bytes]
            if other is not job and changes and stage.kind is not StageKind.B:
                raise ScheduleError(
                    f"{_name(stage)} is divided among jobs {other.index} and {job.index}, but its forward "
                    f"changes buffers of segment {changes[0]}, which pass through all microbatches in one "
                    "job; give the stage one job"
                )

    def _spilled(self, dispatch: Dispatch, jobs_of: dict[tuple[int, int], Job]) -> set[tuple[int, int]]:
        """The (stage, microbatch) that read from the host what was made on their own GPU."""
        found: set[tuple[int, int]] = set()
        if self.waiting_bytes is None:
            return found
        for order in dispatch.order:
            steps = [(dispatch.jobs[job].stage, microbatch) for job, microbatch in order]
            position = {step: number for number, step in enumerate(steps)}
            waiting: dict[tuple[int, int], int] = {}
            for number, (stage, microbatch) in enumerate(steps):
                waiting.pop((stage, microbatch), None)
                reader = (stage + 1, microbatch)
                if position.get(reader, 0) <= number + 1:
                    continue
                waiting[reader] = self._handed_bytes(self.partition.stages[stage])
                if sum(waiting.values()) > self.waiting_bytes:
                    del waiting[reader]
                    found.add(reader)
        return found

    def _handed_bytes(self, stage: Stage) -> int:
        segments = self.chain.segments
        if stage.kind is StageKind.F:
            return segments[stage.last].boundary_bytes
        return segments[stage.first - 1].boundary_gradient_bytes

    def _check_stages(self, stages: tuple[Stage, ...]) -> None:
        """Up the chain with F and FB, then down with B as far as gradients are needed."""
        kinds = " ".join(stage.kind for stage in stages)
        up = [stage for stage in stages if stage.kind is not StageKind.B]
        down = list(stages[len(up) :])
        kinds_up = [StageKind.F] * len(up)
        if self.mode != "forward":
            kinds_up[-1:] = [StageKind.FB]
        expected = kinds_up + [StageKind.B] * (len(down) if self.mode != "forward" else 0)
        if not up or [stage.kind for stage in stages] != expected:
            wanted = "F stages, one FB stage, then B stages" if self.mode != "forward" else "F stages only"
            raise PartitionError(f"mode {self.mode!r} takes {wanted}; the partition has: {kinds or 'none'}")
        if [stage.index for stage in stages] != list(range(len(stages))):
            raise PartitionError("the stages of a partition must be numbered in order, from 0")
        segments, position = len(self.chain.segments), 0
        for stage in up:
            if stage.first != position or stage.last < stage.first:
                raise PartitionError(
                    f"{_name(stage)} must begin at segment {position}, where the last one ended"
                )
            position = stage.last + 1
        if position != segments:
            raise PartitionError(f"{_name(up[-1])} must end at the last segment, {segments - 1}")
        if self.mode != "forward":
            self._check_backward(down, up[-1].first)

    def _check_backward(self, down: list[Stage], position: int) -> None:
        needed = self.chain.first_backward
        for stage in down:
            if stage.last != position - 1 or stage.last < stage.first:
                raise PartitionError(
                    f"{_name(stage)} must end at segment {position - 1}, behind the last one"
                )
            if stage.last < needed:
                raise PartitionError(
                    f"{_name(stage)} needs no backward: the first segment to need one is {needed}"
                )
            position = stage.first
        if position > needed:
            raise PartitionError(f"no stage runs the backward of segments {needed}..{position - 1}")


def check_dispatch(dispatch: Dispatch, stages: tuple[Stage, ...]) -> dict[tuple[int, int], Job]:
    """The job of each (stage, microbatch).

    Raises:
        ScheduleError: As in `LayOutDispatch.run`.
    """
    _check_jobs(dispatch, stages)
    found: dict[tuple[int, int], Job] = {}
    runs: dict[int, list[int]] = {job.index: [] for job in dispatch.jobs}
    for gpu, order in enumerate(dispatch.order):
        for index, microbatch in order:
            job = dispatch.jobs[index] if 0 <= index < len(dispatch.jobs) else None
            if job is None:
                raise ScheduleError(f"gpu{gpu} is to run job {index}; there are {len(dispatch.jobs)} jobs")
            if job.gpu != gpu or microbatch not in job.microbatches:
                raise ScheduleError(
                    f"gpu{gpu} is to run microbatch {microbatch} of job {index}, which is job {job.index} "
                    f"on gpu{job.gpu} with microbatches {job.microbatches}"
                )
            if (job.stage, microbatch) in found:
                raise ScheduleError(f"stage {job.stage} runs microbatch {microbatch} more than once")
            found[job.stage, microbatch] = job
            runs[index].append(microbatch)
    for stage in stages:
        for microbatch in range(dispatch.microbatches):
            if (stage.index, microbatch) not in found:
                raise ScheduleError(f"no job runs microbatch {microbatch} of {_name(stage)}")
    if len(found) != len(stages) * dispatch.microbatches:
        raise ScheduleError(
            f"the dispatch runs {len(found)} (stage, microbatch) pairs; the partition has {len(stages)} "
            f"stages and there are {dispatch.microbatches} microbatches"
        )
    for job in dispatch.jobs:
        if tuple(runs[job.index]) != job.microbatches:
            raise ScheduleError(
                f"gpu{job.gpu} runs microbatches {tuple(runs[job.index])} of job {job.index}, whose "
                f"microbatches are {job.microbatches}; all must run, in this order"
            )
    return found


def _check_jobs(dispatch: Dispatch, stages: tuple[Stage, ...]) -> None:
    if len(dispatch.order) != dispatch.gpus:
        raise ScheduleError(f"the dispatch orders {len(dispatch.order)} GPUs; it has {dispatch.gpus}")
    for position, job in enumerate(dispatch.jobs):
        if job.index != position:
            raise ScheduleError(f"job {position} of the dispatch is numbered {job.index}")
        if not 0 <= job.stage < len(stages):
            raise ScheduleError(f"job {position} runs stage {job.stage}; there are {len(stages)} stages")
        if not job.microbatches:
            raise ScheduleError(f"job {position} has no microbatches; leave it out")


def _name(stage: Stage) -> str:
    return f"stage {stage.index} ({stage.kind}, segments {stage.first}..{stage.last})"


@dataclass(frozen=True)
class _JobLayout:
    """The compute actions of one job, and the buffers that they use, with their bytes."""

    options: LayOutDispatch
    stage: Stage
    job: Job
    saved: frozenset[int]
    workspace_bytes: int

    def action(self, op: Op, microbatch: int, reads: tuple[str, ...], writes: tuple[str, ...]) -> Action:
        stage, job = self.stage, self.job
        return Action(
            id=str(ActionId(stage.index, op, microbatch)),
            gpu=job.gpu,
            stream=Stream.COMPUTE,
            op=op,
            job=job.index,
            stage=stage.index,
            microbatch=microbatch,
            seconds=self._seconds[op],
            reads=reads,
            writes=writes,
            workspace_bytes=0 if stage.kind is StageKind.B else self.workspace_bytes,
        )

    def reads(self, op: Op, microbatch: int, source: int, begins: bool) -> dict[str, int]:
        """What an action reads.

        Args:
            op: The action.
            microbatch: Its microbatch.
            source: The job under whose name the GPU has what the stage before made of this microbatch.
            begins: Whether no microbatch of this job came before.
        """
        stage, job, space = self.stage, self.job.index, self._space
        segments = self.options.chain.segments
        found = dict(self._weights)
        if self._input_bytes is not None:
            found[buffers.inputs(space, microbatch, job)] = self._input_bytes
        if stage.first > 0:
            below = stage.first - 1
            owner = job if stage.kind is StageKind.B else source
            found[buffers.boundary(space, below, microbatch, owner)] = segments[below].boundary_bytes
        if stage.kind is StageKind.B:
            found |= self._kept(microbatch)
        if op is Op.BACKWARD:
            size = segments[stage.last].boundary_gradient_bytes
            found[buffers.boundary_gradient(space, stage.last, microbatch, source)] = size
            found |= self._tape(microbatch)
        if not begins and op is not Op.RECOMPUTE:
            found |= self._gradients
        return found

    def writes(self, op: Op, microbatch: int) -> dict[str, int]:
        """What an action writes."""
        if op is Op.RECOMPUTE:
            return self._tape(microbatch)
        stage, job, space = self.stage, self.job.index, self._space
        segments = self.options.chain.segments
        found = self._gradients | self._changed_weights
        if stage.kind is StageKind.F:
            for cut in self._cuts:
                found[buffers.boundary(space, cut, microbatch, job)] = segments[cut].boundary_bytes
            if self.options.mode != "forward":
                found |= self._kept(microbatch)
        elif stage.first > 0 and segments[stage.first - 1].needs_backward:
            below = stage.first - 1
            size = segments[below].boundary_gradient_bytes
            found[buffers.boundary_gradient(space, below, microbatch, job)] = size
        if stage.kind is StageKind.FB or (self.options.mode == "forward" and self._is_last):
            found[buffers.loss(space, microbatch)] = _LOSS_BYTES
        return found

    @property
    def _is_last(self) -> bool:
        return self.stage.index == len(self.options.partition.stages) - 1

    @cached_property
    def _space(self) -> str:
        return buffers.gpu(self.job.gpu)

    @cached_property
    def _seconds(self) -> dict[Op, float]:
        time = stage_time(self.options.chain, self.stage, self.job.gpu)
        if self.stage.kind is StageKind.B:
            return {Op.RECOMPUTE: time.ahead_s, Op.BACKWARD: time.rest_s}
        return dict.fromkeys(_OPS[self.stage.kind], time.seconds)

    @cached_property
    def _input_bytes(self) -> int | None:
        """None where the stage reads no inputs of the caller."""
        segments = [self.options.chain.segments[index] for index in self.stage.segments]
        reads = any(segment.inputs for segment in segments)
        return sum(segment.input_bytes for segment in segments) if reads else None

    @cached_property
    def _cuts(self) -> list[int]:
        """The boundaries that a forward stage leaves behind."""
        return sorted(
            self.saved.intersection(self.stage.segments) | (set() if self._is_last else {self.stage.last})
        )

    @cached_property
    def _kept_bytes(self) -> dict[int, int]:
        return stage_bytes.kept_bytes(self.options.chain, self.stage)

    def _kept(self, microbatch: int) -> dict[str, int]:
        """Attention outputs, which go to the host from forward stages and come back to backward stages."""
        space, job, sizes = self._space, self.job.index, self._kept_bytes
        return {buffers.kept(space, index, microbatch, job): size for index, size in sizes.items()}

    def _tape(self, microbatch: int) -> dict[str, int]:
        return {buffers.tape(self._space, microbatch, self.job.index): self.workspace_bytes}

    @cached_property
    def _weights(self) -> dict[str, int]:
        chain = self.options.chain
        return {
            buffers.weights(self._space, index, self.job.index): size
            for index, size in stage_bytes.weight_bytes(chain, self.stage.segments).items()
            if chain.segments[index].weight_bytes
        }

    @cached_property
    def _changed_weights(self) -> dict[str, int]:
        """A backward's recompute and an evaluation leave the model's buffers as they are."""
        if self.stage.kind is StageKind.B or self.options.mode == "forward":
            return {}
        segments = self.options.chain.segments
        changed = {
            buffers.weights(self._space, index, self.job.index)
            for index in self.stage.segments
            if segments[index].state_bytes
        }
        return {name: size for name, size in self._weights.items() if name in changed}

    @cached_property
    def _gradients(self) -> dict[str, int]:
        if self.stage.kind is StageKind.F:
            return {}
        chain = self.options.chain
        return {
            buffers.gradients(self._space, index, self.job.index): size
            for index, size in stage_bytes.gradient_bytes(chain, self.stage.segments).items()
            if chain.segments[index].gradient_bytes
        }
