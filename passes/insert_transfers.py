"""Adds every copy between host and GPUs to a schedule of compute actions, and frees every buffer.

Before -> after, stage 1 of two GPUs, one segment and one microbatch::

    gpu1 compute  1F0              gpu1 compute  1F0 1X0.0 1X@1.0
                                   gpu1 h2d      1P@1.1 1V0 1X0.1
                                   gpu1 d2h      1H0 1X0.2

Why the result cannot deadlock: actions are emitted in one order, job by job and microbatch by
microbatch: what comes in, compute, what goes out. A queue is the part of that order that its stream
runs, and whatever an action needs (data, a freed slot) was emitted before it: hand-offs come from
the job before, saved boundaries from a forward job, a job's weights are emitted among the
microbatches of the GPU's job before and take the slot of the one before that. So the first action
in that order that is not over yet can always run.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from rpcompile import buffers, stage_bytes
from rpcompile.errors import InvalidArgument, ScheduleError
from rpcompile.ir import COMPUTE_OPS, Action, ActionId, Op, Queue, Schedule, Stream

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rpcompile.ir import Job, SegmentChain

_STREAMS = tuple(Stream)
# Parts of the ids of FREE actions: the stream's number, and one more for gradients, which leave so
# much later than changed weights that one FREE for both would hold back the next prefetch.
_PARTS = {Stream.COMPUTE: 0, Stream.H2D: 1, Stream.D2H: 2}
_GRADIENTS_PART = 3

_Value = tuple[str, int | None, int | None]


@dataclass(frozen=True)
class InsertTransfers:
    """Schedule -> Schedule, with PREFETCH, LOAD, RECEIVE, HANDOFF, OFFLOAD, GRADIENT and FREE.

    Attributes:
        chain: The segments; its hardware prices the copies.
        activation_slots: How many microbatches' incoming (and outgoing) tensors a GPU may hold at
            once. With 2, one is copied while another is computed; without a limit a fast link
            would fill the GPU's memory.
    """

    chain: SegmentChain
    activation_slots: int = 2

    name = "insert-transfers"

    def run(self, schedule: Schedule) -> Schedule:
        """Adds the copies that the compute actions' reads and writes call for.

        Args:
            schedule: Compute actions only; each GPU runs its jobs in order.

        Returns:
            The schedule with all queues, `buffers` with the host's.

        Raises:
            InvalidArgument: `activation_slots` is below 1.
            ScheduleError: The schedule has other actions than compute, or reads what no earlier job makes.
        """
        if self.activation_slots < 1:
            raise InvalidArgument(f"activation_slots is {self.activation_slots}; it must be at least 1")
        for action in schedule.actions():
            if action.op not in COMPUTE_OPS:
                raise ScheduleError(f"{action.id} is not a compute action; insert-transfers runs once")
        copies = _Copies(self.chain, schedule)
        emitted = _insert_frees(list(copies.emit()))
        emitted = _limit_residency(emitted, schedule.jobs, self.activation_slots)
        queues: dict[tuple[int, int], list[Action]] = defaultdict(list)
        for action in emitted:
            queues[action.gpu, _STREAMS.index(action.stream)].append(action)
        return replace(
            schedule,
            queues=tuple(Queue(gpu, _STREAMS[s], tuple(queues[gpu, s])) for gpu, s in sorted(queues)),
            buffers=copies.nbytes,
        )


class _Copies:
    """Emits compute actions with the copies around them, in the order of the module's docstring."""

    def __init__(self, chain: SegmentChain, schedule: Schedule) -> None:
        self.chain = chain
        self.jobs = schedule.jobs
        self.nbytes = dict(schedule.buffers)
        self.host_weights = stage_bytes.weight_bytes(chain, range(len(chain.segments)))
        self.steps: dict[int, list[Action]] = {job.index: [] for job in schedule.jobs}
        for action in schedule.actions():
            self.steps[action.job].append(action)
        self.made = {buffer for action in schedule.actions() for buffer in action.writes}
        self.makers = {
            _value(buffer): action.job for action in schedule.actions() for buffer in action.writes
        }
        # Who reads a boundary or gradient that does not lie on its GPU, and so needs it on the host.
        self.readers: dict[_Value, list[Op]] = defaultdict(list)
        for action in schedule.actions():
            for buffer in action.reads:
                if buffer not in self.made:
                    self.readers[_value(buffer)].append(action.op)

    def emit(self) -> Iterator[Action]:
        by_gpu: dict[int, list[Job]] = defaultdict(list)
        for job in self.jobs:
            by_gpu[job.gpu].append(job)
        following = {job.index: after for jobs in by_gpu.values() for job, after in pairwise(jobs)}
        for jobs in by_gpu.values():
            yield from self._prefetches(jobs[0])
        for job in self.jobs:
            steps = self.steps[job.index]
            chunks = self._prefetches(following[job.index]) if job.index in following else []
            behind = [number * len(steps) // len(chunks) for number in range(len(chunks))]
            for position, step in enumerate(steps):
                yield from self._incoming(step)
                yield from (chunk for chunk, place in zip(chunks, behind, strict=True) if place == position)
                yield step
                yield from self._outgoing(step)
            yield from self._downloads(steps[-1])

    def _prefetches(self, job: Job) -> list[Action]:
        """The weights of a job, segment by segment, so that activations can pass between two."""
        found: list[Action] = []
        step = self.steps[job.index][0]
        for buffer in step.reads:
            name = buffers.parse(buffer)
            if name.kind == "weights" and name.segment is not None:
                source = buffers.weights(buffers.HOST, name.segment)
                self.nbytes[source] = self.host_weights[name.segment]
                found.append(
                    self._copy(step, Op.PREFETCH, [(source, buffer)], job=job.index, part=name.segment)
                )
        return found

    def _incoming(self, step: Action) -> Iterator[Action]:
        loads: list[tuple[str, str]] = []
        receives: list[tuple[str, str]] = []
        for buffer in step.reads:
            name = buffers.parse(buffer)
            if name.microbatch is None or buffer in self.made:
                continue
            if name.kind == "inputs":
                source = buffers.inputs(buffers.HOST, name.microbatch)
                self.nbytes[source] = sum(segment.input_bytes for segment in self.chain.segments)
                loads.append((source, buffer))
                continue
            maker = self.makers.get(_value(buffer), step.job)
            if maker >= step.job:
                raise ScheduleError(f"{step.id} reads {buffer}, which no earlier job makes")
            saved = name.kind == "x" and step.op is Op.BACKWARD
            (loads if saved else receives).append((_on_host(name, maker), buffer))
        if loads:
            yield self._copy(step, Op.LOAD, loads, microbatch=step.microbatch)
        if receives:
            yield self._copy(step, Op.RECEIVE, receives, microbatch=step.microbatch)

    def _outgoing(self, step: Action) -> Iterator[Action]:
        """What the next job waits for goes first; that copy serves a later backward as well."""
        offloads: list[Action] = []
        for buffer in step.writes:
            name = buffers.parse(buffer)
            if name.microbatch is None:
                continue
            readers = self.readers[_value(buffer)]
            pair = (buffer, _on_host(name, step.job))
            if name.kind == "loss":
                offloads.append(self._copy(step, Op.OFFLOAD, [pair], microbatch=step.microbatch))
            elif any(name.kind == "dx" or reader is not Op.BACKWARD for reader in readers):
                yield self._copy(step, Op.HANDOFF, [pair], microbatch=step.microbatch)
            elif readers:
                offload = self._copy(step, Op.OFFLOAD, [pair], microbatch=step.microbatch, part=name.segment)
                offloads.append(offload)
        yield from offloads

    def _downloads(self, step: Action) -> Iterator[Action]:
        """What a job leaves behind. Changed buffers go first, for their weights hold a prefetch slot."""
        gradients: list[Action] = []
        for buffer in step.writes:
            name = buffers.parse(buffer)
            if name.kind == "weights" and name.segment is not None:
                target = buffers.state(name.segment, step.job)
                self.nbytes[target] = self.chain.segments[name.segment].state_bytes
                yield self._copy(step, Op.OFFLOAD, [(buffer, target)], job=step.job, part=name.segment)
            elif name.kind == "gradients" and name.segment is not None:
                pair = (buffer, buffers.gradients(buffers.HOST, name.segment, step.job))
                gradients.append(self._copy(step, Op.GRADIENT, [pair], job=step.job, part=name.segment))
        yield from gradients

    def _copy(
        self,
        step: Action,
        op: Op,
        pairs: list[tuple[str, str]],
        microbatch: int | None = None,
        job: int | None = None,
        part: int | None = None,
    ) -> Action:
        """One transfer; a copy that has no size of its own is as large as its source."""
        for source, target in pairs:
            self.nbytes.setdefault(target, self.nbytes[source])
        nbytes = sum(self.nbytes[target] for _, target in pairs)
        hardware, upwards = self.chain.hardware, op in (Op.PREFETCH, Op.LOAD, Op.RECEIVE)
        rate = hardware.h2d_bytes_per_s if upwards else hardware.d2h_bytes_per_s
        return Action(
            id=str(ActionId(step.stage, op, microbatch, job, part)),
            gpu=step.gpu,
            stream=Stream.H2D if upwards else Stream.D2H,
            op=op,
            job=step.job,
            stage=step.stage,
            microbatch=microbatch,
            nbytes=nbytes,
            seconds=nbytes / rate + hardware.latency_s,
            reads=tuple(source for source, _ in pairs),
            writes=tuple(target for _, target in pairs),
        )


def _value(buffer: str) -> _Value:
    """What a buffer holds, no matter where: its kind, segment and microbatch."""
    name = buffers.parse(buffer)
    return name.kind, name.segment, name.microbatch


def _on_host(name: buffers.BufferName, maker: int) -> str:
    """The host's copy of what job `maker` made of one microbatch."""
    assert name.microbatch is not None
    if name.kind == "loss":
        return buffers.loss(buffers.HOST, name.microbatch)
    assert name.segment is not None
    if name.kind == "x":
        return buffers.boundary(buffers.HOST, name.segment, name.microbatch)
    return buffers.boundary_gradient(buffers.HOST, name.segment, name.microbatch, maker)


def _insert_frees(emitted: list[Action]) -> list[Action]:
    """Frees what the program made (but not its results) behind the last action that uses it.

    One FREE takes all buffers of a job, microbatch and stream. A buffer that a copy down reads is
    freed on that stream, so that compute never waits for a copy in order to free something.
    """
    uses: dict[str, list[int]] = defaultdict(list)
    for number, action in enumerate(emitted):
        for buffer in {*action.reads, *action.writes}:
            uses[buffer].append(number)
    groups: dict[ActionId, list[str]] = defaultdict(list)
    last_use: dict[ActionId, int] = {}
    for buffer, numbers in sorted(uses.items()):
        name = buffers.parse(buffer)
        if name.space == buffers.HOST and name.kind not in ("x", "dx"):
            continue
        last = emitted[numbers[-1]]
        leaves = any(emitted[n].stream is Stream.D2H and buffer in emitted[n].reads for n in numbers)
        part = _PARTS[Stream.D2H if leaves else last.stream]
        if name.microbatch is None:
            part = _GRADIENTS_PART if name.kind == "gradients" else part
            group = ActionId(last.stage, Op.FREE, job=last.job, part=part)
        else:
            group = ActionId(last.stage, Op.FREE, last.microbatch, part=part)
        groups[group].append(buffer)
        last_use[group] = max(last_use.get(group, 0), numbers[-1])
    behind: dict[int, list[Action]] = defaultdict(list)
    for group, number in sorted(last_use.items(), key=lambda item: (item[1], str(item[0]))):
        behind[number].append(_free(group, emitted[number], tuple(groups[group])))
    return [found for number, action in enumerate(emitted) for found in (action, *behind[number])]


def _free(group: ActionId, last: Action, freed: tuple[str, ...]) -> Action:
    stream = next((stream for stream, part in _PARTS.items() if part == group.part), Stream.D2H)
    return Action(
        id=str(group),
        gpu=last.gpu,
        stream=stream,
        op=Op.FREE,
        job=last.job,
        stage=last.stage,
        microbatch=group.microbatch,
        frees=freed,
    )


def _limit_residency(emitted: list[Action], jobs: tuple[Job, ...], slots: int) -> list[Action]:
    """Makes what fills memory wait (`after`) for what empties it, GPU by GPU.

    A prefetch waits for the weights of the job two before on the same GPU, the first gradient of a
    job for the gradients of the gradient-making job two before, and a microbatch's copies up (or its
    compute, for the output's sake) for the input (or output) of the microbatch `slots` before.
    """
    gpus = {job.gpu: _Residency(slots) for job in jobs}
    return [gpus[action.gpu].admit(action) for action in emitted]


class _Residency:
    """Who frees what on one GPU, in order."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.weights: dict[int, list[str]] = {}  # job -> what frees its weights
        self.gradients: list[str] = []  # what frees the gradients, by job that makes some
        self.gradient_jobs = 0
        self.inputs: list[str] = []  # what ends the input of each compute action
        self.outputs: list[str | None] = []  # what ends its output's way down, if it has one

    def admit(self, action: Action) -> Action:
        """The next action that was emitted for this GPU, with what it has to wait for."""
        after: list[str | None] = []
        if action.op is Op.PREFETCH:
            self.weights.setdefault(action.job, [])
            if len(self.weights) > 2:
                after += list(self.weights.values())[-3]
        elif action.op in (Op.LOAD, Op.RECEIVE) and len(self.inputs) >= self.slots:
            after.append(self.inputs[-self.slots])
        elif action.op in COMPUTE_OPS:
            if len(self.outputs) >= self.slots:
                after.append(self.outputs[-self.slots])
            if _has(action.writes, "gradients") and not _has(action.reads, "gradients"):
                self.gradient_jobs += 1
                if self.gradient_jobs > 2:
                    after.append(self.gradients[self.gradient_jobs - 3])
            self.inputs.append(action.id)
            self.outputs.append(None)
        elif action.microbatch is not None and action.stream is Stream.COMPUTE:
            self.inputs[-1] = action.id
        elif action.microbatch is not None and action.stream is Stream.D2H:
            self.outputs[-1] = action.id
        if _has(action.frees, "weights"):
            self.weights[action.job].append(action.id)
        if _has(action.frees, "gradients"):
            self.gradients.append(action.id)
        return replace(action, after=tuple(name for name in after if name is not None))


def _has(names: tuple[str, ...], kind: str) -> bool:
    return any(buffers.parse(name).kind == kind for name in names)
