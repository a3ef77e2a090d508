"""Jobs, actions and the queues they stand in; the text form of one action is described at `ActionId`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

from rpcompile.errors import ScheduleError

if TYPE_CHECKING:
    from collections.abc import Iterator


class Stream(StrEnum):
    """A queue that runs its actions in order.

    H2D and WEIGHTS share a link upwards, D2H and GRADIENTS one downwards: activations take what they need
    first, the bulk takes what they leave.
    """

    COMPUTE = "compute"
    H2D = "h2d"  # activations and inputs
    WEIGHTS = "weights"  # weights and buffers of whole jobs
    D2H = "d2h"  # activations, losses and changed buffers
    GRADIENTS = "gradients"  # weight gradients of whole jobs
    HOST = "host"


UP_STREAMS = frozenset({Stream.H2D, Stream.WEIGHTS})
DOWN_STREAMS = frozenset({Stream.D2H, Stream.GRADIENTS})


class Op(StrEnum):
    """What an action does; the value is its letter in the text form."""

    PREFETCH = "P"  # weights: weights and buffers of one segment, for a job
    LOAD = "L"  # h2d: user inputs, the saved stage input and attention outputs of one microbatch
    RECEIVE = "V"  # h2d: a handed-off activation or gradient of one microbatch
    FORWARD = "F"  # compute: forward without autograd
    RECOMPUTE = "R"  # compute: forward of a backward stage under autograd, right before its BACKWARD
    BACKWARD = "B"  # compute: backward through what RECOMPUTE kept; it alone needs the gradient
    FUSED = "FB"  # compute: forward, loss and backward at once
    HANDOFF = "H"  # d2h: an activation or gradient that the next job waits for
    OFFLOAD = "O"  # d2h: a stage input kept for recompute, attention outputs, a loss, or changed buffers
    GRADIENT = "G"  # gradients: weight gradients of one segment, after a job's last microbatch
    SUM = "S"  # host: jobs' gradients of one segment are added to those of the jobs before
    UPDATE = "U"  # host: optimizer update
    FREE = "X"  # any stream: buffers whose life ends


_PATTERN = re.compile(r"(\d+)(FB|[PLVFRBHOGSUX])(\d+)?(?:@(\d+))?(?:\.(\d+))?")

COMPUTE_OPS = frozenset({Op.FORWARD, Op.RECOMPUTE, Op.BACKWARD, Op.FUSED})


class ActionId(NamedTuple):
    """The text form of an action: `<stage><op>[<microbatch>][@<job>][.<part>]`.

    `2F0` is stage 2, forward, microbatch 0; `5FB3` the fused stage 5 on microbatch 3; `2P@2.7`
    the upload of segment 7's weights for job 2, which runs stage 2; `1O0.6` the offload of the
    boundary behind segment 6, from stage 1, microbatch 0. It round-trips through `parse`.
    """

    stage: int
    op: Op
    microbatch: int | None = None
    job: int | None = None
    part: int | None = None

    def __str__(self) -> str:
        microbatch = "" if self.microbatch is None else self.microbatch
        job = "" if self.job is None else f"@{self.job}"
        part = "" if self.part is None else f".{self.part}"
        return f"{self.stage}{self.op}{microbatch}{job}{part}"

    @classmethod
    def parse(cls, text: str) -> ActionId:
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise ScheduleError(f"{text!r} is not an action; write e.g. 2F0, 5FB3, 2P@2.7 or 1O0.6")
        stage, op, microbatch, job, part = match.groups()
        optional = [None if digits is None else int(digits) for digits in (microbatch, job, part)]
        return cls(int(stage), Op(op), *optional)


@dataclass(frozen=True)
class Job:
    """One upload of one stage's weights to one GPU, then its microbatches in order."""

    index: int
    stage: int
    round: int
    replica: int
    microbatches: tuple[int, ...]
    gpu: int


