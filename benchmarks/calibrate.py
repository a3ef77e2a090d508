"""Which shares of a GPU's peaks kernels reach: fits `efficiency` in rpcompile/data/hardware.json.

    python benchmarks/calibrate.py

Data: published times of one layer and of the LM head, forward and backward, of three models, and of
training at several sequence lengths (benchmarks/data/published.json). No constant depends on a model:

- attention: the slope of the published time per token over the sequence length.
- matmul, matmul_backward, matmul_sustained, memory: least squares over the logarithms of predicted /
  published times of layers and heads.

The form of the model was chosen on the same data, and the attention share is from one of the three models
also where that one is left out; so the errors with a model left out are on the low side.

The published head is compared with the LM head's product alone. A loss that casts the logits to float32
and keeps their softmax moves 17 GB, which takes as long as the published head altogether; at 230 TFLOP/s
the product accounts for all of it, in proportion to the hidden size. That loss is priced apart here.

Prints a table, writes benchmarks/results/calibrate.json.
"""

from __future__ import annotations

import json
import math
import platform
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import sympy
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from rpcompile import hardware
from rpcompile.passes.canonicalize_graph import CanonicalizeGraph
from rpcompile.passes.capture_graph import CaptureGraph, ExampleInputs
from rpcompile.passes.estimate_costs import EstimateCosts
from rpcompile.passes.find_cuts import FindCuts
from rpcompile.roofline import Work, seconds
from rpcompile.sizes import symbol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from rpcompile.ir import CostedGraph

HERE = Path(__file__).parent
BATCH, SEQUENCE = 4, 2048
PARTS = ("layer forward", "layer backward", "head forward", "head backward")
START = {"matmul": 0.9, "matmul_backward": 0.9, "matmul_sustained": 0.5, "memory": 0.9}
"""The fitted shares, where the fit begins: the limit on products must bind there, or it cannot move."""
HIGHEST = 0.95
"""No share is fitted above this, the one quoted with 32-bit accumulation; free, `matmul` would go to 1."""
Parts = dict[str, list[list[Work]]]
"""Part -> the work of each segment it is made of."""


def model(name: str) -> torch.nn.Module:
    """A published model at real width, three layers deep, without weights."""
    shapes: dict[str, tuple[int, int, int, int]] = {
        "Qwen3-1.7B": (151936, 2048, 6144, 16),
        "Llama3-8B": (128256, 4096, 14336, 32),
        "Qwen3-32B": (151936, 5120, 25600, 64),
    }
    vocabulary, hidden, inner, heads = shapes[name]
    kind, configuration = (
        (LlamaForCausalLM, LlamaConfig) if name.startswith("Llama") else (Qwen3ForCausalLM, Qwen3Config)
    )
    config: Any = configuration(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
    )
    with torch.device("meta"):
        return kind(config).to(torch.float16).train()


def costed_graph(name: str) -> CostedGraph:
    """The priced graph of `model(name)` with its loss."""
    tokens = torch.zeros(BATCH, SEQUENCE, dtype=torch.long)
    example = ExampleInputs.of({"input_ids": tokens, "labels": tokens})
    captured = CanonicalizeGraph().run(CaptureGraph(example).run(model(name)))
    return EstimateCosts().run(FindCuts().run(captured))


def parts(costed: CostedGraph) -> Parts:
    """The work of the middle layer, of the LM head's product, and of the loss behind it."""
    sizes = {symbol("batch"): BATCH, symbol("sequence"): SEQUENCE}

    def works(names: Iterable[str], backward: bool) -> list[Work]:
        found = []
        for cost in (costed.costs[name] for name in names):
            if backward:
                terms = (cost.backward_flops, cost.backward_read_bytes + cost.backward_write_bytes)
            else:
                terms = (cost.forward_flops, cost.read_bytes + cost.write_bytes)
            flops, nbytes = (float(sympy.Float(term.xreplace(sizes))) for term in terms)
            found.append(Work(cost.op_class, flops, nbytes, backward))
        return found

    order = costed.capture.order
    at = {cut.name: cut.position for cut in costed.capture.cuts}
    start, middle, end = (at[f"model.layers.{name}"] for name in ("0.mlp", "1.self_attn", "1.mlp"))
    last = order[at["model.layers.2.mlp"] :]
    head = next(i for i, name in enumerate(last) if costed.costs[name].op_class == "matmul") + 1
    result: Parts = {}
    for direction in ("forward", "backward"):
        backward = direction == "backward"
        halves = (order[start:middle], order[middle:end])
        result[f"layer {direction}"] = [works(half, backward) for half in halves]
        result[f"head {direction}"] = [works(last[:head], backward)]
        result[f"loss {direction}"] = [works(last[head:], backward)]
    return result


def predict_ms(part: list[list[Work]], efficiency: dict[str, float]) -> float:
    gpu = replace(hardware.lookup("rtx4090", "float16", accumulate="fp16"), efficiency=efficiency)
    return 1e3 * sum(seconds(segment, gpu) for segment in part)


