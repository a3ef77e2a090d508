"""How long does the planner take, by layers, GPUs and microbatches, and what bubble and gap remain?

Chains of attention and MLP segments with a head (`partition_speed.decoder`), and the profiles of published
layer times in benchmarks/profiles, 8 GPUs x 16 microbatches, as `rpcompile plan --profile` plans them: with
as many fused segments as pay, and with the head only, as the published schedules have it. All figures but
seconds of planning are simulated. Seconds of the whole plan (partitions, search, copies, events, simulation,
proof), by the wall clock and of processor time on all threads, and of the search within it. The first search
of a process compiles its kernels, or loads them from numba's cache; that is timed apart.

    python benchmarks/planner_speed.py [chains | published] [--efforts fast normal] [--modes sync async]
        [--limit-s SECONDS] [--output PATH]

The profiles are planned, and not the chains, where `published` is asked for.

On a busy machine, give `--limit-s 1000`, so that moves and not the clock end each search.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import numba
from partition_speed import decoder
from rich.console import Console
from rich.table import Table

from rpcompile.ir import SegmentChain
from rpcompile.passes.search_schedule import EFFORTS, SearchSchedule
from rpcompile.planner import ModelDescription, PlanOptions, plan_chain
from rpcompile.profile import Profile

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
CASES = (
    (12, 2, 4),
    (32, 8, 16),
    (32, 8, 4),
    (64, 8, 64),
    (94, 8, 16),
    (94, 64, 128),
    (94, 8, 512),
)
PROFILES = ("qwen3-1.7b", "llama3-8b", "qwen3-32b")
LIMITS = {"sync": (1.0, None), "async": (0.65,)}  # of traffic, by mode, for the published profiles


def measure(name: str, chain: SegmentChain, options: PlanOptions) -> dict[str, object]:
    """One plan."""
    began, began_cpu = time.monotonic(), time.process_time()
    plan = plan_chain(chain, options, ModelDescription(name, "", "bfloat16"))
    plan_s, cpu_s = time.monotonic() - began, time.process_time() - began_cpu
    fused = next(stage for stage in plan.partition.stages if stage.kind == "FB")
    return {
        "model": name,
        "gpus": options.gpus,
        "microbatches": options.microbatches,
        "mode": options.mode,
        "max_traffic": options.max_traffic,
        "fused_segments": options.fused_segments,
        "effort": options.effort,
        "time_s": plan.prediction.iteration_s,
        "bound_s": plan.partition.bound_s,
        "gap": plan.partition.gap,
        "bubble": plan.prediction.bubble,
        "traffic": plan.prediction.traffic,
        "stages": len(plan.partition.stages),
        "fused": len(fused.segments),
        "jobs": len(plan.schedule.jobs),
        "plan_s": plan_s,
        "cpu_s": cpu_s,
        "solve_s": plan.partition.solve_s,
        "solver": plan.partition.solver,
    }


Case = tuple[str, SegmentChain, PlanOptions]  # and the model's name


def chains(modes: list[str]) -> Iterator[Case]:
    """Chains of many lengths."""
    for (layers, gpus, microbatches), mode in product(CASES, modes):
        yield f"{layers} layers", decoder(layers), PlanOptions(gpus, microbatches, mode)


def published(modes: list[str]) -> Iterator[Case]:
    """The published profiles under the published traffic, and without a limit."""
    for name, mode in product(PROFILES, modes):
        chain = Profile.load(HERE / "profiles" / f"{name}.json").to_chain()
        for most, fused in product(LIMITS[mode], (None, 1)):
            yield name, chain, PlanOptions(8, 16, mode, max_traffic=most, fused_segments=fused)


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("what", nargs="?", choices=("chains", "published"), default="chains")
    parser.add_argument("--efforts", nargs="+", choices=EFFORTS, default=["fast", "normal"])
    parser.add_argument("--modes", nargs="+", choices=("sync", "async"), default=["sync", "async"])
    parser.add_argument("--limit-s", type=float, help="wall time of one plan; default: the effort's")
    parser.add_argument("--output", type=Path, help="default: planner_speed[_published].json in results")
    options = parser.parse_args()
    began = time.monotonic()
    SearchSchedule(2, 2, time_limit_s=0.0).run(decoder(1))
    first_s = time.monotonic() - began
    columns = "model|GPUs|microbatches|mode|most traffic|most fused|effort|time|bound|gap|bubble|traffic"
    columns += "|stages|fused|jobs|plan|cpu|search|solver"
    table = Table(*columns.split("|"), title=f"The planner; search compiled or loaded in {first_s:.1f} s")
    rows: list[dict[str, object]] = []
    cases = list((published if options.what == "published" else chains)(options.modes))
    for effort, (name, chain, asked) in product(options.efforts, cases):
        row = measure(name, chain, replace(asked, effort=effort, time_limit_s=options.limit_s))
        rows.append(row)
        texts = {"gap": "{:.2%}", "bubble": "{:.2%}", "traffic": "{:.2f}x"}
        texts |= dict.fromkeys(("time_s", "bound_s"), "{:.3f} s")
        texts |= dict.fromkeys(("plan_s", "cpu_s", "solve_s"), "{:.1f} s")
        print(row, flush=True)
        table.add_row(*(texts.get(key, "{}").format(value) for key, value in row.items()))
    Console(width=190).print(table)
    result = {
        "simulated": True,
        "date": datetime.date.today().isoformat(),
        "machine": {"cores": os.cpu_count(), "architecture": platform.machine(), "system": platform.system()},
        "versions": {"python": platform.python_version(), "numba": numba.__version__},
        "limit_s": options.limit_s,
        "compile_or_load_s": first_s,
        "rows": rows,
    }
    name = "planner_speed_published.json" if options.what == "published" else "planner_speed.json"
    output: Path = options.output or HERE / "results" / name
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
