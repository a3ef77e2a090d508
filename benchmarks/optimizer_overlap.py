"""What does `compiled.step` cost beside `optimizer.step()`, on the host?

SmolLM2-135M's parameters, random, in segments of one decoder layer; AdamW (fused) with gradient
clipping, as the runtime queues it. "returns" is how long the caller of a queued step is held, "first
layer" when the next forward may start, "all" when everything is updated. No GPU takes part. Run it as::

    python benchmarks/optimizer_overlap.py        # writes benchmarks/results/optimizer_overlap.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rpcompile.runtime import optimizer_subsets
from rpcompile.runtime.updates import Updates

# SmolLM2-135M's config.json.
HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY, KEY_VALUE = 576, 1536, 30, 49152, 192


def parameters() -> list[list[nn.Parameter]]:
    """The model's parameters with gradients, one list a segment: embedding, layers, last norm."""
    square, wide = (HIDDEN, HIDDEN), (INTERMEDIATE, HIDDEN)
    layer = [square, (KEY_VALUE, HIDDEN), (KEY_VALUE, HIDDEN), square, wide, wide, (HIDDEN, INTERMEDIATE)]
    shapes = [[(VOCABULARY, HIDDEN)], *[[*layer, (HIDDEN,), (HIDDEN,)]] * LAYERS, [(HIDDEN,)]]
    made = [[nn.Parameter(torch.randn(shape) * 0.02) for shape in segment] for segment in shapes]
    for parameter in (p for segment in made for p in segment):
        parameter.grad = torch.randn_like(parameter) * 1e-3
    return made


def measure(repeats: int, make: Callable[[Any], torch.optim.Optimizer]) -> dict[str, float]:
    """Median seconds of each way, taken in turns."""
    segments = parameters()
    everything = [p for segment in segments for p in segment]
    owners = {id(p): index for index, segment in enumerate(segments) for p in segment}
    updates = Updates([f"layer {index}" for index in range(len(segments))])
    optimizer = make(everything)
    times: dict[str, list[float]] = {}

    def note(what: str, start: float) -> None:
        times.setdefault(what, []).append(time.perf_counter() - start)

    for _ in range(repeats + 1):
        start = time.perf_counter()
        nn.utils.clip_grad_norm_(everything, 1.0)
        note("plain: clip", start)
        start = time.perf_counter()
        optimizer.step()
        note("plain: step", start)
        start = time.perf_counter()
        updates.clip_grad_norm_(everything, 1.0, 2.0, False)
        note("queued: clip returns", start)
        start = time.perf_counter()
        updates.step(optimizer, owners)
        first = updates.pending[0]
        note("queued: step returns", start)
        updates.pending[1].result()
        note("queued: first layer", start)
        assert first.done()
        updates.wait()
        note("queued: all", start)
    updates.close()
    return {what: statistics.median(values[1:]) for what, values in times.items()}


def main() -> None:
    """Measures, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "optimizer_overlap.json"
    )
    options = parser.parse_args()
    count = sum(p.numel() for segment in parameters() for p in segment)
    rows: dict[str, dict[str, float]] = {}
    piece = optimizer_subsets.PIECE
    rows["AdamW(fused=True)"] = measure(options.repeats, lambda p: torch.optim.AdamW(p, fused=True))
    optimizer_subsets.PIECE = count
    whole = "AdamW(fused=True), tensors not divided"
    rows[whole] = measure(options.repeats, lambda p: torch.optim.AdamW(p, fused=True))
    optimizer_subsets.PIECE = piece
    rows["AdamW()"] = measure(options.repeats, torch.optim.AdamW)
    print(f"{count:,} parameters, milliseconds\n\n| | {' | '.join(rows)} |\n|---{'|---' * len(rows)}|")
    for what in next(iter(rows.values())):
        print(f"| {what} | {' | '.join(f'{1e3 * row[what]:.1f}' for row in rows.values())} |")
    record = {
        "question": "seconds of a plain and a queued optimizer step with clipping, on the host",
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()} {platform.system()}, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "note": "the machine was shared with other work",
        "parameters": count,
        "median_s": rows,
    }
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
