"""How fast is rpcompile on a CUDA device, and were its predictions right?

THIS SCRIPT HAS NOT BEEN RUN ON A GPU YET. No figure of it exists.

Qwen3-1.7B and Qwen3-8B (random weights from their published configurations, bfloat16, 2048 tokens a row),
GPU memory capped to 24 GB. Forward and backward of one batch, gradients where the optimizer needs them, no
optimizer. rpcompile and `roundpipe` take turns on the same GPU with the same microbatches; each turn is a
warm-up run and a timed one, and the first turn does not count. Plain PyTorch with the model on the GPU
comes last, where it fits, without and with recompute. The table shows medians of tokens per second; for
rpcompile also predicted against measured seconds and peak memory, and the share of transfer time that
overlaps with compute. Recorded and simulated trace are written into one file beside the JSON result.

Every loop is a process of its own (`gpu_loops.py`). What fails, or takes too long, is noted in the result,
and the rest goes on; the result is written after every step. `--dry-run` runs all of it on a tiny model on
the CPU, to try the script out; its figures mean nothing.

    python benchmarks/gpu_bench.py [--gpus 1] [--models Qwen3-1.7B Qwen3-8B] [--runs 3] [--budget 450]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import queue
import statistics
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterator

SEQUENCE, CAP_BYTES = 2048, 24 * 2**30
MODELS = ("Qwen3-1.7B", "Qwen3-8B")
OFFLOADING = ("rpcompile", "roundpipe")
ALONE = ("resident", "resident, recompute")


class LoopFailed(Exception):
    """What a loop's process answered, or that it did not."""


