"""Writes benchmarks/profiles/*.json: profiles of the published layer times (benchmarks/data/published.json).

    python benchmarks/make_profiles.py

Layers are segments and the LM head is the last one; the embedding's time is not published. Sizes follow
from the parameter counts at 2 bytes each; the hop is the published one. What a layer keeps for its backward
is not published: `saved_bytes` is 34 bytes a token and hidden unit (Korthikanti et al., arXiv 2205.05198,
equation 1, without the attention scores, which FlashAttention does not keep); for the head it is the logits.
"""

from __future__ import annotations

import json
from pathlib import Path

from rpcompile.profile import FORMAT, VERSION, Profile, ProfileSegment

HERE = Path(__file__).parent
TOKENS = 4 * 2048
HIDDEN_AND_VOCABULARY = {
    "Qwen3-1.7B": (2048, 151936),
    "Llama3-8B": (4096, 128256),
    "Qwen3-32B": (5120, 151936),
}


def profile(name: str) -> Profile:
    """The profile of one published model."""
    data = json.loads((HERE / "data" / "published.json").read_text(encoding="utf-8"))
    entry = data["models"][name]
    hidden, vocabulary = HIDDEN_AND_VOCABULARY[name]

    def segment(
        title: str, prefix: str, parameters: float, boundary_bytes: int, saved_bytes: int
    ) -> ProfileSegment:
        return ProfileSegment(
            name=title,
            forward_s=entry[f"{prefix}fwd_ms"] / 1e3,
            backward_s=entry[f"{prefix}bwd_ms"] / 1e3,
            weight_bytes=round(2 * parameters),
            gradient_bytes=round(2 * parameters),
            boundary_bytes=boundary_bytes,
            saved_bytes=saved_bytes,
        )

    layers = [
        segment(f"layers.{index}", "", entry["layer_parameters"], 2 * TOKENS * hidden, 34 * TOKENS * hidden)
        for index in range(entry["layers"])
    ]
    head = segment("lm_head", "head_", entry["head_parameters"], 0, 2 * TOKENS * vocabulary)
    return Profile(
        format=FORMAT,
        version=VERSION,
        hardware="rtx4090",
        segments=(*layers, head),
        source=f"{name}, 4 x 2048 tokens on one RTX 4090: {data['source']}; by benchmarks/make_profiles.py",
        tokens_per_microbatch=TOKENS,
        hop_s=entry["comm_ms"] / 1e3,
    )


if __name__ == "__main__":
    for model in HIDDEN_AND_VOCABULARY:
        path = HERE / "profiles" / f"{model.lower()}.json"
        profile(model).save(path)
        print(path.name, len(profile(model).segments), "segments")
