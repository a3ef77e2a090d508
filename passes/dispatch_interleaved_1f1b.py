"""Dispatches a looped pipeline as interleaved 1F1B."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rpcompile.passes._pipeline import Step, dispatch_pipeline, one_forward_one_backward

if TYPE_CHECKING:
    from rpcompile.ir import Dispatch, Partition


@dataclass(frozen=True)
class DispatchInterleaved1F1B:
    """Partition -> Dispatch, V forward stages a GPU, round and round.

    Microbatches go in groups of N: a group passes all of a GPU's stages, upwards for forwards and
    downwards for backwards, before the next group begins. GPU k warms up with 2 (N - 1 - k) + (V - 1) N
    forwards, the last group being smaller where N does not divide M.

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
        groups = [
            range(begin, min(begin + self.gpus, self.microbatches))
            for begin in range(0, self.microbatches, self.gpus)
        ]
        forward = [("F", stage, m) for group in groups for stage in stages for m in group]
        backward = [("B", stage, m) for group in groups for stage in reversed(stages) for m in group]
        warm_up = 2 * (self.gpus - 1 - gpu) + (chunks - 1) * self.gpus
        return one_forward_one_backward(forward, backward, warm_up)
