"""What does `compiled.step` cost beside `optimizer.step()`, on the host?

SmolLM2-135M's parameters, random, in segments of one decoder layer; AdamW (fused) with gradient
clipping, as the runtime queues it. "norm and queue" is how long the caller is held, "first layer" when
the embedding and layer 0 are updated, so that the next forward may start. No GPU takes part. Run it as::

    python benchmarks/optimizer_overlap.py        # writes benchmarks/results/optimizer_overlap.json
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn

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


def measure(repeats: int, make: Callable[[Any], torch.optim.Optimizer]) -> dict[str, dict[str, float]]:
    """Seconds of each way, the ways taking turns: the least of each, for the machine may be shared."""
    segments = parameters()
    everything = [p for segment in segments for p in segment]
    owners = {id(p): index for index, segment in enumerate(segments) for p in segment}
    updates = Updates([f"layer {index}" for index in range(len(segments))])
    optimizer = make(everything)
    times: dict[str, dict[str, list[float]]] = {}

    def note(way: str, what: str, start: float) -> None:
        times.setdefault(way, {}).setdefault(what, []).append(time.perf_counter() - start)

    for _ in range(repeats + 1):
        start = time.perf_counter()
        nn.utils.clip_grad_norm_(everything, 1.0)
        optimizer.step()
        note("plain", "clip and step, all", start)
        start = time.perf_counter()
        updates.clip_grad_norm_(everything, 1.0, 2.0, False)
        note("queued", "norm", start)
        updates.step(optimizer, owners)
        first = updates.pending[1]
        note("queued", "norm and queue", start)
        first.result()
        note("queued", "first layer", start)
        updates.wait()
        note("queued", "clip and step, all", start)
    updates.close()
    return {way: {what: min(values[1:]) for what, values in found.items()} for way, found in times.items()}


def main() -> None:
    """Measures, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "optimizer_overlap.json"
    )
    options = parser.parse_args()
    count = sum(p.numel() for segment in parameters() for p in segment)
    rows = {
        "AdamW(fused=True)": measure(options.repeats, lambda p: torch.optim.AdamW(p, fused=True)),
        "AdamW()": measure(max(1, options.repeats // 3), torch.optim.AdamW),
    }
    columns = ["norm", "norm and queue", "first layer", "clip and step, all"]
    print(
        f"{count:,} parameters, milliseconds since the call\n\n| | | {' | '.join(columns)} |\n"
        f"|---{'|---' * 5}|"
    )
    for optimizer, ways in rows.items():
        for way, found in ways.items():
            cells = [f"{1e3 * found[what]:.1f}" if what in found else "" for what in columns]
            print(f"| {optimizer} | {way} | {' | '.join(cells)} |")
    record = {
        "question": "seconds of a plain and a queued optimizer step with clipping, on the host",
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()} {platform.system()}, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "note": "least of the repeats; the machine was shared with other work",
        "parameters": count,
        "least_s": rows,
    }
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
