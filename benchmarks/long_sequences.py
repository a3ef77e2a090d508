"""What is the longest sequence that a 24 GB card can be planned for, with each technique added in turn?

One sequence a microbatch, 8 GPUs, the finest stages (one segment each); the peaks are predicted by running
each distinct segment on tensors without data. Nothing is measured on a GPU. Beside them are the longest
sequences that RoundPipe is published to have trained. "time" is what dividing adds to the estimated seconds
of all passes at that length.

    python -m benchmarks.long_sequences [--output PATH]
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from rpcompile import named_models
from rpcompile.passes.capture_graph import ExampleInputs
from rpcompile.planner import CapturedModel, capture_model, find_hardware
from rpcompile.round_robin_time import StageCosts, stages_between

if TYPE_CHECKING:
    from rpcompile.ir import Hardware, SegmentChain

GPUS, MICROBATCHES = 8, 8
LONGEST = 1 << 20
# RoundPipe's longest, in tokens: from its artifact (exp/raw-data.csv), 8 x RTX 4090.
PUBLISHED = {"qwen3-1.7b": 73 * 1024, "llama3.1-8b": 49 * 1024, "qwen3-32b": 28 * 1024}
# Name -> `tiles` and `head_groups`.
Divided = tuple[str | int, str | int]
WHOLE: Divided = (1, 1)
TECHNIQUES: tuple[tuple[str, Divided], ...] = (
    ("whole", WHOLE),
    ("loss in chunks", ("loss", 1)),
    ("+ token-wise regions in chunks", ("auto", 1)),
    ("+ attention backward by groups of heads", ("auto", "auto")),
)


def bind(model: CapturedModel, hardware: Hardware, sequence: int, divided: Divided) -> SegmentChain:
    sizes = {"batch": 1, "sequence": sequence}
    return model.bind(hardware, sizes, tiles=divided[0], head_groups=divided[1])


def excess_bytes(chain: SegmentChain) -> int:
    """How far the largest of the finest stages is over what a plan may use."""
    segments = len(chain.segments)
    costs = StageCosts(chain, GPUS, MICROBATCHES)
    cuts = [*range(segments), *range(segments + 1, 2 * segments - chain.first_backward + 1)]
    stages = [costs.of(stage) for stage in stages_between(cuts, segments)]
    return max(costs.resident_bytes(cuts, stages)) - chain.hardware.usable_bytes


def longest(model: CapturedModel, hardware: Hardware, divided: Divided) -> int:
    """The longest sequence whose finest stages fit, to a thousand tokens."""
    low, high = 0, LONGEST // 1024 + 1
    while high - low > 1:
        middle = (low + high) // 2
        fits = excess_bytes(bind(model, hardware, 1024 * middle, divided)) <= 0
        low, high = (middle, high) if fits else (low, middle)
    return 1024 * low


def seconds(chain: SegmentChain) -> float:
    """Forward, recompute and backward of one sequence."""
    return sum(2 * segment.forward_s + segment.backward_s for segment in chain.segments)


def rows(name: str, hardware: Hardware) -> list[dict[str, Any]]:
    tokens = torch.zeros(2, 2048, dtype=torch.long)
    example = ExampleInputs.of({"input_ids": tokens, "labels": tokens})
    model = capture_model(named_models.build(name).module, example)
    found: list[dict[str, Any]] = []
    for technique, divided in TECHNIQUES:
        length = longest(model, hardware, divided)
        tiled, whole = (bind(model, hardware, max(length, 1), choice) for choice in (divided, WHOLE))
        found.append(
            {
                "model": name,
                "technique": technique,
                "predicted_tokens": length,
                "published_roundpipe_tokens": PUBLISHED[name],
                "more_time": seconds(tiled) / seconds(whole) - 1,
                "tiles": sorted({segment.tiles for segment in tiled.segments}),
                "head_groups": max(segment.head_groups for segment in tiled.segments),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/long_sequences.json"))
    options = parser.parse_args()
    hardware = find_hardware("rtx4090")
    table = Table(title=f"longest sequence, {hardware.name}, predicted")
    for column in ("model", "technique", "tokens", "published RoundPipe", "times", "more time"):
        table.add_column(column, justify="left" if column in ("model", "technique") else "right")
    found: list[dict[str, Any]] = []
    for name in PUBLISHED:
        for row in rows(name, hardware):
            found.append(row)
            published = row["published_roundpipe_tokens"]
            table.add_row(
                name,
                row["technique"],
                f"{row['predicted_tokens']:,}",
                f"{published:,}",
                f"{row['predicted_tokens'] / published:.2f}",
                f"{100 * row['more_time']:.1f} %",
            )
    Console().print(table)
    report = {
        "date": datetime.date.today().isoformat(),
        "machine": {"system": platform.system(), "architecture": platform.machine()},
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
        "predicted": True,
        "usable_bytes": hardware.usable_bytes,
        "rows": found,
    }
    options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
