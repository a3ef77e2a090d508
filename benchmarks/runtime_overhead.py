"""What does the runtime cost on top of plain PyTorch, and does its memory stay flat?

Without options: SmolLM2-135M (its configuration, random weights, float32) on one CPU worker, against a plain
PyTorch microbatch loop that recomputes the same layers (`torch.utils.checkpoint`). Runs alternate; the
table shows medians, of wall-clock seconds and of the process's CPU seconds, which other processes disturb
less. With `--steps N`: N steps of a small model on two workers; the process's memory and the bytes of all
tensors are sampled on the way.

    python benchmarks/runtime_overhead.py [--runs 5] [--sequence 128] [--microbatches 4] [--output PATH]
    python benchmarks/runtime_overhead.py --steps 1000
"""

from __future__ import annotations

import argparse
import copy
import datetime
import gc
import json
import os
import platform
import re
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.checkpoint import checkpoint

import rpcompile
from rpcompile.ir import Hardware, StageKind

RESULTS = Path("benchmarks/results")
# A GPU so small that the model has to be streamed in several stages, as models are that this is made for.
WORKER = Hardware("cpu-worker", 2**30, 700 * 2**20, 5e10, 1e10, 5e9, 5e9, 1e-5, {})


def smollm2() -> Any:
    """SmolLM2-135M from its published configuration, with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rope_theta=100_000.0,
        tie_word_embeddings=True,
        use_cache=False,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).train()


def recompute_like(model: Any, plan: rpcompile.Plan) -> int:
    """Checkpoints the layers that the plan recomputes; returns how many those are."""
    names = {
        plan.chain.segments[index].name
        for stage in plan.partition.stages
        if stage.kind is StageKind.B
        for index in stage.segments
    }
    layers = {int(found[1]) for name in names if (found := re.search(r"layers\.(\d+)", name))}
    for number in layers:
        layer = model.model.layers[number]
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    return len(layers)


def plain(model: Any, batch: dict[str, torch.Tensor], microbatches: int) -> torch.Tensor:
    total = torch.zeros(())
    parts = [
        dict(zip(batch, values, strict=True))
        for values in zip(*(v.chunk(microbatches) for v in batch.values()), strict=True)
    ]
    for part in parts:
        loss = model(**part).loss / microbatches
        loss.backward()
        total += loss.detach()
    return total


def overhead(options: argparse.Namespace) -> dict[str, object]:
    model = smollm2()
    reference = copy.deepcopy(model)
    ids = torch.randint(0, model.config.vocab_size, (options.microbatches, options.sequence))
    batch = {"input_ids": ids, "labels": ids}
    compiled = rpcompile.compile(
        model, 1, example_inputs=batch, microbatches=options.microbatches, gpu=WORKER, devices=["cpu"]
    )
    print(compiled.plan)
    recomputed = recompute_like(reference, compiled.plan)
    seconds: dict[str, list[float]] = {"plain": [], "rpcompile": []}
    cpu_seconds: dict[str, list[float]] = {"plain": [], "rpcompile": []}
    for run in range(options.runs + 1):  # the first is warm-up
        for name, trained in (("plain", reference), ("rpcompile", model)):
            started, cpu_started = time.perf_counter(), time.process_time()
            if name == "plain":
                loss = plain(reference, batch, options.microbatches)
            else:
                loss = compiled.forward_backward(**batch)
            if run:
                seconds[name].append(time.perf_counter() - started)
                cpu_seconds[name].append(time.process_time() - cpu_started)
            trained.zero_grad()
            print(f"run {run} {name}: {time.perf_counter() - started:.3f} s, loss {loss:.5f}", flush=True)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    cpu_medians = {name: statistics.median(found) for name, found in cpu_seconds.items()}
    return {
        "model": "SmolLM2-135M, random weights, float32",
        "microbatches": f"{options.microbatches} x 1 x {options.sequence} tokens",
        "stages": len(compiled.plan.partition.stages),
        "recomputed_layers": recomputed,
        "seconds": seconds,
        "median_s": medians,
        "overhead": medians["rpcompile"] / medians["plain"] - 1,
        "cpu_seconds": cpu_seconds,
        "median_cpu_s": cpu_medians,
        "cpu_overhead": cpu_medians["rpcompile"] / cpu_medians["plain"] - 1,
    }


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(6))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return nn.functional.cross_entropy(x, y)


def flat_memory(options: argparse.Namespace) -> dict[str, object]:
    torch.manual_seed(0)
    batch = {"x": torch.randn(32, 64), "y": torch.randint(0, 64, (32,))}
    model = Small()
    slow = Hardware("slow", 2**30, 2**30, 1e7, 1e7, 1e9, 1e9, 1e-6, {})
    compiled = rpcompile.compile(
        model, 2, example_inputs=batch, microbatches=4, gpu=slow, devices=["cpu", "cpu"]
    )
    optimizer = torch.optim.AdamW(compiled.parameters(), lr=1e-3)
    samples: list[dict[str, int]] = []
    for step in range(1, options.steps + 1):
        compiled.forward_backward(**batch)
        compiled.step(optimizer)
        optimizer.zero_grad()
        if step % max(1, options.steps // 10) == 0:
            compiled.wait()  # what an update still holds is not counted
            samples.append(
                {"step": step, "resident_bytes": _resident_bytes(), "tensor_bytes": _tensor_bytes()}
            )
    return {"model": "6 x Linear(64, 64)", "steps": options.steps, "samples": samples}


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _tensor_bytes() -> int:
    gc.collect()
    tensors = [found for found in gc.get_objects() if type(found) in (torch.Tensor, nn.Parameter)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each")
    parser.add_argument("--sequence", type=int, default=128, help="tokens of a microbatch")
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of one operator")
    parser.add_argument("--steps", type=int, help="measure memory over so many steps instead")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.steps:
        name, result = "runtime_memory", flat_memory(options)
        table = Table("step", "resident", "tensors", title=f"memory over {options.steps} steps")
        for sample in result["samples"]:  # type: ignore[attr-defined]
            table.add_row(*(f"{value:,}" for value in sample.values()))
    else:
        name, result = "runtime_overhead", overhead(options)
        table = Table("loop", "median", "median CPU", title="one iteration")
        for loop, seconds in result["median_s"].items():  # type: ignore[attr-defined]
            table.add_row(loop, f"{seconds:.3f} s", f"{result['median_cpu_s'][loop]:.3f} s")  # type: ignore[index]
        table.add_row("overhead", f"{result['overhead']:.1%}", f"{result['cpu_overhead']:.1%}")
    Console().print(table)
    result |= {
        "date": datetime.date.today().isoformat(),
        "machine": {
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "architecture": platform.machine(),
            "system": platform.system(),
        },
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    output = options.output or RESULTS / f"{name}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
