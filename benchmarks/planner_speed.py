"""How long does the search for a schedule take, by layers, GPUs and microbatches, and what gap remains?

Chains of attention and MLP segments with a head (`partition_speed.decoder`). The first search of a
process compiles its kernels, or loads them from numba's cache; that is timed apart.

    python benchmarks/planner_speed.py [--efforts fast default] [--output PATH]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import time
from pathlib import Path

import numba
from partition_speed import decoder
from rich.console import Console
from rich.table import Table

from rpcompile.passes.search_schedule import EFFORTS, SearchSchedule

CASES = (
    (12, 2, 4),
    (32, 8, 16),
    (32, 8, 4),
    (64, 8, 64),
    (94, 8, 16),
    (94, 64, 128),
    (94, 8, 512),
)


def measure(layers: int, gpus: int, microbatches: int, effort: str) -> dict[str, object]:
    """One search; seconds are wall time."""
    found = SearchSchedule(gpus, microbatches, effort=effort).run(decoder(layers))
    return {
        "layers": layers,
        "gpus": gpus,
        "microbatches": microbatches,
        "effort": effort,
        "time_s": found.partition.objective_s,
        "gap": found.partition.gap,
        "traffic": found.traffic,
        "stages": len(found.partition.stages),
        "jobs": len(found.dispatch.jobs),
        "solve_s": found.partition.solve_s,
        "ended_by": found.ended_by,
    }


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--efforts", nargs="+", choices=EFFORTS, default=["fast", "default"])
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "planner_speed.json"
    )
    options = parser.parse_args()
    began = time.monotonic()
    SearchSchedule(2, 2, time_limit_s=0.0).run(decoder(1))
    first_s = time.monotonic() - began
    columns = "layers GPUs microbatches effort time gap traffic stages jobs seconds ended"
    table = Table(*columns.split(), title=f"search-schedule; compiled or loaded in {first_s:.1f} s")
    rows: list[dict[str, object]] = []
    for effort in options.efforts:
        for case in CASES:
            row = measure(*case, effort)
            rows.append(row)
            texts = {"time_s": "{:.3f} s", "gap": "{:.2%}", "traffic": "{:.2f}x", "solve_s": "{:.1f} s"}
            table.add_row(*(texts.get(key, "{}").format(value) for key, value in row.items()))
    Console(width=120).print(table)
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
