"""Does the simulator predict measured training speed? RoundPipe's tokens/s on 1 to 8 GPUs, from layer times.

The published layer times of 4 x 2048 tokens, scaled linearly to the real microbatch, RoundPipe's own
partition and round-robin schedule, asynchronous iterations back to back; compute and hops only. No
figure is fitted. The measured values are the published ones.

    python -m benchmarks.throughput [--output PATH]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import bubbles
from rpcompile.ir import SegmentChain
from rpcompile.passes.dispatch_round_robin import DispatchRoundRobin
from rpcompile.passes.partition_by_rule import PartitionByRule
from rpcompile.simulate_dispatch import simulate_steady_state

PROFILED_TOKENS = 4 * 2048


def predict(model: str, gpus: int) -> float:
    """Tokens per second of RoundPipe on `gpus` GPUs with the published run configuration."""
    batch, sequence, microbatches, rounds = bubbles.published()[model]["run_config"]
    tokens = batch * sequence
    scale = tokens / (microbatches * rounds) / PROFILED_TOKENS
    chain = _scaled(bubbles.chain(model), scale)
    partition = PartitionByRule(gpus).run(chain)
    dispatch = DispatchRoundRobin(gpus, microbatches * rounds, rounds).run(partition)
    rotate = len(dispatch.jobs) % gpus
    hop_s = scale * bubbles.hop_s(model)
    return tokens / simulate_steady_state(chain, partition, dispatch, hop_s=hop_s, rotate=rotate).period_s


def _scaled(chain: SegmentChain, scale: float) -> SegmentChain:
    segments = tuple(
        replace(s, forward_s=scale * s.forward_s, backward_s=scale * s.backward_s) for s in chain.segments
    )
    return replace(chain, segments=segments)


def rows() -> list[dict[str, Any]]:
    """Every published cell, with our prediction and its relative error."""
    found: list[dict[str, Any]] = []
    for model, entry in bubbles.published().items():
        for gpus, measured in entry["tokens_per_s"].items():
            predicted = predict(model, int(gpus))
            error = predicted / measured - 1
            found.append(
                {
                    "model": model,
                    "gpus": int(gpus),
                    "measured_tokens_per_s": measured,
                    "predicted_tokens_per_s": predicted,
                    "error": error,
                }
            )
    return found


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--output", type=Path, default=bubbles.HERE / "results" / "throughput.json")
    options = parser.parse_args()
    table = Table(title="RoundPipe, asynchronous, on RTX 4090: tokens/s")
    for column in ("model", "GPUs", "measured (published)", "predicted (simulated)", "error"):
        table.add_column(column, justify="left" if column == "model" else "right")
    found = rows()
    for row in found:
        speeds = [f"{row[key]:,.0f}" for key in ("measured_tokens_per_s", "predicted_tokens_per_s")]
        table.add_row(row["model"], str(row["gpus"]), *speeds, f"{row['error']:+.2%}")
    mean = sum(abs(row["error"]) for row in found) / len(found)
    Console(width=100).print(table)
    print(f"mean absolute error {mean:.2%}")
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": {"cores": os.cpu_count(), "architecture": platform.machine(), "system": platform.system()},
        "versions": {"python": platform.python_version()},
        "mean_absolute_error": mean,
        "rows": found,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
