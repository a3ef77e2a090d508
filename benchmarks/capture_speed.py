"""How does the time of a capture grow with layers, with and without repeated blocks?

Builds the models on the meta device from their published sizes, captures each in a process of its
own and prints CPU seconds and the largest resident size. "without" is plain torch.export of every
layer. Run it as::

    python benchmarks/capture_speed.py            # writes benchmarks/results/capture_speed.json
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

# Hugging Face config.json of each model: what decides on the graph.
MODELS: dict[str, dict[str, Any]] = {
    "Qwen3-1.7B": {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "Qwen3-32B": {
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
    "Qwen3-235B-A22B": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 94,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    },
}
# The full export of the largest model takes minutes; it is measured up to this many layers.
FULL_LIMIT = {"Qwen3-235B-A22B": 24}
COMMON = {"vocab_size": 151936, "head_dim": 128, "max_position_embeddings": 40960}
MEBIBYTE = 1 << 20


def measure(name: str, layers: int, repeat_blocks: bool) -> dict[str, Any]:
    """Captures one model in this process.

    Returns:
        CPU seconds of the capture (`cpu_s`), the process's largest resident size (`peak_rss_bytes`),
        what it was before (`rss_before_bytes`) and the graph's number of nodes.
    """
    import torch
    import transformers

    from rpcompile.passes.capture_graph import CaptureGraph, ExampleInputs

    torch.set_num_threads(1)
    sizes = {**COMMON, **MODELS[name], "num_hidden_layers": layers}
    mixture = "num_experts" in sizes
    config = (transformers.Qwen3MoeConfig if mixture else transformers.Qwen3Config)(**sizes)
    if mixture:
        config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        kind = transformers.Qwen3MoeForCausalLM if mixture else transformers.Qwen3ForCausalLM
        model = kind(config).train()
    tokens = torch.zeros(2, 64, dtype=torch.long)
    example = ExampleInputs.of({"input_ids": tokens, "labels": tokens})
    before = _peak_rss_bytes()
    start = time.process_time()
    captured = CaptureGraph(example, repeat_blocks=repeat_blocks).run(model)
    return {
        "model": name,
        "layers": layers,
        "repeat_blocks": repeat_blocks,
        "cpu_s": round(time.process_time() - start, 2),
        "rss_before_bytes": before,
        "peak_rss_bytes": _peak_rss_bytes(),
        "nodes": len(captured.graph_module.graph.nodes),
    }


def _peak_rss_bytes() -> int:
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _in_process(name: str, layers: int, repeat_blocks: bool) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", name, str(layers), str(int(repeat_blocks))]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def table(rows: list[dict[str, Any]]) -> str:
    """One line a model and number of layers."""
    lines = [
        "| model | layers | nodes | with: CPU s | with: peak MiB | without: CPU s | without: peak MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    found = {(row["model"], row["layers"], row["repeat_blocks"]): row for row in rows}
    for name, layers in dict.fromkeys((row["model"], row["layers"]) for row in rows):
        cells = [name, str(layers), str(found[name, layers, True]["nodes"])]
        for repeat in (True, False):
            row = found.get((name, layers, repeat))
            cells += (
                ["not run"] * 2
                if row is None
                else [f"{row['cpu_s']:.1f}", f"{row['peak_rss_bytes'] / MEBIBYTE:.0f}"]
            )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measures, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--one", nargs=3, metavar=("MODEL", "LAYERS", "REPEAT"), help="measure one; print JSON"
    )
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "capture_speed.json"
    )
    options = parser.parse_args()
    if options.one:
        name, layers, repeat = options.one
        print(json.dumps(measure(name, int(layers), repeat == "1")))
        return
    rows: list[dict[str, Any]] = []
    for name, sizes in MODELS.items():
        whole = sizes["num_hidden_layers"]
        for layers in (whole // 8, whole // 4, whole // 2, whole):
            rows.append(_in_process(name, layers, True))
            if layers <= FULL_LIMIT.get(name, whole):
                rows.append(_in_process(name, layers, False))
    import torch
    import transformers

    record = {
        "question": "CPU seconds and resident memory of a capture against layers",
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()} {platform.system()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "note": f"full export capped at {FULL_LIMIT} layers; one thread; the machine was shared",
        "rows": rows,
    }
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(record, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
