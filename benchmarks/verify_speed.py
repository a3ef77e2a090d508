"""How long do the schedule's passes and its proof take?

A made-up model of 94 layers in two segments each and a head, one stage a segment and pass (no plan
has more), 64 microbatches on 8 GPUs: as one job a stage, and with the microbatches of every stage
divided between two GPUs; synchronous, and asynchronous with and without optimizer updates. The first and
the last segment share a tensor. Seconds are CPU seconds of this process; a small schedule goes through
every step first, so that compiled code is loaded. Every other figure is the same on any machine.

    python benchmarks/verify_speed.py [--layers 94] [--microbatches 64] [--gpus 8] [--output PATH]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
from rich.console import Console
from rich.table import Table

from rpcompile.ir import (
    Dispatch,
    Hardware,
    Job,
    Partition,
    Segment,
    SegmentChain,
    Stage,
    StageKind,
    TiedWeight,
)
from rpcompile.passes.dispatch_round_robin import DispatchRoundRobin
from rpcompile.passes.insert_event_waits import InsertEventWaits
from rpcompile.passes.insert_transfers import InsertTransfers
from rpcompile.passes.insert_updates import InsertUpdates
from rpcompile.passes.lay_out_dispatch import LayOutDispatch
from rpcompile.simulate import simulate
from rpcompile.verify import verify_schedule

if TYPE_CHECKING:
    from collections.abc import Callable

_HARDWARE = Hardware("made up", 24 * 10**9, 22 * 10**9, 1e14, 1e12, 25e9, 25e9, 2e-5, {})


def model(layers: int) -> SegmentChain:
    """Attention and MLP segments of `layers` layers, and a head."""

    def segment(name: str, weights: int, seconds: float) -> Segment:
        return Segment(
            name=name,
            nodes=(),
            parameters=(f"{name}.weight",),
            inputs=("input_ids",) if name in ("layer0.attention", "head") else (),
            boundary=(),
            boundary_gradients=(),
            forward_s=seconds,
            backward_s=2 * seconds,
            forward_flops=0.0,
            backward_flops=0.0,
            weight_bytes=weights,
            gradient_bytes=weights,
            state_bytes=0,
            input_bytes=0,
            boundary_bytes=2**24,
            boundary_gradient_bytes=2**24,
            saved_bytes=2**27,
            peak_bytes=2**26,
            needs_backward=True,
            source="given",
        )

    segments: list[Segment] = []
    for layer in range(layers):
        segments.append(segment(f"layer{layer}.attention", 50_000_000, 0.001))
        segments.append(segment(f"layer{layer}.mlp", 150_000_000, 0.003))
    tied = TiedWeight("embedding", (0, 2 * layers), 40_000_000, 40_000_000)
    return SegmentChain((*segments, segment("head", 600_000_000, 0.01)), {}, _HARDWARE, (tied,))


def finest(chain: SegmentChain) -> Partition:
    """F stages of one segment, the last as FB, B stages of one segment."""
    last = len(chain.segments) - 1
    kinds = [(StageKind.F, index) for index in range(last)] + [(StageKind.FB, last)]
    kinds += [(StageKind.B, index) for index in reversed(range(last))]
    stages = tuple(Stage(number, kind, index, index) for number, (kind, index) in enumerate(kinds))
    return Partition(stages, _HARDWARE.usable_bytes, 0.0, 0.0, "GIVEN", 0.0, "by hand")


def halved(partition: Partition, gpus: int, microbatches: int) -> Dispatch:
    """Two jobs a stage: even microbatches on one half of the GPUs, odd ones on the other."""
    jobs: list[Job] = []
    order: list[list[tuple[int, int]]] = [[] for _ in range(gpus)]
    for stage in partition.stages:
        for replica in range(2):
            gpu = 2 * (stage.index % (gpus // 2)) + replica
            job = Job(len(jobs), stage.index, 0, replica, tuple(range(replica, microbatches, 2)), gpu)
            jobs.append(job)
            order[gpu] += [(job.index, microbatch) for microbatch in job.microbatches]
    return Dispatch("halved", gpus, microbatches, tuple(jobs), tuple(map(tuple, order)))


def measure(
    dispatch: Dispatch, chain: SegmentChain, partition: Partition, mode: str, updates: bool
) -> dict[str, Any]:
    """Seconds of every step."""
    row: dict[str, Any] = {"dispatch": dispatch.policy, "mode": mode, "updates": updates}

    def timed(name: str, step: Callable[[], Any]) -> Any:
        begin = time.process_time()
        result = step()
        row[f"{name}_s"] = time.process_time() - begin
        return result

    schedule = timed("lay_out", lambda: LayOutDispatch(chain, partition, mode).run(dispatch))
    schedule = timed("transfers", lambda: InsertTransfers(chain).run(schedule))
    if updates:
        schedule = timed("updates", lambda: InsertUpdates(chain).run(schedule))
    schedule = timed("event_waits", lambda: InsertEventWaits().run(schedule))
    timed("simulate", lambda: simulate(schedule))
    timed("verify", lambda: verify_schedule(schedule, chain, partition))
    row["actions"] = sum(len(queue.actions) for queue in schedule.queues)
    row["events"] = sum(len(action.records) for action in schedule.actions())
    return row


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--layers", type=int, default=94)
    parser.add_argument("--microbatches", type=int, default=64)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/verify_speed.json"))
    options = parser.parse_args()
    small = model(1)
    measure(DispatchRoundRobin(2, 2).run(finest(small)), small, finest(small), "async", updates=True)
    chain = model(options.layers)
    partition = finest(chain)
    round_robin = DispatchRoundRobin(options.gpus, options.microbatches).run(partition)
    rotate = len(round_robin.jobs) % options.gpus
    divided = halved(partition, options.gpus, options.microbatches)
    rows = [
        measure(round_robin, chain, partition, "sync", updates=False),
        measure(divided, chain, partition, "sync", updates=False),
        measure(replace(round_robin, rotate=rotate), chain, partition, "async", updates=False),
        measure(divided, chain, partition, "async", updates=False),
        measure(divided, chain, partition, "async", updates=True),
    ]
    title = f"{options.layers} layers, {options.microbatches} microbatches, {options.gpus} GPUs"
    table = Table("dispatch", "mode", "updates", "actions", "events", title=title)
    steps = [key for key in rows[-1] if key.endswith("_s")]
    for step in steps:
        table.add_column(step.removesuffix("_s"))
    for row in rows:
        told = [row["dispatch"], row["mode"], "yes" if row["updates"] else "no"]
        told += [f"{row[key]:,}" for key in ("actions", "events")]
        table.add_row(*told, *(f"{row[step]:.2f} s" if step in row else "" for step in steps))
    Console(width=140).print(table)
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": {"cores": os.cpu_count(), "architecture": platform.machine(), "system": platform.system()},
        "versions": {"python": platform.python_version(), "numpy": numpy.__version__},
        "layers": options.layers,
        "microbatches": options.microbatches,
        "gpus": options.gpus,
        "rows": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
