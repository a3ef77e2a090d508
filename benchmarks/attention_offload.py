"""From which length on does it pay to offload attention outputs instead of recomputing them, and how much?

8 GPUs, 16 microbatches of at least 8,192 tokens, token-wise regions in chunks of 4,096. For each length a
plan that recomputes all attention and one that offloads all of it, both searched, and simulated with the
links; nothing is measured on a GPU. "break-even" is the length at which one direction of the link takes as
long for an attention's output and log-sum-exp as the GPU takes to recompute them.

    python -m benchmarks.attention_offload [--output PATH] [--models NAME ...]
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from rpcompile import named_models
from rpcompile.attention_choice import saved_share
from rpcompile.errors import PartitionError
from rpcompile.passes.capture_graph import ExampleInputs
from rpcompile.planner import CapturedModel, PlanOptions, capture_model, find_hardware

if TYPE_CHECKING:
    from rpcompile.ir import Hardware, SegmentChain
    from rpcompile.plan import Plan

MODELS = ("qwen3-1.7b", "llama3.1-8b", "qwen3-32b")
LENGTHS = (2048, 4096, 8192, 16384, 32768, 65536)
LEAST_TOKENS = 8192
CHUNK = 4096
OPTIONS = PlanOptions(8, 16, solver_time_s=1.0, effort="fast")


def bind(model: CapturedModel, hardware: Hardware, length: int) -> SegmentChain:
    sizes = {"batch": max(1, LEAST_TOKENS // length), "sequence": length}
    return model.bind(hardware, sizes, tiles=max(1, length // CHUNK))


def break_even(model: CapturedModel, hardware: Hardware) -> int:
    """The length at which copying one way takes as long as computing, to 64 tokens."""
    low, high = 1, 1024
    while high - low > 1:
        middle = (low + high) // 2
        segments = bind(model, hardware, 64 * middle).segments
        kept = [segment.attention for segment in segments if segment.attention]
        copies_s = sum(attention.nbytes for attention in kept) / hardware.h2d_bytes_per_s
        low, high = (low, middle) if sum(a.forward_s for a in kept) >= copies_s else (middle, high)
    return 64 * high


def plan(model: CapturedModel, chain: SegmentChain, attention: str) -> Plan | None:
    try:
        return model.plan(chain, replace(OPTIONS, attention=attention), progress=False)
    except PartitionError:
        return None


def rows(name: str, hardware: Hardware) -> list[dict[str, Any]]:
    tokens = torch.zeros(2, 2048, dtype=torch.long)
    example = ExampleInputs.of({"input_ids": tokens, "labels": tokens})
    model = capture_model(named_models.build(name).module, example)
    even, found = break_even(model, hardware), list[dict[str, Any]]()
    for length in LENGTHS:
        chain = bind(model, hardware, length)
        plans = [plan(model, chain, attention) for attention in ("recompute", "offload")]
        times = [None if made is None else made.prediction.iteration_s for made in plans]
        host = plans[1].prediction.host if plans[1] else None
        found.append(
            {
                "model": name,
                "break_even_tokens": even,
                "tokens": length,
                "rows": chain.bindings["batch"],
                "recompute_s": times[0],
                "offload_s": times[1],
                "change": times[1] / times[0] - 1 if times[0] and times[1] else None,
                "at_most": -saved_share(chain),
                "host_attention_bytes": None if host is None else host.attention_bytes,
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/attention_offload.json"))
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    options = parser.parse_args()
    hardware = find_hardware("rtx4090")
    table = Table(title=f"attention outputs offloaded, 8 x {hardware.name}, simulated")
    names = ("model", "break-even", "tokens", "recompute", "offload", "change", "of compute", "host")
    for column in names:
        table.add_column(column, justify="left" if column == "model" else "right")
    found: list[dict[str, Any]] = []
    for name in options.models:
        for row in rows(name, hardware):
            found.append(row)
            times = ("-" if row[key] is None else f"{row[key]:.2f} s" for key in ("recompute_s", "offload_s"))
            table.add_row(
                name,
                f"{row['break_even_tokens']:,}",
                f"{row['rows']} x {row['tokens']:,}",
                *times,
                "-" if row["change"] is None else f"{100 * row['change']:+.1f} %",
                f"{100 * row['at_most']:+.1f} %",
                "-" if row["host_attention_bytes"] is None else f"{row['host_attention_bytes'] / 1e9:.0f} GB",
            )
    Console().print(table)
    report = {
        "date": datetime.date.today().isoformat(),
        "machine": {"system": platform.system(), "architecture": platform.machine()},
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
        "simulated": True,
        "hardware": {"name": hardware.name, "h2d_bytes_per_s": hardware.h2d_bytes_per_s},
        "rows": found,
    }
    options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
