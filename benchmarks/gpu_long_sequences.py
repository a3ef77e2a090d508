"""Does memory on a CUDA device come out as predicted, and how long a sequence really trains under 24 GB?

THIS SCRIPT HAS NOT BEEN RUN ON A GPU YET. No figure of it exists. `make gpu-bench` measures speed; this is
the part about memory.

First one layer of Llama-8B at several lengths: `max_memory_allocated` of each stage of one segment, whole and
divided, beside the prediction. Then training: Qwen3-1.7B, one microbatch of one row, under a cap of 24 GB, at
the longest sequence that is predicted to fit and, where that fails, at shorter ones.

    python -m benchmarks.gpu_long_sequences [--lengths 16384 32768 65536] [--output PATH]
    python -m benchmarks.gpu_long_sequences --dry      # the same on the CPU with small shapes and a small cap
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch

import rpcompile
from benchmarks.gpu_bench import CAP_BYTES
from benchmarks.gpu_loops import capped, qwen3
from rpcompile.errors import RpcompileError, StageTooLarge
from rpcompile.fit import largest_that_fits
from rpcompile.hardware import lookup
from rpcompile.ir import Stage, StageKind
from rpcompile.passes.capture_graph import ExampleInputs
from rpcompile.planner import capture_model
from rpcompile.probe import probe
from tests import family_tiny as tiny
from tests import staged
from tests.measured_memory import Measured
from tests.models import Case

LLAMA = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 1 << 20,
}
SMALL = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
DIVIDED = ((1, 1), (8, 8))
SHORTER = (1.0, 0.98, 0.95, 0.9, 0.8)


def peaks(length: int, dry: bool) -> list[dict[str, Any]]:
    """Predicted and measured bytes of a layer's stages at one length, weights and gradients included."""
    sizes = {**LLAMA, **SMALL} if dry else LLAMA
    ids = torch.randint(0, sizes["vocab_size"], (1, length))
    # The CPU's attention in 16 bits has workspaces that no table here knows.
    model = tiny.causal("Llama", **sizes).model.to(torch.float32 if dry else torch.bfloat16)
    case, rows = Case(model, {"input_ids": ids, "labels": ids}), []
    captured = staged.capture(model, case.batch, 1)
    for tiles, groups in DIVIDED:
        found = Measured(case, captured, "cpu" if dry else "cuda", tiles=tiles, head_groups=groups)
        for name, stage in (
            ("attention", Stage(0, StageKind.B, 1, 1)),
            ("mlp", Stage(0, StageKind.B, 2, 2)),
            ("layer", Stage(0, StageKind.B, 1, 2)),
        ):
            given = found.given_bytes(stage)
            predicted = found.predicted_bytes(stage) + given
            row: dict[str, Any] = {"tokens": length, "stage": name, "tiles": tiles, "head_groups": groups}
            row["predicted_bytes"] = predicted
            try:
                row["measured_bytes"] = found.measured_bytes(stage) + given
                row["error"] = round(predicted / row["measured_bytes"] - 1, 5)
            except torch.OutOfMemoryError as error:
                row["failed"] = str(error)
            rows.append(row)
            print(row, flush=True)
    return rows


def train(dry: bool) -> list[dict[str, Any]]:
    """One forward and backward at the longest sequence that is predicted to fit, else at shorter ones."""
    if dry:
        model = tiny.causal("Qwen3", **SMALL, num_hidden_layers=2, max_position_embeddings=1 << 20).model
        hardware = replace(lookup("rtx4090"), usable_bytes=12_000_000)
    else:
        model, hardware = qwen3("Qwen3-1.7B"), capped(probe(seconds=0.3).hardware, CAP_BYTES)
    longest, rows = predicted_longest(model, hardware), []
    for share in SHORTER:
        length = int(share * longest)
        ids = torch.randint(0, model.config.vocab_size, (1, length))
        batch = {"input_ids": ids, "labels": ids}
        row: dict[str, Any] = {"tokens": length, "predicted_longest": longest}
        try:
            with compiled_for(model, batch, hardware, dry) as compiled:
                row["predicted_peak_bytes"] = max(compiled.plan.prediction.gpu_peak_bytes)
                start = time.perf_counter()
                row["loss"] = float(compiled.forward_backward(**batch))
                row["seconds"] = time.perf_counter() - start
            if not dry:
                row["measured_peak_bytes"] = torch.cuda.max_memory_allocated()
        except (RpcompileError, torch.OutOfMemoryError) as error:
            row["failed"] = f"{type(error).__name__}: {error}"
        rows.append(row)
        print(row, flush=True)
        if "failed" not in row:
            break
    return rows


def compiled_for(model: Any, batch: dict[str, torch.Tensor], hardware: Any, dry: bool) -> rpcompile.Compiled:
    devices = None if dry else ["cuda:0"] * 2
    return rpcompile.compile(
        model, 2, example_inputs=batch, microbatches=1, gpu=hardware, devices=devices, progress=False
    )


def predicted_longest(model: Any, hardware: Any) -> int:
    """The longest sequence for which a plan is found."""
    tokens = torch.zeros(1, 64, dtype=torch.long)
    captured = capture_model(model, ExampleInputs.of({"input_ids": tokens, "labels": tokens}))
    found = largest_that_fits(
        captured, hardware, "sequence", {}, gpus=2, microbatches=1, host_bytes=1 << 50, progress=False
    )
    if not found.size:
        raise StageTooLarge(found.binds)
    return found.size


def main() -> None:
    """Measures, prints row by row and writes the JSON."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--lengths", type=int, nargs="+", help="default: 16K, 32K and 64K; dry: 512, 1K")
    parser.add_argument("--dry", action="store_true", help="on the CPU, small")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/gpu_long_sequences.json"))
    options = parser.parse_args()
    dry = options.dry
    if dry:
        torch.set_num_threads(1)
    if not dry and not torch.cuda.is_available():
        raise SystemExit(f"needs a CUDA device; torch {torch.__version__} sees none here. Try --dry.")
    memory = [
        row
        for n in options.lengths or ([512, 1024] if dry else [2**14, 2**15, 2**16])
        for row in peaks(n, dry)
    ]
    if not dry:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, CAP_BYTES / total), 0)
    record = {
        "date": date.today().isoformat(),
        "device": "cpu, dry run" if dry else torch.cuda.get_device_name(0),
        "system": platform.system(),
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
        "peaks": memory,
        "training": train(dry),
    }
    if not dry:
        options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
