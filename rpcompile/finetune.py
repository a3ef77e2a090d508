"""A small fine-tuning run on a text file, through rpcompile: what `rpcompile train` does."""

from __future__ import annotations

import difflib
import hashlib
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from tqdm import tqdm

import rpcompile
from rpcompile import checkpoint, named_models
from rpcompile.demo.data import batches
from rpcompile.errors import CheckpointError, InvalidArgument, require_at_least

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedTokenizerBase

DEMO_MODEL = "smollm2-135m"
CHECKPOINT = "checkpoint"  # in the folder for the result


@dataclass(frozen=True)
class TrainOptions:
    """What to train, and how.

    Attributes:
        model: A Hugging Face folder with weights and tokenizer, or "smollm2-135m" (of the demo's package).
        text: A text file in UTF-8.
        out: Folder for the result: weights or adapter, tokenizer, plan.json, and the checkpoint.
        steps: Optimizer steps.
        batch: Rows of a step.
        seq: Tokens of a row.
        microbatches: Parts of a batch.
        gpus: GPUs, or CPU workers.
        lr: AdamW's learning rate.
        lora: Rank of LoRA adapters on all linear layers; 0 trains every weight.
        seed: Of the adapters and of the order of rows.
        save_every: Steps between checkpoints; the last step makes one, too.
        resume: Go on from the checkpoint in `out`, as if training had not been interrupted.
    """

    model: str
    text: Path
    out: Path = Path("out/train")
    steps: int = 20
    batch: int = 8
    seq: int = 128
    microbatches: int = 4
    gpus: int = 4
    lr: float = 2e-4
    lora: int = 8
    seed: int = 0
    save_every: int = 100
    resume: bool = False

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> TrainOptions:
        """From names and values, as a YAML file or the command line has them.

        Raises:
            InvalidArgument: A name is unknown, one is missing, or a value is of the wrong kind or range.
        """
        known = {field.name: field for field in fields(cls)}
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
                raise InvalidArgument(f"training option {name!r} is unknown; {hint}")
        for name in ("model", "text"):
            if not given.get(name):
                raise InvalidArgument(f"training needs {name!r}: --{name}, or a line in the configuration")
        options = cls(str(given["model"]), Path(str(given["text"])))
        for name, value in given.items():
            if name not in ("model", "text"):
                options = replace(options, **{name: _converted(name, value, getattr(options, name))})
        for name in ("steps", "batch", "seq", "microbatches", "gpus", "save_every"):
            require_at_least(1, **{name: getattr(options, name)})
        if options.lora < 0 or not 0 < options.lr < float("inf"):
            raise InvalidArgument(f"lora is {options.lora} and lr is {options.lr}; use lora >= 0 and lr > 0")
        if options.batch % options.microbatches:
            raise InvalidArgument(
                f"batch {options.batch} is no multiple of microbatches {options.microbatches}"
            )
        return options


@dataclass(frozen=True)
class TrainResult:
    """The losses of the steps, in order, and where the result is.

    Attributes:
        losses: Of the steps from `first_step` on.
        out: The folder.
        first_step: Steps that had been taken when this run began.
    """

    losses: tuple[float, ...]
    out: Path
    first_step: int = 0


