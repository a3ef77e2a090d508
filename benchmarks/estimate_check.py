"""Are estimated seconds plausible for models and GPUs that they were not calibrated on?

For each built-in model on each GPU of the catalogue, 4 sequences of 2,048 tokens a microbatch: the share of
the GPU's peak FLOP/s that a decoder layer and the whole model reach (with recompute, which does no useful
work, left out), and how much longer a backward takes than a forward. Everything is estimated; nothing is
measured. `python -m benchmarks.calibrate` compares with published layer times. Run it as::

    python -m benchmarks.estimate_check [MODEL ...]     # writes benchmarks/results/estimate_check.json
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch

from rpcompile import hardware, named_models
from rpcompile.huggingface import infer_example_inputs
from rpcompile.passes.capture_graph import ExampleInputs
from rpcompile.planner import CapturedModel, capture_model

SIZES = {"batch": 4, "sequence": 2048}


def captured(name: str, lora: int | None = None) -> CapturedModel:
    """A built-in model, in bfloat16, without weights."""
    model = named_models.build(name, lora=lora).module
    example = infer_example_inputs(model, 2)
    return capture_model(model, ExampleInputs.of(example))


def check(model: CapturedModel, gpu: str) -> dict[str, Any]:
    """What the estimate comes to on one GPU."""
    card = hardware.lookup(gpu)
    # Only seconds matter: a model that does not fit is not tiled.
    chain = model.bind(replace(card, usable_bytes=2**62), SIZES, tiles=1)
    segments = chain.segments
    forward_s, backward_s = (
        sum(getattr(s, f"{side}_s") for s in segments) for side in ("forward", "backward")
    )
    forward, backward = (
        sum(getattr(s, f"{side}_flops") for s in segments) for side in ("forward", "backward")
    )
    tokens = SIZES["batch"] * SIZES["sequence"]
    seconds = 2 * forward_s + backward_s
    return {
        "gpu": gpu,
        "tflop_per_s": card.flops_per_s / 1e12,
        "forward_utilisation": round(forward / forward_s / card.flops_per_s, 4),
        "backward_utilisation": round(backward / backward_s / card.flops_per_s, 4),
        "utilisation": round((forward + backward) / (forward_s + backward_s) / card.flops_per_s, 4),
        "backward_over_forward": round(backward_s / forward_s, 3),
        "flops_backward_over_forward": round(backward / forward, 3),
        "tokens_per_s_with_recompute": round(tokens / seconds, 1),
        "seconds_by_class": {
            c.name: [round(c.forward_s, 5), round(c.backward_s, 5)] for c in chain.op_classes if c.forward_s
        },
    }


def main() -> None:
    """Checks, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=[*named_models.names()])
    parser.add_argument("--gpus", nargs="*", default=["rtx4090", "rtx3090", "rtx5090", "a100-80g", "h100"])
    options = parser.parse_args()
    cases = [(name, None) for name in options.models]
    cases += [(name, 16) for name in ("qwen3-1.7b", "qwen3-30b-a3b") if name in options.models]
    rows: list[dict[str, Any]] = []
    print("| model | GPU | forward | backward | both | backward / forward | tokens/s |\n" + "|---" * 7 + "|")
    for name, rank in cases:
        model = captured(name, rank)
        title = name if rank is None else f"{name}, LoRA"
        for gpu in options.gpus:
            row = {"model": title, **check(model, gpu)}
            rows.append(row)
            shares = [row[f"{side}utilisation"] for side in ("forward_", "backward_", "")]
            cells = " | ".join(f"{share:.0%}" for share in shares)
            rate = row["tokens_per_s_with_recompute"]
            print(
                f"| {title} | {gpu} | {cells} | {row['backward_over_forward']:.2f} | {rate:,.0f} |",
                flush=True,
            )
    record = {
        "question": "estimated shares of the peak, for models and GPUs that were not calibrated on",
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()} {platform.system()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "note": "estimated, not measured; tokens/s of one GPU with recompute and nothing in its way",
        "sizes": SIZES,
        "rows": rows,
    }
    output = Path(__file__).parent / "results" / "estimate_check.json"
    output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
