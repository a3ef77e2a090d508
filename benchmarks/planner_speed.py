"""How long does the planner take, by layers, GPUs and microbatches, and what gap remains?

Chains of attention and MLP segments with a head (`partition_speed.decoder`). Two times: of the whole plan
(partitions, search, copies, events, simulation, proof), and of the search for a schedule within it. The
first search of a process compiles its kernels, or loads them from numba's cache; that is timed apart.

    python benchmarks/planner_speed.py [--efforts fast normal] [--modes sync async] [--output PATH]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import time
from itertools import product
from pathlib import Path

import numba
from partition_speed import decoder
from rich.console import Console
from rich.table import Table

from rpcompile.passes.search_schedule import EFFORTS, SearchSchedule
from rpcompile.planner import ModelDescription, PlanOptions, plan_chain

CASES = (
    (12, 2, 4),
    (32, 8, 16),
    (32, 8, 4),
    (64, 8, 64),
    (94, 8, 16),
    (94, 64, 128),
    (94, 8, 512),
)


def measure(layers: int, gpus: int, microbatches: int, effort: str, mode: str) -> dict[str, object]:
    """One plan; seconds are wall time."""
    chain, began = decoder(layers), time.monotonic()
    options = PlanOptions(gpus, microbatches, mode, effort=effort)
    plan = plan_chain(chain, options, ModelDescription(f"{layers} layers", "", "bfloat16"))
    plan_s = time.monotonic() - began
    return {
        "layers": layers,
        "gpus": gpus,
        "microbatches": microbatches,
        "mode": mode,
        "effort": effort,
        "time_s": plan.prediction.iteration_s,
        "gap": plan.partition.gap,
        "traffic": plan.prediction.traffic,
        "stages": len(plan.partition.stages),
        "jobs": len(plan.schedule.jobs),
        "plan_s": plan_s,
        "solve_s": plan.partition.solve_s,
        "solver": plan.partition.solver,
    }


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--efforts", nargs="+", choices=EFFORTS, default=["fast", "normal"])
    parser.add_argument("--modes", nargs="+", choices=("sync", "async"), default=["sync", "async"])
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "planner_speed.json"
    )
    options = parser.parse_args()
    began = time.monotonic()
    SearchSchedule(2, 2, time_limit_s=0.0).run(decoder(1))
    first_s = time.monotonic() - began
    columns = "layers|GPUs|microbatches|mode|effort|time|gap|traffic|stages|jobs|plan|search|solver"
    table = Table(*columns.split("|"), title=f"The planner; search compiled or loaded in {first_s:.1f} s")
    rows: list[dict[str, object]] = []
    for effort in options.efforts:
        for case, mode in product(CASES, options.modes):
            row = measure(*case, effort, mode)
            rows.append(row)
            texts = {"time_s": "{:.3f} s", "gap": "{:.2%}", "traffic": "{:.2f}x"}
            texts |= dict.fromkeys(("plan_s", "solve_s"), "{:.1f} s")
            print(row, flush=True)
            table.add_row(*(texts.get(key, "{}").format(value) for key, value in row.items()))
    Console(width=150).print(table)
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": {"cores": os.cpu_count(), "architecture": platform.machine(), "system": platform.system()},
        "versions": {"python": platform.python_version(), "numba": numba.__version__},
        "compile_or_load_s": first_s,
        "rows": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
