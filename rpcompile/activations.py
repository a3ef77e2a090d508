"""What a plan does about activations, in words: what is tiled, and what becomes of attention outputs."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from rpcompile import stage_bytes
from rpcompile.ir import StageKind
from rpcompile.units import seconds, size

if TYPE_CHECKING:
    from rpcompile.ir import Segment
    from rpcompile.plan import Plan


def activations(plan: Plan) -> list[str]:
    """Sentences on tiles, groups of heads and attention; none where the plan has none of them."""
    return [*_tiles(plan), *_groups(plan), *_attention(plan)]


def in_brief(plan: Plan) -> str:
    """The same in half a line; empty where nothing is divided or offloaded."""
    parts = [f"{_names(found)} in {tiles} chunks of tokens" for tiles, found in _by(plan, "tiles").items()]
    grouped = _by(plan, "head_groups").items()
    parts += [f"attention of {_names(found)} in {groups} groups of heads" for groups, found in grouped]
    kept = _offloaded(plan)
    if kept:
        again = sum(1 for index in _recomputed(plan) if plan.chain.segments[index].attention)
        parts.append(f"attention outputs of {len(kept)} of {again} recomputed segments offloaded")
    return " · ".join(parts)


def _tiles(plan: Plan) -> list[str]:
    lines: list[str] = []
    for tiles, found in _by(plan, "tiles").items():
        need = max(segment.saved_bytes + segment.peak_bytes for segment in found)
        lines.append(
            f"What treats every token by itself in {_names(found)} runs in {tiles} chunks of tokens: so one "
            f"of them needs {size(need)} at most besides weights and boundaries."
        )
    if not lines and "sequence" in plan.chain.bindings and plan.mode != "forward":
        lines.append("Nothing is divided into chunks of tokens: every segment fits as it is.")
    return lines


def _groups(plan: Plan) -> list[str]:
    return [
        f"The attention of {_names(found)} runs backward in {groups} groups of heads, one after another."
        for groups, found in _by(plan, "head_groups").items()
    ]


def _by(plan: Plan, count: str) -> dict[int, list[Segment]]:
    """The segments that are divided, by how many parts: "tiles" or "head_groups"."""
    found: dict[int, list[Segment]] = {}
    for segment in plan.chain.segments:
        if getattr(segment, count) > 1:
            found.setdefault(getattr(segment, count), []).append(segment)
    return dict(sorted(found.items()))


def _attention(plan: Plan) -> list[str]:
    segments = plan.chain.segments
    if plan.mode == "forward" or not any(segment.nodes or segment.attention for segment in segments):
        return []  # a profile need not say what attention takes
    if not any(segment.attention for segment in segments):
        return [
            "No attention output can be kept: scaled_dot_product_attention is not in what is recomputed "
            "(eager attention writes its products out)."
        ]
    refused = Counter(reason for s in segments if s.attention for reason in s.attention.refused)
    lines = [
        f"{_count(number)} recompute attention in any case: {reason}." for reason, number in refused.items()
    ]
    lines += [_saving(plan)] if _offloaded(plan) else ["Attention is recomputed for every backward."]
    return lines + [plan.attention] * bool(plan.attention)


def _saving(plan: Plan) -> str:
    segments, kept = plan.chain.segments, _offloaded(plan)
    nbytes = sum(segments[index].kept_bytes for index in kept)
    saved_s = sum(segments[index].forward_s - segments[index].recompute_s for index in kept)
    fused = sum(1 for segment in segments if segment.offloads) - len(kept)
    text = (
        f"The attention outputs of {_names([segments[index] for index in kept])} go to the host in the "
        f"forward and come back for the backward: {size(nbytes)} a microbatch each way, "
        f"{size(plan.microbatches * nbytes)} of host memory, and {seconds(plan.microbatches * saved_s)} of "
        f"GPU time less an iteration."
    )
    return text + (
        f" {_count(fused)} more lie in the fused stage, which recomputes nothing." if fused else ""
    )


def _recomputed(plan: Plan) -> list[int]:
    stages = (stage for stage in plan.partition.stages if stage.kind is StageKind.B)
    return sorted(index for stage in stages for index in stage.segments)


def _offloaded(plan: Plan) -> list[int]:
    """The segments whose attention outputs really leave: those of the fused stage stay."""
    stages = (stage for stage in plan.partition.stages if stage.kind is StageKind.B)
    return sorted(index for stage in stages for index in stage_bytes.kept_bytes(plan.chain, stage))


def _names(segments: list[Segment]) -> str:
    if len(segments) == 1:
        return segments[0].name
    return f"{len(segments)} segments ({segments[0].name} … {segments[-1].name})"


def _count(number: int) -> str:
    return "1 segment" if number == 1 else f"{number} segments"
