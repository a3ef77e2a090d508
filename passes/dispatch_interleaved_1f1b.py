"""Dispatches a looped pipeline as interleaved 1F1B."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from rpcompile.passes._pipeline import Step, dispatch_pipeline, one_forward_one_backward

if TYPE_CHECKING:
    from rpcompile.ir import Dispatch, Partition


@dataclass(frozen=True)
class DispatchInterleaved1F1B:
    """Partition -> Dispatch, V forward stages a GPU, round and round.

    Microbatches go in groups: a group passes all of a GPU's stages, upwards for forwards and downwards
    for backwards, before the next group begins. GPU k warms up with 2 (N - 1 - k) + (V - 1) G forwards,
    G being the size of a group: N where N divides M, as published; else as near to it as even groups of
    at least N microbatches are.

    Attributes:
        gpus: N, the number of GPUs; the number of forward stages is a multiple of it.
        microbatches: M, the number of microbatches.

    Source: Narayanan et al., arXiv 2104.04473, section 2.2.
    """

    gpus: int
    microbatches: int

    name = "dispatch-interleaved-1f1b"

    def run(self, partition: Partition) -> Dispatch:
        """Orders both kinds by group, stage and microbatch, taking turns.

        Raises:
            InvalidArgument: `gpus` or `microbatches` is below 1.
            PartitionError: The partition is not a multiple of N forward stages and their mirror image.
        """
        return dispatch_pipeline(
            "interleaved_1f1b", partition, self.gpus, self.microbatches, chunks=None, steps=self._steps
        )

    def _steps(self, gpu: int, chunks: int) -> list[Step]:
        stages = [chunk * self.gpus + gpu for chunk in range(chunks)]
        count = max(1, self.microbatches // self.gpus)
        bounds = [-(-g * self.microbatches // count) for g in range(count + 1)]
        groups = [range(begin, end) for begin, end in pairwise(bounds)]
        forward = [("F", stage, m) for group in groups for stage in stages for m in group]
        backward = [("B", stage, m) for group in groups for stage in reversed(stages) for m in group]
        warm_up = 2 * (self.gpus - 1 - gpu) + (chunks - 1) * max(map(len, groups))
        return one_forward_one_backward(forward, backward, warm_up)
