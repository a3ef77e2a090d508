"""Memory constraints of the stage model: `StageCosts.resident_bytes`, exactly, in bytes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ortools.sat.python import cp_model

from rpcompile.ir import StageKind
from rpcompile.round_robin_time import LOSS_BYTES, StageCost

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rpcompile.ir import Segment
    from rpcompile.passes._stage_slots import Slot, StageSlots
    from rpcompile.round_robin_time import StageCosts


_ZERO = cp_model.LinearExpr.constant(0)


@dataclass
class MemoryRows:
    """Adds the constraints of each slot, left out where no stages there can be could break them.

    Attributes:
        costs: Prices stages.
        layout: The slots.
        limit_bytes: Memory that a plan may use on each GPU.
    """

    costs: StageCosts
    layout: StageSlots
    limit_bytes: int
    _known_kept: dict[int, list[cp_model.IntVar]] = field(default_factory=dict[int, list[cp_model.IntVar]])
    _known_passing: dict[int, cp_model.IntVar] = field(default_factory=dict[int, cp_model.IntVar])
    _known_leaving: dict[int, cp_model.IntVar] = field(default_factory=dict[int, cp_model.IntVar])

    def add(self, largest: Mapping[StageKind, StageCost]) -> None:
        """Add the constraints; `largest` has the most of every figure of any stage of a kind."""
        slots, gpus = self.layout.slots, self.costs.gpus
        most = StageCost(*map(max, zip(*largest.values(), strict=True)))
        for j, slot in enumerate(slots):
            own = largest[slot.kind]
            total, lingering, prefetched = own.memory_bytes, 0, 0
            if j >= gpus:
                before = largest[slots[j - gpus].kind]
                left = 0 if slots[j - gpus].kind is StageKind.F else 2 * most.gradient_bytes
                total = max(total + before.store_bytes, own.begin_bytes + 2 * most.store_bytes) + left
                lingering = before.lingering_bytes
            if j + gpus < len(slots):
                after = largest[slots[j + gpus].kind]
                total += after.load_bytes
                prefetched = after.weight_bytes
            if total + max(lingering, prefetched) > self.limit_bytes:
                self._add(j)

    def _add(self, j: int) -> None:
        """While the slot's job runs, and before it has made anything."""
        model, slots, gpus, sets = self.layout.model, self.layout.slots, self.costs.gpus, self.costs.sets
        slot, second_set = slots[j], sets - 1
        after = slots[j + gpus] if j + gpus < len(slots) else None
        # By microbatch, from the last one before this job.
        before = [slots[i] for i in range(j - gpus, -1, -gpus) for _ in range(sets)]
        weights = model.new_int_var(0, self.limit_bytes, "")
        copies_up = model.new_int_var(0, self.limit_bytes, "")
        copies_down = model.new_int_var(0, self.limit_bytes, "")
        if after:
            model.add(weights >= self._weights(after)).only_enforce_if(slot.used)
            more = self._load(after) - second_set * self._load(slot)
            model.add(copies_up >= more).only_enforce_if(slot.used, after.used)
        if before:
            model.add(weights >= self._lingering(before[0])).only_enforce_if(slot.used)
            more = self._output(before[0]) - second_set * self._store(slot)
            model.add(copies_down >= more).only_enforce_if(slot.used, before[0].used)
        own, tied_twice = self._own(slot), self._gradients_made(slot) - self._gradients(slot)
        runs = own + tied_twice + self._held(slot) + sets * self._store(slot) + self._leaving(j) + copies_down
        begins = self._leaving(j - gpus)
        for other in before[:2]:
            begins += self._output(other)
        if slot.kind is StageKind.B:
            begins += own + tied_twice
        if gpus == 1:
            begins += self.costs.microbatches * self._handed(slot)[0]
        either = self._weights(slot) + sets * self._load(slot) + weights + copies_up
        for moment in (runs, begins):
            model.add(either + moment <= self.limit_bytes).only_enforce_if(slot.used)

    # ------------------------------------------------------------------ the figures of `StageCost`

    def _weights(self, slot: Slot) -> cp_model.LinearExpr:
        total = self.layout.share("weights", (s.weight_bytes for s in self._segments), slot)
        for both, tied in slot.duplicates:
            total -= tied.weight_bytes * both
        return total

    def _gradients(self, slot: Slot) -> cp_model.LinearExpr:
        total = self._gradients_made(slot)
        if slot.kind is not StageKind.F:
            for both, tied in slot.duplicates:
                total -= tied.gradient_bytes * both
        return total

    def _gradients_made(self, slot: Slot) -> cp_model.LinearExpr:
        """With a tied weight's gradient once for each use: all but the last wait for it."""
        if slot.kind is StageKind.F:
            return _ZERO
        return self.layout.share("gradients", (s.gradient_bytes for s in self._segments), slot)

    def _leaving(self, j: int) -> cp_model.LinearExpr | cp_model.IntVar:
        """At least the gradients that may be there when the slot's job is over."""
        slots, model, before = self.layout.slots, self.layout.model, j - self.costs.gpus
        if j < 0 or slots[j].kind is StageKind.F:
            return _ZERO
        two = self._gradients(slots[j]) + (self._gradients(slots[before]) if before >= 0 else _ZERO)
        if all(segment.gradient_bytes for segment in self._segments if segment.needs_backward):
            return two
        if j not in self._known_leaving:
            found = self._known_leaving[j] = model.new_int_var(0, self.limit_bytes, "")
            makes_some = model.new_bool_var("")
            model.add(self._gradients(slots[j]) > 0).only_enforce_if(makes_some)
            model.add(found >= two).only_enforce_if(slots[j].used)
            model.add(found >= self._leaving(before)).only_enforce_if(slots[j].used, ~makes_some)
        return self._known_leaving[j]

    def _lingering(self, slot: Slot) -> cp_model.LinearExpr:
        if slot.kind is StageKind.B:
            return _ZERO
        changed = (s.weight_bytes if s.state_bytes else 0 for s in self._segments)
        return self.layout.share("lingering", changed, slot)

    def _held(self, slot: Slot) -> cp_model.LinearExpr | cp_model.IntVar:
        """On one GPU, at least what is handed from job to job there while this one runs."""
        if self.costs.gpus > 1:
            return _ZERO
        model, m, (into, out) = self.layout.model, self.costs.microbatches, self._handed(slot)
        held = model.new_int_var(0, self.limit_bytes, "")
        model.add(held >= m * into + out).only_enforce_if(slot.used)
        model.add(held >= into + m * out).only_enforce_if(slot.used)
        if slot.kind is StageKind.F and m > 1:
            model.add(held >= m * into + 2 * out).only_enforce_if(slot.used, self._passes_on(slot))
            model.add(held >= 2 * into + m * out).only_enforce_if(slot.used, self._passes_on(slot))
        return held

    def _own(self, slot: Slot) -> cp_model.IntVar:
        """At least what each of the slot's segments needs."""
        layout, tables = self.layout, self.costs.workspaces
        own = layout.model.new_int_var(0, self.limit_bytes, "")
        shared = self._shared(slot)
        if slot.kind is StageKind.F:
            base = self._crossing(slot.high) - shared
            edge = layout.look_up("first forward", [*tables.first_forward, 0], slot.low)
            inner, margins = tables.inner_forward, (-1, 0)
        else:
            backward = tables.backward[slot.kind]
            # Stages of both kinds look the same numbers up, unless attention outputs are offloaded.
            which = " again" if backward is not tables.backward[StageKind.FB] else ""
            base = layout.look_up(f"base{which}", [*backward.base, 0], slot.low) - shared
            edge = layout.look_up(f"last backward{which}", [0, *backward.last], slot.high)
            inner, margins = backward.inner, (0, 1)
            if slot.kind is StageKind.B:
                base -= layout.share("scratch", (s.state_bytes for s in self._segments), slot)
        layout.model.add(own >= edge - base).only_enforce_if(slot.used)
        for segment, nbytes in enumerate(inner):
            inside = (
                layout.at_most(slot.low, segment + margins[0]),
                ~layout.at_most(slot.high, segment + margins[1]),
            )
            layout.model.add(own >= nbytes - base).only_enforce_if(slot.used, *inside)
        return own

    def _shared(self, slot: Slot) -> cp_model.LinearExpr:
        """At least the results of rematerialised nodes that each of the slot's segments reads."""
        sizes = self.costs.workspaces.rematerialised
        if not any(sizes):
            return _ZERO
        shared = self.layout.model.new_int_var(0, max(sizes), "")
        for segment, nbytes in enumerate(sizes):
            if nbytes:
                inside = (self.layout.at_most(slot.low, segment), ~self.layout.at_most(slot.high, segment))
                self.layout.model.add(shared >= nbytes).only_enforce_if(*inside)
        return shared + _ZERO

    def _load(self, slot: Slot) -> cp_model.LinearExpr:
        total = self.layout.share("inputs", (s.input_bytes for s in self._segments), slot)
        if slot.kind is StageKind.B:
            total += self._crossing(slot.low) + self._attention(slot)
        return total + self._handed(slot)[0] if self.costs.gpus > 1 else total

    def _store(self, slot: Slot) -> cp_model.LinearExpr:
        """Boundaries kept for backward stages included."""
        last = slot.kind is StageKind.FB or (self.layout.forward_only and slot is self.layout.slots[-1])
        total = _ZERO + (LOSS_BYTES if last else 0)
        for kept in self._kept(slot):
            total += kept
        if slot.kind is StageKind.F:
            total += self._attention(slot)
        return total + self._handed(slot)[1] if self.costs.gpus > 1 else total

    def _output(self, slot: Slot) -> cp_model.LinearExpr:
        """At least what is copied down once a microbatch has run, as the jobs behind see it."""
        total = self._store(slot)
        if self.costs.gpus == 1 and slot.kind is StageKind.F:
            passed_on = self.layout.model.new_int_var(0, max(self.costs.crossing), "")
            row = self.layout.model.add(passed_on >= self._crossing(slot.low))
            row.only_enforce_if(self._passes_on(slot))
            total += passed_on
        return total

    def _passes_on(self, slot: Slot) -> cp_model.IntVar:
        """True if a backward slot begins where the slot does, at what was handed to it on one GPU."""
        if slot.low.index not in self._known_passing:
            passes = self._known_passing[slot.low.index] = self.layout.model.new_bool_var("")
            for later in self.layout.slots:
                if later.kind is StageKind.B:
                    apart = (self.layout.less(slot.low, later.low), self.layout.less(later.low, slot.low))
                    self.layout.model.add_bool_or(passes, ~later.used, *apart)
        return self._known_passing[slot.low.index]

    def _attention(self, slot: Slot) -> cp_model.LinearExpr:
        """Attention outputs that its segments offload or load."""
        if not any(segment.offloads for segment in self._segments):
            return _ZERO
        return self.layout.share("attention", (s.kept_bytes for s in self._segments), slot)

    def _handed(self, slot: Slot) -> tuple[cp_model.IntVar, cp_model.IntVar]:
        """What comes from the stage before, and what goes to the next."""
        into = self._gradient(slot.high) if slot.kind is StageKind.B else self._crossing(slot.low)
        return into, self._crossing(slot.high) if slot.kind is StageKind.F else self._gradient(slot.low)

    def _kept(self, slot: Slot) -> list[cp_model.IntVar]:
        """By backward slot, the boundary it begins from if that lies inside the slot."""
        if slot.kind is not StageKind.F:
            return []
        if slot.high.index not in self._known_kept:
            found: list[cp_model.IntVar] = []
            for later in self.layout.slots:
                if later.kind is StageKind.B:
                    kept = self.layout.model.new_int_var(0, max(self.costs.crossing), "")
                    inside = self.layout.less(slot.low, later.low), self.layout.less(later.low, slot.high)
                    row = self.layout.model.add(kept >= self._crossing(later.low))
                    row.only_enforce_if(later.used, *inside)
                    found.append(kept)
            self._known_kept[slot.high.index] = found
        return self._known_kept[slot.high.index]

    def _crossing(self, cut: cp_model.IntVar) -> cp_model.IntVar:
        return self.layout.look_up("crossing", self.costs.crossing, cut)

    def _gradient(self, cut: cp_model.IntVar) -> cp_model.IntVar:
        return self.layout.look_up("crossing gradients", self.costs.crossing_gradients, cut)

    @property
    def _segments(self) -> tuple[Segment, ...]:
        return self.costs.chain.segments
