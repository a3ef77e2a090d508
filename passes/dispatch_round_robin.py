"""Dispatches stages to GPUs round robin: job j runs stage j, on GPU j mod N."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rpcompile.errors import InvalidArgument
from rpcompile.ir import Dispatch, Job

if TYPE_CHECKING:
    from rpcompile.ir import Partition


@dataclass(frozen=True)
class DispatchRoundRobin:
    """Partition -> Dispatch, with all microbatches of a stage in one job.

    Attributes:
        gpus: N, the number of GPUs.
        microbatches: M, the number of microbatches.

    Source: RoundPipe, arXiv 2604.27085.
    """

    gpus: int
    microbatches: int

    name = "dispatch-round-robin"

    def run(self, partition: Partition) -> Dispatch:
        """Makes one job of each stage.

        Args:
            partition: Stages in execution order.

        Raises:
            InvalidArgument: `gpus` or `microbatches` is below 1.
        """
        for option, value in (("gpus", self.gpus), ("microbatches", self.microbatches)):
            if value < 1:
                raise InvalidArgument(f"{option} is {value}; it must be at least 1")
        microbatches = tuple(range(self.microbatches))
        jobs = tuple(
            Job(stage.index, stage.index, 0, 0, microbatches, stage.index % self.gpus)
            for stage in partition.stages
        )
        order = tuple(
            tuple((job.index, microbatch) for job in jobs[gpu :: self.gpus] for microbatch in microbatches)
            for gpu in range(self.gpus)
        )
        return Dispatch("round_robin", self.gpus, self.microbatches, jobs, order)
