"""Puts a report together: words, charts and bokeh's own script in one file."""

from __future__ import annotations

import html
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bokeh.embed import components
from bokeh.resources import Resources

from rpcompile.errors import PlanFileError
from rpcompile.explain import Explanation, explain
from rpcompile.files import write_in_one_step
from rpcompile.mixed_gpus import box_text
from rpcompile.plan_summary import compute_s, upload_traffic
from rpcompile.policies import compare_policies
from rpcompile.report import charts, timeline
from rpcompile.units import ranges, seconds, size

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from rpcompile.plan import Plan

_PAGE = Path(__file__).with_name("page.html")


def write_report(plan: Plan, path: str | os.PathLike[str], *, compare: bool = True) -> None:
    """Writes an HTML file that explains a plan; it opens without a network.

    Args:
        plan: The plan.
        path: File to write; an old one is replaced.
        compare: Also simulate other policies on the same segments.

    Raises:
        PlanFileError: The file cannot be written.
    """
    text = report_html(plan, compare=compare)
    try:
        write_in_one_step(Path(path), text)
    except OSError as error:
        raise PlanFileError(f"{path}: cannot write the report: {error.strerror}") from error


def report_html(plan: Plan, *, compare: bool = True) -> str:
    """The text of the file; see `write_report`."""
    simulated = plan.simulate()
    x_range = timeline.time_range(simulated)
    figures: dict[str, Any] = {
        "gantt": timeline.gantt(plan, simulated, x_range),
        "memory": timeline.memory(plan, simulated, x_range),
        "host": timeline.host_memory(simulated, x_range),
        "balance": charts.stage_balance(plan),
        "load": charts.gpu_load(plan),
    }
    classes = charts.operation_classes(plan)
    if classes is not None:
        figures["classes"] = classes
    results = compare_policies(plan) if compare else ()
    possible = [result for result in results if result.problem is None]
    if possible:
        figures["policies"] = charts.policies(possible)
    script, divs = components(figures)
    explanation = explain(plan, replan=False)
    values = {
        "title": html.escape(f"{plan.model_name} on {box_text(plan.chain, plan.gpus)}"),
        "subtitle": html.escape(_subtitle(plan)),
        "cards": _cards(plan),
        "words": _words(explanation),
        "stages": _stage_table(plan, explanation),
        "classes_note": ""
        if classes is not None
        else "<p>The plan was made from a profile, which has no classes.</p>",
        "policies_note": _policy_note(results, compare),
        "bokeh": Resources(mode="inline", components=["bokeh"]).render_js(),
        "script": script,
        **{f"{name}_chart": divs.get(name, "") for name in (*figures, "classes", "policies")},
    }
    page = _PAGE.read_text(encoding="utf-8")
    for name, value in values.items():
        page = page.replace(f"<!--{name}-->", value)
    return page


def _subtitle(plan: Plan) -> str:
    sizes = " x ".join(map(str, plan.chain.bindings.values())) or "the given size"
    return (
        f"plan {plan.id} · {plan.schedule.policy} · {plan.mode} · {plan.microbatches} microbatches "
        f"of {sizes} · {plan.dtype} · every figure is simulated{_iterations(plan)}"
    )


def _iterations(plan: Plan) -> str:
    if plan.prediction.alone_s is None:
        return ""
    how = "iterations overlap" if plan.mode == "async" else "each layer's forward follows its update"
    return (
        f"; time and bubble are those of the steady state, where {how}, and charts over time "
        f"show one iteration alone, which takes {seconds(plan.prediction.alone_s)}"
    )


def _cards(plan: Plan) -> str:
    predicted = plan.prediction
    peak, gpu = max((peak, gpu) for gpu, peak in enumerate(predicted.gpu_peak_bytes))
    limit = plan.chain.hardware_of(gpu).usable_bytes
    up, down = upload_traffic(plan)
    rate = "–" if predicted.tokens_per_s is None else f"{predicted.tokens_per_s:,.0f}"
    cards = (
        (
            "iteration",
            seconds(predicted.iteration_s),
            "with the optimizer" if plan.update_s_per_byte else "up to the gradients, without the optimizer",
        ),
        ("tokens a second", rate, "all GPUs together"),
        ("bubble", f"{100 * predicted.bubble:.1f} %", "idle share of the GPUs"),
        ("GPU peak", size(peak), f"of {size(limit)} usable"),
        ("host peak", size(predicted.host_peak_bytes), "with the optimizer's state"),
        ("traffic", size(up), f"up, and {size(down)} down"),
    )
    return "".join(
        f'<div class="card"><span>{label}</span><b>{html.escape(value)}</b><small>{note}</small></div>'
        for label, value, note in cards
    )


def _words(explanation: Explanation) -> str:
    parts = {
        "Why these stages": explanation.cut,
        "Activations": explanation.activations,
        "Where the idle time goes": explanation.idle,
        "What would help": explanation.advice,
        "What else was tried": explanation.tried,
    }
    items = {
        title: "".join(f"<li>{html.escape(line)}</li>" for line in lines) for title, lines in parts.items()
    }
    return "".join(
        f"<section><h3>{title}</h3><ul>{text}</ul></section>" for title, text in items.items() if text
    )


def _stage_table(plan: Plan, explanation: Explanation) -> str:
    gpus: dict[int, set[int]] = {}
    for job in plan.schedule.jobs:
        gpus.setdefault(job.stage, set()).add(job.gpu)
    rows: list[str] = []
    for stage, note in zip(plan.partition.stages, explanation.stages, strict=True):
        cells = (
            str(stage.index),
            stage.kind.value,
            ranges(gpus.get(stage.index, set())),
            seconds(compute_s(plan, stage)),
            note.bound_by,
            note.text,
        )
        rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    names = ("stage", "kind", "gpu", "a microbatch", "bound by", "in words")
    head = "".join(f"<th>{name}</th>" for name in names)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _policy_note(results: Sequence[Any], compare: bool) -> str:
    if not compare:
        return "<p>Not asked for.</p>"
    refused = [result for result in results if result.problem]
    return "".join(f"<p>{html.escape(f'{r.policy}: {r.problem}')}</p>" for r in refused)
