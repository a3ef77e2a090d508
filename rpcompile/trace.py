"""Shows a schedule: a timeline for Perfetto or chrome://tracing, and a grid of ids to read."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Run:
    """A timeline to show: simulated, or measured.

    Attributes:
        schedule: What ran.
        timeline: When; of one or several iterations.
        label: Stands behind every name of the run, e.g. "simulated" or "measured".
    """

    schedule: Schedule
    timeline: Timeline
    label: str = "simulated"


def write_trace(
    schedule: Schedule,
    timeline: Timeline,
    path: str | os.PathLike[str],
    *others: Run,
    label: str = "simulated",
) -> None:
    """Writes a timeline in the Chrome trace format, and other runs beside it.

    One process a GPU and run, one thread a stream, one slice an action (an instant for FREE), arrows from
    HANDOFF to RECEIVE, and a counter of each GPU's memory; what the host runs is a process of its own.
    The file is complete or not there.

    Args:
        schedule: What was simulated.
        timeline: The result.
        path: File to write; an old one is replaced.
        others: More runs, to compare: measured ones, or simulations of other schedules.
        label: Where the first timeline's times are from.

    Source: "Trace Event Format", the document that chrome://tracing and ui.perfetto.dev follow.
    """
    runs = (Run(schedule, timeline, label), *others)
    events: list[dict[str, Any]] = []
    pid, arrow = 0, 0
    for run in runs:
        tracks = _Tracks(run, pid)
        arrows = list(tracks.arrows(arrow))
        events += [*tracks.names(), *tracks.slices(), *arrows, *tracks.memory()]
        pid, arrow = pid + run.schedule.gpus + 1, arrow + len(arrows) // 2
    trace = {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "metadata": {
            "source": f"rpcompile, {' and '.join(dict.fromkeys(run.label for run in runs))}",
            "runs": [_about(run) for run in runs],
        },
    }
    write_in_one_step(Path(path), json.dumps(trace, allow_nan=False))


def _about(run: Run) -> dict[str, Any]:
    return {
        "label": run.label,
        "policy": run.schedule.policy,
        "mode": run.schedule.mode,
        "gpus": run.schedule.gpus,
        "microbatches": run.schedule.microbatches,
        "iterations": len(run.timeline.iteration_end_s),
        "makespan_s": run.timeline.makespan_s,
        "bubble": run.timeline.bubble,
    }


def _ticks(seconds: float) -> int:
    return round(seconds * 1e6 * _TICKS_PER_US)


class _Tracks:
    """The events of one run; its GPUs are the processes from `pid` on, then comes the host."""

    def __init__(self, run: Run, pid: int) -> None:
        self.schedule, self.timeline, self.label, self.pid = run.schedule, run.timeline, run.label, pid
        iterations = range(len(run.timeline.iteration_end_s))
        self.actions = [
            (action, action.id + (f"#{i}" if i else ""), self._track(action, i))
            for i in iterations
            for action in run.schedule.actions()
            if action.id in run.timeline.start_s  # a measured iteration has no UPDATEs
        ]

    def _track(self, action: Action, iteration: int) -> dict[str, Any]:
        gpus = self.schedule.gpus
        gpu = (action.gpu + iteration * self.timeline.rotate) % gpus
        place = gpus if action.stream is Stream.HOST else gpu
        return {"pid": self.pid + place, "tid": _STREAMS.index(action.stream)}

    def names(self) -> Iterator[dict[str, Any]]:
        gpus = self.schedule.gpus
        threads = sorted({(track["pid"], track["tid"]) for _, _, track in self.actions})
        pids = {pid for pid, _ in threads} | {self.pid + gpu for gpu in range(gpus)}
        for pid in sorted(pids):
            name = "Host" if pid == self.pid + gpus else f"GPU {pid - self.pid}"
            yield {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": f"{name} ({self.label})"}}
            yield {"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": pid}}
        for pid, tid in threads:
            track = {"ph": "M", "pid": pid, "tid": tid}
            yield {**track, "name": "thread_name", "args": {"name": _STREAMS[tid].value}}
            yield {**track, "name": "thread_sort_index", "args": {"sort_index": tid}}

    def slices(self) -> Iterator[dict[str, Any]]:
        for action, name, track in self.actions:
            start, end = _ticks(self.timeline.start_s[name]), _ticks(self.timeline.end_s[name])
            event: dict[str, Any] = {
                "name": name,
                "cat": action.op.name.lower(),
                **track,
                "ts": start / _TICKS_PER_US,
                "args": _arguments(action),
            }
            if action.op is Op.FREE:
                yield {**event, "ph": "i", "s": "t"}
            else:
                yield {**event, "ph": "X", "dur": (end - start) / _TICKS_PER_US}

    def arrows(self, first: int) -> Iterator[dict[str, Any]]:
        """Numbered from `first` on."""
        handed: dict[str, tuple[str, dict[str, Any]]] = {}
        pairs: list[tuple[tuple[str, dict[str, Any]], tuple[str, dict[str, Any]]]] = []
        for op in (Op.HANDOFF, Op.RECEIVE):
            for action, name, track in self.actions:
                iteration = name.removeprefix(action.id)
                if action.op is not op:
                    continue
                if op is Op.HANDOFF:
                    handed |= {buffer + iteration: (name, track) for buffer in action.writes}
                else:
                    sources = (handed.get(buffer + iteration) for buffer in action.reads)
                    pairs += [(source, (name, track)) for source in sources if source is not None]
        for number, ends in enumerate(pairs, first):
            for (name, track), phase in zip(ends, ({"ph": "s"}, {"ph": "f", "bp": "e"}), strict=True):
                ts = _ticks(self.timeline.start_s[name]) / _TICKS_PER_US
                yield {"name": "hand-off", "cat": "handoff", "id": number, **phase, **track, "ts": ts}

    def memory(self) -> Iterator[dict[str, Any]]:
        for pid, steps in enumerate(self.timeline.gpu_memory, self.pid):
            for time, nbytes in zip(steps.times_s, steps.nbytes, strict=True):
                ts = _ticks(time) / _TICKS_PER_US
                name = f"memory ({self.label})"
                yield {"ph": "C", "name": name, "pid": pid, "ts": ts, "args": {"bytes": nbytes}}


def _arguments(action: Action) -> dict[str, Any]:
    names = [buffers.parse(name) for name in (*action.reads, *action.writes, *action.frees)]
    segments = sorted({name.segment for name in names if name.kind == "weights" and name.segment is not None})
    found: dict[str, Any] = {"op": action.op.name, "stage": action.stage, "job": action.job}
    found |= {"segments": segments} if segments else {}
    found |= {} if action.microbatch is None else {"microbatch": action.microbatch}
    return found | ({"bytes": action.nbytes} if action.nbytes else {})


def format_schedule(schedule: Schedule) -> str:
    """The schedule's ids, a line per GPU and stream, with events: `e1,e2>0F0>e3`.

    Example::

        gpu0 compute    e0,e1>0F0>e2 0X0.0
        gpu0 h2d        0L0>e0
        gpu0 weights    0P@0.0>e1
    """
    lines: list[str] = []
    for queue in schedule.queues:
        cells: list[str] = []
        for action in queue.actions:
            before = f"{','.join(action.waits)}>" if action.waits else ""
            behind = f">{','.join(action.records)}" if action.records else ""
            cells.append(f"{before}{action.id}{behind}")
        lines.append(f"gpu{queue.gpu} {queue.stream.value:<9}  {' '.join(cells)}\n")
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
