"""What no dispatch of a chain can beat, whatever the stages, the replicas, the traffic and the order."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rpcompile.passes._dispatch_reach import Idle, Reach

if TYPE_CHECKING:
    from rpcompile.dispatch_costs import Tables
    from rpcompile.dispatch_time import Machine
    from rpcompile.ir import SegmentChain

_SLACK = 1 + 1e-9  # what a limit of traffic is held to


def least_seconds(
    chain: SegmentChain,
    tables: Tables,
    machine: Machine,
    microbatches: int,
    most_bytes: float = math.inf,
    most_jobs: int | None = None,
) -> float:
    """A lower bound on the time of one iteration; of chained ones, on what each adds.

    Every dispatch has some first segment of the fused stage, and runs that stage on some number r of GPUs.
    For each such pair there is a bound, the largest of these; the least over all pairs that fit in memory
    and traffic holds for every dispatch. M microbatches, N GPUs of V speeds together.

    - Work: what all microbatches compute, over V. The longer the fused stage, the less is recomputed.
    - Links: every stage is uploaded once at least and the fused one r times, over N links; gradients of
      backward and fused stages come down as often.
    - Line: one of the r GPUs has at least M / r microbatches of the fused stage, one after the other. Its
      first one has come through all forwards before, its last one has all backwards to go; see `Reach`.
    - Idle: GPUs that cannot all be at work at both ends of an iteration; see `Idle`. What traffic allows
      is shared by both ends.
    - Updates: the host makes them one after the other.

    Chained asynchronous iterations hide both ends of each, but what an iteration uploads of a trained segment
    has waited for that segment's gradients of the iteration two before: the line fits in two iterations. With
    synchronous updates behind a global norm, an iteration's uploads of trained segments come behind
    everything of the one before that makes gradients; what lies in front of the first trained segment may
    overlap with that, and does not count for line and idle.

    Args:
        chain: The segments.
        tables: Their prices.
        machine: What they run on; of rates and speeds the highest there are.
        microbatches: Number of microbatches.
        most_bytes: Most bytes to upload in an iteration.
        most_jobs: Most jobs of a stage; None for no limit.
    """
    reach = Reach(chain, tables, machine, microbatches)
    most_jobs = min(machine.speed.size, microbatches, most_jobs or microbatches)
    begins = [_Begin.of(reach, begin, most_bytes, most_jobs) for begin in reach.fitting]
    begins = [found for found in begins if found.jobs.size]
    if not begins:  # Nothing fits in what is allowed: what holds without limits still does.
        every = range(tables.first_fused, tables.segments)
        begins = [_Begin.of(reach, begin, math.inf, most_jobs) for begin in every]
    least_s, idle = math.inf, None
    for found in sorted(begins, key=lambda found: found.first_s.min()):
        if found.first_s.min() >= least_s:
            break
        line_s = found.line_s(least_s)
        seconds = np.maximum(found.first_s, line_s)
        if machine.iterations == 1 and seconds.min() < least_s:
            idle = idle or Idle(reach, most_jobs, math.isfinite(most_bytes))
            seconds = np.maximum(seconds, found.idle_s(idle, line_s))
        least_s = min(least_s, float(seconds.min()))
    return least_s


@dataclass(frozen=True)
class _Begin:
    """All dispatches whose fused stage begins at one segment, by number of GPUs that run it.

    Attributes:
        reach: The chain.
        begin: That segment.
        jobs: (k,) numbers of GPUs that traffic, memory and changed buffers allow.
        spare_bytes: (k,) what traffic leaves for replicas of other stages.
        first_s: (k,) the bounds that are quick to take.
    """

    reach: Reach
    begin: int
    jobs: np.ndarray
    spare_bytes: np.ndarray
    first_s: np.ndarray

    @classmethod
    def of(cls, reach: Reach, begin: int, most_bytes: float, most_jobs: int) -> _Begin:
        machine, fused_bytes = reach.machine, float(reach.fused_bytes[begin])
        others_bytes = float(reach.forward_bytes[:begin].sum() + reach.backward_bytes[:begin].sum())
        jobs = np.arange(1, min(most_jobs, reach.widest(begin) or most_jobs) + 1)
        spare_bytes = most_bytes * _SLACK - others_bytes - jobs * fused_bytes
        jobs, spare_bytes = jobs[spare_bytes >= 0], spare_bytes[spare_bytes >= 0]
        links = machine.speed.size
        up_s = (others_bytes + jobs * fused_bytes) / machine.up_bytes_per_s / links
        down_bytes = float(reach.gradient_bytes[:begin].sum()) + jobs * float(reach.fused_gradients[begin])
        down_s = down_bytes / machine.down_bytes_per_s / links
        turns = -(-reach.microbatches // jobs)
        line_s = reach.line_s(begin, turns * reach.fused_s[begin], 0.0, 0.0)
        work_s = np.full(jobs.size, reach.work_s(begin, all_of_it=True) / float(machine.speed.sum()))
        found = np.maximum.reduce([work_s, up_s, down_s, line_s, np.full(jobs.size, reach.update_s)])
        return cls(reach, begin, jobs, spare_bytes, found)

    def line_s(self, enough_s: float) -> np.ndarray:
        """The line, where GPUs of the fused stage cannot all begin, or end, at the same time.

        A GPU that has more than M / r microbatches, rounded up, is longer at it by one at least. Else k GPUs
        have as many as that. Their first microbatches come through segment s one after the other, f_s apart,
        or q at a time where it is replicated q times: the i-th GPU begins floor(i / q) f_s later than the
        first; likewise at the other end with backward and recompute. The longest of k lines is no shorter
        than their mean. To have all segments but the quicker half replicated q times takes traffic.

        Args:
            enough_s: What need not be improved on.
        """
        reach, found = self.reach, np.zeros(self.jobs.size)
        up_s, up_bytes = reach.slower_half(reach.forward_s, reach.forward_bytes, reach.origin, self.begin)
        down_s, down_bytes = reach.slower_half(reach.again_s, reach.backward_bytes, reach.first, self.begin)
        for place, jobs in enumerate(self.jobs.tolist()):
            if self.first_s[place] >= enough_s:
                continue
            turns = -(-reach.microbatches // jobs)
            late = _lateness(reach.microbatches - jobs * (turns - 1))
            number = np.arange(late.size)
            left = self.spare_bytes[place] - number * up_bytes
            other = np.where(left >= 0, number[-1], -1)
            if down_bytes > 0:
                other = np.minimum(other, np.floor(np.maximum(left, -down_bytes) / down_bytes)).astype(int)
            possible = other >= 0
            lines_s = reach.line_s(
                self.begin,
                turns * reach.fused_s[self.begin],
                up_s * late[possible],
                down_s * late[other[possible]],
            )
            longer_s = reach.line_s(self.begin, (turns + 1) * reach.fused_s[self.begin], 0.0, 0.0)
            found[place] = min(float(np.min(lines_s)), float(longer_s))
        return found

    def idle_s(self, idle: Idle, line_s: np.ndarray) -> np.ndarray:
        """Work, and what GPUs must be idle at both ends, which do not overlap: an iteration is no shorter
        than its line, nor than its work.

        Args:
            idle: Of the chain.
            line_s: (k,) the line.
        """
        work_s, speed = self.reach.work_s(self.begin), float(self.reach.machine.speed.sum())
        apart_s = np.maximum(line_s, work_s / speed)
        return (work_s + idle.least(self.begin, self.jobs, self.spare_bytes, apart_s)) / speed


def _lateness(servers: int) -> np.ndarray:
    """Mean of floor(i / q) over i < k, for q = 1..k."""
    return np.array([(np.arange(servers) // q).mean() for q in range(1, servers + 1)])