class Loop:
    """The process of one loop.

    Args:
        settings: As `gpu_loops.Settings`.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        command = [sys.executable, str(Path(__file__).with_name("gpu_loops.py")), json.dumps(settings)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def answer(self, deadline: float) -> dict[str, Any]:
        """The next answer.

        Raises:
            LoopFailed: It is an error, or none came before the deadline, or the process has ended.
        """
        try:
            line = self._answers.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            self.end()
            raise LoopFailed("not done when its time was up") from None
        if not line:
            raise LoopFailed(f"its process ended with {self._process.wait()}")
        found = json.loads(line)
        if "error" in found:
            raise LoopFailed(found["error"])
        return found["found"]

    def do(self, command: str, deadline: float) -> dict[str, Any]:
        """Has a command carried out; raises as `answer` does."""
        assert self._process.stdin is not None
        try:
            print(command, file=self._process.stdin, flush=True)
        except OSError:
            raise LoopFailed("its process has ended") from None
        return self.answer(deadline)

    def end(self) -> None:
        """Ends the process, whatever it is doing."""
        self._process.kill()
        self._process.wait()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")


@dataclass
class Model:
    """What is found for one model; loops that failed are in `failures`."""

    name: str
    options: argparse.Namespace
    deadline: float
    facts: dict[str, Any] = field(default_factory=dict[str, Any])
    turns: dict[str, list[dict[str, Any]]] = field(default_factory=dict[str, "list[dict[str, Any]]"])
    prediction: dict[str, Any] | None = None
    failures: dict[str, str] = field(default_factory=dict[str, str])

    def measure(self, record: Any) -> None:
        """The loops that offload in turn, then the others one by one; `record` is called on the way."""
        loops: dict[str, Loop] = {}
        try:
            for name in OFFLOADING:  # one by one: rpcompile's measures the device as it starts
                loops[name] = Loop(self._settings(name))
                with self._noted(name, loops):
                    self.facts[name] = loops[name].answer(self.deadline)
            for number in range(self.options.runs + 1):
                for name in list(loops):
                    self._turn(name, loops, record, counts=number > 0)
            if "rpcompile" in loops:
                with self._noted("prediction", loops):
                    self.prediction = loops["rpcompile"].do("predict", self.deadline)
                with self._noted("waits", loops):
                    self.facts["rpcompile"] |= loops["rpcompile"].do("waits", self.deadline)
        finally:
            for loop in loops.values():
                loop.end()
        record()
        for name in ALONE:
            alone = {name: Loop(self._settings(name))}
            with self._noted(name, alone):
                self.facts[name] = alone[name].answer(self.deadline)
            for number in range(self.options.runs + 1):
                self._turn(name, alone, record, counts=number > 0)
            for loop in alone.values():
                loop.end()

    def result(self) -> dict[str, Any]:
        """For the JSON file."""
        options = self.options
        tokens = options.microbatches * options.sequence
        medians = {
            name: statistics.median(turn["seconds"] for turn in turns) for name, turns in self.turns.items()
        }
        return {
            "model": self.name,
            "tokens": tokens,
            "tokens_per_s": {name: tokens / seconds for name, seconds in medians.items()},
            "median_s": medians,
            "turns": self.turns,
            "prediction": self.prediction,
            "failures": self.failures,
            "facts": self.facts,
        }

    def _turn(self, name: str, loops: dict[str, Loop], record: Any, counts: bool) -> None:
        """One turn; the first does not count: RoundPipe plans by the times of the runs before."""
        if name in loops:
            with self._noted(name, loops):
                found = loops[name].do("turn", self.deadline)
                if counts:
                    self.turns.setdefault(name, []).append(found)
            record()

    @contextmanager
    def _noted(self, name: str, loops: dict[str, Loop]) -> Iterator[None]:
        """A loop that fails is left out from here on."""
        try:
            yield
        except LoopFailed as error:
            self.failures[name] = str(error)
            if name in loops:
                loops.pop(name).end()

    def _settings(self, loop: str) -> dict[str, Any]:
        options = self.options
        return {
            "loop": loop,
            "model": self.name,
            "sequence": options.sequence,
            "microbatches": options.microbatches,
            "gpus": options.gpus,
            "device": "cpu" if options.dry_run else "cuda",
            "cap_bytes": CAP_BYTES,
            "effort": options.effort,
            "folder": str(options.output.parent),
        }


def show(models: list[Model]) -> None:
    """Prints the table."""
    table = Table("model", "loop", "tokens/s", "loss", "seconds", "peak", "hidden", "notes")
    for model in models:
        result = model.result()
        for name, rate in result["tokens_per_s"].items():
            last = model.turns[name][-1]
            cells = [f"{result['median_s'][name]:.2f}", f"{max(last['peak_bytes']) / 1e9:.2f} GB", ""]
            if name == "rpcompile" and model.prediction is not None:
                found = model.prediction
                predicted, peak = max(found["predicted_peak_bytes"]), max(found["measured_peak_bytes"])
                cells = [
                    f"{result['median_s'][name]:.2f} (predicted {found['predicted_s']:.2f})",
                    f"{peak / 1e9:.2f} GB (predicted {predicted / 1e9:.2f})",
                    f"{found['hidden_transfer_share']:.0%}",
                ]
            table.add_row(model.name, name, f"{rate:,.0f}", f"{last['loss']:.4f}", *cells, "")
        for name, reason in model.failures.items():
            table.add_row(model.name, name, "-", "", "", "", "", reason)
    Console(width=140).print(table)


def save(path: Path, models: list[Model], options: argparse.Namespace) -> None:
    """Writes what there is so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "question": "tokens/s with weights on the host, and how right the plan was",
        "dry_run": options.dry_run,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {
            "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none",
            "memory_cap_bytes": CAP_BYTES,
            "cores": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "system": platform.system(),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "transformers": version("transformers"),
        },
        "options": {name: value for name, value in vars(options).items() if name != "output"},
        "results": [model.result() for model in models],
    }
    path.write_text(json.dumps(result, indent=2) + "\n")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--gpus", type=int, default=1, help="logical GPUs; they share the devices there are")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--microbatches", type=int, default=8, help="of one row each")
    parser.add_argument("--sequence", type=int, default=SEQUENCE, help="tokens of a row")
    parser.add_argument("--runs", type=int, default=3, help="timed runs of each loop")
    parser.add_argument("--effort", default="fast", help="how long rpcompile searches for its plan")
    parser.add_argument("--budget", type=float, default=450.0, help="seconds for everything")
    parser.add_argument("--output", type=Path, help="default: in benchmarks/results; dry run: in out")
    parser.add_argument("--dry-run", action="store_true", help="try the script out on the CPU")
    options = parser.parse_args(arguments)
    folder = Path("out" if options.dry_run else "benchmarks/results")
    options.output = options.output or folder / "gpu_bench.json"
    if options.dry_run:
        options.models, options.sequence, options.microbatches = ["tiny"], 16, 2
    return options


def main(arguments: list[str] | None = None) -> int:
    """Returns 0 if rpcompile could be measured for every model."""
    options = parse(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        print(f"gpu_bench needs a CUDA device; torch {torch.__version__} sees none here.", file=sys.stderr)
        return 1
    end = time.monotonic() + options.budget
    models: list[Model] = []
    for number, name in enumerate(options.models):
        left = len(options.models) - number
        models.append(Model(name, options, time.monotonic() + (end - time.monotonic()) / left))
        models[-1].measure(lambda: save(options.output, models, options))
        save(options.output, models, options)
    show(models)
    return 0 if all("rpcompile" in model.turns for model in models) else 1


if __name__ == "__main__":
    sys.exit(main())
