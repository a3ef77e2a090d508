"""Small hand-made chains and partitions, and the passes that make schedules of them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

from hypothesis import strategies as st

from rpcompile.ir import (
    Action,
    AttentionOutputs,
    Hardware,
    Op,
    Partition,
    Queue,
    Schedule,
    Segment,
    SegmentChain,
    Stage,
    StageKind,
    Stream,
    TiedWeight,
)
from rpcompile.passes.dispatch_round_robin import DispatchRoundRobin
from rpcompile.passes.insert_event_waits import InsertEventWaits
from rpcompile.passes.insert_transfers import InsertTransfers
from rpcompile.passes.lay_out_dispatch import LayOutDispatch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


# One byte takes one second on either link, so that times can be worked out by hand.
HARDWARE = Hardware(
    name="toy",
    memory_bytes=10**9,
    usable_bytes=10**9,
    flops_per_s=1.0,
    memory_bytes_per_s=1.0,
    h2d_bytes_per_s=1.0,
    d2h_bytes_per_s=1.0,
    latency_s=0.0,
    sources={},
)


def segment(index: int, **changes: object) -> Segment:
    """A trainable segment of 4 weight bytes, 2 s forward and 3 s backward, with a boundary of 1 byte."""
    plain = Segment(
        name=f"layer{index}",
        nodes=(),
        parameters=(f"layer{index}.weight",),
        inputs=(),
        boundary=("x",),
        boundary_gradients=("x",),
        forward_s=2.0,
        backward_s=3.0,
        forward_flops=0.0,
        backward_flops=0.0,
        weight_bytes=4,
        gradient_bytes=4,
        state_bytes=0,
        input_bytes=0,
        boundary_bytes=1,
        boundary_gradient_bytes=1,
        saved_bytes=5,
        peak_bytes=7,
        forward_peak_bytes=7,
        needs_backward=True,
        source="given",
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def attention(nbytes: int = 3, forward_s: float = 0.5) -> AttentionOutputs:
    """Attention outputs of an attention that takes part of its segment's forward."""
    return AttentionOutputs((), nbytes, forward_s, 4, 6, 5)


def chain(
    length: int, changes: dict[int, dict[str, object]] | None = None, tied: tuple[TiedWeight, ...] = ()
):
    """Segments 0..length-1; the first reads an input of 2 bytes; `changes` by segment."""
    segments = [segment(index) for index in range(length)]
    segments[0] = replace(segments[0], inputs=("input_ids",), input_bytes=2)
    for index, fields in (changes or {}).items():
        segments[index] = replace(segments[index], **fields)  # type: ignore[arg-type]
    return SegmentChain(tuple(segments), {}, HARDWARE, tied)


def partition(*stages: str, memory_limit_bytes: int = 10**9) -> Partition:
    """E.g. `partition("F0-1", "FB2-2", "B1-1", "B0-0")`."""
    found: list[Stage] = []
    for text in stages:
        kind = text.rstrip("0123456789-")
        first, last = text[len(kind) :].split("-")
        found.append(Stage(len(found), StageKind(kind), int(first), int(last)))
    return Partition(tuple(found), memory_limit_bytes, 0.0, 0.0, "FEASIBLE", 0.0, "by hand")


def computes(
    chain: SegmentChain, stages: Partition, gpus: int, microbatches: int, mode: str = "sync"
) -> Schedule:
    dispatch = DispatchRoundRobin(gpus, microbatches).run(stages)
    return LayOutDispatch(chain, stages, mode).run(dispatch)


def with_transfers(
    chain: SegmentChain, stages: Partition, gpus: int, microbatches: int, mode: str = "sync", slots: int = 2
) -> Schedule:
    return InsertTransfers(chain, slots).run(computes(chain, stages, gpus, microbatches, mode))


def compiled(
    chain: SegmentChain, stages: Partition, gpus: int, microbatches: int, mode: str = "sync", slots: int = 2
) -> Schedule:
    return InsertEventWaits().run(with_transfers(chain, stages, gpus, microbatches, mode, slots))


