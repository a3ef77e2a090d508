"""The choice of stages as a CP-SAT model: its times, and what bounds them.

Seconds become whole ticks, every duration of a segment or a hop rounded down: the model relaxes the
exact problem, so its bound holds in seconds too. A tick is a power of two, so that whole numbers
stay exact. Memory is exact (`_stage_memory`).
"""

from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ortools.sat.python import cp_model

from rpcompile.ir import Stage, StageKind
from rpcompile.passes._stage_memory import MemoryRows
from rpcompile.passes._stage_slots import StageSlots
from rpcompile.round_robin_time import NO_JOB, StageCost

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rpcompile.passes._stage_slots import Slot
    from rpcompile.round_robin_time import StageCosts

_HORIZON_BITS = 29


class Answer(NamedTuple):
    """What is known after a solve: cuts of the unrolled line if any, a lower bound, CP-SAT's status.

    `work` is CP-SAT's deterministic time.
    """

    cuts: tuple[int, ...] | None
    bound_s: float
    status: str
    work: float


@dataclass
class StageModel:
    """A model that is built when it is solved, once.

    Attributes:
        costs: Prices stages.
        limit_bytes: Memory that a plan may use on each GPU.
        forward_only: Leave out the fused and the backward stages.
        forward_slots: Most forward stages considered.
        backward_slots: Most backward stages considered.
        horizon_s: Longest iteration considered.
        hint: Cuts of the unrolled line to start from, if any are known.
    """

    costs: StageCosts
    limit_bytes: int
    forward_only: bool
    forward_slots: int
    backward_slots: int
    horizon_s: float
    hint: tuple[int, ...] | None

    def __post_init__(self) -> None:
        segments = self.costs.chain.segments
        self._n = len(segments)
        self._first_backward = self._n if self.forward_only else self.costs.chain.first_backward
        self._tick_s = 2.0 ** (math.frexp(self.horizon_s)[1] - _HORIZON_BITS)
        self._horizon = self._ticks(self.horizon_s) + 1  # the float may have been rounded down
        self._forward = [self._ticks(s.forward_s) for s in segments]
        self._both = [self._ticks(s.forward_s) + self._ticks(s.backward_s) for s in segments]
        self._again = [self._ticks(s.recompute_s) + self._ticks(s.backward_s) for s in segments]

    def solve(self, time_limit_s: float, work_limit: float, seed: int) -> Answer:
        """Run CP-SAT until it has proved its answer or a limit is reached.

        On one worker it gives the same answer every time unless the wall clock stops it. That worker
        also proves more, sooner, than two interleaved ones: those share the time among many searches.

        Args:
            time_limit_s: Wall time, the building of the model included.
            work_limit: Deterministic time, roughly a second's work each on a fast machine.
            seed: Of CP-SAT.
        """
        began = time.monotonic()
        starts = self._fused_starts()
        if not starts:
            return Answer(None, math.inf, "INFEASIBLE", 0.0)
        chain, longest = self.costs.chain, self._longest_compute(starts)
        layout = StageSlots(chain, starts, self.forward_slots, self.backward_slots, self.hint)
        makespan = self._add_times(layout, longest)
        MemoryRows(self.costs, layout, self.limit_bytes).add(self._largest(starts, longest))
        least = self._least_makespan(starts)
        layout.model.minimize(makespan)

        solver = cp_model.CpSolver()
        solver.parameters.num_workers = 1
        solver.parameters.random_seed = seed
        solver.parameters.max_time_in_seconds = max(0.0, time_limit_s - (time.monotonic() - began))
        solver.parameters.max_deterministic_time = work_limit
        # Thorough presolve takes longer than the whole limit on chains of 60 segments.
        solver.parameters.cp_model_probing_level = 0
        solver.parameters.symmetry_level = 0
        solver.parameters.max_presolve_iterations = 1
        # Its handler would keep Ctrl-C to itself, and leave behind one that ends the process.
        solver.parameters.catch_sigint_signal = False
        status = _solve(solver, layout.model)
        assert status != cp_model.MODEL_INVALID, layout.model.validate()
        cuts = layout.read(solver) if status in (cp_model.OPTIMAL, cp_model.FEASIBLE) else None
        bound = max(solver.best_objective_bound, least)
        work = solver.response_proto.deterministic_time
        return Answer(cuts, bound * self._tick_s, solver.status_name(status), work)

    def _ticks(self, seconds: float) -> int:
        return int(seconds / self._tick_s)

    # ------------------------------------------------------------------ what is known beforehand

    def _fused_starts(self) -> list[int]:
        """First segments of the fused stages that fit and leave the iteration within the horizon."""
        if self.forward_only:
            return [self._n]
        starts: list[int] = []
        for start in range(self._n):
            outside, fused = self._one_microbatch(start)
            fits = self.costs.of(Stage(0, StageKind.FB, start, self._n - 1)).memory_bytes <= self.limit_bytes
            if fits and outside + self.costs.microbatches * fused <= self._horizon:
                starts.append(start)
        return starts

    def _one_microbatch(self, start: int) -> tuple[int, int]:
        """Ticks of one microbatch outside and inside a fused stage that begins here."""
        outside = sum(self._forward[:start]) + sum(self._again[self._first_backward : start])
        return outside, sum(self._both[start:])

    def _longest_compute(self, starts: Sequence[int]) -> int:
        """Ticks that one microbatch may take in any stage.

        The stage runs M of them; the first comes through all stages before, the last through all behind.
        """
        if self.costs.microbatches == 1:
            return self._horizon
        least = min(sum(self._one_microbatch(start)) for start in starts)
        return (self._horizon - least) // (self.costs.microbatches - 1)

    def _least_makespan(self, starts: Sequence[int]) -> int:
        """No iteration is shorter than the way through the fused stage, or than all work spread evenly."""
        m, gpus = self.costs.microbatches, self.costs.gpus
        pairs = [self._one_microbatch(start) for start in starts]
        return min(max(outside + m * fused, (outside + fused) * m // gpus) for outside, fused in pairs)

    def _largest(self, starts: Sequence[int], longest: int) -> dict[StageKind, StageCost]:
        """By kind, the most of every figure over all short enough stages; boundaries kept count in."""
        costs: dict[StageKind, list[StageCost]] = {kind: [NO_JOB] for kind in StageKind}
        for start in starts:
            if start < self._n:
                costs[StageKind.FB].append(self.costs.of(Stage(0, StageKind.FB, start, self._n - 1)))
        for first in range(max(starts)):
            # On one GPU, what the stage is handed may be copied down behind it.
            kept = self.costs.crossing[first] if self.costs.gpus == 1 else 0
            for last in range(first, max(starts)):
                if sum(self._forward[first : last + 1]) > longest:
                    break
                cost = self.costs.of(Stage(0, StageKind.F, first, last))
                memory = cost.memory_bytes + self.costs.sets * kept
                costs[StageKind.F].append(
                    cost._replace(memory_bytes=memory, store_bytes=cost.store_bytes + kept)
                )
                kept += self.costs.crossing[last + 1]
        for first in range(self._first_backward, self._n - 1):
            for last in range(first, self._n - 1):
                if sum(self._again[first : last + 1]) > longest:
                    break
                costs[StageKind.B].append(self.costs.of(Stage(0, StageKind.B, first, last)))
        return {kind: StageCost(*map(max, zip(*some, strict=True))) for kind, some in costs.items()}

    # ------------------------------------------------------------------ times

    def _add_times(self, layout: StageSlots, longest: int) -> cp_model.IntVar:
        """The recurrence of `rpcompile.round_robin_time`; returns the end of the last job."""
        model, gpus = layout.model, self.costs.gpus
        starts: list[cp_model.IntVar] = []
        ends: list[cp_model.IntVar] = []
        upload_ends: list[cp_model.IntVar] = []
        previous = model.new_constant(0)
        for j, slot in enumerate(layout.slots):
            upload_end, start, end = (model.new_int_var(0, self._horizon, "") for _ in range(3))
            compute = model.new_int_var(0, longest, "")
            name, ticks = ("forward", self._forward) if slot.kind is StageKind.F else ("both", self._both)
            if slot.kind is StageKind.B and self._again != self._both:
                name, ticks = "again", self._again
            model.add(compute == layout.share(name, ticks, slot))
            upload = self._upload(layout, slot)
            model.add(upload_end >= upload)
            if j >= gpus:
                model.add(upload_end >= upload + upload_ends[j - gpus])
                model.add(start >= ends[j - gpus])
            if j >= 2 * gpus:
                model.add(upload_end >= upload + ends[j - 2 * gpus])
            model.add(start >= upload_end)
            model.add(end >= start + self.costs.microbatches * compute)
            if j:
                hop = self._hop(layout, slot)
                model.add(start >= starts[-1] + previous + hop)
                model.add(end >= ends[-1] + hop + compute)
            starts.append(start)
            ends.append(end)
            upload_ends.append(upload_end)
            previous = compute
        return ends[-1]

    def _upload(self, layout: StageSlots, slot: Slot) -> cp_model.LinearExpr:
        chain = self.costs.chain
        rate = chain.hardware.h2d_bytes_per_s
        ticks = (self._ticks(s.weight_bytes / rate) for s in chain.segments)
        upload = layout.share("upload", ticks, slot) + self._ticks(chain.hardware.latency_s) * slot.used
        for both, tied in slot.duplicates:
            upload -= math.ceil(tied.weight_bytes / rate / self._tick_s) * both
        return upload

    def _hop(self, layout: StageSlots, slot: Slot) -> cp_model.IntVar:
        """Ticks from the stage before; none into the first one, nor into empty slots."""
        if slot.kind is StageKind.B:
            ticks = self._hops(self.costs.crossing_gradients, self._first_backward)
            return layout.look_up("hop down", ticks, slot.high)
        return layout.look_up("hop up", self._hops(self.costs.crossing, 0), slot.low)

    def _hops(self, crossing: Sequence[int], outermost: int) -> list[int]:
        """Ticks of the hop at each cut of one direction; none at its outer end."""
        if self.costs.gpus == 1:
            return [0] * len(crossing)
        hardware = self.costs.chain.hardware
        hops_s = [n / hardware.d2h_bytes_per_s + n / hardware.h2d_bytes_per_s for n in crossing]
        ticks = [self._ticks(hop_s + 2 * hardware.latency_s) for hop_s in hops_s]
        return [hop if cut > outermost else 0 for cut, hop in enumerate(ticks)]


def _solve(solver: cp_model.CpSolver, model: cp_model.CpModel) -> cp_model.CpSolverStatus:
    """Solves in a thread, for the one that is interrupted must not be in the middle of a solve."""
    with ThreadPoolExecutor(1) as pool:
        solving = pool.submit(solver.solve, model)
        try:
            return solving.result()
        except BaseException:
            solver.stop_search()
            raise
