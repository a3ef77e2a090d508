"""Does the runtime keep the period of an asynchronous plan?

Every action takes the time that the plan predicts, times a factor, by sleeping before it; what it then
computes, on CPU workers, is small beside that. So the queues, events and host work that are timed are the
runtime's, the durations of actions are *made up*. "in flight" reads the loss of the call before, "awaited"
each loss at once, which is what one iteration takes alone. Run it as::

    python benchmarks/async_period.py        # writes benchmarks/results/async_period.json
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
from torch import nn

import rpcompile
from rpcompile.ir import Hardware

# A GPU on which the model below takes some milliseconds, and that holds about two layers at once.
CARD = Hardware("made up", 2**30, 40_000, 1e7, 1e7, 2e7, 2e7, 1e-6, {})
WIDTH, LAYERS = 32, 12


def model() -> nn.Module:
    """Layers that are equal but for the last, with the loss."""

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(
                *(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(LAYERS))
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x).square().mean()

    torch.manual_seed(0)
    return Chain()


def seconds(compiled: rpcompile.Compiled, batch: torch.Tensor, steps: int, awaited: bool) -> float:
    """Of one iteration with its step, in the steady state: between the ends of the first and last ones."""
    optimizer = torch.optim.AdamW(compiled.parameters(), lr=1e-3, fused=True)
    ends: list[float] = []
    losses: list[torch.Tensor] = []
    for _ in range(steps + 2):
        losses.append(compiled.forward_backward(x=batch))
        compiled.step(optimizer)
        optimizer.zero_grad()
        if awaited or len(losses) > 1:
            losses[-1 if awaited else -2].item()
            ends.append(time.perf_counter())
    return (ends[-1] - ends[0]) / (len(ends) - 1)


def measure(gpus: int, microbatches: int, steps: int, factor: float) -> dict[str, Any]:
    """Predicted and measured seconds of one iteration, on the factor's scale."""
    batch = torch.randn(4 * microbatches, WIDTH)
    options: dict[str, Any] = {"gpus": gpus, "microbatches": microbatches, "gpu": CARD, "mode": "async"}
    with rpcompile.compile(
        model(), example_inputs={"x": batch}, devices=["cpu"] * gpus, **options
    ) as compiled:
        durations = {action.id: action.seconds for action in compiled.plan.schedule.actions()}
        compiled._training.engine.before_instruction = lambda name: time.sleep(
            factor * durations.get(name, 0.0)
        )
        predicted = compiled.plan.prediction
        assert predicted.alone_s is not None
        return {
            "gpus": gpus,
            "microbatches": microbatches,
            "jobs": len(compiled.plan.schedule.jobs),
            "predicted_period_s": factor * predicted.iteration_s,
            "in_flight_s": seconds(compiled, batch, steps, awaited=False),
            "predicted_alone_s": factor * predicted.alone_s,
            "awaited_s": seconds(compiled, batch, steps, awaited=True),
        }


def main() -> None:
    """Measures, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--factor", type=float, default=20.0)
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "async_period.json"
    )
    options = parser.parse_args()
    rows = [measure(gpus, parts, options.steps, options.factor) for gpus, parts in ((2, 2), (4, 4), (4, 8))]
    columns = ["predicted_period_s", "in_flight_s", "predicted_alone_s", "awaited_s"]
    print(f"| GPUs | microbatches | jobs | {' | '.join(columns)} |\n|---{'|---' * 6}|")
    for row in rows:
        cells = [f"{row[name]:.3f}" for name in columns]
        print(f"| {row['gpus']} | {row['microbatches']} | {row['jobs']} | {' | '.join(cells)} |")
    record = {
        "question": "seconds of an asynchronous iteration against the plan's, when actions sleep",
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()} {platform.system()}, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "note": "durations are made up; the machine was shared with other work",
        "steps": options.steps,
        "factor": options.factor,
        "rows": rows,
    }
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
