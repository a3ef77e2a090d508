"""Partition: which segments form which stage; forward and backward are cut independently.

A search proposes stages (`_stage_search`), CP-SAT improves on them and bounds what any other choice
could reach (`_stage_model`). Both minimise the iteration time of `rpcompile.round_robin_time`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import ortools

from rpcompile.errors import InvalidArgument, PartitionError, require_at_least
from rpcompile.ir import Partition, StageKind
from rpcompile.passes._check_chain import check_chain, check_segments
from rpcompile.passes._stage_model import Answer, StageModel
from rpcompile.passes._stage_search import StageSearch
from rpcompile.round_robin_time import StageCosts, stages_between
from rpcompile.units import size

if TYPE_CHECKING:
    from rpcompile.ir import SegmentChain
    from rpcompile.passes._stage_search import Candidate

_MODES = ("sync", "forward")
_SLOTS = 8


@dataclass(frozen=True)
class PartitionStages:
    """Choose the stages with the shortest predicted iteration.

    In execution order, forward stages tile segments 0..t-1 upwards, one fused stage runs t..n-1
    forward and backward, and backward stages with recompute tile t-1..g downwards, g being the first
    segment with a backward. In mode "forward", forward stages tile everything.

    "OPTIMAL" holds over all partitions. The bound of a "FEASIBLE" one holds over those with at most 8
    forward and 8 backward stages, or two more than the search found useful if that is more; if CP-SAT
    finishes with them, it goes on with twice as many.

    Attributes:
        gpus: Number of GPUs, N.
        microbatches: Number of microbatches, M; each job runs all of them.
        memory_limit_bytes: What may be used on each GPU, by the rules of
            `StageCosts.resident_bytes`; None for `chain.hardware.usable_bytes`.
        time_limit_s: Limit of the wall time, of which the search before CP-SAT takes half at most.
        seed: Of the search and of CP-SAT. The same seed gives the same stages, unless the wall clock
            ends either (see `StageModel.solve`).
        mode: "sync" to train, "forward" to evaluate.
    """

    gpus: int
    microbatches: int
    memory_limit_bytes: int | None = None
    time_limit_s: float = 3.0
    seed: int = 0
    mode: str = "sync"

    name = "partition-stages"

    def run(self, chain: SegmentChain) -> Partition:
        """Partition the chain.

        Raises:
            InvalidArgument: An option is out of range, or a time or rate of the chain is not one.
            PartitionError: More GPUs than segments, nothing to train, or no partition fits.
            StageTooLarge: One segment alone does not fit.
        """
        began = time.monotonic()
        self._check_options()
        self._check_gpus(chain)
        costs, n = StageCosts(chain, self.gpus, self.microbatches), len(chain.segments)
        limit = chain.hardware.usable_bytes if self.memory_limit_bytes is None else self.memory_limit_bytes
        check_segments(costs, limit, self.mode == "forward")

        line = n if self.mode == "forward" else 2 * n - chain.first_backward
        search = StageSearch(costs, line, limit, self.seed)
        best, answer = self._improve(
            search, began, search.run(self.time_limit_s / 2, began + self.time_limit_s / 2)
        )
        if best.excess_bytes:
            raise self._nothing_fits(search, answer.status)
        return Partition(
            stages=stages_between(best.cuts, n),
            memory_limit_bytes=limit,
            objective_s=best.iteration_s,
            bound_s=min(answer.bound_s, best.iteration_s),
            status="OPTIMAL" if answer.status == "OPTIMAL" else "FEASIBLE",
            solve_s=time.monotonic() - began,
            solver=f"CP-SAT {'.'.join(ortools.__version__.split('.')[:2])}",
        )

    # ------------------------------------------------------------------ checks

    def _check_options(self) -> None:
        if self.mode not in _MODES:
            raise InvalidArgument(f"mode={self.mode!r} is unknown; use one of {', '.join(_MODES)}")
        require_at_least(1, gpus=self.gpus, microbatches=self.microbatches)
        require_at_least(0, time_limit_s=self.time_limit_s)

    def _check_gpus(self, chain: SegmentChain) -> None:
        check_chain(chain, self.mode != "forward")
        if self.gpus > len(chain.segments):
            raise PartitionError(
                f"gpus={self.gpus} is more than the {len(chain.segments)} segments of the model; use"
                f' gpus={len(chain.segments)} or fewer, or effort="fast", which divides stages among GPUs'
            )

    # ------------------------------------------------------------------ solver

    def _improve(self, search: StageSearch, began: float, best: Candidate) -> tuple[Candidate, Answer]:
        """Solve with few stages allowed first, then with more, as long as there is time."""
        n, training = search.segments, self.mode != "forward"
        most_forward, most_backward = (n - 1, max(0, search.line - n - 1)) if training else (n, 0)
        ends, work = began + self.time_limit_s, self.time_limit_s / 2
        kinds = [stage.kind for stage in stages_between(best.cuts, n)]
        forward = max(_SLOTS, kinds.count(StageKind.F) + 2)
        backward = max(_SLOTS, kinds.count(StageKind.B) + 2)
        while True:
            if best.excess_bytes:
                forward, backward = n, n
            every = forward >= most_forward and backward >= most_backward
            model = self._model(search, best, min(forward, most_forward), min(backward, most_backward))
            answer = model.solve(max(0.0, ends - time.monotonic()), work, self.seed)
            if answer.cuts is not None:
                best = min(best, search.rate(answer.cuts))
            work = max(0.0, work - answer.work)
            if every or answer.status != "OPTIMAL":
                return best, answer
            forward, backward = 2 * forward, 2 * backward

    def _model(self, search: StageSearch, best: Candidate, forward: int, backward: int) -> StageModel:
        if best.excess_bytes:
            # One job after the other, with every upload, hop and recompute there can be.
            stages = map(search.cost, pairwise(search.finest()))
            horizon_s = sum(s.upload_s + s.hop_s + self.microbatches * s.compute_s for s in stages)
            hint = None
        else:
            horizon_s, hint = best.iteration_s, best.cuts
        return StageModel(
            costs=search.costs,
            limit_bytes=search.limit_bytes,
            forward_only=self.mode == "forward",
            forward_slots=forward,
            backward_slots=backward,
            horizon_s=horizon_s,
            hint=hint,
        )

    def _nothing_fits(self, search: StageSearch, status: str) -> PartitionError:
        costs, limit = search.costs, size(search.limit_bytes)
        if status != "INFEASIBLE":
            return PartitionError(
                f"no partition that fits in {limit} was found in time_limit_s={self.time_limit_s}, nor a"
                " proof that there is none; raise time_limit_s, or use more microbatches (smaller ones)"
            )
        finest = search.finest()
        stages, each = stages_between(finest, search.segments), [search.cost(run) for run in pairwise(finest)]
        resident = costs.resident_bytes(finest, each)
        worst = max(range(len(stages)), key=resident.__getitem__)
        stage, own = stages[worst], each[worst].memory_bytes
        others = size(resident[worst] - own)
        return PartitionError(
            f"no partition fits in {limit}, not even with one segment a stage: the {stage.kind} job of"
            f" {costs.chain.segments[stage.first].name} needs {size(own)}, and {others} on the same GPU"
            " belong to the jobs before and behind it (weights prefetched, gradients on their way down). Use"
            " more microbatches (smaller ones), another number of GPUs or GPUs with more memory."
        )
