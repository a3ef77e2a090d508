"""Options that several commands share, and how commands print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
PlanFile = Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file that `rpcompile plan` wrote.")]
ModelName = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="A Hugging Face folder or config.json, a built-in name (`plan --list`), or module:factory.",
    ),
]
ProfileFile = Annotated[
    Path | None, typer.Option("--profile", help="A profile file, in place of a model.", metavar="FILE")
]
Gpus = Annotated[
    int | None, typer.Option("--gpus", min=1, max=64, help="Number of GPUs (8, or as many as --gpu lists).")
]
Gpu = Annotated[
    str | None,
    typer.Option("--gpu", help="Kind of GPU: a catalogue name, or a hardware file of `rpcompile probe`."),
]
Box = Annotated[
    str | None,
    typer.Option(
        "--gpu",
        help="Kind of GPU: a catalogue name, or a hardware file of `rpcompile probe`. Different ones as a "
        "list, 2xrtx4090,rtx3090; with --profile each with its speed beside the profile's GPU, "
        "2xrtx4090,rtx3090@0.45.",
    ),
]
Batch = Annotated[int | None, typer.Option("--batch", min=1, help="Rows of a whole batch (default 64).")]
Sequence = Annotated[int | None, typer.Option("--seq", min=1, help="Tokens of a row (default 2048).")]
Microbatches = Annotated[
    int | None,
    typer.Option(
        "--microbatches", min=1, help="Parts of a batch (default: most that divide it, up to 2 x GPUs)."
    ),
]
SimulatedMicrobatches = Annotated[
    int | None,
    typer.Option(
        "--microbatches", min=1, max=4096, help="Parts of a batch (default: the plan's, or 2 x GPUs)."
    ),
]
Mode = Annotated[
    str, typer.Option("--mode", help="sync, async (for iterations that overlap), or forward (evaluation).")
]
Lora = Annotated[
    int | None, typer.Option("--lora", min=1, help="Train LoRA adapters of this rank on all linear layers.")
]
Dtype = Annotated[
    str | None, typer.Option("--dtype", help="Of the weights (default: the configuration's, else bfloat16).")
]
SolverTime = Annotated[
    float, typer.Option("--solver-time", min=0.01, help="Seconds of the partition solver.")
]

Effort = Annotated[
    str,
    typer.Option(
        "--effort",
        help="Search of stages, replicas and order: fast (2 s), normal (20 s), thorough (90 s); or none: "
        "one job a stage, round robin, which adds gradients in the order of plain PyTorch.",
    ),
]
MaxTraffic = Annotated[
    float | None,
    typer.Option(
        "--max-traffic",
        min=0.01,
        help="Most uploads of weights; 1 is every layer once a pass and round of GPUS microbatches.",
    ),
]
OptimizerNs = Annotated[
    float | None,
    typer.Option(
        "--optimizer-ns",
        help="Put the optimizer's updates into the plan: nanoseconds on the host for a trainable parameter "
        "(AdamW: 0.15 where host memory moves 200 GB/s).",
    ),
]
FusedSegments = Annotated[
    int | None,
    typer.Option(
        "--fused-segments",
        min=1,
        help="Most segments that run forward and backward at once; 1 is the head only, as published "
        "schedules have it (default: as many as pay).",
    ),
]
Tiles = Annotated[
    str,
    typer.Option("--tiles", help="Chunks of tokens: auto, loss (the loss only), or a number; 1 for none."),
]
HeadGroups = Annotated[
    str,
    typer.Option("--head-groups", help="Groups of heads in attention's backward: auto, or a number."),
]

Attention = Annotated[
    str,
    typer.Option(
        "--attention", help="Attention outputs: auto, recompute, or offload (to the host and back)."
    ),
]


def show(text: str, data: Any, as_json: bool) -> None:
    """Prints one of the two forms of a result."""
    print(json.dumps(data, indent=1, allow_nan=False) if as_json else text.rstrip("\n"))
