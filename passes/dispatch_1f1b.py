"""Dispatches a pipeline as 1F1B: after a warm-up, one forward and one backward in turn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rpcompile.passes._pipeline import Step, dispatch_pipeline, one_forward_one_backward

if TYPE_CHECKING:
    from rpcompile.ir import Dispatch, Partition


@dataclass(frozen=True)
class Dispatch1F1B:
    """Partition -> Dispatch, one forward and one backward stage a GPU.

    GPU k of N warms up with N - 1 - k forwards.

    Attributes:
        gpus: N, the number of GPUs and of forward stages.
        microbatches: M, the number of microbatches.

    Source: Narayanan et al., "PipeDream-Flush", arXiv 2006.09503.
    """

    gpus: int
    microbatches: int

    name = "dispatch-1f1b"

    def run(self, partition: Partition) -> Dispatch:
        """Orders both kinds by microbatch, taking turns.

        Raises:
            InvalidArgument: `gpus` or `microbatches` is below 1.
            PartitionError: The partition is not one forward stage a GPU and its mirror image.
        """
        return dispatch_pipeline("1f1b", partition, self.gpus, self.microbatches, chunks=1, steps=self._steps)

    def _steps(self, gpu: int, _: int) -> list[Step]:
        forward, backward = ([(kind, gpu, m) for m in range(self.microbatches)] for kind in "FB")
        return one_forward_one_backward(forward, backward, self.gpus - 1 - gpu)
