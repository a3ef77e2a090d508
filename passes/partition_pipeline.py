"""Divides a chain for pipelines whose GPUs hold on to their stages: forward stages and their mirror image."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rpcompile.errors import PartitionError, require_at_least
from rpcompile.ir import Partition, Stage, StageKind

if TYPE_CHECKING:
    from rpcompile.ir import SegmentChain


@dataclass(frozen=True)
class PartitionPipeline:
    """SegmentChain -> Partition with `gpus * chunks` forward stages, then as many backward stages.

    Segments are counted, not weighed; only the last one (the head with its loss) counts as as many of
    the others as it takes time, rounded. The last stage is filled up to the smallest number of segments
    a stage that is possible, the others share the rest evenly, smaller stages first.

    Attributes:
        gpus: Number of GPUs.
        chunks: Forward stages a GPU; None for as many as there are segments for.
        fused: Let the last stage run forward and backward at once, without recompute, as a schedule must
            have it that is to run. Published pipelines do not.

    Source: inferred from the partitions of the RoundPipe artifact (arXiv 2604.27085), which it meets.
    """

    gpus: int
    chunks: int | None = 1
    fused: bool = False

    name = "partition-pipeline"

    def run(self, chain: SegmentChain) -> Partition:
        """Divides the chain.

        Raises:
            InvalidArgument: `gpus` or `chunks` is below 1.
            PartitionError: There are fewer segments than stages, or no backward reaches the first one.
        """
        layers = len(chain.segments) - 1
        require_at_least(1, gpus=self.gpus, chunks=1 if self.chunks is None else self.chunks)
        count = self.gpus * (self.chunks or max(1, layers // self.gpus))
        if chain.first_backward:
            raise PartitionError(
                f"segment {chain.first_backward} is the first with a backward; a pipeline's backward stages "
                "mirror its forward stages, so every segment must have one"
            )
        sizes = _stage_sizes(layers, _head_layers(chain), count)
        if min(sizes) < 1:
            raise PartitionError(
                f"{layers + 1} segments do not fill {count} stages; use fewer GPUs or chunks, or "
                "smaller segments"
            )
        ends = [sum(sizes[: index + 1]) for index in range(count)]
        up = [
            Stage(i, StageKind.F, end - size, end - 1)
            for i, (size, end) in enumerate(zip(sizes, ends, strict=True))
        ]
        mirrored = up[:-1] if self.fused else up
        down = [
            Stage(count + index, StageKind.B, s.first, s.last) for index, s in enumerate(reversed(mirrored))
        ]
        if self.fused:
            up[-1] = replace(up[-1], kind=StageKind.FB)
        usable = chain.hardware.usable_bytes
        return Partition((*up, *down), usable, 0.0, 0.0, "FEASIBLE", 0.0, self.name)


def _head_layers(chain: SegmentChain) -> int:
    """How many of the other segments the last one weighs as much as, recompute included for those."""
    *layers, head = chain.segments
    mean_s = sum(2 * s.forward_s + s.backward_s for s in layers) / max(1, len(layers))
    return round((head.forward_s + head.backward_s) / mean_s) if mean_s else 0


def _stage_sizes(layers: int, head: int, count: int) -> list[int]:
    """Segments of each forward stage, the head counting as one of the last stage's."""
    if count == 1:
        return [layers + 1]
    last = min(layers, max(0, math.ceil((layers + head) / count) - head))
    rest = layers - last
    return [rest // (count - 1) + (i >= count - 1 - rest % (count - 1)) for i in range(count - 1)] + [
        last + 1
    ]
