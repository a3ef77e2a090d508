"""Dispatches a pipeline as GPipe: every forward of a stage, then every backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rpcompile.passes._pipeline import Step, dispatch_pipeline

if TYPE_CHECKING:
    from rpcompile.ir import Dispatch, Partition


@dataclass(frozen=True)
class DispatchGPipe:
    """Partition -> Dispatch, one forward and one backward stage a GPU.

    Attributes:
        gpus: N, the number of GPUs and of forward stages.
        microbatches: M, the number of microbatches.

    Source: Huang et al., arXiv 1811.06965.
    """

    gpus: int
    microbatches: int

    name = "dispatch-gpipe"

    def run(self, partition: Partition) -> Dispatch:
        """Orders the forwards, then the backwards, both by microbatch.

        Raises:
            InvalidArgument: `gpus` or `microbatches` is below 1.
            PartitionError: The partition is not one forward stage a GPU and its mirror image.
        """
        return dispatch_pipeline(
            "gpipe", partition, self.gpus, self.microbatches, chunks=1, steps=self._steps
        )

    def _steps(self, gpu: int, _: int) -> list[Step]:
        return [(kind, gpu, m) for kind in "FB" for m in range(self.microbatches)]
