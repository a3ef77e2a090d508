"""How near is the memory predicted for stages to what the allocator reports while they run?

Runs stages of small members of model families on the CPU (or a GPU) and compares, for one microbatch that is
not the first: everything on the device, weights and gradients included. "bound" is what the partition counts
for the stage before it is chosen. Convolutions run without oneDNN: whether it copies its operands into a
layout of its own is decided inside it by shape and processor, and it is not what runs on a GPU. Then times
the prediction itself for models of published sizes. Run it as::

    python -m benchmarks.peak_memory [--device cuda]     # writes benchmarks/results/peak_memory.json
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

from benchmarks import capture_speed
from rpcompile.device_kernels import Kernels
from rpcompile.passes._segment_memory import SegmentMemories
from tests import memory_cases, staged
from tests.measured_memory import Measured, without_onednn


def family_rows(name: str, device: str) -> list[dict[str, Any]]:
    """Predicted and measured bytes of some stages of one family."""
    case = memory_cases.FAMILIES[name]()
    if device == "cuda":
        case.model.to(torch.bfloat16)
    found = Measured(case, staged.capture(case.model, case.batch, 1), device)
    rows: list[dict[str, Any]] = []
    for stage in memory_cases.stages(found.chain):
        given = found.given_bytes(stage)
        predicted, measured = found.predicted_bytes(stage) + given, found.measured_bytes(stage) + given
        rows.append(
            {
                "family": name,
                "kind": stage.kind.value,
                "segments": [stage.first, stage.last],
                "predicted_bytes": predicted,
                "measured_bytes": measured,
                "error": round(predicted / measured - 1, 5),
                "bound": round((found.bound_bytes(stage) + given) / measured - 1, 5),
            }
        )
    return rows


def prediction_time(name: str) -> dict[str, Any]:
    """CPU seconds that the memory of every segment of a published size takes; on the meta device."""
    import transformers

    sizes = {**capture_speed.COMMON, **capture_speed.MODELS[name]}
    mixture = "num_experts" in sizes
    config = (transformers.Qwen3MoeConfig if mixture else transformers.Qwen3Config)(**sizes)
    if mixture:
        config._experts_implementation = "grouped_mm"
    kind = transformers.Qwen3MoeForCausalLM if mixture else transformers.Qwen3ForCausalLM
    with torch.device("meta"):
        model = kind(config).to(torch.bfloat16).train()
    tokens = torch.zeros(4, 64, dtype=torch.long)
    captured = staged.capture(model, {"input_ids": tokens, "labels": tokens}, 1)
    start = time.process_time()
    memories = SegmentMemories(captured, {"batch": 4, "sequence": 2048}, Kernels("cuda"))
    segments = [memories.segment(index) for index in range(len(captured.cuts) + 1)]
    seconds = time.process_time() - start
    return {"model": name, "segments": len(segments), "cpu_s": round(seconds, 3)}


def main() -> None:
    """Compares, prints the tables and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    device = parser.parse_args().device
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    print(
        "| family | kind | segments | predicted | measured | error | bound |\n|---|---|---|---|---|---|---|"
    )
    with without_onednn():
        for name in memory_cases.FAMILIES:
            for row in family_rows(name, device):
                rows.append(row)
                first, last = row["segments"]
                cells = f"{name} | {row['kind']} | {first}..{last} | {row['predicted_bytes']:,}"
                print(
                    f"| {cells} | {row['measured_bytes']:,} | {row['error']:.2%} | {row['bound']:.2%} |",
                    flush=True,
                )
    times = [prediction_time(name) for name in capture_speed.MODELS]
    print("\n| model | segments | prediction, CPU s |\n|---|---|---|")
    for row in times:
        print(f"| {row['model']} | {row['segments']} | {row['cpu_s']} |")
    record = {
        "question": "predicted against measured peak memory of stages, weights and gradients included",
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()} {platform.system()}",
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu, one thread",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "note": "convolutions without oneDNN; the machine was shared",
        "stages": rows,
        "prediction": times,
    }
    suffix = "" if device == "cpu" else f"_{device}"
    output = Path(__file__).parent / "results" / f"peak_memory{suffix}.json"
    output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
