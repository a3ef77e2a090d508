"""Stages: runs of segments, in the order they are executed."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class StageKind(StrEnum):
    """F: forward; B: backward with recompute; FB: forward and backward at once, no recompute."""

    F = "F"
    B = "B"
    FB = "FB"


@dataclass(frozen=True)
class Stage:
    """A run of segments `first..last` (both included). Indices follow execution order: F..., FB, B...

    `workspace_bytes` is what one microbatch needs on its device besides the stage's buffers, found by running
    the stage on tensors without data (see `Action`); None: not found, bounded by `stage_bytes.Workspaces`.
    """

    index: int
    kind: StageKind
    first: int
    last: int
    workspace_bytes: int | None = None

    @property
    def segments(self) -> range:
        return range(self.first, self.last + 1)


@dataclass(frozen=True)
class Partition:
    """The stages of one iteration, with what the solver can say about them.

    Attributes:
        stages: In execution order: forward stages up the model, the fused tail, backward stages down.
        memory_limit_bytes: Limit that each job's residency was held to.
        objective_s: Predicted time of one iteration under the solver's model.
        bound_s: Proved lower bound on it over all partitions considered.
        status: "OPTIMAL" or "FEASIBLE".
        solve_s: Seconds the solver took.
        solver: E.g. "CP-SAT 9.15".
    """

    stages: tuple[Stage, ...]
    memory_limit_bytes: int
    objective_s: float
    bound_s: float
    status: str
    solve_s: float
    solver: str

    @property
    def gap(self) -> float:
        """(objective - bound) / objective, 0 when proved optimal."""
        return 0.0 if self.objective_s == 0 else (self.objective_s - self.bound_s) / self.objective_s
