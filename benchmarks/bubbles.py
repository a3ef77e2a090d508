"""How much of the GPUs' time do schedules waste? Ours beside the published ones, on published layer times.

Simulated, not measured. Eight GPUs, 16 microbatches, one isolated synchronous iteration. The comparison
policies have compute and hops only, as the published figures do; "simulated" plans of our own have
uploads, downloads and shared host memory as well. Traffic 1.00x is one upload of each layer a pass and
round of eight microbatches.

    python -m benchmarks.bubbles [--solver-time 10] [--output PATH]
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import platform
from pathlib import Path
from typing import Any

import numba
import ortools
from rich.console import Console
from rich.table import Table

from rpcompile.ir import Dispatch, Partition, SegmentChain
from rpcompile.passes.dispatch_1f1b import Dispatch1F1B
from rpcompile.passes.dispatch_gpipe import DispatchGPipe
from rpcompile.passes.dispatch_interleaved_1f1b import DispatchInterleaved1F1B
from rpcompile.passes.dispatch_looped_bfs import DispatchLoopedBFS
from rpcompile.passes.dispatch_round_robin import DispatchRoundRobin
from rpcompile.passes.insert_event_waits import InsertEventWaits
from rpcompile.passes.insert_transfers import InsertTransfers
from rpcompile.passes.lay_out_dispatch import LayOutDispatch
from rpcompile.passes.partition_by_rule import PartitionByRule
from rpcompile.passes.partition_pipeline import PartitionPipeline
from rpcompile.passes.partition_stages import PartitionStages
from rpcompile.profile import Profile
from rpcompile.shared_links import SharedLinks
from rpcompile.simulate import simulate
from rpcompile.simulate_dispatch import (
    DispatchTimeline,
    simulate_dispatch,
    simulate_steady_state,
    upload_bytes,
)
from rpcompile.stage_bytes import upload_unit_bytes

HERE = Path(__file__).parent
GPUS, MICROBATCHES = 8, 16
PUBLISHED_NAMES = {
    "gpipe": "gpipe",
    "1f1b": "1f1b",
    "interleaved_1f1b": "interleaved-1f1b",
    "looped_bfs": "looped-bfs",
    "round_robin": "roundpipe",
}


@functools.cache
def published() -> dict[str, Any]:
    """The published figures, by model."""
    text = (HERE / "data" / "published_schedules.json").read_text(encoding="utf-8")
    return json.loads(text)["models"]


@functools.cache
def _profile(model: str) -> Profile:
    return Profile.load(HERE / "profiles" / f"{model.lower()}.json")


@functools.cache
def chain(model: str) -> SegmentChain:
    """The layers and the head, with published times."""
    return _profile(model).to_chain()


def hop_s(model: str) -> float:
    """The published time of one hop between GPUs."""
    found = _profile(model).hop_s
    assert found is not None
    return found


def partition(model: str, policy: str) -> Partition:
    """The stages that the published schedule of a policy has."""
    if policy == "round_robin":
        return PartitionByRule(GPUS, balanced=True).run(chain(model))
    chunks = 1 if policy in ("gpipe", "1f1b") else None
    return PartitionPipeline(GPUS, chunks).run(chain(model))


def dispatch(model: str, policy: str) -> Dispatch:
    """The published schedule of a policy."""
    passes = {
        "gpipe": DispatchGPipe(GPUS, MICROBATCHES),
        "1f1b": Dispatch1F1B(GPUS, MICROBATCHES),
        "interleaved_1f1b": DispatchInterleaved1F1B(GPUS, MICROBATCHES),
        "looped_bfs": DispatchLoopedBFS(GPUS, MICROBATCHES),
        "round_robin": DispatchRoundRobin(GPUS, MICROBATCHES, rounds=MICROBATCHES // GPUS),
    }
    return passes[policy].run(partition(model, policy))


def run(model: str, policy: str, semantics: str = "strict") -> DispatchTimeline:
    """Simulates the published schedule of a policy."""
    stages = partition(model, policy)
    return simulate_dispatch(
        chain(model), stages, dispatch(model, policy), hop_s=hop_s(model), semantics=semantics
    )


def compare(model: str, policy: str) -> dict[str, Any]:
    """One row: what we simulate of a policy beside what is published."""
    given = published()[model]["published"][PUBLISHED_NAMES[policy]]
    found, strict = run(model, policy, "published"), run(model, policy)
    stages, made = partition(model, policy), dispatch(model, policy)
    row = {
        "model": model,
        "plan": policy,
        "published_bubble": given["bubble_ratio_pct"] / 100,
        "bubble_as_published": found.bubble,
        "bubble": strict.bubble,
        "makespan_s": strict.makespan_s,
        "published_makespan_s": given["makespan_ms"] / 1e3,
        "makespan_as_published_s": found.makespan_s,
        "idle_s": {part: getattr(strict.idle, f"{part}_s") for part in ("fill", "switch", "drain", "intra")},
        "traffic": _traffic(model, upload_bytes(chain(model), stages, made)),
    }
    if policy == "round_robin":
        shift = len(made.jobs) % GPUS
        steady = simulate_steady_state(chain(model), stages, made, hop_s=hop_s(model), rotate=shift)
        row["async_bubble"] = steady.bubble
        row["published_async_bubble"] = published()[model]["async_published_pct"] / 100
    return row


def planned(model: str, solver_time_s: float) -> dict[str, Any]:
    """One row: rpcompile's own plan, with every copy simulated and host memory shared.

    This is where another search comes in: whatever makes a partition and a dispatch.
    """
    stages = PartitionStages(GPUS, MICROBATCHES, time_limit_s=solver_time_s).run(chain(model))
    made = DispatchRoundRobin(GPUS, MICROBATCHES).run(stages)
    schedule = LayOutDispatch(chain(model), stages).run(made)
    schedule = InsertEventWaits().run(InsertTransfers(chain(model)).run(schedule))
    timeline = simulate(schedule, links=SharedLinks())
    return {
        "model": model,
        "plan": "rpcompile, simulated",
        "bubble": timeline.bubble,
        "makespan_s": timeline.makespan_s,
        "idle_s": {
            part: getattr(timeline.idle, f"{part}_s") for part in ("fill", "switch", "drain", "intra")
        },
        "traffic": _traffic(model, timeline.weight_bytes),
    }


def _traffic(model: str, nbytes: int) -> float:
    return nbytes / upload_unit_bytes(chain(model), GPUS, MICROBATCHES)


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--solver-time", type=float, default=10.0, help="seconds for our partitions")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "bubbles.json")
    options = parser.parse_args()
    table = Table(title="bubbles, % (simulated; 8 GPUs x 16 microbatches)")
    for column in ("model", "plan", "published", "as published", "strict", "async", "traffic"):
        table.add_column(column, justify="left" if column in ("model", "plan") else "right")
    rows: list[dict[str, Any]] = []
    for model in published():
        found = [compare(model, policy) for policy in PUBLISHED_NAMES]
        found.append(planned(model, options.solver_time))
        for row in found:
            shares = ("published_bubble", "bubble_as_published", "bubble", "async_bubble")
            cells = [f"{100 * row[key]:.4f}" if key in row else "" for key in shares]
            table.add_row(row["model"], row["plan"], *cells, f"{row['traffic']:.2f}x")
        table.add_section()
        rows += found
    Console(width=110).print(table)
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": {"cores": os.cpu_count(), "architecture": platform.machine(), "system": platform.system()},
        "versions": {
            "python": platform.python_version(),
            "ortools": ortools.__version__,
            "numba": numba.__version__,
        },
        "simulated": True,
        "rows": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
