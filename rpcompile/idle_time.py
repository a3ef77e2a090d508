"""Where the idle time of GPUs lies, and what an iteration takes once many follow one another.

How the idle time of a GPU is divided, as the published figures do (inferred from them: every figure of
`benchmarks/data/published_schedules.json` is met):

    fill     before its first action
    drain    behind its last action, until all GPUs are done
    switch   on the way to its first backward. Where GPUs hold on to their stages (no fused stage), all idle
             time between its first action and its first backward; in round-robin dispatch only the gap right
             before the first backward
    intra    the rest
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class IdleTime:
    """Idle seconds of all GPUs together, by position; see the module's text."""

    fill_s: float
    switch_s: float
    drain_s: float
    intra_s: float

    @property
    def total_s(self) -> float:
        return self.fill_s + self.switch_s + self.drain_s + self.intra_s


def divide_idle(
    starts: Sequence[Sequence[float]],
    ends: Sequence[Sequence[float]],
    backward: Sequence[Sequence[bool]],
    makespan_s: float,
    *,
    whole_warm_up: bool,
) -> IdleTime:
    """Idle time by position; see the module's text.

    Args:
        starts: By GPU, starts of its compute actions in order.
        ends: By GPU, their ends.
        backward: By GPU, which of them are a backward or a fused action.
        makespan_s: When all is over.
        whole_warm_up: Count all gaps before a GPU's first backward as switch, not only the last one.
    """
    fill, switch, drain, intra = [], [], [], []
    for begin, end, is_backward in zip(starts, ends, backward, strict=True):
        if not begin:
            fill.append(makespan_s)
            continue
        gaps = [after - before for before, after in zip(end, begin[1:], strict=False)]
        first = is_backward.index(True) if True in is_backward else 0
        since = 0 if whole_warm_up else max(0, first - 1)
        fill.append(begin[0])
        switch += gaps[since:first]
        intra += gaps[:since] + gaps[first:]
        drain.append(makespan_s - end[-1])
    return IdleTime(math.fsum(fill), math.fsum(switch), math.fsum(drain), math.fsum(intra))


def steady_period(ends_s: Sequence[float]) -> tuple[float, bool]:
    """What an iteration takes once iterations have settled.

    They need not become equal: several may take turns, each with a time of its own.

    Args:
        ends_s: End of each iteration, two or more.

    Returns:
        The mean over the shortest turn that the second half of the iterations repeats, and True; or the
        mean over the second half, and False if it does not repeat.
    """
    steps = [after - before for before, after in pairwise(ends_s)]
    half = len(steps) // 2
    for turn in range(1, half + 1):
        earlier = steps[half - turn : -turn]
        if all(map(functools.partial(math.isclose, abs_tol=1e-9 * ends_s[-1]), steps[half:], earlier)):
            return math.fsum(steps[-turn:]) / turn, True
    return (ends_s[-1] - ends_s[half]) / (len(steps) - half), False
