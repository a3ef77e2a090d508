"""Shows a schedule: a timeline for Perfetto or chrome://tracing, and a grid of ids to read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rpcompile import buffers
from rpcompile.errors import ScheduleError
from rpcompile.files import write_in_one_step
from rpcompile.ir import ActionId, Op, Stream

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from rpcompile.ir import Action, Schedule
    from rpcompile.simulate import Timeline

_STREAMS = tuple(Stream)
# The file's times are multiples of 1/64 microsecond. Sums of such numbers are exact in floating
# point, so slices that meet in the simulation meet in the viewer and never overlap.
_TICKS_PER_US = 64
_LINE = re.compile(rf"gpu(?P<gpu>\d+) +(?P<stream>{'|'.join(_STREAMS)})(?P<cells>( +\S+)*)")


def write_trace(
    schedule: Schedule, timeline: Timeline, path: str | os.PathLike[str], source: str = "simulated"
) -> None:
    """Writes a timeline in the Chrome trace format.

    One process a GPU, one thread a stream, one slice an action (an instant for FREE), arrows from
    HANDOFF to RECEIVE, and a counter of each GPU's memory. The file is complete or not there.

    Args:
        schedule: What was simulated or run.
        timeline: The result.
        path: File to write; an old one is replaced.
        source: Where the times are from, "simulated" or "measured"; shown beside every GPU.

    Source: "Trace Event Format", the document that chrome://tracing and ui.perfetto.dev follow.
    """
    trace = {
        "traceEvents": [
            *_names(schedule, source),
            *_slices(schedule, timeline),
            *_arrows(schedule, timeline),
            *_memory(timeline),
        ],
        "displayTimeUnit": "ms",
        "metadata": {
            "source": f"rpcompile, {source}",
            "policy": schedule.policy,
            "mode": schedule.mode,
            "gpus": schedule.gpus,
            "microbatches": schedule.microbatches,
            "makespan_s": timeline.makespan_s,
            "bubble": timeline.bubble,
        },
    }
    write_in_one_step(Path(path), json.dumps(trace, allow_nan=False))


def _ticks(seconds: float) -> int:
    return round(seconds * 1e6 * _TICKS_PER_US)


def _track(action: Action) -> dict[str, Any]:
    return {"pid": action.gpu, "tid": _STREAMS.index(action.stream)}


def _names(schedule: Schedule, source: str) -> Iterator[dict[str, Any]]:
    for gpu in range(schedule.gpus):
        yield {"ph": "M", "name": "process_name", "pid": gpu, "args": {"name": f"GPU {gpu} ({source})"}}
        yield {"ph": "M", "name": "process_sort_index", "pid": gpu, "args": {"sort_index": gpu}}
    for queue in schedule.queues:
        tid = _STREAMS.index(queue.stream)
        track = {"ph": "M", "pid": queue.gpu, "tid": tid}
        yield {**track, "name": "thread_name", "args": {"name": queue.stream.value}}
        yield {**track, "name": "thread_sort_index", "args": {"sort_index": tid}}


def _slices(schedule: Schedule, timeline: Timeline) -> Iterator[dict[str, Any]]:
    for action in schedule.actions():
        start, end = _ticks(timeline.start_s[action.id]), _ticks(timeline.end_s[action.id])
        event: dict[str, Any] = {
            "name": action.id,
            "cat": action.op.name.lower(),
            **_track(action),
            "ts": start / _TICKS_PER_US,
            "args": _arguments(action),
        }
        if action.op is Op.FREE:
            yield {**event, "ph": "i", "s": "t"}
        else:
            yield {**event, "ph": "X", "dur": (end - start) / _TICKS_PER_US}


def _arguments(action: Action) -> dict[str, Any]:
    names = [buffers.parse(name) for name in (*action.reads, *action.writes, *action.frees)]
    segments = sorted({name.segment for name in names if name.kind == "weights" and name.segment is not None})
    found: dict[str, Any] = {"op": action.op.name, "stage": action.stage, "job": action.job}
    found |= {"segments": segments} if segments else {}
    found |= {} if action.microbatch is None else {"microbatch": action.microbatch}
    return found | ({"bytes": action.nbytes} if action.nbytes else {})


def _arrows(schedule: Schedule, timeline: Timeline) -> Iterator[dict[str, Any]]:
    handed = {
        buffer: action for action in schedule.actions() if action.op is Op.HANDOFF for buffer in action.writes
    }
    pairs = [
        (handed[buffer], action)
        for action in schedule.actions()
        if action.op is Op.RECEIVE
        for buffer in action.reads
        if buffer in handed
    ]
    for number, ends in enumerate(pairs):
        for action, phase in zip(ends, ({"ph": "s"}, {"ph": "f", "bp": "e"}), strict=True):
            ts = _ticks(timeline.start_s[action.id]) / _TICKS_PER_US
            yield {"name": "hand-off", "cat": "handoff", "id": number, **phase, **_track(action), "ts": ts}


def _memory(timeline: Timeline) -> Iterator[dict[str, Any]]:
    for gpu, steps in enumerate(timeline.gpu_memory):
        for time, nbytes in zip(steps.times_s, steps.nbytes, strict=True):
            ts = _ticks(time) / _TICKS_PER_US
            yield {"ph": "C", "name": "memory (simulated)", "pid": gpu, "ts": ts, "args": {"bytes": nbytes}}


def format_schedule(schedule: Schedule) -> str:
    """The schedule's ids, a line per GPU and stream, with events: `e1,e2>0F0>e3`.

    Example::

        gpu0 compute  e0>0F0>e1 0X0.0
        gpu0 h2d      0P@0.0 0L0>e0
    """
    lines: list[str] = []
    for queue in schedule.queues:
        cells: list[str] = []
        for action in queue.actions:
            before = f"{','.join(action.waits)}>" if action.waits else ""
            behind = f">{','.join(action.records)}" if action.records else ""
            cells.append(f"{before}{action.id}{behind}")
        lines.append(f"gpu{queue.gpu} {queue.stream.value:<7}  {' '.join(cells)}\n")
    return "".join(lines)


def parse_ids(text: str) -> dict[tuple[int, Stream], tuple[ActionId, ...]]:
    """Reads the ids back from what `format_schedule` wrote, by GPU and stream.

    Raises:
        ScheduleError: A line or a cell has another form.
    """
    found: dict[tuple[int, Stream], tuple[ActionId, ...]] = {}
    for line in text.splitlines():
        match = _LINE.fullmatch(line)
        if match is None:
            raise ScheduleError(f"{line!r} must begin with a GPU and a stream, e.g. gpu0 compute")
        ids: list[ActionId] = []
        for cell in match["cells"].split():
            names = [part for part in cell.split(">") if part[0].isdecimal()]
            if len(names) != 1:
                raise ScheduleError(f"{cell!r} must hold one action, e.g. e1,e2>0F0>e3")
            ids.append(ActionId.parse(names[0]))
        found[int(match["gpu"]), Stream(match["stream"])] = tuple(ids)
    return found
