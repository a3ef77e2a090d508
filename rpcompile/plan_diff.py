"""In what two plans differ, a row each."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from rpcompile.mixed_gpus import box_text
from rpcompile.units import seconds, size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rpcompile.plan import Plan


class Difference(NamedTuple):
    """One thing that differs: its name, its text in either plan, and the change in percent or ""."""

    what: str
    left: str
    right: str
    change: str


def differences(left: Plan, right: Plan) -> list[Difference]:
    """What differs, the model and the hardware first, then figures, then stages and their jobs.

    How long the solver took and what versions made the plans do not count.
    """
    return [*_facts(left, right), *_figures(left, right), *_stages(left, right)]


def _facts(left: Plan, right: Plan) -> Iterator[Difference]:
    def facts(plan: Plan) -> dict[str, str]:
        found = {name: str(getattr(plan, name)) for name in ("dtype", "gpus", "microbatches", "mode")}
        sizes = {f"size {name}": str(value) for name, value in plan.chain.bindings.items()}
        hardware = {
            f"hardware.{name}": str(getattr(plan.chain.hardware, name))
            for name in ("name", "usable_bytes", "flops_per_s", "h2d_bytes_per_s", "d2h_bytes_per_s")
        }
        if plan.chain.kinds:
            hardware["GPUs"] = box_text(plan.chain, plan.gpus)
        model = {"model": plan.model_name, "fingerprint": plan.fingerprint[:12]}
        return {**model, **found, "policy": plan.schedule.policy, **sizes, **hardware}

    a, b = facts(left), facts(right)
    for what in dict.fromkeys((*a, *b)):
        if a.get(what) != b.get(what):
            yield Difference(what, a.get(what, "-"), b.get(what, "-"), "")


def _figures(left: Plan, right: Plan) -> Iterator[Difference]:
    def figures(plan: Plan) -> dict[str, tuple[float, str]]:
        predicted = plan.prediction
        peak = max(predicted.gpu_peak_bytes)
        tokens = predicted.tokens_per_s
        return {
            "iteration": (predicted.iteration_s, seconds(predicted.iteration_s)),
            "tokens/s": (tokens or 0.0, "-" if tokens is None else f"{tokens:,.0f}"),
            "bubble": (predicted.bubble, f"{100 * predicted.bubble:.2f} %"),
            "GPU peak": (peak, size(peak)),
            "host peak": (predicted.host_peak_bytes, size(predicted.host_peak_bytes)),
        }

    a, b = figures(left), figures(right)
    for what, (value, text) in a.items():
        other, other_text = b[what]
        if value != other:
            change = f"{100 * (other / value - 1):+.1f} %" if value else ""
            yield Difference(what, text, other_text, change)


def _stages(left: Plan, right: Plan) -> Iterator[Difference]:
    def stages(plan: Plan) -> list[str]:
        gpus: dict[int, list[int]] = {}
        for job in plan.schedule.jobs:
            gpus.setdefault(job.stage, []).append(job.gpu)
        places = {stage: ",".join(map(str, found)) for stage, found in gpus.items()}
        return [
            f"{stage.kind.value} {stage.first}..{stage.last} on {places.get(stage.index, '-')}"
            for stage in plan.partition.stages
        ]

    a, b = stages(left), stages(right)
    if len(a) != len(b):
        yield Difference("stages", str(len(a)), str(len(b)), "")
    for index in range(max(len(a), len(b))):
        one, two = (texts[index] if index < len(texts) else "-" for texts in (a, b))
        if one != two:
            yield Difference(f"stage {index}", one, two, "")
    if a == b and left.schedule != right.schedule:
        yield Difference("schedule", "differs", "differs", "")
