"""Adds every copy between host and GPUs to a schedule of compute actions, and frees every buffer.

Before -> after, stage 1 of two GPUs, one segment and one microbatch::

    gpu1 compute  1F0              gpu1 compute    1F0 1X0.0 1X@1.0
                                   gpu1 h2d        1V0 1X0.1
                                   gpu1 weights    1P@1.1
                                   gpu1 d2h        1H0 1X0.2

Why the result cannot deadlock: all actions are emitted in one order. It follows an order of the
compute actions in which each comes behind those that make what it reads and behind those before it
on its GPU (there is one, or the dispatch is refused); around each compute action stand its copies:
what comes in, compute, what goes out, then FREEs. A queue is the part of that order that its stream
runs, and whatever an action needs was emitted before it: data by the order of compute, a microbatch's
slot because it is freed right behind an earlier compute action of the same GPU, and the slot of a
job's weights because its prefetch stands right before its first compute action, behind the last one
of every job that it waits for. So the first action in that order that is not over yet
can always run.

Slots go to a GPU's jobs by first use; `passes/_residency.py` says who waits for whom. Jobs that run
one after another share two slots: one job computes while the next one's weights arrive. Where a GPU
goes back and forth between jobs (1F1B, GPipe), each keeps its slot from before its first microbatch
to its last.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from rpcompile import buffers, stage_bytes
from rpcompile.collection import collection_paused
from rpcompile.errors import ScheduleError, require_at_least
from rpcompile.ir import (
    COMPUTE_OPS,
    DOWN_STREAMS,
    UP_STREAMS,
    Action,
    ActionId,
    Op,
    Queue,
    Schedule,
    Stream,
)
from rpcompile.ordering import ActionGraph, Edges, queue_numbers
from rpcompile.passes._residency import limit_residency, tenures

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rpcompile.buffers import ParsedNames
    from rpcompile.ir import SegmentChain

_STREAMS = tuple(Stream)
_STREAM_OF = {
    Op.PREFETCH: Stream.WEIGHTS,
    Op.LOAD: Stream.H2D,
    Op.RECEIVE: Stream.H2D,
    Op.HANDOFF: Stream.D2H,
    Op.OFFLOAD: Stream.D2H,
    Op.GRADIENT: Stream.GRADIENTS,
}
# Parts of the ids of FREE actions, by stream.
_STREAM_OF_PART = (Stream.COMPUTE, Stream.H2D, Stream.D2H, Stream.GRADIENTS)
_PARTS = {stream: part for part, stream in enumerate(_STREAM_OF_PART)}

_Group = tuple[int, int | None, int | None, int]  # stage, microbatch, job, part
_Value = tuple[str, int | None, int | None]


@dataclass(frozen=True)
class InsertTransfers:
    """Schedule -> Schedule, with PREFETCH, LOAD, RECEIVE, HANDOFF, OFFLOAD, GRADIENT and FREE.

    Attributes:
        chain: The segments; the hardware of their GPUs prices the copies.
        activation_slots: How many microbatches' incoming (and outgoing) tensors a GPU may hold at
            once. With 2, one is copied while another is computed; without a limit a fast link
            would fill the GPU's memory.
        resident_jobs: How many jobs' weights (and gradients) a GPU may hold at once. Where it goes
            back and forth between more jobs than that, it holds those.
    """

    chain: SegmentChain
    activation_slots: int = 2
    resident_jobs: int = 2

    name = "insert-transfers"

    @collection_paused()
    def run(self, schedule: Schedule) -> Schedule:
        """Adds the copies that the compute actions' reads and writes call for.

        Args:
            schedule: Compute actions only, of any dispatch (`lay-out-dispatch`).

        Returns:
            The schedule with all queues, `buffers` with the host's.

        Raises:
            InvalidArgument: An option is below 1.
            ScheduleError: The schedule has other actions than compute, reads what no action makes, or
                has GPUs wait for one another.
        """
        require_at_least(1, activation_slots=self.activation_slots, resident_jobs=self.resident_jobs)
        for action in schedule.actions():
            if action.op not in COMPUTE_OPS:
                raise ScheduleError(f"{action.id} is not a compute action; insert-transfers runs once")
        names = buffers.ParsedNames()
        stays = {
            queue.gpu: tenures([action.job for action in queue.actions], self.resident_jobs)
            for queue in schedule.queues
        }
        copies = _Copies(self.chain, schedule, names)
        emitted = _insert_frees(list(copies.emit()), names)
        queues: dict[tuple[int, int], list[Action]] = defaultdict(list)
        for action in limit_residency(emitted, stays, self.activation_slots, names):
            queues[action.gpu, _STREAMS.index(action.stream)].append(action)
        return replace(
            schedule,
            queues=tuple(Queue(gpu, _STREAMS[s], tuple(queues[gpu, s])) for gpu, s in sorted(queues)),
            buffers=copies.nbytes,
        )


class _Values(dict[str, "_Value"]):
    """What buffers hold, no matter where: kind, segment and microbatch."""

    def __init__(self, names: ParsedNames) -> None:
        super().__init__()
        self._names = names

    def __missing__(self, buffer: str) -> _Value:
        name = self._names[buffer]
        value = self[buffer] = (name.kind, name.segment, name.microbatch)
        return value


class _Copies:
    """Emits compute actions with the copies around them, in the order of the module's docstring."""

    def __init__(self, chain: SegmentChain, schedule: Schedule, names: ParsedNames) -> None:
        self.chain = chain
        self.schedule = schedule
        self.names = names
        self.nbytes = dict(schedule.buffers)
        self.host_weights = stage_bytes.weight_bytes(chain, range(len(chain.segments)))
        self.actions = list(schedule.actions())
        self.values = _Values(names)
        self.makers = {buffer: number for number, a in enumerate(self.actions) for buffer in a.writes}
        self.value_makers = {self.values[buffer]: number for buffer, number in self.makers.items()}
        # Who reads a boundary or gradient that does not lie on its GPU, and so needs it on the host.
        self.readers: dict[_Value, list[Op]] = defaultdict(list)
        for action in self.actions:
            for buffer in action.reads:
                if buffer not in self.makers and self.values[buffer][2] is not None:
                    self.readers[self.values[buffer]].append(action.op)

    def emit(self) -> Iterator[Action]:
        """All actions but FREEs."""
        first = {action.job: action for action in reversed(self.actions)}
        last = {action.job: action for action in self.actions}
        for step in self._in_order():
            if step is first[step.job]:
                yield from self._prefetches(step)
            yield from self._incoming(step)
            yield step
            yield from self._outgoing(step)
            if step is last[step.job]:
                yield from self._downloads(step)

    def _in_order(self) -> list[Action]:
        """The compute actions, each behind those it depends on."""
        needs: list[list[int]] = []
        for step in self.actions:
            found: list[int] = []
            for buffer in step.reads:
                kind, _, microbatch = value = self.values[buffer]
                if microbatch is None or kind == "inputs":
                    continue
                maker = self.makers.get(buffer, self.value_makers.get(value))
                if maker is None:
                    raise ScheduleError(f"{step.id} reads {buffer}, which no action makes")
                found.append(maker)
            needs.append(found)
        for number, step in enumerate(self.actions):
            if step.op is Op.RECOMPUTE:
                # It stands with its BACKWARD. Else its LOAD could be put before other readers' copies of what
                # was saved, and the last of those, whose queue frees it, would wait for a LOAD of much later.
                needs[number] += [source for source in needs[number + 1] if source != number]
        sources = np.array([source for found in needs for source in found], np.int32)
        edges = Edges.of_counts(sources, np.array([*map(len, needs)], np.int32))
        graph = ActionGraph(tuple(self.actions), queue_numbers(self.schedule), edges)
        return [self.actions[number] for number in graph.execution_order().tolist()]

    def _prefetches(self, step: Action) -> list[Action]:
        """The weights of a job, from its first step, segment by segment."""
        found: list[Action] = []
        for buffer in step.reads:
            name = self.names[buffer]
            if name.kind == "weights" and name.segment is not None:
                source = buffers.weights(buffers.HOST, name.segment)
                self.nbytes[source] = self.host_weights[name.segment]
                found.append(
                    self._copy(step, Op.PREFETCH, [(source, buffer)], job=step.job, part=name.segment)
                )
        return found

    def _incoming(self, step: Action) -> Iterator[Action]:
        loads: list[tuple[str, str]] = []
        receives: list[tuple[str, str]] = []
        for buffer in step.reads:
            name = self.names[buffer]
            if name.microbatch is None or buffer in self.makers:
                continue
            if step.op is Op.BACKWARD and name.kind != "dx":
                continue  # it came for the RECOMPUTE
            if name.kind == "inputs":
                source = buffers.inputs(buffers.HOST, name.microbatch)
                self.nbytes[source] = sum(segment.input_bytes for segment in self.chain.segments)
                loads.append((source, buffer))
                continue
            maker = self.actions[self.value_makers[self.values[buffer]]].job
            saved = name.kind == "kept" or (name.kind == "x" and step.op is Op.RECOMPUTE)
            (loads if saved else receives).append((_on_host(name, maker), buffer))
        if loads:
            yield self._copy(step, Op.LOAD, loads, microbatch=step.microbatch)
        if receives:
            yield self._copy(step, Op.RECEIVE, receives, microbatch=step.microbatch)

    def _outgoing(self, step: Action) -> Iterator[Action]:
        """What the next job waits for goes first; that copy serves a later backward as well."""
        offloads: dict[int | None, list[tuple[str, str]]] = defaultdict(list)  # by segment
        for buffer in step.writes:
            name = self.names[buffer]
            if name.microbatch is None or name.kind == "tape":
                continue
            readers = self.readers.get(self.values[buffer], ())
            pair = (buffer, _on_host(name, step.job))
            if name.kind == "loss":
                offloads[None].append(pair)
            elif any(name.kind == "dx" or reader in (Op.FORWARD, Op.FUSED) for reader in readers):
                yield self._copy(step, Op.HANDOFF, [pair], microbatch=step.microbatch)
            elif readers:
                offloads[name.segment].append(pair)
        for segment, pairs in offloads.items():
            yield self._copy(step, Op.OFFLOAD, pairs, microbatch=step.microbatch, part=segment)

    def _downloads(self, step: Action) -> Iterator[Action]:
        """What a job leaves behind. Changed buffers go first, for their weights hold a prefetch slot."""
        gradients: list[Action] = []
        for buffer in step.writes:
            name = self.names[buffer]
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
        hardware, stream = self.chain.hardware_of(step.gpu), _STREAM_OF[op]
        rate = hardware.h2d_bytes_per_s if stream in UP_STREAMS else hardware.d2h_bytes_per_s
        return Action(
            id=str(ActionId(step.stage, op, microbatch, job, part)),
            gpu=step.gpu,
            stream=stream,
            op=op,
            job=step.job,
            stage=step.stage,
            microbatch=microbatch,
            nbytes=nbytes,
            seconds=nbytes / rate + hardware.latency_s,
            reads=tuple(source for source, _ in pairs),
            writes=tuple(target for _, target in pairs),
        )


