"""The Gantt chart and memory over time, as bokeh figures with a common time axis."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from bokeh.models import (
    BoxZoomTool,
    ColumnDataSource,
    FixedTicker,
    HoverTool,
    PanTool,
    Range1d,
    ResetTool,
    Span,
    WheelZoomTool,
)
from bokeh.plotting import figure

from rpcompile.gantt import LANES, Bar, bars, palette, tone
from rpcompile.idle import PHRASES, gaps
from rpcompile.units import seconds, size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rpcompile.plan import Plan
    from rpcompile.simulate import MemorySteps, Timeline

MOST_BARS = 12_000
MOST_STEPS = 1_500  # of one GPU's memory
_HEIGHTS = dict(zip(LANES, (0.32, 0.12, 0.12, 0.12, 0.12), strict=True))
_CENTRES = dict(zip(LANES, (0.19, 0.43, 0.57, 0.73, 0.87), strict=True))
_GPU_PIXELS = 84
_BAR_TIP = """<div class="tip"><b>@label</b> @op, stage @stage@part<br>gpu @gpu, @stream<br>
@left{0,0.000} to @right{0,0.000} ms: <b>@takes{0,0.000} ms</b>@moved</div>"""
_GAP_TIP = """<div class="tip"><b>idle @takes{0,0.000} ms</b> on gpu @gpu<br>@why</div>"""
LINES = ("#3b82c4", "#d9822b", "#3d9970", "#b5489b", "#8a7a2f", "#5b63c9", "#c0504d", "#3aa6a6")


def time_range(timeline: Timeline) -> Range1d:
    """The x axis that the figures share, in milliseconds."""
    end = timeline.makespan_s * 1e3
    return Range1d(start=-0.005 * end, end=1.005 * end, bounds=(-0.02 * end, 1.02 * end))


def gantt(plan: Plan, timeline: Timeline, x_range: Range1d) -> Any:
    """Every action by GPU and stream; idle time is hatched."""
    drawn = bars(plan.schedule, timeline, MOST_BARS)
    chart = _figure(x_range, height=90 + _GPU_PIXELS * plan.gpus, y_range=Range1d(start=plan.gpus, end=-0.05))
    idle = chart.hbar(
        y="y",
        left="left",
        right="right",
        height=_HEIGHTS[LANES[0]],
        source=_gap_source(plan, timeline),
        fill_color="#d64545",
        fill_alpha=0.10,
        hatch_pattern="/",
        hatch_color="#d64545",
        hatch_alpha=0.35,
        hatch_scale=7,
        line_color=None,
        name="idle",
    )
    work = chart.hbar(
        y="y",
        left="left",
        right="right",
        height="height",
        source=_bar_source(plan, drawn),
        fill_color="colour",
        line_color=None,
        name="bars",
    )
    chart.add_tools(
        HoverTool(renderers=[work], tooltips=_BAR_TIP, point_policy="follow_mouse"),
        HoverTool(renderers=[idle], tooltips=_GAP_TIP, point_policy="follow_mouse"),
    )
    ticks = {gpu + _CENTRES[lane]: _lane_name(gpu, lane.value) for gpu in range(plan.gpus) for lane in LANES}
    chart.yaxis.ticker = FixedTicker(ticks=list(ticks))
    chart.yaxis.major_label_overrides = ticks
    chart.ygrid.visible = False
    chart.xaxis.axis_label = "milliseconds, simulated"
    return chart


def memory(plan: Plan, timeline: Timeline, x_range: Range1d) -> Any:
    """Memory of each GPU over time, against what a plan may use."""
    limits = {plan.chain.hardware_of(gpu).usable_bytes / 1e9 for gpu in range(plan.gpus)}
    top = 1.2 * max(*limits, *(peak / 1e9 for peak in timeline.gpu_peak_bytes))
    chart = _figure(x_range, height=280, y_range=Range1d(start=0, end=top))
    for gpu, steps in enumerate(timeline.gpu_memory):
        label = f"gpu{gpu}" if gpu < len(LINES) else "more"
        _steps(chart, steps, LINES[gpu % len(LINES)], label, f"gpu{gpu}", timeline.makespan_s)
    for limit in sorted(limits):
        chart.add_layout(
            Span(location=limit, dimension="width", line_color="#d64545", line_dash="dashed", line_width=2)
        )
    chart.yaxis.axis_label = f"GB on a GPU (dashed: limit{'s' * (len(limits) > 1)})"
    _finish_lines(chart)
    return chart


def host_memory(timeline: Timeline, x_range: Range1d) -> Any:
    """Memory of the host over time."""
    chart = _figure(
        x_range, height=200, y_range=Range1d(start=0, end=1.25 * max(1e-9, timeline.host_peak_bytes / 1e9))
    )
    _steps(chart, timeline.host_memory, LINES[0], "host", "host", timeline.makespan_s)
    chart.yaxis.axis_label = "GB on the host"
    _finish_lines(chart)
    return chart


# ------------------------------------------------------------------- data


def _bar_source(plan: Plan, drawn: Sequence[Bar]) -> ColumnDataSource:
    colours = palette(plan.microbatches)
    left = np.array([bar.start_s * 1e3 for bar in drawn], dtype=np.float64)
    right = np.array([bar.end_s * 1e3 for bar in drawn], dtype=np.float64)
    return ColumnDataSource(
        {
            "y": np.array([bar.gpu + _CENTRES[bar.stream] for bar in drawn], dtype=np.float32),
            "height": np.array([_HEIGHTS[bar.stream] for bar in drawn], dtype=np.float32),
            "left": left.astype(np.float32),
            "right": right.astype(np.float32),
            "takes": (right - left).astype(np.float32),
            "colour": [_hex(tone(bar, colours)) for bar in drawn],
            "gpu": np.array([bar.gpu for bar in drawn], dtype=np.int32),
            "stage": np.array([bar.stage for bar in drawn], dtype=np.int32),
            "stream": [bar.stream.value for bar in drawn],
            "label": [bar.label for bar in drawn],
            "op": [bar.op.name.lower() for bar in drawn],
            "part": ["" if bar.microbatch is None else f", microbatch {bar.microbatch}" for bar in drawn],
            "moved": [f", {size(bar.nbytes)}" if bar.nbytes else "" for bar in drawn],
        }
    )


def _gap_source(plan: Plan, timeline: Timeline) -> ColumnDataSource:
    found = gaps(plan.schedule, timeline)
    return ColumnDataSource(
        {
            "y": [gap.gpu + _CENTRES[LANES[0]] for gap in found],
            "left": [gap.start_s * 1e3 for gap in found],
            "right": [gap.end_s * 1e3 for gap in found],
            "takes": [gap.seconds * 1e3 for gap in found],
            "gpu": [gap.gpu for gap in found],
            "why": [
                ", ".join(f"{PHRASES[cause]} {seconds(value)}" for cause, value in gap.causes.items())
                for gap in found
            ],
        }
    )


def _hex(colour: tuple[float, float, float, float]) -> str:
    return "#" + "".join(f"{round(255 * part):02x}" for part in colour)


def _lane_name(gpu: int, stream: str) -> str:
    return f"gpu{gpu}" if stream == LANES[0].value else stream


# ------------------------------------------------------------------- figures


def _figure(x_range: Range1d, height: int, y_range: Range1d) -> Any:
    zoom = WheelZoomTool(dimensions="width")
    pan = PanTool(dimensions="width")
    tools = [pan, zoom, BoxZoomTool(dimensions="width"), ResetTool()]
    chart = figure(
        height=height,
        sizing_mode="stretch_width",
        x_range=x_range,
        y_range=y_range,
        tools=tools,
        active_drag=pan,
        toolbar_location="above",
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
        min_border_left=70,
    )
    chart.toolbar.logo = None
    return chart


def _steps(chart: Any, steps: MemorySteps, colour: str, legend: str, name: str, end_s: float) -> None:
    times, nbytes = thinned(steps, end_s)
    source = ColumnDataSource(
        {
            "x": np.array(times, dtype=np.float32) * np.float32(1e3),
            "y": np.array(nbytes, dtype=np.float32) / np.float32(1e9),
            "name": [name] * len(times),
        }
    )
    chart.step("x", "y", source=source, mode="after", line_width=1.6, color=colour, legend_label=legend)


def thinned(steps: MemorySteps, end_s: float) -> tuple[list[float], list[int]]:
    """Times and bytes with at most `MOST_STEPS` points; each stands for the most in its share of time."""
    pairs = list(zip(steps.times_s, steps.nbytes, strict=True))
    if len(pairs) > MOST_STEPS:
        most: dict[int, int] = {}
        for time, nbytes in pairs:
            place = int(time / end_s * (MOST_STEPS - 1)) if end_s else 0
            most[place] = max(most.get(place, 0), nbytes)
        pairs = [(place * end_s / (MOST_STEPS - 1), nbytes) for place, nbytes in sorted(most.items())]
    pairs.append((end_s, pairs[-1][1] if pairs else 0))
    return [time for time, _ in pairs], [nbytes for _, nbytes in pairs]


def _finish_lines(chart: Any) -> None:
    chart.xaxis.axis_label = "milliseconds, simulated"
    chart.legend.orientation = "horizontal"
    chart.legend.location = "top_left"
    chart.legend.click_policy = "hide"
    chart.legend.border_line_color = None
    chart.legend.padding = 2
    chart.add_tools(HoverTool(tooltips="@name: @y{0.00} GB from @x{0.0} ms", mode="mouse"))
