"""How fast is rpcompile on a CUDA device, and were its predictions right?

THIS SCRIPT HAS NOT BEEN RUN ON A GPU YET. No figure of it exists.

Qwen3-1.7B and Qwen3-8B (random weights from their published configurations, bfloat16, 2048 tokens a row),
GPU memory capped to 24 GB. Forward and backward of one batch, gradients on the host at the end, no
optimizer. rpcompile and `roundpipe` (if it is installed) take turns on the same GPU with the same
microbatches; each turn is a warm-up run and a timed one. Plain PyTorch with the model on the GPU comes last,
where it fits. The table shows medians of tokens per second; for rpcompile also predicted against measured
seconds and peak memory, and the share of transfer time that overlaps with compute. Simulated and recorded
traces are written beside the JSON result.

    python benchmarks/gpu_bench.py [--gpus 1] [--models 1.7B 8B] [--runs 3] [--budget 480] [--output PATH]

All runs of a model end early once its share of the budget (seconds) is spent.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import gc
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

import rpcompile
from rpcompile.hardware import detect, lookup
from rpcompile.ir import Hardware, Stream
from rpcompile.simulate import Timeline, measured, simulate
from rpcompile.trace import Run, write_trace

if TYPE_CHECKING:
    from collections.abc import Callable

SEQUENCE, CAP_BYTES = 2048, 24 * 2**30
SHAPES = {
    "1.7B": {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
    },
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
    },
}


def qwen3(size: str) -> Any:
    """The model in bfloat16. Weights repeat one block of random numbers, which takes seconds, not minutes."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=151_936,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40_960,
        rope_theta=1_000_000.0,
        tie_word_embeddings=size == "1.7B",
        use_cache=False,
        dtype=torch.bfloat16,
        **SHAPES[size],
    )
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    block = torch.randn(1 << 20).mul_(0.02).to(torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1)
                continue
            for piece in parameter.view(-1).split(block.numel()):
                piece.copy_(block[: piece.numel()])
    return model.train()


def rpcompile_loop(
    model: Any, batch: dict[str, torch.Tensor], options: argparse.Namespace, hardware: Hardware
) -> tuple[Callable[[], object], rpcompile.Compiled]:
    compiled = rpcompile.compile(
        model,
        options.gpus,
        example_inputs=batch,
        microbatches=options.microbatches,
        gpu=hardware,
        devices=[f"cuda:{index % torch.cuda.device_count()}" for index in range(options.gpus)],
    )

    def run() -> None:
        compiled.forward_backward(**batch)
        model.zero_grad()

    return run, compiled


def roundpipe_loop(
    model: Any, batch: dict[str, torch.Tensor], options: argparse.Namespace
) -> Callable[[], object]:
    import roundpipe  # type: ignore[import-not-found]

    wrapped = roundpipe.wrap_model_to_roundpipe(
        model,
        use_sequential_preset=True,
        model_run_config=roundpipe.RoundPipeRunConfig(num_microbatch=options.microbatches),
    )

    def run() -> None:
        wrapped.forward_backward(
            input_kwargs=batch, loss_fn=lambda outputs, _: outputs.loss / options.microbatches
        )
        wrapped.synchronize()
        wrapped.zero_grad()

    return run


def resident_loop(
    model: Any, batch: dict[str, torch.Tensor], options: argparse.Namespace
) -> Callable[[], object]:
    model = model.to("cuda:0")
    model.gradient_checkpointing_enable({"use_reentrant": False})

    def run() -> None:
        for index in range(options.microbatches):
            part = {
                name: value.chunk(options.microbatches)[index].to("cuda:0") for name, value in batch.items()
            }
            (model(**part).loss / options.microbatches).backward()
        model.zero_grad()

    return run


def turn(run: Callable[[], object]) -> float:
    """Seconds of a run, after one that fills the allocator's caches again."""
    gc.collect()
    torch.cuda.empty_cache()
    run()
    torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(size: str, options: argparse.Namespace, hardware: Hardware) -> dict[str, Any]:
    """One model: the loops that offload in turn until the runs or the budget are used up, then the other."""
    deadline = time.perf_counter() + options.budget / len(options.models)
    model = qwen3(size)
    ids = torch.randint(0, 151_936, (options.microbatches, SEQUENCE))
    batch = {"input_ids": ids, "labels": ids.clone()}
    seconds: dict[str, list[float]] = {}
    left_out: dict[str, str] = {}

    def take(name: str, run: Callable[[], object]) -> None:
        if name in left_out or (seconds.get(name) and time.perf_counter() > deadline):
            return
        try:
            seconds.setdefault(name, []).append(turn(run))
        except (torch.OutOfMemoryError, rpcompile.RpcompileError) as error:
            left_out[name] = f"{type(error).__name__}: {error}"

    ours, compiled = rpcompile_loop(copy.deepcopy(model), batch, options, hardware)
    loops = {"rpcompile": ours}
    if importlib.util.find_spec("roundpipe"):
        loops["roundpipe"] = roundpipe_loop(copy.deepcopy(model), batch, options)
    else:
        left_out["roundpipe"] = "not installed"
    for _ in range(options.runs):
        for name, run in loops.items():
            take(name, run)
    loops.clear()
    result: dict[str, Any] = {"model": f"Qwen3-{size}", "tokens": ids.numel(), "left_out": left_out}
    if seconds.get("rpcompile"):
        result["prediction"] = check_prediction(size, compiled, ours, seconds["rpcompile"], options)
    compiled.close()
    # Weights and gradients alone; below that, activations decide, and running out of memory is an answer.
    if 2 * sum(parameter.nbytes for parameter in model.parameters()) < CAP_BYTES:
        resident = resident_loop(model, batch, options)
        for _ in range(options.runs):
            take("resident", resident)
    else:
        left_out["resident"] = "weights and gradients do not fit"
    rates = {name: ids.numel() / statistics.median(found) for name, found in seconds.items()}
    return {**result, "seconds": seconds, "tokens_per_s": rates}


