"""Prices of every stage that a search may choose, as tables that compiled code looks up."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from rpcompile.ir import Stage, StageKind
from rpcompile.round_robin_time import StageCost, StageCosts
from rpcompile.simulate_dispatch import stage_time

if TYPE_CHECKING:
    from rpcompile.ir import SegmentChain

FIELDS = (
    "compute_s",
    "load_bytes",
    "weight_bytes",
    "gradient_bytes",
    "memory_bytes",
    "lingering_bytes",
    "store_bytes",
)
AHEAD = len(FIELDS)  # behind the fields of `StageCost`: seconds of a backward that need no gradient
_ENTRIES = 20_000  # stages that are priced at most; on long chains, longer stages are not considered


class Tables(NamedTuple):
    """Costs by place on the unrolled line (see `round_robin_time.stages_between`).

    Attributes:
        segments: n.
        line: Length of the line.
        longest: Most segments of a stage other than the fused one.
        first_fused: First segment that the fused stage may begin at.
        runs: (line, longest + 1, fields + 1) costs of the stage of that begin and length.
        fused: (n, fields) costs of the fused stage that begins there.
        hop_s: (line + 1) seconds of a hop at that position.
        saved_s: (line + 1) seconds over the host of what crosses there.
        handed_bytes: (line + 1) bytes handed on there.
        updated_bytes: (n + 1) gradient bytes of the segments before that one.
    """

    segments: int
    line: int
    longest: int
    first_fused: int
    runs: np.ndarray
    fused: np.ndarray
    hop_s: np.ndarray
    saved_s: np.ndarray
    handed_bytes: np.ndarray
    updated_bytes: np.ndarray


def price_stages(
    chain: SegmentChain, gpus: int, microbatches: int, fused_segments: int | None = None
) -> Tables:
    """The tables of one chain, for training."""
    costs, n = StageCosts(chain, gpus, microbatches), len(chain.segments)
    line = 2 * n - chain.first_backward
    longest = min(n, max(2, _ENTRIES // line))
    runs = np.zeros((line, longest + 1, len(FIELDS) + 1))
    for begin in range(line):
        for length in range(1, longest + 1):
            end = begin + length
            if end > (n if begin < n else line):
                break
            if begin < n:
                stage = Stage(0, StageKind.F, begin, end - 1)
            else:
                stage = Stage(0, StageKind.B, 2 * n - end, 2 * n - 1 - begin)
            runs[begin, length, :AHEAD] = _row(costs.of(stage))
            if begin >= n:
                # The stage's last segment says what its recompute is; the others add their forward.
                more = (
                    chain.segments[stage.first].forward_s if length > 1 else stage_time(chain, stage).ahead_s
                )
                runs[begin, length, AHEAD] = runs[begin, length - 1, AHEAD] + more
    fused = np.array([_row(costs.of(Stage(0, StageKind.FB, begin, n - 1))) for begin in range(n)])
    down = [costs.crossing_gradients[2 * n - position] for position in range(n, line + 1)]
    handed = np.array([*costs.crossing[:n], *down], float)
    hardware = chain.hardware
    each = 1 / hardware.d2h_bytes_per_s + 1 / hardware.h2d_bytes_per_s
    saved_s = handed * each + 2 * hardware.latency_s
    hop_s = saved_s if gpus > 1 else np.zeros(line + 1)
    updated = np.cumsum([0.0, *(float(s.gradient_bytes) for s in chain.segments)])
    first_fused = 0 if fused_segments is None else max(0, n - fused_segments)
    return Tables(n, line, longest, first_fused, runs, fused, hop_s, saved_s, handed, updated)


def _row(cost: StageCost) -> list[float]:
    return [float(getattr(cost, name)) for name in FIELDS]