@st.composite
def problems(draw: st.DrawFn, max_segments: int = 6, mode: str | None = None):
    """Random (chain, partition, gpus, microbatches, mode).

    With a frozen prefix, state, inputs, tied weights and offloaded attention outputs.
    """
    length = draw(st.integers(1, max_segments))
    mode = mode or draw(st.sampled_from(["sync", "sync", "forward"]))
    frozen = draw(st.integers(0, length))
    changes: dict[int, dict[str, object]] = {}
    for index in range(length):
        reads_input = index == 0 or draw(st.booleans())
        weights = draw(st.sampled_from([0, 3, 6]))
        live = index >= frozen
        changes[index] = {
            "inputs": ("input_ids",) if reads_input else (),
            "input_bytes": 2 if reads_input else 0,
            "weight_bytes": weights,
            "gradient_bytes": weights if live and draw(st.booleans()) else 0,
            "state_bytes": draw(st.sampled_from([0, 0, 1])) if weights else 0,
            "boundary_bytes": draw(st.integers(1, 5)),
            "needs_backward": live,
            "forward_s": (forward_s := draw(st.sampled_from([0.0, 1.0, 2.5]))),
            "backward_s": draw(st.sampled_from([1.0, 4.0])) if live else 0.0,
            "attention": attention(draw(st.integers(1, 4)), forward_s / 2)
            if live and draw(st.booleans())
            else None,
            "offloads": draw(st.booleans()),
        }
    tied: tuple[TiedWeight, ...] = ()
    owners = [index for index in range(length) if changes[index]["weight_bytes"]]
    if len(owners) > 1 and draw(st.booleans()):
        ends = (owners[0], owners[-1])
        for index in ends:
            changes[index]["gradient_bytes"] = 3 if index >= frozen else 0
        tied = (TiedWeight("shared", ends, 2, 2 if ends[0] >= frozen else 0),)
    stages = draw(_stages(length, frozen, mode))
    return chain(length, changes, tied), stages, draw(st.integers(1, 5)), draw(st.integers(1, 6)), mode


@st.composite
def _stages(draw: st.DrawFn, length: int, frozen: int, mode: str) -> Partition:
    if mode == "forward":
        return partition(*(f"F{first}-{last}" for first, last in draw(_runs(0, length))))
    tail = draw(st.integers(0, length - 1))
    backward = []
    if frozen < tail:
        backward = draw(_runs(draw(st.integers(0, frozen)), tail))
        # The last backward stage may reach below what needs one, but not lie there altogether.
        while backward[0][1] < frozen:
            backward[:2] = [(backward[0][0], backward[1][1])]
    return partition(
        *(f"F{first}-{last}" for first, last in draw(_runs(0, tail))),
        f"FB{tail}-{length - 1}",
        *(f"B{first}-{last}" for first, last in reversed(backward)),
    )


@st.composite
def _runs(draw: st.DrawFn, start: int, stop: int) -> list[tuple[int, int]]:
    """Divides start..stop-1 into neighbouring (first, last)."""
    if start == stop:
        return []
    cuts = [cut for cut in range(start + 1, stop) if draw(st.booleans())]
    bounds = [start, *cuts, stop]
    return [(left, right - 1) for left, right in pairwise(bounds)]


def action(schedule: Schedule, id: str) -> Action:
    """The action of this id."""
    return next(action for action in schedule.actions() if action.id == id)


def ids(schedule: Schedule, gpu: int, stream: str) -> str:
    """The ids of one queue, separated by blanks."""
    return " ".join(
        action.id
        for queue in schedule.queues
        if (queue.gpu, queue.stream) == (gpu, stream)
        for action in queue.actions
    )


def rewrite(schedule: Schedule, change: Callable[[Action], Iterable[Action]]) -> Schedule:
    """Each action replaced by what `change` makes of it; queues stay where they are."""
    queues = tuple(
        replace(queue, actions=tuple(found for action in queue.actions for found in change(action)))
        for queue in schedule.queues
    )
    return replace(schedule, queues=queues)


def edit(schedule: Schedule, name: str, /, **changes: object) -> Schedule:
    """One action with other fields."""
    changed = replace(action(schedule, name), **changes)  # type: ignore[arg-type]
    return rewrite(schedule, lambda found: [changed if found.id == name else found])


def without(schedule: Schedule, id: str) -> Schedule:
    """The schedule without one action."""
    return rewrite(schedule, lambda found: [] if found.id == id else [found])


def hand_made(*queues: tuple[int, Stream, list[Action]]) -> Schedule:
    """A schedule of (gpu, stream, actions); the actions need not say where they are."""
    found = [
        Queue(gpu, stream, tuple(replace(action, gpu=gpu, stream=stream) for action in actions))
        for gpu, stream, actions in queues
    ]
    return Schedule("by hand", "sync", 2, 1, (), tuple(found))


def act(id: str, op: Op = Op.FORWARD, **fields: object) -> Action:
    """An action for `hand_made`."""
    return Action(id, 0, Stream.COMPUTE, op, 0, 0, **fields)  # type: ignore[arg-type]
