"""The choice of stages as a CP-SAT model, laid out around the fused stage.

The fused stage has a fixed slot, so every slot's kind is known beforehand. Slots that are not needed
are empty and lie at the outer ends, where they take no time: in front they begin and end at segment
0, at the back at the first backward segment. GPUs only count modulo N, so they shift nothing::

    slot       0     1      2       3       4      5        n = 5, first backward = 0
    stage      -    F 0   F 1..2  FB 3..4  B 1..2  B 0
    cut       0   0      1       3        3      1      0

What depends on one cut is a table looked up at it, mostly prefix sums; a stage's share is the
difference of two look-ups. Seconds become whole ticks, every duration of a segment or a hop rounded
down: the model relaxes the exact problem, so its bound holds in seconds too. A tick is a power of
two, so that whole numbers stay exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, NamedTuple

from ortools.sat.python import cp_model

from rpcompile.ir import Stage, StageKind

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rpcompile.ir import TiedWeight
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


class _Slot(NamedTuple):
    """A possible stage of the segments `low <= s < high`, empty unless `used`.

    `hop` is the ticks into it; `duplicates` tells, for each two neighbouring users of a tied tensor,
    whether it holds both.
    """

    kind: StageKind
    low: cp_model.IntVar
    high: cp_model.IntVar
    used: cp_model.IntVar
    hop: cp_model.IntVar
    duplicates: list[tuple[cp_model.IntVar, TiedWeight]]


@dataclass
class StageModel:
    """A model that is built when it is solved, once.

    Attributes:
        costs: Prices stages.
        gpus: GPUs.
        microbatches: Microbatches.
        limit_bytes: What a job and the weights prefetched behind it may use.
        forward_only: Leave out the fused and the backward stages.
        forward_slots: Most forward stages considered.
        backward_slots: Most backward stages considered.
        horizon_s: Longest iteration considered.
        hint: Cuts of the unrolled line to start from, if any are known.
    """

    costs: StageCosts
    gpus: int
    microbatches: int
    limit_bytes: int
    forward_only: bool
    forward_slots: int
    backward_slots: int
    horizon_s: float
    hint: tuple[int, ...] | None
    _model: cp_model.CpModel = field(default_factory=cp_model.CpModel)
    _known: dict[tuple[str, int], cp_model.IntVar] = field(default_factory=dict)

    def __post_init__(self) -> None:
        segments = self.costs.chain.segments
        self._n = len(segments)
        self._first_backward = self._n if self.forward_only else self.costs.chain.first_backward
        self._tick_s = 2.0 ** (math.frexp(self.horizon_s)[1] - _HORIZON_BITS)
        self._horizon = self._ticks(self.horizon_s) + 1  # the float may have been rounded down
        self._forward = _prefix(self._ticks(s.forward_s) for s in segments)
        self._both = _prefix(self._ticks(s.forward_s) + self._ticks(s.backward_s) for s in segments)
        self._hop_up = self._hops([s.boundary_bytes for s in segments], outermost=0)
        self._hop_down = self._hops([s.boundary_gradient_bytes for s in segments], self._first_backward)

    def solve(self, time_limit_s: float, work_limit: float, seed: int) -> Answer:
        """Run CP-SAT until it has proved its answer or a limit is reached.

        On one worker it gives the same answer every time unless the wall clock stops it. That worker
        also proves more, sooner, than two interleaved ones: those share the time among many searches.

        Args:
            time_limit_s: Wall time.
            work_limit: Deterministic time, roughly a second's work each on a fast machine.
            seed: Of CP-SAT.
        """
        starts = self._fused_starts()
        if not starts:
            return Answer(None, math.inf, "INFEASIBLE", 0.0)
        longest = self._longest_compute(starts)
        slots = self._slots(starts)
        makespan = self._add_times(slots, longest)
        self._add_memory(slots, self._largest(starts, longest))
        least = self._least_makespan(starts)
        self._model.minimize(makespan)

        solver = cp_model.CpSolver()
        solver.parameters.num_workers = 1
        solver.parameters.random_seed = seed
        solver.parameters.max_time_in_seconds = time_limit_s
        solver.parameters.max_deterministic_time = work_limit
        # Thorough presolve takes longer than the whole limit on chains of 60 segments.
        solver.parameters.cp_model_probing_level = 0
        solver.parameters.symmetry_level = 0
        solver.parameters.max_presolve_iterations = 1
        status = solver.solve(self._model)
        assert status != cp_model.MODEL_INVALID, self._model.validate()
        cuts = self._read(solver, slots) if status in (cp_model.OPTIMAL, cp_model.FEASIBLE) else None
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
            stage = Stage(0, StageKind.FB, start, self._n - 1)
            outside, fused = self._one_microbatch(start)
            fits = self.costs.memory_bytes(stage) <= self.limit_bytes
            if fits and outside + self.microbatches * fused <= self._horizon:
                starts.append(start)
        return starts

    def _one_microbatch(self, start: int) -> tuple[int, int]:
        """Ticks of one microbatch outside and inside a fused stage that begins here."""
        top = max(start, self._first_backward)
        down = self._both[top] - self._both[self._first_backward]
        return self._forward[start] + down, self._both[self._n] - self._both[start]

    def _longest_compute(self, starts: Sequence[int]) -> int:
        """Ticks a stage may take for one microbatch: while it runs M, the others cannot run all of theirs."""
        least = min(sum(self._one_microbatch(start)) for start in starts)
        return self._horizon if self.microbatches == 1 else (self._horizon - least) // (self.microbatches - 1)

    def _least_makespan(self, starts: Sequence[int]) -> int:
        """No iteration is shorter than the fused stage's path, or than all work spread evenly."""
        pairs = [self._one_microbatch(start) for start in starts]
        m = self.microbatches
        return min(max(outside + m * fused, (outside + fused) * m // self.gpus) for outside, fused in pairs)

    def _largest(self, starts: Sequence[int], longest: int) -> dict[StageKind, tuple[int, int]]:
        """By kind: most memory and most weights of any stage that is short enough, in bytes."""
        n, g = self._n, self._first_backward
        stages = {StageKind.FB: [Stage(0, StageKind.FB, start, n - 1) for start in starts if start < n]}
        ranges = ((StageKind.F, self._forward, 0, max(starts)), (StageKind.B, self._both, g, n - 1))
        for kind, ticks, low, high in ranges:
            runs = ((first, last) for first in range(low, high) for last in range(first, high))
            short = [(first, last) for first, last in runs if ticks[last + 1] - ticks[first] <= longest]
            stages[kind] = [Stage(0, kind, first, last) for first, last in short]
        return {
            kind: (
                max(map(self.costs.memory_bytes, some), default=0),
                max(map(self.costs.weight_bytes, some), default=0),
            )
            for kind, some in stages.items()
        }

    # ------------------------------------------------------------------ slots

    def _slots(self, starts: Sequence[int]) -> list[_Slot]:
        """Every slot in execution order, with the rule that empty ones lie at the outer ends."""
        model, n, g = self._model, self._n, self._first_backward
        fused = model.new_int_var_from_domain(cp_model.Domain.from_values(list(starts)), "fused")
        up = [*(model.new_int_var(0, n - 1, f"up{j}") for j in range(1, self.forward_slots)), fused]
        slots: list[_Slot] = []
        for low, high in pairwise([model.new_constant(0), *up][-self.forward_slots - 1 :]):
            used = self._used(low, high, empty_at=0)
            slots.append(self._slot(StageKind.F, low, high, used))
        hinted = [cut for cut in self.hint or () if cut <= max(starts)]
        self._hint(up, ([0] * len(up) + hinted)[-len(up) :])
        if self.forward_only:
            return slots

        slots.append(self._slot(StageKind.FB, fused, model.new_constant(n), model.new_constant(1)))
        top = fused
        if starts[0] < g:
            top = model.new_int_var(g, n - 1, "top")
            model.add_max_equality(top, [fused, g])
        down = [model.new_int_var(g, n - 1, f"down{j}") for j in range(1, self.backward_slots)]
        for high, low in pairwise([top, *down, model.new_constant(g)][: self.backward_slots + 1]):
            used = self._used(low, high, empty_at=g)
            slots.append(self._slot(StageKind.B, low, high, used))
        hinted = [2 * n - cut for cut in self.hint or () if cut > n]
        self._hint(down, (hinted + [g] * len(down))[1 : len(down) + 1])
        return slots

    def _used(self, low: cp_model.IntVar, high: cp_model.IntVar, empty_at: int) -> cp_model.IntVar:
        """Whether the slot holds a segment; if not, it lies at the outer end, and so do all beyond it."""
        used = self._model.new_bool_var("")
        self._model.add(low <= high)
        self._model.add(low < high).only_enforce_if(used)
        self._model.add(high == empty_at).only_enforce_if(~used)
        return used

    def _slot(
        self, kind: StageKind, low: cp_model.IntVar, high: cp_model.IntVar, used: cp_model.IntVar
    ) -> _Slot:
        if kind is StageKind.B:
            hop = self._look_up("hop down", self._hop_down, high)
        else:
            hop = self._look_up("hop up", self._hop_up, low)
        duplicates: list[tuple[cp_model.IntVar, TiedWeight]] = []
        for tied in self.costs.chain.tied:
            for user, following in pairwise(sorted(tied.segments)):
                both = self._model.new_bool_var("")
                self._model.add(low <= user).only_enforce_if(both)
                self._model.add(high > following).only_enforce_if(both)
                duplicates.append((both, tied))
        return _Slot(kind, low, high, used, hop, duplicates)

    def _hops(self, crossing: Iterable[int], outermost: int) -> list[int]:
        """Ticks of the hop at each cut of one direction; none at its outer end."""
        hardware = self.costs.chain.hardware
        per_byte_s = (hardware.d2h_bytes_per_s, hardware.h2d_bytes_per_s)
        hops = [
            self._ticks(sum(nbytes / rate for rate in per_byte_s) + 2 * hardware.latency_s)
            for nbytes in crossing
        ]
        return [0 if self.gpus == 1 or cut <= outermost else hop for cut, hop in enumerate((0, *hops))]

    def _hint(self, variables: Sequence[cp_model.IntVar], values: Sequence[int]) -> None:
        if self.hint:
            for variable, value in zip(variables, values, strict=True):
                self._model.add_hint(variable, value)

    def _look_up(self, name: str, table: Sequence[int], cut: cp_model.IntVar) -> cp_model.IntVar:
        """The variable that equals the table's entry at the cut."""
        key = (name, cut.index)
        if key not in self._known:
            self._known[key] = self._model.new_int_var(min(table), max(table), "")
            self._model.add_element(cut, table, self._known[key])
        return self._known[key]

    def _share(self, name: str, table: Sequence[int], slot: _Slot) -> cp_model.LinearExpr:
        """What a prefix sum grows by inside the slot."""
        return self._look_up(name, table, slot.high) - self._look_up(name, table, slot.low)

    def _at_most(self, cut: cp_model.IntVar, segment: int) -> cp_model.IntVar:
        """Whether the cut lies before the segment's end."""
        key = (f"at most {segment}", cut.index)
        if key not in self._known:
            self._known[key] = self._model.new_bool_var("")
            self._model.add(cut <= segment).only_enforce_if(self._known[key])
            self._model.add(cut > segment).only_enforce_if(~self._known[key])
        return self._known[key]

    # ------------------------------------------------------------------ constraints

    def _add_times(self, slots: Sequence[_Slot], longest: int) -> cp_model.IntVar:
        """The recurrence of `rpcompile.round_robin_time`; returns the end of the last job."""
        model, gpus = self._model, self.gpus
        starts: list[cp_model.IntVar] = []
        ends: list[cp_model.IntVar] = []
        upload_ends: list[cp_model.IntVar] = []
        previous = model.new_constant(0)
        for j, slot in enumerate(slots):
            upload_end, start, end = (model.new_int_var(0, self._horizon, "") for _ in range(3))
            compute = model.new_int_var(0, longest, "")
            if slot.kind is StageKind.F:
                model.add(compute == self._share("forward", self._forward, slot))
            else:
                model.add(compute == self._share("both", self._both, slot))
            upload = self._upload(slot)
            model.add(upload_end >= upload)
            if j >= gpus:
                model.add(upload_end >= upload + upload_ends[j - gpus])
                model.add(start >= ends[j - gpus])
            if j >= 2 * gpus:
                model.add(upload_end >= upload + ends[j - 2 * gpus])
            model.add(start >= upload_end)
            model.add(end >= start + self.microbatches * compute)
            if j:
                model.add(start >= starts[-1] + previous + slot.hop)
                model.add(end >= ends[-1] + slot.hop + compute)
            starts.append(start)
            ends.append(end)
            upload_ends.append(upload_end)
            previous = compute
        return ends[-1]

    def _upload(self, slot: _Slot) -> cp_model.LinearExpr:
        chain = self.costs.chain
        rate = chain.hardware.h2d_bytes_per_s
        uploads = _prefix(self._ticks(s.weight_bytes / rate) for s in chain.segments)
        upload = self._share("upload", uploads, slot) + self._ticks(chain.hardware.latency_s) * slot.used
        for both, tied in slot.duplicates:
            upload -= math.ceil(tied.weight_bytes / rate / self._tick_s) * both
        return upload

    def _add_memory(self, slots: Sequence[_Slot], largest: dict[StageKind, tuple[int, int]]) -> None:
        """Each job with the weights prefetched behind it within the limit, where that could fail."""
        for j, slot in enumerate(slots):
            following = slots[j + self.gpus] if j + self.gpus < len(slots) else None
            prefetched = largest[following.kind][1] if following else 0
            if largest[slot.kind][0] + prefetched <= self.limit_bytes:
                continue
            resident = self._memory(slot)
            if following:
                resident += self._weights(following)
            self._model.add(resident <= self.limit_bytes).only_enforce_if(slot.used)

    def _weights(self, slot: _Slot) -> cp_model.LinearExpr:
        weights = self._share("weights", _prefix(s.weight_bytes for s in self.costs.chain.segments), slot)
        for both, tied in slot.duplicates:
            weights -= tied.weight_bytes * both
        return weights

    def _memory(self, slot: _Slot) -> cp_model.LinearExpr:
        """`StageCosts.memory_bytes` of the slot."""
        segments = self.costs.chain.segments
        backward = slot.kind is not StageKind.F
        inside = [s.input_bytes + backward * (s.gradient_bytes + s.saved_bytes) for s in segments]
        at_cut = [0, *(s.boundary_bytes + backward * s.boundary_gradient_bytes for s in segments)]
        memory = self._weights(slot) + self._share(f"inside {backward}", _prefix(inside), slot)
        memory += self._look_up(f"at cut {backward}", at_cut, slot.low)
        memory += self._look_up(f"at cut {backward}", at_cut, slot.high)
        if backward:
            for both, tied in slot.duplicates:
                memory -= tied.gradient_bytes * both
        return memory + self._peak(slot)

    def _peak(self, slot: _Slot) -> cp_model.IntVar:
        """At least the largest transient of the slot's segments."""
        peaks = [s.peak_bytes for s in self.costs.chain.segments]
        peak = self._model.new_int_var(min(peaks), max(peaks), "")
        for segment, nbytes in enumerate(peaks):
            if nbytes > min(peaks):
                inside = (self._at_most(slot.low, segment), ~self._at_most(slot.high, segment))
                self._model.add(peak >= nbytes).only_enforce_if(*inside)
        return peak

    def _read(self, solver: cp_model.CpSolver, slots: Sequence[_Slot]) -> tuple[int, ...]:
        """Cuts of the unrolled line."""
        cuts = {0, 2 * self._n - self._first_backward}
        for slot in slots:
            low, high = solver.value(slot.low), solver.value(slot.high)
            if slot.kind is StageKind.B:
                cuts |= {2 * self._n - high, 2 * self._n - low}
            else:
                cuts |= {low, high}
        # The fused stage ends at n, which is inside it on the unrolled line.
        return tuple(sorted(cuts if self.forward_only else cuts - {self._n}))


def _prefix(values: Iterable[int]) -> list[int]:
    return list(accumulate(values, initial=0))
