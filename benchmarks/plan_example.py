"""Prints the plan of a Qwen3-1.7B on eight RTX 4090, without weights. Shown in the README.

python benchmarks/plan_example.py
"""

from __future__ import annotations

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import rpcompile


def main() -> None:
    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
        bos_token_id=151643,
        eos_token_id=151645,
    )
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    tokens = torch.zeros(64, 2048, dtype=torch.long)
    example = {"input_ids": tokens, "labels": tokens}
    compiled = rpcompile.compile(
        model, 8, gpu="rtx4090", microbatches=16, example_inputs=example, solver_time_s=10.0
    )
    print(compiled.plan)


if __name__ == "__main__":
    main()
