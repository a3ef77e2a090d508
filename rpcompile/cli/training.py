"""`train`: a small real fine-tuning run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rpcompile.cli import options
from rpcompile.errors import InvalidArgument


def train(
    config: Annotated[Path | None, typer.Argument(metavar="[YAML]", help="Options in a YAML file.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Hugging Face folder with weights, or smollm2-135m.")
    ] = None,
    text: Annotated[Path | None, typer.Option("--text", help="Text file to train on.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the result (out/train).")] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Optimizer steps (20).")] = None,
    batch: Annotated[int | None, typer.Option("--batch", min=1, help="Rows of a step (8).")] = None,
    seq: Annotated[int | None, typer.Option("--seq", min=1, help="Tokens of a row (128).")] = None,
    microbatches: Annotated[int | None, typer.Option("--microbatches", min=1, help="Of a batch (4).")] = None,
    gpus: Annotated[int | None, typer.Option("--gpus", min=1, help="GPUs, or CPU workers (4).")] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="AdamW's learning rate (2e-4).")] = None,
    lora: Annotated[int | None, typer.Option("--lora", min=0, help="LoRA rank; 0: all weights (8).")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of adapters and order.")] = None,
    save_every: Annotated[
        int | None, typer.Option("--save-every", min=1, help="Steps between checkpoints (100).")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")] = False,
    as_json: options.Json = False,
) -> None:
    """Fine-tune a model on a text file and save it; flags go before the YAML file's lines."""
    flags = {
        "model": model,
        "text": text,
        "out": out,
        "steps": steps,
        "batch": batch,
        "seq": seq,
        "microbatches": microbatches,
        "gpus": gpus,
        "lr": lr,
        "lora": lora,
        "seed": seed,
        "save_every": save_every,
        "resume": resume or None,
    }
    given = {name: value for name, value in flags.items() if value is not None}
    from rpcompile.finetune import TrainOptions
    from rpcompile.finetune import train as run

    found = run(TrainOptions.of({**_read(config), **given}))
    first, last = found.losses[0], found.losses[-1]
    behind = f" behind the first {found.first_step}" if found.first_step else ""
    text_form = (
        f"Loss {first:.3f} at first, {last:.3f} at last, {len(found.losses)} steps{behind}\n"
        f"Saved to {found.out}\n"
    )
    data = {"losses": list(found.losses), "out": str(found.out), "first_step": found.first_step}
    options.show(text_form, data, as_json)


COMMANDS = (train,)


def _read(config: Path | None) -> dict[str, Any]:
    if config is None:
        return {}
    import yaml

    try:
        found = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidArgument(f"configuration {config} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise InvalidArgument(f"configuration {config} holds no `name: value` lines")
    return found
