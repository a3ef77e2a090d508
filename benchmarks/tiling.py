"""What do chunks of tokens and groups of heads do to memory and time, measured on the CPU?

Two layers of Llama and of Qwen3 (256 wide, 4 heads of 64 on 2 of keys, float32, one sequence a
microbatch). Memory: every distinct stage of one segment, what is predicted against what the CPU's allocator
reports, weights and gradients included, whole and divided. Time: forward, recompute and backward of all
segments as stages of their own, whole and divided in turn, in seconds of one thread; the least of the
runs counts. Qwen3's time is taken up to 4K tokens.

    python -m benchmarks.tiling [--lengths 2048 4096 8192 16384] [--output PATH]
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from rpcompile.ir import Stage, StageKind
from tests import family_tiny as tiny
from tests import staged
from tests.measured_memory import Measured
from tests.models import Case

SIZES = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1 << 15,
}
TILES, GROUPS = 8, 2
HALVES = ((1, "attention"), (2, "mlp"))
# Name -> chunks of tokens, groups of heads.
TECHNIQUES = {"whole": (1, 1), "heads": (1, GROUPS), "tokens": (TILES, 1), "both": (TILES, GROUPS)}
TIMED = ("whole", "both")


def case_of(family: str, length: int) -> Case:
    ids = torch.randint(0, SIZES["vocab_size"], (1, length), generator=torch.Generator().manual_seed(1))
    return Case(tiny.causal(family, **SIZES).model, {"input_ids": ids, "labels": ids})


def stages_of(found: Measured) -> dict[str, Stage]:
    """The stages of one segment that differ: forward and backward of a layer's halves, and the loss."""
    last = len(found.chain.segments) - 1
    named = {f"{k.value} {part}": Stage(0, k, i, i) for k in (StageKind.F, StageKind.B) for i, part in HALVES}
    return {**named, "FB loss": Stage(0, StageKind.FB, last, last)}


def peaks(family: str, length: int) -> list[dict[str, Any]]:
    """Predicted and measured bytes of each stage by each technique."""
    case, rows = case_of(family, length), []
    captured = staged.capture(case.model, case.batch, 1)
    for technique, (tiles, groups) in TECHNIQUES.items():
        found = Measured(case, captured, tiles=tiles, head_groups=groups)
        for name, stage in stages_of(found).items():
            given = found.given_bytes(stage)
            predicted, measured = found.predicted_bytes(stage) + given, found.measured_bytes(stage) + given
            row = {"family": family, "tokens": length, "stage": name, "technique": technique}
            error = round(predicted / measured - 1, 5)
            rows.append({**row, "predicted_bytes": predicted, "measured_bytes": measured, "error": error})
    return rows


def seconds(family: str, length: int, runs: int) -> dict[str, Any]:
    """CPU seconds of one microbatch, whole and divided in turn."""
    case = case_of(family, length)
    captured = staged.capture(case.model, case.batch, 1)
    chains = {
        name: Measured(case, captured, tiles=tiles, head_groups=groups).chain
        for name, (tiles, groups) in TECHNIQUES.items()
        if name in TIMED
    }
    found: dict[str, list[float]] = {name: [] for name in chains}
    for _ in range(runs):
        for name, chain in chains.items():
            count = len(chain.segments)
            every = set(range(count))
            stages = staged.partition(chain.first_backward, count, count - 1, every, every)
            case.model.zero_grad()
            start = time.process_time()
            staged.forward_backward(case.model, captured, chain, stages, case.batch, 1, 0)
            found[name].append(time.process_time() - start)
    least = {name: min(times) for name, times in found.items()}
    more = {name: round(value / least["whole"] - 1, 4) for name, value in least.items()}
    return {"family": family, "tokens": length, "seconds": least, "more_time": more}


def show(memory: list[dict[str, Any]], times: list[dict[str, Any]]) -> None:
    table = Table("family", "tokens", "stage", *TECHNIQUES, "largest error", title="measured peak, MB")
    cells: dict[tuple[str, int, str], dict[str, dict[str, Any]]] = {}
    for row in memory:
        cells.setdefault((row["family"], row["tokens"], row["stage"]), {})[row["technique"]] = row
    for (family, length, stage), rows in cells.items():
        numbers = [f"{rows[name]['measured_bytes'] / 1e6:.1f}" for name in TECHNIQUES]
        error = max((row["error"] for row in rows.values()), key=abs)
        table.add_row(family, f"{length:,}", stage, *numbers, f"{100 * error:.2f} %")
    Console(width=120).print(table)
    table = Table("family", "tokens", *TIMED, title="microseconds a token")
    for row in times:
        each = [f"{1e6 * row['seconds'][name] / row['tokens']:.1f}" for name in TIMED]
        more = [f" ({100 * row['more_time'][name]:+.1f} %)" for name in TIMED]
        table.add_row(row["family"], f"{row['tokens']:,}", *map("".join, zip(each, more, strict=True)))
    Console(width=120).print(table)


def main() -> None:
    """Measures, prints the tables and writes the JSON."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384])
    parser.add_argument("--runs", type=int, default=2, help="runs of each technique")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/tiling.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    memory = [row for family in ("Llama", "Qwen3") for n in options.lengths[:2] for row in peaks(family, n)]
    times = [seconds("Llama", n, options.runs) for n in options.lengths]
    times += [seconds("Qwen3", n, options.runs) for n in options.lengths if n <= 4096]
    show(memory, times)
    record = {
        "question": "memory and time of chunks of tokens and groups of heads",
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()} {platform.system()}, one thread; the machine was shared",
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
        "sizes": SIZES,
        "chunks_and_groups": TECHNIQUES,
        "peaks": memory,
        "times": times,
    }
    options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