@dataclass(frozen=True)
class Dispatch:
    """Which GPU runs which microbatches of which stage, and in which order.

    A stage may have several jobs (replicas) that share its microbatches, on any GPUs; each
    (stage, microbatch) belongs to one of them. A GPU may go back and forth between its jobs.

    Attributes:
        policy: Name of the rule that made it, e.g. "round_robin".
        gpus: Number of GPUs.
        microbatches: Number of microbatches.
        jobs: In dispatch order; `Job.index` is the position.
        order: By GPU, its compute actions in order, each as (job, microbatch).
        recompute_ahead: Whether a backward's recompute may run before the gradient is there, once its
            saved input is. Asked by `simulate_dispatch` alone: a schedule's RECOMPUTE always may.
        rotate: GPUs by which each of chained iterations is shifted against the one before: job j of
            iteration i runs on GPU (jobs[j].gpu + i * rotate) mod `gpus`.
    """

    policy: str
    gpus: int
    microbatches: int
    jobs: tuple[Job, ...]
    order: tuple[tuple[tuple[int, int], ...], ...]
    recompute_ahead: bool = False
    rotate: int = 0


@dataclass(frozen=True, slots=True)
class Action:
    """One instruction of one stream.

    Buffers are named `<space>:<what>`, space being `host` or `gpu<k>` (see `rpcompile/buffers.py`).

    Attributes:
        id: Text form of an `ActionId`; unique in a schedule.
        gpu: GPU whose stream runs it.
        stream: The stream.
        op: What it does.
        job: Index of the job it belongs to.
        stage: Stage of that job.
        microbatch: Microbatch, None for actions of a whole job.
        nbytes: Bytes moved; 0 for compute and FREE.
        seconds: Predicted duration.
        reads: Buffers read.
        writes: Buffers written; a buffer both read and written is updated in place.
        frees: Buffers whose life ends here (FREE only).
        after: Ids of actions that must be over first for a reason other than data: memory slots.
        waits: Events that must have happened before it starts.
        records: Events that happen when it is over.
        workspace_bytes: Device memory that a compute action needs besides its buffers while it runs; below 0
            where values that it hands on are values it was given, which both have buffers.
    """

    id: str
    gpu: int
    stream: Stream
    op: Op
    job: int
    stage: int
    microbatch: int | None = None
    nbytes: int = 0
    seconds: float = 0.0
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    frees: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    waits: tuple[str, ...] = ()
    records: tuple[str, ...] = ()
    workspace_bytes: int = 0

    def ordered(
        self, after: tuple[str, ...], waits: tuple[str, ...] = (), records: tuple[str, ...] = ()
    ) -> Action:
        """The same action in another order; `dataclasses.replace` takes twice as long."""
        return Action(
            self.id,
            self.gpu,
            self.stream,
            self.op,
            self.job,
            self.stage,
            self.microbatch,
            self.nbytes,
            self.seconds,
            self.reads,
            self.writes,
            self.frees,
            after,
            waits,
            records,
            self.workspace_bytes,
        )


@dataclass(frozen=True)
class Queue:
    """The actions of one stream of one GPU, in the order they run."""

    gpu: int
    stream: Stream
    actions: tuple[Action, ...]


@dataclass(frozen=True)
class Schedule:
    """What every stream of every GPU does in one iteration.

    Attributes:
        policy: "round_robin", ...
        mode: How iterations follow one another in training, "sync" or "async" (see `simulate`); or
            "forward" (evaluation only).
        gpus: Number of GPUs.
        microbatches: Number of microbatches.
        jobs: In dispatch order.
        queues: One a GPU and stream that has work, ordered by GPU then stream.
        buffers: Buffer name -> size in bytes.
        rotate: As in `Dispatch`.
        tied: By tensor that several segments read and that is trained, those segments.
    """

    policy: str
    mode: str
    gpus: int
    microbatches: int
    jobs: tuple[Job, ...]
    queues: tuple[Queue, ...]
    buffers: dict[str, int] = field(default_factory=dict[str, int])
    rotate: int = 0
    tied: tuple[tuple[int, ...], ...] = ()

    def actions(self) -> Iterator[Action]:
        """Every action, queue by queue."""
        for queue in self.queues:
            yield from queue.actions
