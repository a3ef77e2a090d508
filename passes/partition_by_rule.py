"""Divides a chain by RoundPipe's rule: the fewest stages of at most T, by max(S, N) x T."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rpcompile.errors import require_at_least
from rpcompile.ir import Partition, Stage, StageKind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rpcompile.ir import SegmentChain

_ROUNDING = 1 + 1e-9


@dataclass(frozen=True)
class PartitionByRule:
    """SegmentChain -> Partition, for comparison with `partition-stages`.

    A limit T is chosen among the run lengths (sums of neighbouring forward, or backward, times) between
    the heaviest segment and `slack` times that. For each, the fused stage takes segments from the end
    while they fit into T; forward stages are filled from there down to the first segment, backward stages
    from the first segment up. The T with the smallest max(S, N) x T wins, S being the number of stages.

    Attributes:
        gpus: N, the number of GPUs.
        slack: How far T may exceed the heaviest segment.
        balanced: Spread segments evenly over the stages that were found, with forward stages no heavier
            than the heaviest backward stage. So are the published partitions (inferred from them); the
            peer's runtime fills greedily.

    Source: RoundPipe, arXiv 2604.27085.
    """

    gpus: int
    slack: float = 1.1
    balanced: bool = False

    name = "partition-by-rule"

    def run(self, chain: SegmentChain) -> Partition:
        """Divides the chain.

        Raises:
            InvalidArgument: `gpus` or `slack` is below 1.
        """
        require_at_least(1, gpus=self.gpus, slack=self.slack)
        forward = [segment.forward_s for segment in chain.segments]
        backward = [segment.forward_s + segment.backward_s for segment in chain.segments]
        needed = chain.first_backward
        best: tuple[float, float] | None = None
        stages: tuple[Stage, ...] = ()
        for limit in self._limits(forward, backward[needed:]):
            found = self._fill(forward, backward, needed, limit)
            cost = max(len(found), self.gpus) * limit
            if best is None or cost < best[0]:
                best, stages = (cost, limit), found
        assert best is not None
        if self.balanced:
            stages = self._balance(stages, forward, backward)
        usable = chain.hardware.usable_bytes
        return Partition(stages, usable, best[0], 0.0, "FEASIBLE", 0.0, self.name)

    def _limits(self, *times: list[float]) -> list[float]:
        heaviest = max(max(row, default=0.0) for row in times)
        found: set[float] = {heaviest}
        for row in times:
            for start in range(len(row)):
                total = 0.0
                for seconds in row[start:]:
                    total += seconds
                    if total > self.slack * heaviest * _ROUNDING:
                        break
                    if total >= heaviest:
                        found.add(total)
        return sorted(found)

    def _fill(
        self, forward: list[float], backward: list[float], needed: int, limit: float
    ) -> tuple[Stage, ...]:
        tail, total = len(forward), 0.0
        while tail and (tail == len(forward) or total + backward[tail - 1] <= limit * _ROUNDING):
            tail -= 1
            total += backward[tail]
        up = _greedy(forward[:tail][::-1], limit)[::-1]
        down = _greedy(backward[needed:tail], limit)[::-1]
        return _stages(up, len(forward), down)

    def _balance(
        self, stages: tuple[Stage, ...], forward: list[float], backward: list[float]
    ) -> tuple[Stage, ...]:
        down = [s for s in stages if s.kind is StageKind.B]
        tail = next(s.first for s in stages if s.kind is StageKind.FB)
        if not down:
            return stages
        heaviest = max(sum(backward[s.first : s.last + 1]) for s in down)
        count = len(_greedy(forward[:tail][::-1], heaviest))
        return _stages(_even(tail, count), len(forward), _even(tail - down[-1].first, len(down))[::-1])


def _greedy(times: Sequence[float], limit: float) -> list[int]:
    """Sizes of runs, each as long as fits into the limit, and at least 1."""
    sizes: list[int] = []
    total = 0.0
    for seconds in times:
        if not sizes or total + seconds > limit * _ROUNDING:
            sizes.append(0)
            total = 0.0
        sizes[-1] += 1
        total += seconds
    return sizes


def _even(count: int, parts: int) -> list[int]:
    """Sizes that differ by at most one, smaller ones first."""
    return [count // parts + (index >= parts - count % parts) for index in range(parts)]


def _stages(up: Sequence[int], segments: int, down: Sequence[int]) -> tuple[Stage, ...]:
    """Stages of these sizes in execution order, the fused one taking what `up` leaves."""
    found: list[Stage] = []
    position = 0
    for size in up:
        found.append(Stage(len(found), StageKind.F, position, position + size - 1))
        position += size
    found.append(Stage(len(found), StageKind.FB, position, segments - 1))
    for size in down:
        found.append(Stage(len(found), StageKind.B, position - size, position - 1))
        position -= size
    return tuple(found)
