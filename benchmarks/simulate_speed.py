"""How long does the simulator take? A round-robin schedule with every copy, alone and with shared links.

An 8B-like decoder of 64 layers on 8 GPUs (benchmarks/partition_speed.py), stages of a layer each. The
import of numba and the first run with shared links are timed in a fresh process, with a cached kernel (the
very first run on a machine compiles it, which takes some seconds more).

    python -m benchmarks.simulate_speed [--microbatches 128] [--output PATH]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numba
from rich.console import Console
from rich.table import Table

from benchmarks.partition_speed import decoder
from rpcompile.ir import Partition, Schedule
from rpcompile.passes.dispatch_round_robin import DispatchRoundRobin
from rpcompile.passes.insert_event_waits import InsertEventWaits
from rpcompile.passes.insert_transfers import InsertTransfers
from rpcompile.passes.lay_out_dispatch import LayOutDispatch
from rpcompile.round_robin_time import stages_between
from rpcompile.shared_links import SharedLinks
from rpcompile.simulate import simulate

GPUS, LAYERS, REPEATS = 8, 64, 5
FIRST_RUN = """
import time
import numpy
started = time.perf_counter()
import rpcompile.fluid_rates
imported = time.perf_counter() - started
from benchmarks import simulate_speed as speed
schedule = speed.schedule(2, layers=4)
started = time.perf_counter()
speed.simulate(schedule, links=speed.SharedLinks())
print(imported + time.perf_counter() - started)
"""


def schedule(microbatches: int, layers: int = LAYERS) -> Schedule:
    """Round-robin dispatch with transfers and events."""
    chain = decoder(layers)
    segments = len(chain.segments)
    cuts = [*range(0, segments, 2), segments + 1, *range(segments + 3, 2 * segments + 1, 2)]
    stages = stages_between(cuts, segments)
    partition = Partition(stages, chain.hardware.usable_bytes, 0.0, 0.0, "FEASIBLE", 0.0, "by hand")
    dispatch = DispatchRoundRobin(GPUS, microbatches).run(partition)
    found = LayOutDispatch(chain, partition).run(dispatch)
    return InsertEventWaits().run(InsertTransfers(chain).run(found))


def measure(made: Schedule, links: SharedLinks | None) -> dict[str, Any]:
    """Median CPU seconds of a run in this process, and what 100,000 actions take at that speed."""
    simulate(made, links=links)
    times: list[float] = []
    for _ in range(REPEATS):
        started = time.process_time()
        simulate(made, links=links)
        times.append(time.process_time() - started)
    actions = sum(1 for _ in made.actions())
    seconds = statistics.median(times)
    return {
        "links": "idle machine" if links is None else "200 GB/s of host memory shared",
        "actions": actions,
        "cpu_s": seconds,
        "cpu_s_per_100k_actions": 1e5 * seconds / actions,
    }


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--microbatches", type=int, default=128)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/simulate_speed.json"))
    options = parser.parse_args()
    made = schedule(options.microbatches)
    rows = [measure(made, links) for links in (None, SharedLinks())]
    done = subprocess.run([sys.executable, "-c", FIRST_RUN], capture_output=True, text=True, check=True)
    table = Table(title="simulate(), CPU seconds")
    for column in ("links", "actions", "seconds", "per 100,000 actions"):
        table.add_column(column, justify="left" if column == "links" else "right")
    for row in rows:
        figures = [f"{row[key]:.2f}" for key in ("cpu_s", "cpu_s_per_100k_actions")]
        table.add_row(row["links"], f"{row['actions']:,}", *figures)
    Console(width=100).print(table)
    print(f"import and first run with shared links in a process: {float(done.stdout):.2f} s")
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": {"cores": os.cpu_count(), "architecture": platform.machine(), "system": platform.system()},
        "versions": {"python": platform.python_version(), "numba": numba.__version__},
        "first_shared_run_s": float(done.stdout),
        "rows": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
