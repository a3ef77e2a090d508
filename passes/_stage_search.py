"""Good stages fast: greedy partitions of many shapes, the best of them annealed.

On transformer chains, stages should be small at both ends of an iteration, where GPUs wait for the
first and the last microbatch, and large in the middle; beyond that the time is flat in many
directions, so several starts with different stage counts are worth more than one long search.
"""

from __future__ import annotations

import math
import random
import time
from bisect import bisect_left
from dataclasses import dataclass, field
from itertools import pairwise, product
from typing import TYPE_CHECKING, NamedTuple

from rpcompile.round_robin_time import stages_between

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rpcompile.round_robin_time import StageCost, StageCosts

_STARTS = 6
_STAGES_PER_S = 600_000  # stages that are priced in about a second
# Worse by how much of the iteration time, times the number of stages, is accepted at first and at last.
_HOT, _COLD = 0.3, 0.005


class Candidate(NamedTuple):
    """A partition. Less is better: bytes over the memory limit first, then predicted seconds."""

    excess_bytes: int
    iteration_s: float
    cuts: tuple[int, ...]


@dataclass(frozen=True)
class StageSearch:
    """A search over cuts of the unrolled line (see `rpcompile.round_robin_time.stages_between`).

    Attributes:
        costs: Prices stages.
        line: Length of the unrolled line: 2n - first backward segment, or n for forward only.
        limit_bytes: Memory that a plan may use on each GPU.
        seed: Of the annealing.
    """

    costs: StageCosts
    line: int
    limit_bytes: int
    seed: int
    _known: dict[tuple[int, int], StageCost] = field(default_factory=dict)

    @property
    def segments(self) -> int:
        """n."""
        return len(self.costs.chain.segments)

    def run(self, effort: float, until: float = math.inf) -> Candidate:
        """The best partition found; its `excess_bytes` is 0 unless none was found that fits.

        Args:
            effort: Work to do, in about a second each; counted, not timed, so the result is repeatable.
            until: Where `time.monotonic()` ends annealing all the same.
        """
        best: dict[int, Candidate] = {}
        for candidate in map(self.rate, self.greedy(range(1, min(self.line, 12 * self.costs.gpus) + 1))):
            band = len(candidate.cuts) // 4  # neighbours in stage count are neighbours in shape
            best[band] = min(candidate, best.get(band, candidate))
        starts = sorted(best.values())[:_STARTS]
        return min(
            self._anneal(start, effort, random.Random(self.seed + i), until) for i, start in enumerate(starts)
        )

    def finest(self) -> tuple[int, ...]:
        """Cuts of the partition with one segment a stage."""
        return tuple(u for u in range(self.line + 1) if u != self.segments or u == self.line)

    def rate(self, cuts: tuple[int, ...]) -> Candidate:
        """Price the stages between the cuts."""
        costs = [self.cost(run) for run in pairwise(cuts)]
        excess = self.costs.excess_bytes(cuts, costs, self.limit_bytes)
        return Candidate(excess, self.costs.iteration_s(costs), cuts)

    def cost(self, run: tuple[int, int]) -> StageCost:
        """Price the stage of a run of the line."""
        known = self._known.get(run)
        if known is None:
            (stage,) = stages_between(run, self.segments)
            known = self._known[run] = self.costs.of(stage)
        return known

    def _mirror(self, fused: int) -> int:
        """Where the fused stage that begins at this position ends."""
        return min(2 * self.segments - fused, self.line)

    # ------------------------------------------------------------------ greedy

    def greedy(self, counts: Iterable[int]) -> set[tuple[int, ...]]:
        """Stages up to a cap in seconds, which grows from both ends of the line towards the middle.

        Args:
            counts: Into how many parts the work is divided to find a cap.
        """
        total_s = sum(self.cost((u, u + 1)).compute_s for u in range(self.line))
        gpus = self.costs.gpus
        ramps = [[], *([(i + 1) / k for i in range(k)] for k in (gpus, 2 * gpus, 3 * gpus))]
        ramps += [[start * growth**i for i in range(8)] for start, growth in ((0.25, 1.25), (0.0625, 1.6))]
        found = {self.finest()}
        for count, fused_part in product(counts, (1.0, 0.5)):
            cap_s = total_s / count * 1.0001
            fused = self._fuse(cap_s * fused_part)
            for ramp in ramps:
                caps_s = [cap_s * min(1.0, part) for part in ramp] + [cap_s]
                up, down = self._pack(0, fused[0], caps_s), self._pack(self.line, fused[1], caps_s)
                found.add(tuple(sorted({*up, *fused, *down})))
        return found

    def _fuse(self, cap_s: float) -> tuple[int, int]:
        """Ends of the largest fused stage within the cap that fits, or of the smallest there is."""
        if self.line == self.segments:
            return self.line, self.line
        begin = self.segments - 1
        while begin and self._fits((begin - 1, self._mirror(begin - 1)), cap_s):
            begin -= 1
        return begin, self._mirror(begin)

    def _pack(self, outer: int, inner: int, caps_s: list[float]) -> list[int]:
        """Cuts from `outer` towards `inner`, the latter left out; the last cap holds from then on."""
        cuts, step = [outer], 1 if inner > outer else -1
        for position in range(outer + step, inner, step):
            begin, end = sorted((cuts[-1], position + step))
            if not self._fits((begin, end), caps_s[min(len(cuts), len(caps_s)) - 1]):
                cuts.append(position)
        return cuts

    def _fits(self, run: tuple[int, int], cap_s: float) -> bool:
        # The next job's weights are not known yet; they are about as large as this one's.
        cost = self.cost(run)
        return cost.compute_s <= cap_s and cost.memory_bytes + cost.weight_bytes <= self.limit_bytes

    # ------------------------------------------------------------------ annealing

    def _anneal(self, start: Candidate, effort: float, rng: random.Random, until: float) -> Candidate:
        """Move, add and remove cuts; worse partitions are accepted ever more rarely."""
        best = now = start
        moves = min(100 * self.line, int(effort * _STAGES_PER_S / _STARTS / len(start.cuts)))
        first_s = start.iteration_s * _HOT / len(start.cuts)
        for move in range(moves):
            if time.monotonic() > until:
                break
            cuts = self._neighbour(now.cuts, rng)
            if cuts == now.cuts:
                continue
            then = self.rate(cuts)
            temperature_s = first_s * (_COLD / _HOT) ** (move / moves)
            worse_s = self._energy_s(then) - self._energy_s(now)
            if worse_s <= temperature_s * rng.expovariate(1.0):
                now = then
                best = min(best, now)
        return best

    def _energy_s(self, candidate: Candidate) -> float:
        # A tenth of the memory too much weighs as much as twice the time.
        return candidate.iteration_s * (1 + 10 * candidate.excess_bytes / self.limit_bytes)

    def _neighbour(self, cuts: tuple[int, ...], rng: random.Random) -> tuple[int, ...]:
        forward_only = self.line == self.segments
        begin = self.line if forward_only else cuts[bisect_left(cuts, self.segments) - 1]
        kind, step = rng.random(), rng.choice((-2, -1, 1, 2))
        inner = set(cuts)
        if kind < 0.1 and not forward_only:
            begin = min(max(0, begin + step), self.segments - 1)
        elif kind < 0.3:
            inner ^= {rng.randrange(self.line)}
        elif kind < 0.6:
            index = rng.randrange(len(cuts))
            shifted = set(cuts[index : index + rng.randrange(1, 7)])
            inner = (inner - shifted) | {cut + step for cut in shifted}
        else:
            cut = rng.choice(cuts)
            inner ^= {cut, cut + step}
        end = self.line if forward_only else self._mirror(begin)
        inner = {u for u in inner if 0 < u < begin or end < u < self.line}
        return tuple(sorted(inner | {0, begin, end, self.line}))
