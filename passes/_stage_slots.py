"""Slots for stages in a CP-SAT model, laid out around the fused stage.

The fused stage has a fixed slot, so every slot's kind is known beforehand. Slots that are not needed
are empty and lie at the outer ends, where they take no time: in front they begin and end at segment
0, at the back at the first backward segment. GPUs only count modulo N, so they shift nothing::

    slot       0     1      2       3       4      5        n = 5, first backward = 0
    stage      -    F 0   F 1..2  FB 3..4  B 1..2  B 0
    cut       0   0      1       3        3      1      0

What depends on one cut is a table looked up at it, mostly prefix sums; a stage's share is the
difference of two look-ups.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, NamedTuple

from ortools.sat.python import cp_model

from rpcompile.ir import StageKind

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rpcompile.ir import SegmentChain, TiedWeight


class Slot(NamedTuple):
    """A possible stage of the segments `low <= s < high`, empty unless `used`.

    `duplicates` tells, for each two neighbouring users of a tied tensor, whether it holds both.
    """

    kind: StageKind
    low: cp_model.IntVar
    high: cp_model.IntVar
    used: cp_model.IntVar
    duplicates: list[tuple[cp_model.IntVar, TiedWeight]]


class StageSlots:
    """The cuts of a model and what can be looked up at them.

    Attributes:
        model: The model that variables and constraints are added to.
        slots: In execution order.
        forward_only: No fused and no backward stages.
    """

    def __init__(
        self,
        chain: SegmentChain,
        fused_starts: Sequence[int],
        forward_slots: int,
        backward_slots: int,
        hint: tuple[int, ...] | None,
    ) -> None:
        """Lay the slots out.

        Args:
            chain: The segments.
            fused_starts: Where the fused stage may begin; the end of the chain for forward only.
            forward_slots: Number of forward slots.
            backward_slots: Number of backward slots.
            hint: Cuts of the unrolled line to start from, if any are known.
        """
        self.model = cp_model.CpModel()
        self.slots: list[Slot] = []
        self._chain, self._n = chain, len(chain.segments)
        self.forward_only = max(fused_starts) == self._n
        self._known: dict[tuple[str, int], cp_model.IntVar] = {}
        domain = cp_model.Domain.from_values(list(fused_starts))
        fused = self.model.new_int_var_from_domain(domain, "fused")
        up = self._add_forward(fused, forward_slots)
        down = [] if self.forward_only else self._add_backward(fused, min(fused_starts), backward_slots)
        if hint:
            self._hint(up, down, hint)

    def _add_forward(self, fused: cp_model.IntVar, count: int) -> list[cp_model.IntVar]:
        cuts = [*(self.model.new_int_var(0, self._n - 1, f"up{j}") for j in range(1, count)), fused]
        for low, high in pairwise([self.model.new_constant(0), *cuts][-count - 1 :]):
            self._add(StageKind.F, low, high, self._used(low, high, empty_at=0))
        return cuts

    def _add_backward(self, fused: cp_model.IntVar, lowest: int, count: int) -> list[cp_model.IntVar]:
        model, n, g = self.model, self._n, self._chain.first_backward
        self._add(StageKind.FB, fused, model.new_constant(n), model.new_constant(1))
        top = fused
        if lowest < g:
            top = model.new_int_var(g, n - 1, "top")
            model.add_max_equality(top, [fused, g])
        cuts = [model.new_int_var(g, n - 1, f"down{j}") for j in range(1, count)]
        for high, low in pairwise([top, *cuts, model.new_constant(g)][: count + 1]):
            self._add(StageKind.B, low, high, self._used(low, high, empty_at=g))
        return cuts

    def _used(self, low: cp_model.IntVar, high: cp_model.IntVar, empty_at: int) -> cp_model.IntVar:
        """Whether the slot holds a segment; if not, it lies at the outer end, and so do all beyond it."""
        used = self.model.new_bool_var("")
        self.model.add(low <= high)
        self.model.add(low < high).only_enforce_if(used)
        self.model.add(high == empty_at).only_enforce_if(~used)
        return used

    def _add(
        self, kind: StageKind, low: cp_model.IntVar, high: cp_model.IntVar, used: cp_model.IntVar
    ) -> None:
        duplicates: list[tuple[cp_model.IntVar, TiedWeight]] = []
        for tied in self._chain.tied:
            for user, following in pairwise(sorted(tied.segments)):
                both = self.model.new_bool_var("")
                self.model.add(low <= user).only_enforce_if(both)
                self.model.add(high > following).only_enforce_if(both)
                duplicates.append((both, tied))
        self.slots.append(Slot(kind, low, high, used, duplicates))

    def _hint(self, up: list[cp_model.IntVar], down: list[cp_model.IntVar], line: tuple[int, ...]) -> None:
        last_up = self._n if self.forward_only else self._n - 1
        inner_up = [cut for cut in line if cut <= last_up]
        inner_down = [2 * self._n - cut for cut in line if cut > self._n]
        values_up = ([0] * len(up) + inner_up)[-len(up) :]
        values_down = (inner_down + [self._chain.first_backward] * len(down))[1 : len(down) + 1]
        for cut, value in zip([*up, *down], [*values_up, *values_down], strict=True):
            self.model.add_hint(cut, value)

    # ------------------------------------------------------------------ expressions

    def look_up(self, name: str, table: Sequence[int], cut: cp_model.IntVar) -> cp_model.IntVar:
        """The variable that equals the table's entry at the cut; tables are told apart by name."""
        key = (name, cut.index)
        if key not in self._known:
            self._known[key] = self.model.new_int_var(min(table), max(table), "")
            self.model.add_element(cut, table, self._known[key])
        return self._known[key]

    def share(self, name: str, per_segment: Iterable[int], slot: Slot) -> cp_model.LinearExpr:
        """The sum over the slot's segments."""
        table = list(accumulate(per_segment, initial=0))
        return self.look_up(name, table, slot.high) - self.look_up(name, table, slot.low)

    def less(self, left: cp_model.IntVar, right: cp_model.IntVar) -> cp_model.IntVar:
        """Whether one cut lies before another."""
        key = (f"before {right.index}", left.index)
        if key not in self._known:
            self._known[key] = self.model.new_bool_var("")
            self.model.add(left < right).only_enforce_if(self._known[key])
            self.model.add(left >= right).only_enforce_if(~self._known[key])
        return self._known[key]

    def at_most(self, cut: cp_model.IntVar, segment: int) -> cp_model.IntVar:
        """Whether the cut lies before the segment's end."""
        key = (f"at most {segment}", cut.index)
        if key not in self._known:
            self._known[key] = self.model.new_bool_var("")
            self.model.add(cut <= segment).only_enforce_if(self._known[key])
            self.model.add(cut > segment).only_enforce_if(~self._known[key])
        return self._known[key]

    def read(self, solver: cp_model.CpSolver) -> tuple[int, ...]:
        """The solution's cuts of the unrolled line."""
        n = self._n
        cuts = {0, n if self.forward_only else 2 * n - self._chain.first_backward}
        for slot in self.slots:
            low, high = solver.value(slot.low), solver.value(slot.high)
            if slot.kind is StageKind.B:
                cuts |= {2 * n - high, 2 * n - low}
            elif slot.kind is StageKind.F:
                cuts |= {low, high}
            else:
                cuts.add(low)
        return tuple(sorted(cuts))