class Progress:
    """How many steps have been taken, and of what: the part of a checkpoint that is this file's own.

    Args:
        options: Those on which the weights of a step depend must be the same again.
        rows: What is trained on.
    """

    def __init__(self, options: TrainOptions, rows: Mapping[str, torch.Tensor]) -> None:
        free = ("text", "out", "steps", "gpus", "microbatches", "save_every", "resume")
        self._run = {name: str(value) for name, value in asdict(options).items() if name not in free}
        self._run["text"] = hashlib.sha256(rows["input_ids"].numpy().tobytes()).hexdigest()
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "run": self._run}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Takes the step over.

        Raises:
            CheckpointError: The checkpoint is of another run.
        """
        for name, value in self._run.items():
            saved = state_dict["run"].get(name)
            if saved != value:
                raise CheckpointError(
                    f"the checkpoint was trained with {name} {saved}, not {value}; resume with the same, or "
                    f"train without resume"
                )
        self.step = state_dict["step"]


def train(options: TrainOptions, progress: bool | None = None) -> TrainResult:
    """Fine-tunes a causal language model on a text file and saves it.

    Args:
        options: What and how.
        progress: Show a progress bar; default: if standard error is a terminal.

    Raises:
        InvalidArgument: The model or the text cannot be read, or the text is too short, or a run that is
            resumed has taken all its steps.
        CheckpointError: There is no checkpoint to resume from, it is of another run, or none can be written.
        RpcompileError: The model cannot be compiled.
    """
    text = _text(options)
    model, tokenizer = _load(options)
    rows = _rows(options, text, tokenizer)
    done = Progress(options, rows)
    example = {name: values[:1].expand(options.batch, -1) for name, values in rows.items()}
    losses: list[float] = []
    with rpcompile.compile(
        model, options.gpus, microbatches=options.microbatches, example_inputs=example, progress=progress
    ) as compiled:
        optimizer = torch.optim.AdamW(compiled.parameters(), lr=options.lr)
        parts: dict[str, checkpoint.Stateful] = {"progress": done, "model": model, "optimizer": optimizer}
        if options.resume:
            checkpoint.load(options.out / CHECKPOINT, parts)
        first = done.step
        if first >= options.steps:
            raise InvalidArgument(f"the checkpoint is at step {first} of {options.steps}; give more steps")
        compiled.plan.save(options.out / "plan.json")
        training = islice(batches(rows, options.batch, options.steps, options.seed), first, None)
        hidden = None if progress is None else not progress
        with tqdm(
            training, total=options.steps, initial=first, desc="train", unit="step", disable=hidden
        ) as bar:
            for batch in bar:
                loss: Any = compiled.forward_backward(**cast("dict[str, Any]", batch))
                compiled.step(optimizer)
                optimizer.zero_grad()
                losses.append(loss.item())
                bar.set_postfix_str(f"loss {losses[-1]:.3f}")
                done.step += 1
                if done.step % options.save_every == 0 or done.step == options.steps:
                    compiled.wait()
                    checkpoint.save(options.out / CHECKPOINT, parts)
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    return TrainResult(tuple(losses), options.out, first)


def _converted(name: str, value: Any, default: Any) -> Any:
    kind = type(default)
    try:
        if kind is int and (isinstance(value, bool) or int(value) != float(value)):
            raise ValueError
        if kind is bool and not isinstance(value, bool):
            raise ValueError
        return Path(str(value)) if isinstance(default, Path) else kind(value)
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"{name} is {value!r}; it must be like {default!r}") from error


def _load(options: TrainOptions) -> tuple[Any, PreTrainedTokenizerBase]:
    torch.manual_seed(options.seed)
    folder = Path(options.model)
    if options.model.lower() == DEMO_MODEL and not folder.exists():
        from rpcompile.demo.model import load_smollm2

        model, tokenizer = load_smollm2()
    elif folder.is_dir():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise InvalidArgument(f"model {folder} cannot be loaded: {error}") from error
    else:
        known = options.model.lower() in named_models.names()
        reason = "its weights are not here" if known else "there is no such folder"
        raise InvalidArgument(
            f"model {options.model!r}: {reason}; give a Hugging Face folder with weights, or {DEMO_MODEL}"
        )
    model.train()
    return (named_models.with_lora(model, options.lora) if options.lora else model), tokenizer


def _text(options: TrainOptions) -> str:
    try:
        return options.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"text {options.text} cannot be read: {error}") from error


def _rows(options: TrainOptions, text: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
    """The text in rows of `seq` tokens; what does not fill the last row is left out."""
    tokens: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    count = len(tokens) // options.seq
    if count == 0:
        raise InvalidArgument(
            f"text {options.text} has {len(tokens)} tokens, fewer than one row of {options.seq}"
        )
    rows = torch.tensor(tokens[: count * options.seq]).view(count, options.seq)
    return {"input_ids": rows, "labels": rows.clone()}
