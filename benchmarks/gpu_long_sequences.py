"""Does memory on a CUDA device come out as predicted, and how long a sequence really trains under 24 GB?

THIS SCRIPT HAS NOT BEEN RUN ON A GPU YET. No figure of it exists. `make gpu-bench` measures speed; this is
the part about memory. Attention is torch's flash attention, as on consumer cards, also where torch would
prefer cuDNN's.

1. One layer of Llama-8B at several lengths: `max_memory_allocated` of each stage of one segment, whole and
   divided, beside the prediction.
2. Qwen3-1.7B with a few of its layers, one microbatch of one row on one GPU under a cap of 24 GB, at the
   longest sequence that is predicted to fit and, where that fails, at shorter ones. The largest stage is as
   large as with all layers, and what takes minutes with all takes a fraction of that.
3. All layers, at five times the longest sequence that RoundPipe is published to have trained (74,752), unless
   part 2 says that it would take longer than is left.

The result is written after every row. The prediction for part 2 takes minutes on the CPU;
`rpcompile fit qwen3-1.7b --gpu rtx4090 --gpus 1 --microbatches 1` finds it beforehand, for `--longest`.

    python -m benchmarks.gpu_long_sequences [--lengths 65536 32768 16384] [--longest N] [--budget 540]
    python -m benchmarks.gpu_long_sequences --dry      # the same on the CPU with small shapes and a small cap
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import rpcompile
from benchmarks.gpu_bench import CAP_BYTES
from benchmarks.gpu_loops import SHAPES, capped, qwen3
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

if TYPE_CHECKING:
    from collections.abc import Callable

    from rpcompile.ir import Hardware

    Keep = Callable[[str, dict[str, Any]], None]

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
MODEL, LAYERS = "Qwen3-1.7B", 4
DIVIDED = ((1, 1), (8, 8))
STAGES = {"attention": (1, 1), "mlp": (2, 2), "layer": (1, 2)}
SHORTER = (1.0, 0.98, 0.95, 0.9, 0.8)
FIVE_TIMES_PUBLISHED = 5 * 73 * 1024


def peaks(lengths: list[int], dry: bool, keep: Keep) -> None:
    """Predicted and measured bytes of a layer's stages, weights and gradients included."""
    sizes = {**LLAMA, **SMALL} if dry else LLAMA
    # The CPU's attention in 16 bits has workspaces that no table here knows.
    model = tiny.causal("Llama", **sizes).model.to(torch.float32 if dry else torch.bfloat16)
    for length in lengths:
        ids = torch.randint(0, sizes["vocab_size"], (1, length))
        case = Case(model.cpu(), {"input_ids": ids, "labels": ids})
        captured = staged.capture(case.model, case.batch, 1)
        for tiles, groups in DIVIDED:
            found = Measured(case, captured, "cpu" if dry else "cuda", tiles=tiles, head_groups=groups)
            for name, (first, last) in STAGES.items():
                row = {"tokens": length, "stage": name, "tiles": tiles, "head_groups": groups}
                keep("peaks", {**row, **peak(found, Stage(0, StageKind.B, first, last))})


def peak(found: Measured, stage: Stage) -> dict[str, Any]:
    """One stage's bytes, predicted and measured."""
    given = found.given_bytes(stage)
    predicted = found.predicted_bytes(stage) + given
    try:
        measured = found.measured_bytes(stage) + given
    except torch.OutOfMemoryError as error:
        return {"predicted_bytes": predicted, "failed": str(error)}
    error = round(predicted / measured - 1, 5)
    return {"predicted_bytes": predicted, "measured_bytes": measured, "error": error}


def few_layers(dry: bool, hardware: Hardware, longest: int | None, keep: Keep) -> dict[str, Any] | None:
    """Trains at the longest sequence that is predicted to fit, else at shorter ones; the row that did."""
    if dry:
        sizes = {**SMALL, "num_hidden_layers": 2, "max_position_embeddings": 1 << 20}
        model = tiny.causal("Qwen3", **sizes).model
    else:
        model = qwen3(MODEL, LAYERS)
    predicted = longest or predicted_longest(model, hardware)
    for share in SHORTER:
        row = {"layers": model.config.num_hidden_layers, "predicted_longest": predicted}
        row |= train(model, int(share * predicted), hardware, dry)
        keep("training", row)
        if "failed" not in row:
            return row
    return None


