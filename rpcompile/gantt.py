"""The bars of a timeline, for reports and plots."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rpcompile.ir import COMPUTE_OPS, Op, Stream

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rpcompile.ir import Schedule
    from rpcompile.simulate import Timeline

LANES: tuple[Stream, ...] = (Stream.COMPUTE, Stream.H2D, Stream.WEIGHTS, Stream.D2H, Stream.GRADIENTS)
"""The streams that are drawn, from top to bottom."""


@dataclass(frozen=True)
class Bar:
    """One action, or several neighbours of one kind, as a bar.

    Attributes:
        gpu: The GPU.
        stream: The stream.
        start_s: Start.
        end_s: End.
        label: Id of the action, or of the first and the last one.
        op: What it does.
        stage: Its stage.
        microbatch: Its microbatch; None for a whole job or for several.
        nbytes: Bytes moved.
        count: How many actions it stands for.
    """

    gpu: int
    stream: Stream
    start_s: float
    end_s: float
    label: str
    op: Op
    stage: int
    microbatch: int | None
    nbytes: int
    count: int = 1


def bars(schedule: Schedule, timeline: Timeline, most: int | None = None) -> list[Bar]:
    """A bar for every action that takes time, queue by queue.

    Args:
        schedule: What was simulated.
        timeline: The result.
        most: Where there would be more bars than this, neighbours on a stream that belong together
            (transfers of one job and kind first, then also its microbatches) become one.
    """
    found = [
        Bar(
            action.gpu,
            action.stream,
            timeline.start_s[action.id],
            timeline.end_s[action.id],
            action.id,
            action.op,
            action.stage,
            action.microbatch,
            action.nbytes,
        )
        for queue in schedule.queues
        if queue.stream in LANES
        for action in queue.actions
        if action.op is not Op.FREE
    ]
    if most is not None and len(found) > most:
        found = _joined(found, only_transfers=True)
    if most is not None and len(found) > most:
        found = _joined(found, only_transfers=False)
    return found


def _joined(found: Iterable[Bar], only_transfers: bool) -> list[Bar]:
    joined: list[Bar] = []
    for bar in found:
        last = joined[-1] if joined else None
        if (
            last is not None
            and (last.gpu, last.stream, last.op, last.stage) == (bar.gpu, bar.stream, bar.op, bar.stage)
            and not (only_transfers and bar.op in COMPUTE_OPS)
        ):
            joined[-1] = Bar(
                bar.gpu,
                bar.stream,
                last.start_s,
                bar.end_s,
                f"{last.label.split(' … ')[0]} … {bar.label}",
                bar.op,
                bar.stage,
                last.microbatch if last.microbatch == bar.microbatch else None,
                last.nbytes + bar.nbytes,
                last.count + bar.count,
            )
        else:
            joined.append(bar)
    return joined


def palette(microbatches: int) -> list[tuple[float, float, float]]:
    """A colour for each microbatch, as (red, green, blue) from 0 to 1.

    Neighbours differ in hue and in lightness, so they can be told apart in grayscale, too.
    """
    lightness = (0.42, 0.56, 0.70)
    return [
        colorsys.hls_to_rgb((0.56 + 0.85 * index / max(1, microbatches)) % 1.0, lightness[index % 3], 0.52)
        for index in range(microbatches)
    ]


def tone(bar: Bar, colours: Sequence[tuple[float, float, float]]) -> tuple[float, float, float, float]:
    """Red, green, blue and opacity of a bar: by microbatch; forward palest, recompute next, weights gray."""
    if bar.microbatch is None:
        return (0.50, 0.54, 0.60, 0.9) if bar.op is Op.PREFETCH else (0.62, 0.52, 0.42, 0.9)
    opacity = {Op.FORWARD: 0.60, Op.RECOMPUTE: 0.80, Op.BACKWARD: 1.0, Op.FUSED: 1.0}.get(bar.op, 0.75)
    return (*colours[bar.microbatch % len(colours)], opacity)
