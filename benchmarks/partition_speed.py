"""How long does `partition-stages` take, and how far from the best can its answer be?

Chains of attention and MLP segments with a head, priced by hand like an 8B decoder in bf16 with 4 x
2048 tokens a microbatch on an RTX 4090 (assumed: 120 TFLOP/s sustained, 24 GB/s each way). Every
figure of the result but the seconds is the same on any machine that is not too slow.

    python benchmarks/partition_speed.py [--time-limit 3.0] [--output PATH]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
from pathlib import Path

import ortools
from rich.console import Console
from rich.table import Table

from rpcompile.ir import Hardware, Segment, SegmentChain
from rpcompile.passes._stage_search import StageSearch
from rpcompile.passes.partition_stages import PartitionStages
from rpcompile.round_robin_time import StageCosts

CASES = ((12, 2, 4), (30, 1, 8), (30, 4, 4), (30, 4, 8), (30, 4, 16), (64, 8, 8), (64, 8, 16))
WIDTH, TOKENS, VOCABULARY = 4096, 4 * 2048, 128_256
FLOPS_PER_S, LINK_BYTES_PER_S = 120e12, 24e9


def decoder(layers: int) -> SegmentChain:
    """`layers` decoder layers in two segments each, and the head with its loss."""
    edge_bytes = 2 * TOKENS * WIDTH
    hardware = Hardware(
        name="rtx4090",
        memory_bytes=24_000_000_000,
        usable_bytes=22_000_000_000,
        flops_per_s=FLOPS_PER_S,
        memory_bytes_per_s=1.008e12,
        h2d_bytes_per_s=LINK_BYTES_PER_S,
        d2h_bytes_per_s=LINK_BYTES_PER_S,
        latency_s=20e-6,
        sources={},
    )

    def segment(name: str, weights: int, edge: int, saved: int, peak: int) -> Segment:
        forward_s = 2 * weights * TOKENS / FLOPS_PER_S
        return Segment(
            name=name,
            nodes=(),
            parameters=(),
            inputs=(),
            boundary=(),
            boundary_gradients=(),
            forward_s=forward_s,
            backward_s=2 * forward_s,
            forward_flops=2 * weights * TOKENS,
            backward_flops=4 * weights * TOKENS,
            weight_bytes=2 * weights,
            gradient_bytes=2 * weights,
            state_bytes=0,
            input_bytes=0,
            boundary_bytes=edge,
            boundary_gradient_bytes=edge,
            saved_bytes=saved,
            peak_bytes=peak,
            needs_backward=True,
            source="given",
        )

    segments: list[Segment] = []
    for layer in range(layers):
        attention, mlp = int(2.5 * WIDTH**2), int(10.5 * WIDTH**2)
        segments.append(
            segment(f"layers.{layer}.attn", attention, edge_bytes, 4 * edge_bytes, 4 * edge_bytes)
        )
        segments.append(segment(f"layers.{layer}.mlp", mlp, edge_bytes, 11 * edge_bytes, 8 * edge_bytes))
    logits_bytes = 2 * TOKENS * VOCABULARY
    segments.append(segment("lm_head", WIDTH * VOCABULARY, 0, logits_bytes, 2 * logits_bytes))
    return SegmentChain(tuple(segments), {"batch": 4, "sequence": 2048}, hardware)


def measure(layers: int, gpus: int, microbatches: int, time_limit_s: float) -> dict[str, object]:
    """Partition one chain; `greedy_s` is what the search finds before any move is tried."""
    chain = decoder(layers)
    n, limit = len(chain.segments), chain.hardware.usable_bytes
    greedy = StageSearch(StageCosts(chain, gpus, microbatches), 2 * n, limit, seed=0).run(effort=0.0)
    partition = PartitionStages(gpus, microbatches, time_limit_s=time_limit_s).run(chain)
    return {
        "layers": layers,
        "segments": n,
        "gpus": gpus,
        "microbatches": microbatches,
        "stages": len(partition.stages),
        "greedy_s": greedy.iteration_s,
        "objective_s": partition.objective_s,
        "bound_s": partition.bound_s,
        "gap": partition.gap,
        "status": partition.status,
        "solve_s": partition.solve_s,
    }


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--time-limit", type=float, default=3.0, help="seconds for CP-SAT")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/partition_speed.json"))
    options = parser.parse_args()
    columns = "layers segments gpus microbatches stages greedy objective bound gap status solve"
    table = Table(*columns.split(), title="partition-stages")
    rows: list[dict[str, object]] = []
    for case in CASES:
        row = measure(*case, options.time_limit)
        rows.append(row)
        seconds = [f"{row[key]:.3f} s" for key in ("greedy_s", "objective_s", "bound_s")]
        counts = [str(row[key]) for key in ("layers", "segments", "gpus", "microbatches", "stages")]
        table.add_row(*counts, *seconds, f"{row['gap']:.1%}", str(row["status"]), f"{row['solve_s']:.1f} s")
    Console(width=120).print(table)
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": {"cores": os.cpu_count(), "architecture": platform.machine(), "system": platform.system()},
        "versions": {"python": platform.python_version(), "ortools": ortools.__version__},
        "time_limit_s": options.time_limit,
        "rows": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
