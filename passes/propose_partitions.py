"""Several good partitions of one chain, for a search for schedules to begin from.

What is best for one job a stage, round robin, need not be best once stages have several jobs, iterations
overlap or GPUs differ: few long stages and many short ones lead such a search to different places.
CP-SAT gives the best of each size.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ortools

from rpcompile.errors import require_at_least
from rpcompile.ir import Partition, StageKind
from rpcompile.passes._check_chain import check_chain
from rpcompile.passes._stage_model import Answer, StageModel
from rpcompile.passes._stage_search import StageSearch
from rpcompile.round_robin_time import StageCosts, stages_between

if TYPE_CHECKING:
    from rpcompile.ir import SegmentChain, Stage
    from rpcompile.passes._stage_search import Candidate

_VERSION = ".".join(ortools.__version__.split(".")[:2])
_NO_ANSWER = Answer(None, 0.0, "UNKNOWN", 0.0)
_SIZES = (4, 8, 16, 32)  # most forward stages, and most backward stages, of the partitions proposed
_MODEL_PER_S = 2500  # (segment, stage) pairs of a model that time is worth spending on, by second of it
_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # parts that regular partitions divide the work into


@dataclass(frozen=True)
class ProposePartitions:
    """SegmentChain -> Partitions for training, the fastest round robin first, no two with the same stages.

    For each size a regular partition is improved by CP-SAT; its bound holds over partitions of that size.

    Attributes:
        gpus: Number of GPUs, N.
        microbatches: Number of microbatches, M.
        time_limit_s: Wall time of CP-SAT, at most; without, partitions are regular ones.
        seed: Of CP-SAT. The same seed gives the same partitions, unless the wall clock ends it.
    """

    gpus: int
    microbatches: int
    time_limit_s: float = 1.0
    seed: int = 0

    name = "propose-partitions"

    def run(self, chain: SegmentChain) -> tuple[Partition, ...]:
        """Propose partitions that fit on every GPU; none if none is found.

        Raises:
            InvalidArgument: An option is out of range, or a time or rate of the chain is not one.
            PartitionError: There is nothing to train.
        """
        require_at_least(1, gpus=self.gpus, microbatches=self.microbatches)
        require_at_least(0, time_limit_s=self.time_limit_s)
        check_chain(chain, training=True)
        ends = time.monotonic() + self.time_limit_s
        costs, n = StageCosts(chain, self.gpus, self.microbatches), len(chain.segments)
        search = StageSearch(costs, 2 * n - chain.first_backward, chain.hardware.usable_bytes, self.seed)
        regular = sorted(map(search.rate, search.greedy(count for count in _COUNTS if count <= search.line)))
        found: dict[tuple[Stage, ...], Partition] = {}
        starts = [(size, start) for size in _SIZES if (start := _best_of(size, regular, n)) is not None]
        for number, (size, start) in enumerate(starts):
            # Building a model cannot be interrupted, and takes long for many stages of a long chain.
            improves = n * size <= _MODEL_PER_S * self.time_limit_s
            share_s = (ends - time.monotonic()) / (len(starts) - number) if improves else 0.0
            partition = self._improved(search, start, size, share_s)
            found.setdefault(partition.stages, partition)
        return tuple(sorted(found.values(), key=lambda partition: partition.objective_s))

    def _improved(self, search: StageSearch, start: Candidate, size: int, seconds: float) -> Partition:
        """The best partition of a size that CP-SAT finds with its share of the work, or where it starts."""
        began, n = time.monotonic(), search.segments
        model = StageModel(
            costs=search.costs,
            limit_bytes=search.limit_bytes,
            forward_only=False,
            forward_slots=min(size, n - 1),
            backward_slots=min(size, max(0, search.line - n - 1)),
            horizon_s=start.iteration_s,
            hint=start.cuts,
        )
        work = self.time_limit_s / 2 / len(_SIZES)
        answer = model.solve(seconds, work, self.seed) if seconds > 0 else _NO_ANSWER
        best = start if answer.cuts is None else min(start, search.rate(answer.cuts))
        solver = "a regular cut" if answer is _NO_ANSWER else f"CP-SAT {_VERSION}"
        return Partition(
            stages=stages_between(best.cuts, n),
            memory_limit_bytes=search.limit_bytes,
            objective_s=best.iteration_s,
            bound_s=min(answer.bound_s, best.iteration_s),
            status="OPTIMAL" if answer.status == "OPTIMAL" else "FEASIBLE",
            solve_s=time.monotonic() - began,
            solver=solver,
        )


def _best_of(size: int, regular: list[Candidate], segments: int) -> Candidate | None:
    """The first that fits and has at most so many forward and backward stages."""
    for candidate in regular:
        kinds = [stage.kind for stage in stages_between(candidate.cuts, segments)]
        if not candidate.excess_bytes and max(kinds.count(StageKind.F), kinds.count(StageKind.B)) <= size:
            return candidate
    return None