def all_layers(few: dict[str, Any] | None, hardware: Hardware, deadline: float, keep: Keep) -> None:
    """Five times RoundPipe's longest, if there is time."""
    row: dict[str, Any] = {
        "layers": SHAPES[MODEL]["num_hidden_layers"],
        "tokens": min(FIVE_TIMES_PUBLISHED, few["tokens"] if few else FIVE_TIMES_PUBLISHED),
    }
    left_s = deadline - time.monotonic()
    if few is not None:
        # Nearly all of it is attention, which grows with the square.
        shorter = row["tokens"] / few["tokens"]
        row["expected_s"] = few["seconds"] * row["layers"] / few["layers"] * shorter**2
        if row["expected_s"] > left_s:
            keep("training", {**row, "failed": f"left out: {left_s:.0f} s are left (--budget)"})
            return
    keep("training", row | train(qwen3(MODEL), row["tokens"], hardware, dry=False))


def train(model: Any, length: int, hardware: Hardware, dry: bool) -> dict[str, Any]:
    """One forward and backward of one row."""
    ids = torch.randint(0, model.config.vocab_size, (1, length))
    batch = {"input_ids": ids, "labels": ids}
    row: dict[str, Any] = {"tokens": length}
    try:
        with rpcompile.compile(
            model,
            1,
            example_inputs=batch,
            microbatches=1,
            gpu=hardware,
            devices=None if dry else ["cuda:0"],
            progress=False,
        ) as compiled:
            row["predicted_peak_bytes"] = max(compiled.plan.prediction.gpu_peak_bytes)
            row["predicted_s"] = compiled.plan.prediction.iteration_s
            row["plan"] = str(compiled.plan).splitlines()[:6]
            if not dry:
                clean_up()
            start = time.perf_counter()
            row["loss"] = float(compiled.forward_backward(**batch))
            row["seconds"] = time.perf_counter() - start
            if not dry:
                row["measured_peak_bytes"] = torch.cuda.max_memory_allocated()
                row["measured_reserved_bytes"] = torch.cuda.max_memory_reserved()
    except (RpcompileError, torch.OutOfMemoryError, MemoryError) as error:
        row["failed"] = f"{type(error).__name__}: {error}"
    model.zero_grad()
    return row


def clean_up() -> None:
    """Gives back what earlier parts left in caches, and forgets their peaks."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def predicted_longest(model: Any, hardware: Hardware) -> int:
    """The longest sequence for which a plan is found."""
    tokens = torch.zeros(1, 64, dtype=torch.long)
    captured = capture_model(model, ExampleInputs.of({"input_ids": tokens, "labels": tokens}))
    found = largest_that_fits(
        captured, hardware, "sequence", {}, gpus=1, microbatches=1, host_bytes=1 << 50, progress=False
    )
    if not found.size:
        raise StageTooLarge(found.binds)
    return found.size


def parse(arguments: list[str] | None) -> argparse.Namespace:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--lengths", type=int, nargs="+", help="default: 64K, 32K and 16K; dry: 512, 1K")
    parser.add_argument("--longest", type=int, help="the longest sequence that is predicted to fit")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for everything")
    parser.add_argument("--dry", action="store_true", help="on the CPU, small")
    parser.add_argument("--output", type=Path, help="default: in benchmarks/results; dry: none")
    options = parser.parse_args(arguments)
    if not options.dry:
        options.output = options.output or Path("benchmarks/results/gpu_long_sequences.json")
    options.lengths = options.lengths or ([512, 1024] if options.dry else [2**16, 2**15, 2**14])
    return options


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints row by row and writes the JSON."""
    options = parse(arguments)
    dry, deadline = options.dry, time.monotonic() + options.budget
    if not dry and not torch.cuda.is_available():
        raise SystemExit(f"needs a CUDA device; torch {torch.__version__} sees none here. Try --dry.")
    torch.backends.cuda.enable_cudnn_sdp(False)
    if dry:
        torch.set_num_threads(1)
    record: dict[str, Any] = {
        "date": date.today().isoformat(),
        "device": "cpu, dry run" if dry else torch.cuda.get_device_name(0),
        "machine": {"system": platform.system(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
        "peaks": [],
        "training": [],
    }

    def keep(part: str, row: dict[str, Any]) -> None:
        record[part].append(row)
        print(row, flush=True)
        if options.output is not None:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(record, indent=1) + "\n")

    peaks(options.lengths, dry, keep)
    if dry:
        hardware = replace(lookup("rtx4090"), usable_bytes=12_000_000)
        few_layers(dry, hardware, options.longest, keep)
        return
    clean_up()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, CAP_BYTES / total), 0)
    hardware = capped(probe(seconds=0.3).hardware, CAP_BYTES)
    all_layers(few_layers(dry, hardware, options.longest, keep), hardware, deadline, keep)


if __name__ == "__main__":
    main()