def check_prediction(
    size: str,
    compiled: rpcompile.Compiled,
    run: Callable[[], object],
    seconds: list[float],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """One recorded run, alone on the GPU, against what the plan said."""
    gc.collect()
    torch.cuda.empty_cache()
    devices = range(min(options.gpus, torch.cuda.device_count()))
    before = [torch.cuda.memory_allocated(device) for device in devices]
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
    engine = compiled._training.engine
    engine.record_times = True
    run()
    engine.record_times = False
    schedule, prediction = compiled.plan.schedule, compiled.plan.prediction
    recorded = measured(schedule, engine.times)
    folder = options.output.parent
    folder.mkdir(parents=True, exist_ok=True)
    beside = Run(schedule, recorded, "measured")
    write_trace(schedule, simulate(schedule), folder / f"gpu_bench_{size}.json", beside)
    peaks = [torch.cuda.max_memory_allocated(d) - b for d, b in zip(devices, before, strict=True)]
    return {
        "predicted_s": prediction.iteration_s,
        "measured_s": statistics.median(seconds),
        "predicted_peak_bytes": list(prediction.gpu_peak_bytes),
        "measured_peak_bytes": peaks,
        "hidden_transfer_share": hidden_share(compiled, recorded),
    }


def hidden_share(compiled: rpcompile.Compiled, timeline: Timeline) -> float:
    """The share of copying time during which the same GPU computes."""
    spans: dict[tuple[int, bool], list[tuple[float, float]]] = {}
    for action in compiled.plan.schedule.actions():
        key = action.gpu, action.stream is Stream.COMPUTE
        spans.setdefault(key, []).append((timeline.start_s[action.id], timeline.end_s[action.id]))
    copying = hidden = 0.0
    for gpu in range(compiled.plan.gpus):
        busy = sorted(spans.get((gpu, True), []))
        for begin, end in spans.get((gpu, False), []):
            copying += end - begin
            hidden += sum(max(0.0, min(end, to) - max(begin, since)) for since, to in busy)
    return hidden / copying if copying else 1.0


def gpu_hardware() -> Hardware:
    """The catalogue's entry for this GPU, its memory capped."""
    name = detect()
    if name is None:
        sys.exit(f"{torch.cuda.get_device_name(0)} is not in the hardware catalogue; pass --hardware NAME")
    return lookup(name)


def show(results: list[dict[str, Any]]) -> None:
    table = Table(
        "model", "loop", "tokens/s", "seconds predicted / measured", "peak predicted / measured", "hidden"
    )
    for result in results:
        for name, rate in result["tokens_per_s"].items():
            cells = [result["model"], name, f"{rate:,.0f}"]
            found = result.get("prediction")
            if name == "rpcompile" and found:
                predicted, peak = max(found["predicted_peak_bytes"]), max(found["measured_peak_bytes"])
                cells.append(f"{found['predicted_s']:.2f} / {found['measured_s']:.2f}")
                cells.append(f"{predicted / 1e9:.2f} / {peak / 1e9:.2f} GB")
                cells.append(f"{found['hidden_transfer_share']:.0%}")
            table.add_row(*cells)
        for name, reason in result["left_out"].items():
            table.add_row(result["model"], name, "-", reason)
    Console(width=140).print(table)


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--gpus", type=int, default=1, help="logical GPUs; they share the devices there are")
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--microbatches", type=int, default=8, help="of one row each")
    parser.add_argument("--runs", type=int, default=3, help="timed runs of each loop")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds for all models")
    parser.add_argument("--hardware", help="catalogue name, instead of the detected one")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/gpu_bench.json"))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(f"gpu_bench needs a CUDA device; torch {torch.__version__} sees none here.")
    hardware = lookup(options.hardware) if options.hardware else gpu_hardware()
    for device in range(torch.cuda.device_count()):
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, CAP_BYTES / total), device)
    results = [measure(size, options, hardware) for size in options.models]
    show(results)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(
        json.dumps(
            {
                "date": datetime.date.today().isoformat(),
                "machine": {
                    "gpu": torch.cuda.get_device_name(0),
                    "gpus": torch.cuda.device_count(),
                    "memory_cap_bytes": CAP_BYTES,
                    "cores": os.cpu_count(),
                    "system": platform.system(),
                },
                "versions": {
                    "python": platform.python_version(),
                    "torch": torch.__version__,
                    "cuda": torch.version.cuda,
                },
                "options": {k: v for k, v in vars(options).items() if k != "output"},
                "results": results,
            },
            indent=2,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
