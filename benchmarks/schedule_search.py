"""How small do bubbles get, on the published layer times? Simulated, beside the published ones.

8 GPUs, 16 microbatches, uploads and gradient downloads at 25 GB/s, two resident jobs a GPU, host memory
bandwidth of 200 GB/s shared by all transfers and sums of partial gradients; strict dependencies. Layers
are two segments of half the time and bytes each; the head is one, and the only segment in the fused
stage but in rows marked *, where layers that fit are fused, too, and not computed twice.

    python benchmarks/schedule_search.py [--effort normal] [--seed 0] [--limit-s SECONDS] [--output PATH]

Time and bubble are those of the search's own model (`rpcompile/dispatch_time.py`); the bubble is
1 - work / (GPUs x time), all ends included: the first upload, the last gradient's way to the host.
`full` is the bubble of the same dispatch with every copy and event, by `rpcompile.simulate`: chained
iterations where they are, single ones in plain synchronous rows.
The rows "optimizer" are at the published batch sizes in microbatches of 4 sequences, with per-segment
updates at 0.15 ns a parameter behind the global norm; `over async` compares them with work / GPUs.
`seconds` is the wall time of a search on two threads, `cpu` their processor time. On a busy machine, give
`--limit-s 1000`, so that moves and not the clock end each search.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numba
from rich.console import Console
from rich.table import Table

from rpcompile.ir import SegmentChain
from rpcompile.passes.insert_event_waits import InsertEventWaits
from rpcompile.passes.insert_transfers import InsertTransfers
from rpcompile.passes.insert_updates import InsertUpdates
from rpcompile.passes.lay_out_dispatch import LayOutDispatch
from rpcompile.passes.search_schedule import EFFORTS, SearchedSchedule, SearchSchedule
from rpcompile.profile import Profile
from rpcompile.shared_links import SharedLinks
from rpcompile.simulate import simulate

HERE = Path(__file__).parent
GPUS, MICROBATCHES, LINK_BYTES_PER_S = 8, 16, 25e9
MODELS = {"Qwen3-1.7B": 512, "Llama3-8B": 256, "Qwen3-32B": 128}  # sequences in a published batch
# Bubbles, synchronous and asynchronous: RoundPipe artifact, pp-simulate/log (see data/published.json).
PUBLISHED = {
    "Qwen3-1.7B": (0.190676, 0.0405),
    "Llama3-8B": (0.142839, 0.0129),
    "Qwen3-32B": (0.066661, 0.0265),
}
UPDATE_S_PER_BYTE = 0.15e-9 / 2  # gradients have 2 bytes a parameter


@dataclass(frozen=True)
class Row:
    """One search; `published_bubble` is the published one of the same mode, if there is one."""

    model: str
    case: str
    microbatches: int
    time_s: float
    bound_s: float
    gap: float
    bubble: float
    full_s: float
    full_bubble: float
    published_bubble: float | None
    over_async: float | None
    traffic: float
    stages: int
    jobs: int
    rotate: int
    seconds: float
    cpu_s: float
    ended_by: str


def halves(model: str) -> SegmentChain:
    """The published profile with every layer in two equal segments."""
    chain = Profile.load(HERE / "profiles" / f"{model.lower()}.json").to_chain()
    hardware = replace(chain.hardware, h2d_bytes_per_s=LINK_BYTES_PER_S, d2h_bytes_per_s=LINK_BYTES_PER_S)
    segments = []
    for segment in chain.segments[:-1]:
        for part in ("first", "second"):
            half = replace(
                segment,
                name=f"{segment.name}.{part}",
                forward_s=segment.forward_s / 2,
                backward_s=segment.backward_s / 2,
                weight_bytes=segment.weight_bytes // 2,
                gradient_bytes=segment.gradient_bytes // 2,
                saved_bytes=segment.saved_bytes // 2,
            )
            segments.append(half)
    return SegmentChain((*segments, chain.segments[-1]), chain.bindings, hardware)


def full_s(chain: SegmentChain, found: SearchedSchedule, search: SearchSchedule) -> float:
    """Seconds of an iteration with every copy, event and update, host memory bandwidth shared."""
    schedule = LayOutDispatch(chain, found.partition).run(found.dispatch)
    schedule = InsertTransfers(chain).run(schedule)
    seconds = search.update_s_per_byte * 2  # 0 leaves the sums of partial gradients
    updates = InsertUpdates(chain, seconds_per_parameter=seconds, clip=search.update_s_per_byte > 0)
    schedule = InsertEventWaits().run(updates.run(schedule))
    links = SharedLinks(host_bytes_per_s=search.host_bytes_per_s)
    if search.mode == "async":
        rotate = found.dispatch.rotate
        return simulate(schedule, links=links, iterations=40, mode="async", rotate=rotate).period_s
    if search.update_s_per_byte:
        return simulate(schedule, links=links, iterations=6).period_s
    return simulate(schedule, links=links).makespan_s


def measure(model: str, case: str, search: SearchSchedule, published: float | None) -> Row:
    """One row of the table."""
    chain = halves(model)
    began_s = time.process_time()
    found = search.run(chain)
    cpu_s = time.process_time() - began_s
    seconds = full_s(chain, found, search)
    partition, optimizer = found.partition, search.update_s_per_byte > 0
    body, head = chain.segments[:-1], chain.segments[-1]
    work_s = sum(2 * s.forward_s + s.backward_s for s in body) + head.forward_s + head.backward_s
    async_s = work_s * search.microbatches / search.gpus
    return Row(
        model=model,
        case=case,
        microbatches=search.microbatches,
        time_s=partition.objective_s,
        bound_s=partition.bound_s,
        gap=partition.gap,
        bubble=found.bubble,
        full_s=seconds,
        full_bubble=1 - (1 - found.bubble) * partition.objective_s / seconds,
        published_bubble=published,
        over_async=seconds / async_s - 1 if optimizer else None,
        traffic=found.traffic,
        stages=len(partition.stages),
        jobs=len(found.dispatch.jobs),
        rotate=found.dispatch.rotate,
        seconds=partition.solve_s,
        cpu_s=cpu_s,
        ended_by=found.ended_by,
    )


def rows_of(model: str, effort: str, seed: int, limit_s: float | None) -> list[Row]:
    """All rows of one model."""
    sync, chained = PUBLISHED[model]
    plain = SearchSchedule(
        GPUS, MICROBATCHES, effort=effort, seed=seed, fused_segments=1, time_limit_s=limit_s
    )
    optimizer = replace(plain, microbatches=MODELS[model] // 4, update_s_per_byte=UPDATE_S_PER_BYTE)
    return [
        measure(model, "async, <= 0.65x", replace(plain, mode="async", max_traffic=0.65), chained),
        measure(model, "sync, <= 1.00x", replace(plain, max_traffic=1.0), sync),
        measure(model, "sync, any traffic", plain, sync),
        measure(model, "sync, any traffic *", replace(plain, fused_segments=None), sync),
        measure(model, "sync, optimizer", optimizer, None),
    ]


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--effort", choices=EFFORTS, default="normal")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit-s", type=float, help="wall time of one search; default: the effort's")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "schedule_search.json")
    options = parser.parse_args()
    columns = "model|case|time s|bound s|gap|bubble|full|published|over async|traffic|stages|jobs"
    columns += "|seconds|cpu|ended by"
    table = Table(*columns.split("|"), title="Simulated bubbles of searched schedules")
    rows: list[Row] = []
    for model in MODELS:
        for row in rows_of(model, options.effort, options.seed, options.limit_s):
            rows.append(row)
            shares = [row.gap, row.bubble, row.full_bubble, row.published_bubble, row.over_async]
            print(row, flush=True)
            table.add_row(
                row.model,
                row.case,
                f"{row.time_s:.4f}",
                f"{row.bound_s:.4f}",
                *("" if share is None else f"{share:.2%}" for share in shares),
                f"{row.traffic:.2f}x",
                *map(str, (row.stages, row.jobs)),
                f"{row.seconds:.1f}",
                f"{row.cpu_s:.1f}",
                row.ended_by,
            )
    Console(width=150).print(table)
    result = {
        "simulated": True,
        "date": datetime.date.today().isoformat(),
        "machine": {"cores": os.cpu_count(), "architecture": platform.machine(), "system": platform.system()},
        "versions": {"python": platform.python_version(), "numba": numba.__version__},
        "effort": options.effort,
        "seed": options.seed,
        "limit_s": options.limit_s,
        "rows": [asdict(row) for row in rows],
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
