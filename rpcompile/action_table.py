"""What each GPU computes and when, as plain data: enough for anyone's simulator to check ours.

It is part of every plan file (`actions`) and of `--json` output. From it and the weights of the segments
follow makespan (the largest `end_s`), bubble (1 - computing / (GPUs x makespan)) and upload traffic (each
entry of `jobs` uploads its segments once).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rpcompile.ir import COMPUTE_OPS, Stream

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rpcompile.ir import Dispatch, Job, Partition, Schedule
    from rpcompile.simulate import Timeline
    from rpcompile.simulate_dispatch import DispatchTimeline


@dataclass(frozen=True)
class ComputeEntry:
    """One compute action: a stage on a microbatch.

    Attributes:
        stage: Index of the stage.
        kind: "F" forward, "B" recompute and backward, "FB" both at once.
        microbatch: The microbatch.
        job: Index of the job in `ActionTable.jobs`.
        start_s: Simulated start.
        end_s: Simulated end.
    """

    stage: int
    kind: str
    microbatch: int
    job: int
    start_s: float
    end_s: float


@dataclass(frozen=True)
class JobEntry:
    """One upload of a stage to a GPU.

    Attributes:
        stage: Index of the stage.
        kind: "F", "B" or "FB".
        first: First segment of the stage.
        last: Last segment of the stage, included.
        round: Accumulation round.
        replica: Which of the stage's jobs in this round.
        gpu: Where it runs.
        microbatches: What it runs.
    """

    stage: int
    kind: str
    first: int
    last: int
    round: int
    replica: int
    gpu: int
    microbatches: tuple[int, ...]


@dataclass(frozen=True)
class ActionTable:
    """Attributes:
    gpus: By GPU, its compute actions in order.
    jobs: Every stage's uploads, in dispatch order.
    """

    gpus: tuple[tuple[ComputeEntry, ...], ...]
    jobs: tuple[JobEntry, ...]


def schedule_table(partition: Partition, schedule: Schedule, timeline: Timeline) -> ActionTable:
    """The table of a schedule; of its first iteration, if several were simulated."""
    gpus: list[tuple[ComputeEntry, ...]] = [()] * schedule.gpus
    for queue in schedule.queues:
        if queue.stream is Stream.COMPUTE:
            gpus[queue.gpu] = tuple(
                ComputeEntry(
                    action.stage,
                    action.op.value,
                    action.microbatch,
                    action.job,
                    timeline.start_s[action.id],
                    timeline.end_s[action.id],
                )
                for action in queue.actions
                if action.op in COMPUTE_OPS and action.microbatch is not None
            )
    return ActionTable(tuple(gpus), _jobs(partition, schedule.jobs))


def dispatch_table(partition: Partition, dispatch: Dispatch, timeline: DispatchTimeline) -> ActionTable:
    """The table of a dispatch with its compute-only timeline."""

    def entry(action: tuple[int, int], start_s: float, end_s: float) -> ComputeEntry:
        stage = dispatch.jobs[action[0]].stage
        return ComputeEntry(stage, partition.stages[stage].kind.value, action[1], action[0], start_s, end_s)

    gpus = tuple(
        tuple(map(entry, order, starts, ends))
        for order, starts, ends in zip(dispatch.order, timeline.start_s, timeline.end_s, strict=True)
    )
    return ActionTable(gpus, _jobs(partition, dispatch.jobs))


def _jobs(partition: Partition, jobs: Sequence[Job]) -> tuple[JobEntry, ...]:
    stages = [partition.stages[job.stage] for job in jobs]
    return tuple(
        JobEntry(s.index, s.kind.value, s.first, s.last, job.round, job.replica, job.gpu, job.microbatches)
        for job, s in zip(jobs, stages, strict=True)
    )
