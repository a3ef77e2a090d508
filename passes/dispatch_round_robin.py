"""Dispatches stages to GPUs round robin: the k-th job of all runs on GPU k mod N."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rpcompile.errors import InvalidArgument, require_at_least
from rpcompile.ir import Dispatch, Job

if TYPE_CHECKING:
    from rpcompile.ir import Partition


@dataclass(frozen=True)
class DispatchRoundRobin:
    """Partition -> Dispatch, with all microbatches of a stage and round in one job.

    Attributes:
        gpus: N, the number of GPUs.
        microbatches: M, the number of microbatches.
        rounds: Accumulation rounds, one behind the other, that divide the microbatches; counting GPUs
            goes on from one to the next. The published schedule has M / N.

    Source: RoundPipe, arXiv 2604.27085.
    """

    gpus: int
    microbatches: int
    rounds: int = 1

    name = "dispatch-round-robin"

    def run(self, partition: Partition) -> Dispatch:
        """Makes one job of each stage and round.

        Args:
            partition: Stages in execution order.

        Raises:
            InvalidArgument: `gpus` or `microbatches` is below 1, or there are not 1 to M rounds.
        """
        require_at_least(1, gpus=self.gpus, microbatches=self.microbatches)
        if not 1 <= self.rounds <= self.microbatches:
            raise InvalidArgument(
                f"rounds is {self.rounds}; choose 1 to {self.microbatches}, the microbatches"
            )
        bounds = [r * self.microbatches // self.rounds for r in range(self.rounds + 1)]
        jobs: list[Job] = []
        for r in range(self.rounds):
            microbatches = tuple(range(bounds[r], bounds[r + 1]))
            for stage in partition.stages:
                gpu = len(jobs) % self.gpus
                jobs.append(Job(len(jobs), stage.index, r, 0, microbatches, gpu))
        order = tuple(
            tuple((job.index, m) for job in jobs[gpu :: self.gpus] for m in job.microbatches)
            for gpu in range(self.gpus)
        )
        return Dispatch("round_robin", self.gpus, self.microbatches, tuple(jobs), order, recompute_ahead=True)
