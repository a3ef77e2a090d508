"""Charts that need no time axis: load of stages and GPUs, cost by operation class, policies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bokeh.models import ColumnDataSource, FactorRange, HoverTool
from bokeh.plotting import figure

from rpcompile.ir import StageKind
from rpcompile.plan_summary import compute_s

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rpcompile.plan import Plan
    from rpcompile.policies import PolicyResult

KINDS = {StageKind.F: "#6fa8dc", StageKind.FB: "#d9822b", StageKind.B: "#3d6fb4"}
_UPLOAD, _PALE = "#8a929c", 0.55


def stage_balance(plan: Plan) -> Any:
    """Compute of each stage over all microbatches, and one upload of its weights."""
    stages = plan.partition.stages
    uploads = {stage.index: 0.0 for stage in stages}
    for queue in plan.schedule.queues:
        for action in queue.actions:
            if action.op.name == "PREFETCH":
                uploads[action.stage] += action.seconds * 1e3
    names = [str(stage.index) for stage in stages]
    source = ColumnDataSource(
        {
            "stage": names,
            "kind": [stage.kind.value for stage in stages],
            "colour": [KINDS[stage.kind] for stage in stages],
            "compute": [plan.microbatches * compute_s(plan, stage) * 1e3 for stage in stages],
            "upload": [uploads[stage.index] for stage in stages],
            "segments": [
                f"{plan.chain.segments[s.first].name} … {plan.chain.segments[s.last].name}" for s in stages
            ],
        }
    )
    chart = _figure(FactorRange(factors=names), "milliseconds of an iteration")
    chart.vbar(x="stage", top="compute", width=0.75, source=source, fill_color="colour", line_color=None)
    chart.vbar(x="stage", top="upload", width=0.25, source=source, fill_color=_UPLOAD, line_color=None)
    chart.xaxis.axis_label = "stage (pale blue F, orange FB, blue B; narrow gray: upload of its weights)"
    _hover(chart, "stage @stage (@kind)<br>@segments<br>compute @compute{0,0.0} ms, upload @upload{0,0.0} ms")
    return chart


def gpu_load(plan: Plan) -> Any:
    """Compute of each GPU by kind of stage."""
    names = [str(gpu) for gpu in range(plan.gpus)]
    loads = {kind: [0.0] * plan.gpus for kind in StageKind}
    for job in plan.schedule.jobs:
        stage = plan.partition.stages[job.stage]
        loads[stage.kind][job.gpu] += len(job.microbatches) * compute_s(plan, stage, job.gpu) * 1e3
    kinds = [kind for kind in StageKind if any(loads[kind])]
    data: dict[str, Any] = {"gpu": names} | {kind.value: loads[kind] for kind in kinds}
    chart = _figure(FactorRange(factors=names), "milliseconds of an iteration")
    chart.vbar_stack(
        [kind.value for kind in kinds],
        x="gpu",
        width=0.7,
        source=ColumnDataSource(data),
        fill_color=[KINDS[kind] for kind in kinds],
        line_color=None,
    )
    chart.xaxis.axis_label = "GPU (pale blue F, orange FB, blue B)"
    _hover(chart, "gpu @gpu: $name @$name{0,0.0} ms")
    return chart


def operation_classes(plan: Plan) -> Any | None:
    """Estimated seconds of one microbatch by class of operator; None where the plan does not say."""
    found = sorted(plan.chain.op_classes, key=lambda c: c.forward_s + c.backward_s)
    if not found:
        return None
    total = sum(cost.forward_s + cost.backward_s for cost in found)
    source = ColumnDataSource(
        {
            "name": [cost.name for cost in found],
            "forward": [cost.forward_s * 1e3 for cost in found],
            "backward": [cost.backward_s * 1e3 for cost in found],
            "share": [100 * (cost.forward_s + cost.backward_s) / total if total else 0.0 for cost in found],
            "tflop": [(cost.forward_flops + cost.backward_flops) / 1e12 for cost in found],
            "gb": [(cost.forward_bytes + cost.backward_bytes) / 1e9 for cost in found],
        }
    )
    chart = _figure(None, "", y_range=FactorRange(factors=[cost.name for cost in found]))
    chart.hbar_stack(
        ["forward", "backward"],
        y="name",
        height=0.7,
        source=source,
        fill_color=[KINDS[StageKind.F], KINDS[StageKind.B]],
        line_color=None,
    )
    chart.xaxis.axis_label = "estimated milliseconds of one microbatch (pale: forward, dark: backward)"
    _hover(chart, "@name: @share{0.0} %<br>$name @$name{0,0.00} ms<br>@tflop{0.00} TFLOP, @gb{0.00} GB")
    return chart


def policies(results: Sequence[PolicyResult]) -> Any:
    """Iteration of each policy."""
    ordered = sorted(results, key=lambda result: -result.iteration_s)
    source = ColumnDataSource(
        {
            "name": [result.policy for result in ordered],
            "time": [result.iteration_s * 1e3 for result in ordered],
            "bubble": [100 * result.bubble for result in ordered],
            "peak": [max(result.gpu_peak_bytes) / 1e9 for result in ordered],
            "colour": [KINDS[StageKind.FB] if result.own else KINDS[StageKind.B] for result in ordered],
        }
    )
    chart = _figure(None, "", y_range=FactorRange(factors=[result.policy for result in ordered]))
    chart.hbar(y="name", right="time", height=0.7, source=source, fill_color="colour", line_color=None)
    chart.xaxis.axis_label = "simulated milliseconds of an iteration (orange: this plan)"
    _hover(chart, "@name: @time{0,0.0} ms, bubble @bubble{0.0} %<br>GPU peak @peak{0.0} GB")
    return chart


def _figure(x_range: FactorRange | None, y_label: str, y_range: FactorRange | None = None) -> Any:
    ranges: dict[str, Any] = {}
    if x_range is not None:
        ranges["x_range"] = x_range
    if y_range is not None:
        ranges["y_range"] = y_range
    chart: Any = figure(
        height=300,
        sizing_mode="stretch_width",
        tools="",
        toolbar_location=None,
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
        **ranges,
    )
    if x_range is not None:
        chart.y_range.start = 0
        chart.xgrid.visible = False
    else:
        chart.x_range.start = 0
        chart.ygrid.visible = False
    chart.yaxis.axis_label = y_label
    return chart


def _hover(chart: Any, tip: str) -> None:
    chart.add_tools(HoverTool(tooltips=f'<div class="tip">{tip}</div>'))
