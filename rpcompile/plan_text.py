"""A plan as it is printed: a head, and a table of its stages."""

from __future__ import annotations

import io
from itertools import takewhile
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from rpcompile import stage_bytes
from rpcompile.activations import in_brief
from rpcompile.ir import StageKind
from rpcompile.mixed_gpus import box_text
from rpcompile.plan_summary import compute_s, upload_s
from rpcompile.units import ranges, seconds, size

if TYPE_CHECKING:
    from rpcompile.host_memory import HostMemory
    from rpcompile.ir import SegmentChain, Stage
    from rpcompile.plan import Plan

_WIDTH = 120


def plan_text(plan: Plan) -> str:
    """The head and the table of stages that printing a plan gives."""
    text = io.StringIO()
    console = Console(file=text, width=_WIDTH, highlight=False, soft_wrap=True)
    for label, value in _header(plan):
        console.print(f"{label:<11}{value}", markup=False)
    console.print(_table(plan))
    return "".join(line.rstrip() + "\n" for line in text.getvalue().splitlines()).rstrip("\n") + "\n"


def _host(host: HostMemory) -> str:
    parts = {
        "weights": host.weight_bytes,
        "gradients": host.gradient_bytes,
        "partial ones": host.partial_bytes,
        "masters": host.master_bytes,
        "optimizer": host.optimizer_bytes,
        "boundaries": host.boundary_bytes,
        "attention": host.attention_bytes,
        "inputs": host.input_bytes,
        "copy": host.copy_bytes,
    }
    return " · ".join(f"{name} {size(nbytes)}" for name, nbytes in parts.items() if nbytes)


def _header(plan: Plan) -> list[tuple[str, str]]:
    predicted, partition = plan.prediction, plan.partition
    sizes = " x ".join(str(size) for size in plan.chain.bindings.values()) or "the given size"
    rate = "" if predicted.tokens_per_s is None else f" · {predicted.tokens_per_s:,.0f} tok/s"
    return [
        (
            f"Plan {plan.id}  ",
            f"{plan.model_name} · {plan.dtype} · {plan.microbatches} microbatches of {sizes} · {plan.mode}",
        ),
        (
            "Hardware",
            f"{box_text(plan.chain, plan.gpus)} · h2d {_links(plan)}",
        ),
        (
            "Simulated",
            f"{seconds(predicted.iteration_s)}/step{rate} · bubble {100 * predicted.bubble:.1f} % · "
            f"GPU peak {size(max(predicted.gpu_peak_bytes))} · host peak {size(predicted.host_peak_bytes)}",
        ),
        *_iterations(plan),
        *([("Host", _host(predicted.host))] if predicted.host else []),
        *([("Memory", brief)] if (brief := in_brief(plan)) else []),
        (
            "Solver",
            f"{partition.solver} {partition.status} · gap {100 * partition.gap:.1f} % · "
            f"{partition.solve_s:.1f} s",
        ),
    ]


def _links(plan: Plan) -> str:
    """Rates of the links up and where they are from, the fastest first."""
    every = [plan.chain.hardware_of(gpu) for gpu in range(plan.gpus)]
    sources = {gpu.h2d_bytes_per_s: gpu.sources.get("h2d_bytes_per_s", "assumed") for gpu in every}
    rates = sorted(sources.items(), reverse=True)
    text = ", ".join(f"{rate / 1e9:.1f} GB/s ({source.partition(':')[0]})" for rate, source in rates)
    return text + ("" if plan.links is None else " · shared links and host memory simulated")


def _iterations(plan: Plan) -> list[tuple[str, str]]:
    """How a plan's iterations follow one another, where the step's time is not that of one alone."""
    alone_s = plan.prediction.alone_s
    if alone_s is None:
        return []
    shift = f", each shifted by {plan.schedule.rotate} GPUs" if plan.schedule.rotate else ""
    how = f"iterations overlap without a pause{shift}"
    if plan.mode == "sync":
        how = "each layer's forward follows its update on the host"
    return [
        ("Iterations", f"the step's time is the steady state's: {how}; one alone takes {seconds(alone_s)}")
    ]


def _table(plan: Plan) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in ("stage", "kind", "gpu"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("segments", no_wrap=True, overflow="ellipsis", max_width=40)
    for name in ("weights", "boundary", "compute", "upload", "bound by"):
        table.add_column(name, justify="right", no_wrap=True)
    gpus: dict[int, list[int]] = {}
    for job in plan.schedule.jobs:
        gpus.setdefault(job.stage, []).append(job.gpu)
    for stage in plan.partition.stages:
        table.add_row(*_row(plan, stage, gpus.get(stage.index, [])))
    return table


def _row(plan: Plan, stage: Stage, gpus: list[int]) -> tuple[str, ...]:
    segments = [plan.chain.segments[index] for index in stage.segments]
    names = [segment.name for segment in segments]
    shared = _shared_path(plan)
    names = [_without(name, shared) for name in names]
    weights = sum(stage_bytes.weight_bytes(plan.chain, stage.segments).values())
    computing_s, uploading_s = compute_s(plan, stage), upload_s(plan, stage)
    return (
        str(stage.index),
        stage.kind.value,
        ranges(set(gpus)),
        names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}",
        size(weights),
        size(_outgoing_bytes(plan.chain, stage)),
        seconds(computing_s),
        seconds(uploading_s),
        "compute" if plan.microbatches * computing_s >= uploading_s else "upload",
    )


def _outgoing_bytes(chain: SegmentChain, stage: Stage) -> int:
    """What a stage hands on: its last boundary, or the gradient of the one in front of it."""
    if stage.kind is StageKind.F:
        return chain.segments[stage.last].boundary_bytes
    return chain.segments[stage.first - 1].boundary_gradient_bytes if stage.first else 0


def _shared_path(plan: Plan) -> list[str]:
    """The modules that hold all segments but the last (the head)."""
    paths = [segment.name.split(".")[:-1] for segment in plan.chain.segments[:-1]]
    levels = takewhile(lambda level: len(set(level)) == 1, zip(*paths, strict=False))
    return [level[0] for level in levels]


def _without(name: str, shared: list[str]) -> str:
    parts = name.split(".")
    same = list(takewhile(lambda pair: pair[0] == pair[1], zip(parts[:-1], shared, strict=False)))
    return ".".join(parts[len(same) :])
