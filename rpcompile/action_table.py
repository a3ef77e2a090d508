"""What each GPU computes and when, as plain data: enough for anyone's simulator to check ours.

It is part of every plan file (`actions`) and of `--json` output. From it and the weights of the segments
follow the time until the last GPU is done (the largest `end_s`), how much of it they compute, and upload
traffic (each entry of `jobs` uploads its segments once). A plan's `iteration_s`, which its bubble is a share
of (1 - computing / (GPUs x `iteration_s`)), ends when the gradients that leave last are on the host and
added up: that may be later, by the actions on the streams of `plan.schedule`; a period may be shorter. Each
entry is the kind of work that it says and no waiting:

    F    forward
    R    recompute: the forward of a backward stage; it needs what the forward saved, but no gradient
    B    backward, right behind its R; it needs the gradient of the stage before. Without an R in front of it
         (comparison policies only), nothing is recomputed
    FB   forward and backward at once

Seconds of a stage are the sums over its segments: `forward_s` for F and R, `backward_s` for B, both for FB.
(Where a backward stage ends in a segment with `reruns`, that segment's `forward_s` is in its B, not its R.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rpcompile.ir import COMPUTE_OPS, Stream

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rpcompile.ir import Job, Partition, Schedule
    from rpcompile.simulate import Timeline


@dataclass(frozen=True)
class ComputeEntry:
    """One compute action: a stage on a microbatch.

    Attributes:
        stage: Index of the stage.
        kind: "F", "R", "B" or "FB"; see the module's text.
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
        kind: "F", "B" (R and B of the compute actions) or "FB".
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


def _jobs(partition: Partition, jobs: Sequence[Job]) -> tuple[JobEntry, ...]:
    stages = [partition.stages[job.stage] for job in jobs]
    return tuple(
        JobEntry(s.index, s.kind.value, s.first, s.last, job.round, job.replica, job.gpu, job.microbatches)
        for job, s in zip(jobs, stages, strict=True)
    )
