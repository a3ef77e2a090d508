"""Lays the stages out on the GPUs round robin: job j runs stage j, on GPU j mod N.

The result holds compute actions only; `insert-transfers` adds the copies between them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rpcompile import buffers, stage_bytes
from rpcompile.errors import InvalidArgument, PartitionError
from rpcompile.ir import Action, ActionId, Job, Op, Queue, Schedule, StageKind, Stream

if TYPE_CHECKING:
    from rpcompile.ir import Partition, SegmentChain, Stage

_OPS = {StageKind.F: Op.FORWARD, StageKind.FB: Op.FUSED, StageKind.B: Op.BACKWARD}

# The size of the loss on its way to the host. In evaluation the same buffer carries every output of
# the model; a chain does not know their sizes, so they are not priced.
_LOSS_BYTES = 4


@dataclass(frozen=True)
class ScheduleRoundRobin:
    """Partition -> Schedule, with all microbatches of a stage in one job.

    Attributes:
        chain: The segments that the partition divides.
        gpus: N, the number of GPUs.
        microbatches: M, the number of microbatches.
        mode: "sync" (training) or "forward" (evaluation; the partition has F stages only).

    Source: RoundPipe, arXiv 2604.27085.
    """

    chain: SegmentChain
    gpus: int
    microbatches: int
    mode: str = "sync"

    name = "schedule-round-robin"

    def run(self, partition: Partition) -> Schedule:
        """Makes one job of each stage, and one compute action of each of its microbatches.

        Args:
            partition: Stages in execution order.

        Returns:
            A schedule without transfers and events; `buffers` holds what lives on the GPUs.

        Raises:
            InvalidArgument: `gpus` or `microbatches` is below 1, or `mode` is unknown.
            PartitionError: The stages do not make up one iteration over the chain.
        """
        self._check_options()
        self._check_stages(partition.stages)
        microbatches = tuple(range(self.microbatches))
        jobs = tuple(
            Job(stage.index, stage.index, 0, 0, microbatches, stage.index % self.gpus)
            for stage in partition.stages
        )
        saved = frozenset(stage.first - 1 for stage in partition.stages if stage.kind is StageKind.B)
        workspaces = stage_bytes.Workspaces(self.chain)
        nbytes: dict[str, int] = {}
        actions: dict[int, list[Action]] = {job.gpu: [] for job in jobs}
        for stage, job in zip(partition.stages, jobs, strict=True):
            kept = saved.intersection(stage.segments)
            layout = _JobLayout(self, stage, job, saved, job is jobs[-1], workspaces.of(stage, kept))
            for microbatch in microbatches:
                reads, writes = layout.reads(microbatch), layout.writes(microbatch)
                nbytes |= reads | writes
                actions[job.gpu].append(layout.action(microbatch, tuple(reads), tuple(writes)))
        queues = tuple(Queue(gpu, Stream.COMPUTE, tuple(actions[gpu])) for gpu in sorted(actions))
        return Schedule("round_robin", self.mode, self.gpus, self.microbatches, jobs, queues, nbytes)

    def _check_options(self) -> None:
        for option, value in (("gpus", self.gpus), ("microbatches", self.microbatches)):
            if value < 1:
                raise InvalidArgument(f"{option} is {value}; it must be at least 1")
        if self.mode not in ("sync", "forward"):
            raise InvalidArgument(f"mode is {self.mode!r}; round robin knows 'sync' and 'forward'")

    def _check_stages(self, stages: tuple[Stage, ...]) -> None:
        """Up the chain with F and FB, then down with B as far as gradients are needed."""
        kinds = " ".join(stage.kind for stage in stages)
        up = [stage for stage in stages if stage.kind is not StageKind.B]
        down = list(stages[len(up) :])
        kinds_up = [StageKind.F] * len(up)
        if self.mode == "sync":
            kinds_up[-1:] = [StageKind.FB]
        expected = kinds_up + [StageKind.B] * (len(down) if self.mode == "sync" else 0)
        if not up or [stage.kind for stage in stages] != expected:
            wanted = "F stages, one FB stage, then B stages" if self.mode == "sync" else "F stages only"
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
        if self.mode == "sync":
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


def _name(stage: Stage) -> str:
    return f"stage {stage.index} ({stage.kind}, segments {stage.first}..{stage.last})"


@dataclass(frozen=True)
class _JobLayout:
    """The buffers, with their bytes, and the compute actions of one job."""

    options: ScheduleRoundRobin
    stage: Stage
    job: Job
    saved: frozenset[int]
    is_last: bool
    workspace_bytes: int

    def action(self, microbatch: int, reads: tuple[str, ...], writes: tuple[str, ...]) -> Action:
        stage, segments = self.stage, self.options.chain.segments
        seconds = sum(segments[index].forward_s for index in stage.segments)
        if stage.kind is not StageKind.F:
            seconds += sum(segments[index].backward_s for index in stage.segments)
        op = _OPS[stage.kind]
        return Action(
            id=str(ActionId(stage.index, op, microbatch)),
            gpu=self.job.gpu,
            stream=Stream.COMPUTE,
            op=op,
            job=self.job.index,
            stage=stage.index,
            microbatch=microbatch,
            seconds=seconds,
            reads=reads,
            writes=writes,
            workspace_bytes=self.workspace_bytes,
        )

    def reads(self, microbatch: int) -> dict[str, int]:
        stage, job, space = self.stage, self.job.index, buffers.gpu(self.job.gpu)
        segments = self.options.chain.segments
        # With one GPU the job before made its output right here. Otherwise this job receives a copy.
        source = job - 1 if self.options.gpus == 1 else job
        found = self._weights()
        if any(segments[index].inputs for index in stage.segments):
            size = sum(segments[index].input_bytes for index in stage.segments)
            found[buffers.inputs(space, microbatch, job)] = size
        if stage.first > 0:
            below = stage.first - 1
            owner = job if stage.kind is StageKind.B else source
            found[buffers.boundary(space, below, microbatch, owner)] = segments[below].boundary_bytes
        if stage.kind is StageKind.B:
            size = segments[stage.last].boundary_gradient_bytes
            found[buffers.boundary_gradient(space, stage.last, microbatch, source)] = size
        if microbatch != self.job.microbatches[0]:
            found |= self._gradients()
        return found

    def writes(self, microbatch: int) -> dict[str, int]:
        stage, job, space = self.stage, self.job.index, buffers.gpu(self.job.gpu)
        segments = self.options.chain.segments
        found = self._gradients() | self._changed_weights()
        if stage.kind is StageKind.F:
            cuts = self.saved.intersection(stage.segments) | (set() if self.is_last else {stage.last})
            for cut in sorted(cuts):
                found[buffers.boundary(space, cut, microbatch, job)] = segments[cut].boundary_bytes
        elif stage.first > 0 and segments[stage.first - 1].needs_backward:
            below = stage.first - 1
            size = segments[below].boundary_gradient_bytes
            found[buffers.boundary_gradient(space, below, microbatch, job)] = size
        if stage.kind is StageKind.FB or (self.options.mode == "forward" and self.is_last):
            found[buffers.loss(space, microbatch)] = _LOSS_BYTES
        return found

    def _weights(self) -> dict[str, int]:
        space, chain = buffers.gpu(self.job.gpu), self.options.chain
        return {
            buffers.weights(space, index, self.job.index): size
            for index, size in stage_bytes.weight_bytes(chain, self.stage.segments).items()
            if chain.segments[index].weight_bytes
        }

    def _changed_weights(self) -> dict[str, int]:
        """A backward's recompute and an evaluation leave the model's buffers as they are."""
        if self.stage.kind is StageKind.B or self.options.mode == "forward":
            return {}
        space, segments = buffers.gpu(self.job.gpu), self.options.chain.segments
        changed = {
            buffers.weights(space, index, self.job.index)
            for index in self.stage.segments
            if segments[index].state_bytes
        }
        return {name: size for name, size in self._weights().items() if name in changed}

    def _gradients(self) -> dict[str, int]:
        if self.stage.kind is StageKind.F:
            return {}
        space, chain = buffers.gpu(self.job.gpu), self.options.chain
        return {
            buffers.gradients(space, index, self.job.index): size
            for index, size in stage_bytes.gradient_bytes(chain, self.stage.segments).items()
            if chain.segments[index].gradient_bytes
        }
