"""Dispatches a looped pipeline breadth first: all microbatches of one stage before the next stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rpcompile.passes._pipeline import Step, dispatch_pipeline

if TYPE_CHECKING:
    from rpcompile.ir import Dispatch, Partition


@dataclass(frozen=True)
class DispatchLoopedBFS:
    """Partition -> Dispatch, any number of forward stages a GPU, round and round.

    Attributes:
        gpus: N, the number of GPUs; the number of forward stages is a multiple of it.
        microbatches: M, the number of microbatches.

    Source: Lamy-Poirier, "Breadth-First Pipeline Parallelism", arXiv 2211.05953.
    """

    gpus: int
    microbatches: int

    name = "dispatch-looped-bfs"

    def run(self, partition: Partition) -> Dispatch:
        """Orders by stage, up and then down, and within a stage by microbatch.

        Raises:
            InvalidArgument: `gpus` or `microbatches` is below 1.
            PartitionError: The partition is not a multiple of N forward stages and their mirror image.
        """
        return dispatch_pipeline(
            "looped_bfs", partition, self.gpus, self.microbatches, chunks=None, steps=self._steps
        )

    def _steps(self, gpu: int, chunks: int) -> list[Step]:
        stages = [chunk * self.gpus + gpu for chunk in range(chunks)]
        up = [("F", stage, m) for stage in stages for m in range(self.microbatches)]
        return up + [("B", stage, m) for stage in reversed(stages) for m in range(self.microbatches)]