def published_ms(entry: dict[str, float]) -> dict[str, float]:
    names = ("fwd_ms", "bwd_ms", "head_fwd_ms", "head_bwd_ms")
    return {part: entry[name] for part, name in zip(PARTS, names, strict=True)}


def attention_share(sweep: dict[str, float], flops_per_s: float) -> float:
    """Share that attention reaches over forward, recompute and backward together.

    A token's time grows with the sequence only by attention: 28 layers x 16 heads x 128 wide x
    2 products x half of the pairs x (1 + 1 + 2.5) forwards. Eight GPUs share the tokens.
    """
    lengths = (2048, 32768)
    short_s, long_s = (8 / sweep[str(length)] for length in lengths)
    flops_a_length = 28 * 16 * 128 * 2 * 2 * 0.5 * 4.5
    return flops_a_length * (lengths[1] - lengths[0]) / (long_s - short_s) / flops_per_s


def fit(
    works: dict[str, Parts], published: dict[str, dict[str, float]], attention: float
) -> dict[str, float]:
    """The shares that bring log(predicted / published) closest to 0."""

    def shares(x: np.ndarray) -> dict[str, float]:
        return {**dict(zip(START, map(float, x), strict=True)), "attention": attention}

    def errors(x: np.ndarray) -> np.ndarray:
        efficiency = shares(x)
        return np.array(
            [
                math.log(predict_ms(works[name][part], efficiency) / published[name][part])
                for name in works
                for part in PARTS
            ]
        )

    return shares(least_squares(errors, np.array(list(START.values()))))


def least_squares(errors: Callable[[np.ndarray], np.ndarray], x: np.ndarray) -> np.ndarray:
    """Levenberg-Marquardt for a few unknowns between 0.1 and `HIGHEST`."""
    damping, now = 1e-3, errors(x)
    for _ in range(100):
        steps = [np.where(np.arange(len(x)) == i, x * 1e-5, 0) for i in range(len(x))]
        slopes = np.stack([(errors(x + step) - now) / step.sum() for step in steps], axis=1)
        normal = slopes.T @ slopes
        move = np.linalg.solve(normal + damping * np.diag(np.diag(normal) + 1e-9), -slopes.T @ now)
        there = np.clip(x + move, 0.1, HIGHEST)
        then = errors(there)
        if then @ then < now @ now:
            done = now @ now - then @ then < 1e-10
            x, now, damping = there, then, damping / 3
            if done:
                break
        else:
            damping *= 4
    return x


def percent(works: Parts, published: dict[str, float], efficiency: dict[str, float]) -> dict[str, float]:
    """Part -> error of the prediction in percent."""
    return {part: 100 * (predict_ms(works[part], efficiency) / published[part] - 1) for part in PARTS}


def main() -> None:
    data = json.loads((HERE / "data" / "published.json").read_text(encoding="utf-8"))
    published = {name: published_ms(entry) for name, entry in data["models"].items()}
    works = {name: parts(costed_graph(name)) for name in published}
    peak = hardware.lookup("rtx4090", "float16", accumulate="fp16").flops_per_s
    attention = attention_share(data["sequence_sweep"], peak)
    fitted = fit(works, published, attention)
    shipped = hardware.lookup("rtx4090", "float16", accumulate="fp16").efficiency
    report: dict[str, Any] = {
        "platform": f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}",
        "source": data["source"],
        "fitted": fitted,
        "shipped": shipped,
        "models": {},
    }
    print("share of the peak, fitted (shipped): ", end="")
    print(", ".join(f"{name} {fitted[name]:.3f} ({shipped[name]:.3f})" for name in sorted(fitted)))
    print(f"\n{'':12}{'':16}{'published':>11}{'predicted':>11}{'error':>9}{'left out':>10}")
    for name in works:
        rest = {other: work for other, work in works.items() if other != name}
        left_out = percent(works[name], published[name], fit(rest, published, attention))
        errors = percent(works[name], published[name], shipped)
        rows: dict[str, Any] = {}
        for part in PARTS:
            predicted = predict_ms(works[name][part], shipped)
            rows[part] = {
                "published_ms": published[name][part],
                "predicted_ms": predicted,
                "error_percent": errors[part],
                "left_out_error_percent": left_out[part],
            }
            print(
                f"{name:12}{part:16}{published[name][part]:8.2f} ms{predicted:8.2f} ms"
                f"{errors[part]:+7.1f} %{left_out[part]:+8.1f} %"
            )
        loss = {part: predict_ms(works[name][part], shipped) for part in ("loss forward", "loss backward")}
        rows["float32 loss, not in the published head, ms"] = loss
        report["models"][name] = rows
    for name, rows in report["models"].items():
        loss = rows["float32 loss, not in the published head, ms"]
        print(f"{name}: a float32 loss adds " + ", ".join(f"{k} {v:.1f} ms" for k, v in loss.items()))
    target = HERE / "results" / "calibrate.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
