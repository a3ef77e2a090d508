"""Draws a plan's timeline with matplotlib, for papers and notebooks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from rpcompile.errors import InvalidArgument
from rpcompile.gantt import LANES, bars, palette, tone
from rpcompile.idle import gaps
from rpcompile.mixed_gpus import box_text
from rpcompile.units import seconds

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from rpcompile.plan import Plan

FORMATS = (".png", ".svg", ".pdf")
_TOPS = dict(zip(LANES, (0.04, 0.46, 0.58, 0.72, 0.84), strict=True))
_HEIGHTS = dict(zip(LANES, (0.40, 0.10, 0.10, 0.10, 0.10), strict=True))
_MOST_LABELS = 400


def plot(plan: Plan, path: str | os.PathLike[str] | None = None, *, width: float = 11.0) -> Figure:
    """Draws each GPU's compute, uploads and downloads over one simulated iteration.

    Microbatches differ in hue and in lightness, forward is paler than backward, idle time is hatched: it
    reads in grayscale, too.

    Args:
        plan: The plan.
        path: A .png, .svg or .pdf file to write; None to write none.
        width: Of the figure, in inches.

    Returns:
        The figure, which notebooks show.

    Raises:
        InvalidArgument: The file has another ending.
        OSError: It cannot be written.
    """
    if path is not None and Path(path).suffix not in FORMATS:
        raise InvalidArgument(f"{path}: end it in {', '.join(FORMATS)}")
    timeline = plan.simulate()
    figure = Figure(figsize=(width, 1.0 + 0.5 * plan.gpus), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    scale, unit = (1.0, "s") if timeline.makespan_s >= 10 else (1e3, "ms")
    idle = [
        _box(gap.start_s * scale, gap.end_s * scale, gap.gpu + _TOPS[LANES[0]], _HEIGHTS[LANES[0]])
        for gap in gaps(plan.schedule, timeline)
    ]
    axes.add_collection(
        PolyCollection(idle, facecolor="#f4f4f4", edgecolor="#b0b0b0", hatch="////", linewidth=0)
    )
    drawn = bars(plan.schedule, timeline)
    colours = palette(plan.microbatches)
    boxes = [
        _box(b.start_s * scale, b.end_s * scale, b.gpu + _TOPS[b.stream], _HEIGHTS[b.stream]) for b in drawn
    ]
    axes.add_collection(
        PolyCollection(boxes, facecolor=[tone(b, colours) for b in drawn], edgecolor="white", linewidth=0.2)
    )
    compute = [bar for bar in drawn if bar.stream is LANES[0]]
    if len(compute) <= _MOST_LABELS:
        for bar in compute:
            if bar.end_s - bar.start_s > 0.006 * len(bar.label) * timeline.makespan_s:
                middle = (bar.start_s + bar.end_s) / 2 * scale
                axes.text(
                    middle, bar.gpu + 0.25, bar.label, ha="center", va="center", fontsize=5.5, clip_on=True
                )
    _finish(axes, plan, timeline.makespan_s * scale, unit)
    if path is not None:
        figure.savefig(path, dpi=180)
    return figure


def _box(left: float, right: float, top: float, height: float) -> Sequence[tuple[float, float]]:
    return ((left, top), (right, top), (right, top + height), (left, top + height))


def _finish(axes: Axes, plan: Plan, end: float, unit: str) -> None:
    axes.set_xlim(0, end)
    axes.set_ylim(plan.gpus, -0.05)
    axes.set_yticks(
        [gpu + _TOPS[LANES[0]] + _HEIGHTS[LANES[0]] / 2 for gpu in range(plan.gpus)],
        [f"GPU {gpu}" for gpu in range(plan.gpus)],
    )
    rows = "activations and weights up, activations and gradients down"
    axes.set_xlabel(f"{unit} (simulated); thin rows: {rows}; hatched: idle")
    sizes = " x ".join(map(str, plan.chain.bindings.values()))
    axes.set_title(
        f"{plan.model_name} on {box_text(plan.chain, plan.gpus)}, {plan.microbatches} microbatches"
        f"{f' of {sizes}' if sizes else ''}: {seconds(plan.prediction.iteration_s)}, "
        f"bubble {100 * plan.prediction.bubble:.1f} %"
        + ("" if plan.prediction.alone_s is None else " in the steady state; here one iteration alone"),
        fontsize=9,
        loc="left",
    )
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(labelsize=8)