def _on_host(name: buffers.BufferName, maker: int) -> str:
    """The host's copy of what job `maker` made of one microbatch."""
    assert name.microbatch is not None
    if name.kind == "loss":
        return buffers.loss(buffers.HOST, name.microbatch)
    assert name.segment is not None
    if name.kind == "x":
        return buffers.boundary(buffers.HOST, name.segment, name.microbatch)
    if name.kind == "kept":
        return buffers.kept(buffers.HOST, name.segment, name.microbatch)
    return buffers.boundary_gradient(buffers.HOST, name.segment, name.microbatch, maker)


def _insert_frees(emitted: list[Action], names: ParsedNames) -> list[Action]:
    """Frees what the program made (but not its results) behind the last action that uses it.

    One FREE takes all buffers of a job, microbatch and stream. A buffer that a copy down reads is
    freed on that stream, so that compute never waits for a copy in order to free something.
    """
    copied_down = {
        buffer: action.stream
        for action in emitted
        if action.stream in DOWN_STREAMS
        for buffer in action.reads
    }
    used: set[str] = set()
    groups: dict[_Group, tuple[int, list[str]]] = {}  # with the number of the last action of each
    for number in range(len(emitted) - 1, -1, -1):
        last = emitted[number]
        for buffer in (*last.reads, *last.writes):
            if buffer in used:
                continue
            used.add(buffer)
            if buffer.startswith(buffers.HOST) and buffers.kind_of(buffer) not in ("x", "kept", "dx"):
                continue
            part = _PARTS[copied_down.get(buffer, last.stream)]
            microbatch = names[buffer].microbatch
            group = (last.stage, microbatch, last.job if microbatch is None else None, part)
            if group not in groups:
                groups[group] = number, []
            groups[group][1].append(buffer)
    behind: dict[int, list[Action]] = defaultdict(list)
    for (stage, microbatch, job, part), (number, freed) in groups.items():
        id = ActionId(stage, Op.FREE, microbatch, job, part)
        behind[number].append(_free(id, emitted[number], tuple(sorted(freed))))
    found: list[Action] = []
    for number, action in enumerate(emitted):
        found.append(action)
        if number in behind:
            found += sorted(behind[number], key=lambda free: free.id)
    return found


def _free(group: ActionId, last: Action, freed: tuple[str, ...]) -> Action:
    return Action(
        id=str(group),
        gpu=last.gpu,
        stream=_STREAM_OF_PART[group.part or 0],
        op=Op.FREE,
        job=last.job,
        stage=last.stage,
        microbatch=group.microbatch,
        frees=freed,
    )
