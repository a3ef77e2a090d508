"""Commands that read plan files: show, verify, diff, trace, report, export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rpcompile.cli import options
from rpcompile.errors import InvalidArgument, ScheduleError

if TYPE_CHECKING:
    from rpcompile.plan import Plan

Other = Annotated[Path, typer.Argument(metavar="OTHER", help="Another plan file.")]


def load(path: Path) -> Plan:
    """A plan to look at; `rpcompile verify` proves its schedule."""
    from rpcompile.plan import Plan

    return Plan.load(path, verify=False)


def show(plan: options.PlanFile, as_json: options.Json = False) -> None:
    """Print a plan: stages, prediction, memory of each GPU, what bounds it."""
    from rpcompile.plan_summary import summary, upload_traffic

    found = load(plan)
    from rpcompile.units import size

    lines = ["", "Memory     peak of each GPU, simulated, and what a plan may use"]
    for gpu, peak in enumerate(found.prediction.gpu_peak_bytes):
        hardware = found.chain.hardware_of(gpu)
        limit = hardware.usable_bytes
        share = f"{100 * peak / limit if limit else 0.0:5.1f} %"
        lines.append(f"  gpu{gpu:<3}   {size(peak):>9} of {size(limit):>9}  {share}  {hardware.name}")
    up, down = upload_traffic(found)
    traffic = found.prediction.traffic
    ratio = "" if traffic is None else f"; weights {traffic:.2f}x of one upload a layer, pass and round"
    lines.append(f"Traffic    {size(up)} to the GPUs and {size(down)} back in an iteration{ratio}")
    lines.append(f"Bounds     {_bounds(found)}")
    options.show(str(found) + "\n".join(lines) + "\n", summary(found), as_json)


def verify(plan: options.PlanFile, as_json: options.Json = False) -> int:
    """Prove that a plan's schedule is complete, ordered, without deadlock and within memory."""
    found = load(plan)
    problem = None
    try:
        found.verify()
    except ScheduleError as error:
        problem = str(error)
    actions = sum(1 for _ in found.schedule.actions())
    text = f"{plan}: {f'{actions:,} actions hold' if problem is None else f'does not hold: {problem}'}\n"
    result = {"plan": found.id, "holds": problem is None, "problem": problem, "actions": actions}
    options.show(text, result, as_json)
    return 0 if problem is None else 1


def diff(plan: options.PlanFile, other: Other, as_json: options.Json = False) -> int:
    """Say in what two plans differ; status 1 if they do."""
    from rpcompile.plan_diff import differences

    found = differences(load(plan), load(other))
    rows = [f"{row.what:<28}  {row.left:>24}  {row.right:>24}  {row.change}".rstrip() for row in found]
    text = "\n".join(rows) if rows else "the plans are the same"
    data = [{"what": r.what, "left": r.left, "right": r.right, "change": r.change} for r in found]
    options.show(text + "\n", {"same": not found, "differences": data}, as_json)
    return 1 if found else 0


def trace(
    plan: options.PlanFile,
    out: Annotated[Path, typer.Option("--out", help="File to write.")] = Path("trace.json"),
    as_json: options.Json = False,
) -> None:
    """Write the simulated timeline for ui.perfetto.dev or chrome://tracing."""
    load(plan).save_trace(out)
    _written(out, "open it at https://ui.perfetto.dev or chrome://tracing", as_json)


def report(
    plan: options.PlanFile,
    out: Annotated[Path, typer.Option("--out", help="File to write.")] = Path("report.html"),
    compare: Annotated[bool, typer.Option(help="Simulate other policies on the same segments, too.")] = True,
    as_json: options.Json = False,
) -> None:
    """Write one HTML file with the plan in words, its timeline, memory and costs; it opens offline."""
    from rpcompile.report import write_report

    write_report(load(plan), out, compare=compare)
    _written(out, "open it in a browser; it needs no network", as_json)


def plot(
    plan: options.PlanFile,
    out: Annotated[Path, typer.Option("--out", help="A .png, .svg or .pdf file.")] = Path("plan.png"),
    as_json: options.Json = False,
) -> None:
    """Draw the timeline for a paper or a notebook."""
    load(plan).plot(out)
    _written(out, "", as_json)


def export(
    plan: options.PlanFile,
    out: Annotated[Path, typer.Option("--out", help="File to write; .py or .csv.")],
    policy: Annotated[
        str | None,
        typer.Option(
            "--policy",
            help="Another policy on the plan's segments; tables are of gpipe, 1f1b, interleaved_1f1b or "
            "looped_bfs.",
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Write the schedule as readable Python, or as the action table of torch.distributed.pipelining."""
    from rpcompile.files import write_in_one_step
    from rpcompile.plan_export import actions_csv, schedule_python

    writers = {".py": schedule_python, ".csv": actions_csv}
    if out.suffix not in writers:
        raise InvalidArgument(f"--out {out}: end it in .py (readable Python) or .csv (torch's action table)")
    found = load(plan)
    if policy is not None:
        from rpcompile.policies import under_policy

        found = under_policy(found, policy)
    write_in_one_step(out, writers[out.suffix](found))
    _written(out, "", as_json)


COMMANDS = (show, verify, diff, trace, report, plot, export)


def _written(path: Path, what: str, as_json: bool) -> None:
    data: dict[str, Any] = {"written": str(path), "bytes": path.stat().st_size}
    options.show(f"Wrote {path}{f': {what}' if what else ''}\n", data, as_json)


def _bounds(plan: Plan) -> str:
    predicted, partition = plan.prediction.iteration_s, plan.partition
    from rpcompile.units import seconds

    ideal_s = (1 - plan.prediction.bubble) * predicted
    return (
        f"no schedule of these stages on {plan.gpus} GPUs is shorter than {seconds(ideal_s)} (no bubbles); "
        f"the solver proves {seconds(partition.bound_s)} for its partitions; this one takes "
        f"{seconds(predicted)}"
    )
