"""Fine-tune SmolLM2-135M with LoRA through rpcompile: `python -m rpcompile.demo --help`."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

import rpcompile
from rpcompile.demo.data import batches, encode, prompt_tokens, read_pairs, split
from rpcompile.demo.model import load_smollm2
from rpcompile.demo.packages import require
from rpcompile.errors import RpcompileError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

HELD_OUT = 4  # of the corpus' ten questions
LENGTH = 48  # tokens; the longest pair has 46
ANSWER_LENGTH = 40  # tokens
LORA_RANK = 8
LORA_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
INTERRUPTED = 130  # exit status of a process that Ctrl-C ended


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo and return the exit status."""
    options = _parse(arguments)
    try:
        _demo(options)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED
    except (RpcompileError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m rpcompile.demo", description="Fine-tune SmolLM2-135M on tech-support answers."
    )
    gpus = torch.cuda.device_count() or 4
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="rows of a step (default %(default)s)")
    parser.add_argument(
        "--microbatches", type=int, default=4, help="pieces a batch is divided into (default %(default)s)"
    )
    parser.add_argument(
        "--gpus", type=int, default=gpus, help="GPUs, or CPU workers without CUDA (default %(default)s)"
    )
    parser.add_argument("--lr", type=float, default=2e-4, help="AdamW's learning rate (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder (default %(default)s)")
    options = parser.parse_args(arguments)
    for name in ("steps", "batch_size", "microbatches", "gpus"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}; give 1 or more")
    if options.batch_size % options.microbatches:
        parser.error(
            f"--batch-size {options.batch_size} is no multiple of --microbatches {options.microbatches}"
        )
    return options


def _demo(options: argparse.Namespace) -> None:
    started = time.perf_counter()
    require("transformers", "peft")
    options.out.mkdir(parents=True, exist_ok=True)
    # peft still calls a transformers property by its old name; nobody who runs the demo can change that.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

    model, tokenizer = load_smollm2()
    train, held_out = split(read_pairs(), HELD_OUT)
    rows = encode(tokenizer, train, LENGTH)
    # Repeated to a training batch's shape, so that evaluation needs no other division into microbatches.
    repeated = [held_out[row % len(held_out)] for row in range(options.batch_size)]
    evaluation = encode(tokenizer, repeated, LENGTH)
    model = _add_lora(model)

    if not torch.cuda.is_available():
        print(f"No CUDA device here: {options.gpus} virtual GPUs, each a CPU worker, run the same program.")
    example = next(batches(rows, options.batch_size, steps=1))
    compiled = rpcompile.compile(
        model, gpus=options.gpus, microbatches=options.microbatches, example_inputs=example
    )
    print(compiled.plan)
    compiled.plan.save(options.out / "plan.json")
    compiled.plan.save_trace(options.out / "trace.json")

    question = held_out[0].question
    loss_before = _evaluate(compiled, evaluation)
    answer_before = _answer(model, tokenizer, question)
    print(f"\nHeld-out loss before training: {loss_before:.3f} ({HELD_OUT} questions never trained on)")
    _train(compiled, batches(rows, options.batch_size, options.steps), options)
    loss_after = _evaluate(compiled, evaluation)
    print(f"Held-out loss after training:  {loss_after:.3f}\n")
    print(f"Question (held out): {question}")
    print(f"Before:   {answer_before}")
    print(f"After:    {_answer(model, tokenizer, question)}")
    print(f"Expected: {held_out[0].answer}\n")

    model.save_pretrained(options.out / "adapter")
    print(f"{options.out}/adapter     the LoRA adapter, for peft.PeftModel.from_pretrained")
    print(f"{options.out}/plan.json   the plan, for rpcompile.compile(model, plan=...)")
    print(f"{options.out}/trace.json  the schedule; open it at https://ui.perfetto.dev or chrome://tracing")
    print(f"Took {time.perf_counter() - started:.0f} s.")


def _add_lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(
        r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=LORA_MODULES, task_type="CAUSAL_LM"
    )
    # No dropout anywhere, so training and evaluation run the same graph.
    return get_peft_model(model, config)


def _evaluate(compiled: Any, batch: dict[str, torch.Tensor]) -> float:
    with torch.no_grad():
        return compiled(**batch).loss.item()


def _answer(model: Any, tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """Answer greedily on the host model, whose weights are the ones that `compiled` trains."""
    prompt = torch.tensor([prompt_tokens(tokenizer, question)])
    tokens = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=ANSWER_LENGTH,
        do_sample=False,
    )
    return str(tokenizer.decode(tokens[0, prompt.shape[1] :], skip_special_tokens=True)).strip()


def _train(compiled: Any, training: Any, options: argparse.Namespace) -> None:
    optimizer = torch.optim.AdamW(compiled.parameters(), lr=options.lr)
    done = 0
    started = time.perf_counter()
    try:
        with tqdm(training, total=options.steps, desc="Training", unit="step") as bar:
            for batch in bar:
                loss = compiled.forward_backward(**batch)
                compiled.step(optimizer)
                optimizer.zero_grad()
                done += 1
                tokens_per_s = done * batch["input_ids"].numel() / (time.perf_counter() - started)
                bar.set_postfix_str(f"loss {loss.item():.3f}, {tokens_per_s:.0f} tokens/s")
    except KeyboardInterrupt:
        print(
            f"\nStopped in step {done + 1} of {options.steps}. The plan and the trace are in {options.out}; "
            "the adapter was not saved.",
            file=sys.stderr,
        )
        raise


if __name__ == "__main__":
    sys.exit(main())
