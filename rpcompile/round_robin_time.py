"""Time and memory of round-robin stages in closed form: what `partition-stages` minimises.

Job j runs stage j on GPU j mod N, on all M microbatches in order. With c_j the compute seconds of
one microbatch, h_j the hop into job j, u_j the upload of its weights, s_j the start of its first
microbatch and e_j the end of its last::

    upload_end_j = max(upload_end_{j-N}, e_{j-2N}) + u_j       a GPU holds the weights of two jobs
    s_j = max(s_{j-1} + c_{j-1} + h_j, e_{j-N}, upload_end_j)
    e_j = max(s_j + M c_j, e_{j-1} + h_j + c_j)

This equals the recurrence over every microbatch, start(j, m) = max(end(j-1, m) + h_j, end(j, m-1),
end(j-N, M-1), upload_end_j): by induction over j, end(j, m) is convex in m, so what delays the last
microbatch of a job is the first or the last microbatch of the job before.

Left out: downloads of gradients and of inputs kept for recompute, links shared by GPUs, the
optimizer. The simulator has those.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, TypeVar

from rpcompile.ir import Stage, StageKind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rpcompile.ir import SegmentChain

Number = TypeVar("Number", int, float)


def run_jobs(
    compute_s: Sequence[float],
    upload_s: Sequence[float],
    hop_s: Sequence[float],
    gpus: int,
    microbatches: int,
) -> tuple[list[float], list[float]]:
    """Start and end of every job under the recurrence above.

    Args:
        compute_s: Seconds of one microbatch of each job.
        upload_s: Seconds to upload the weights of each job.
        hop_s: Seconds from the end of a microbatch in job j-1 to its earliest start in job j; 0
            for the first job.
        gpus: N; job j runs on GPU j mod N.
        microbatches: M.

    Returns:
        Start of the first microbatch and end of the last one, in seconds, by job.
    """
    starts: list[float] = []
    # Shifted, so that entry j is that of job j - 2N and of job j - N.
    ends, upload_ends = [0.0] * (2 * gpus), [0.0] * gpus
    start = end = first_done = 0.0
    for j, (compute, upload, hop) in enumerate(zip(compute_s, upload_s, hop_s, strict=True)):
        upload_end = max(upload_ends[j], ends[j]) + upload
        start = max(first_done + hop, ends[j + gpus], upload_end)
        end = max(start + microbatches * compute, end + hop + compute)
        first_done = start + compute
        starts.append(start)
        ends.append(end)
        upload_ends.append(upload_end)
    return starts, ends[2 * gpus :]


def stages_between(cuts: Sequence[int], segments: int) -> tuple[Stage, ...]:
    """Stages between neighbouring cuts of the unrolled line, on which an iteration is one walk.

    Position u < n stands for the forward of segment u, position u >= n for recompute and backward
    of segment 2n-1-u. A run across the middle is the fused stage, e.g. for n = 3::

        cuts (0, 1, 5, 6) -> F 0..0, FB 1..2, B 0..0

    Args:
        cuts: Increasing positions, both ends of the line included.
        segments: n.
    """
    stages: list[Stage] = []
    for index, (begin, end) in enumerate(pairwise(cuts)):
        if end <= segments:
            stages.append(Stage(index, StageKind.F, begin, end - 1))
        elif begin < segments:
            stages.append(Stage(index, StageKind.FB, begin, segments - 1))
        else:
            stages.append(Stage(index, StageKind.B, 2 * segments - end, 2 * segments - 1 - begin))
    return tuple(stages)


class StageCosts:
    """What stages of one chain cost, per microbatch, from prefix sums: a search asks often."""

    def __init__(self, segment_chain: SegmentChain) -> None:
        segments = segment_chain.segments
        self.chain = segment_chain
        self._forward_s = list(accumulate((s.forward_s for s in segments), initial=0.0))
        self._backward_s = list(accumulate((s.backward_s for s in segments), initial=0.0))
        self._weights = list(accumulate((s.weight_bytes for s in segments), initial=0))
        self._gradients = list(accumulate((s.gradient_bytes for s in segments), initial=0))
        self._saved = list(accumulate((s.saved_bytes for s in segments), initial=0))
        self._inputs = list(accumulate((s.input_bytes for s in segments), initial=0))
        self._peaks = [s.peak_bytes for s in segments]

    def compute_s(self, stage: Stage) -> float:
        """Seconds of compute: F forward, FB forward and backward, B recompute and backward."""
        seconds = _between(self._forward_s, stage)
        return seconds if stage.kind is StageKind.F else seconds + _between(self._backward_s, stage)

    def weight_bytes(self, stage: Stage) -> int:
        """Weights and buffers to upload; a tensor tied inside the stage counts once."""
        again = sum(_duplicates(tied.segments, stage) * tied.weight_bytes for tied in self.chain.tied)
        return _between(self._weights, stage) - again

    def gradient_bytes(self, stage: Stage) -> int:
        """Weight gradients that the stage makes; a tensor tied inside the stage counts once."""
        if stage.kind is StageKind.F:
            return 0
        again = sum(_duplicates(tied.segments, stage) * tied.gradient_bytes for tied in self.chain.tied)
        return _between(self._gradients, stage) - again

    def upload_s(self, stage: Stage) -> float:
        """Seconds to upload the stage's weights in one transfer."""
        hardware = self.chain.hardware
        return self.weight_bytes(stage) / hardware.h2d_bytes_per_s + hardware.latency_s

    def boundary_bytes(self, stage: Stage) -> int:
        """What the stage hands to the next one: an activation going up, a gradient going down."""
        if stage.kind is StageKind.F:
            return self.chain.segments[stage.last].boundary_bytes
        return self.chain.segments[stage.first - 1].boundary_gradient_bytes if stage.first else 0

    def hop_s(self, stage: Stage) -> float:
        """Seconds from this stage to the next one on another GPU, by way of the host."""
        hardware, nbytes = self.chain.hardware, self.boundary_bytes(stage)
        return nbytes / hardware.d2h_bytes_per_s + nbytes / hardware.h2d_bytes_per_s + 2 * hardware.latency_s

    def memory_bytes(self, stage: Stage) -> int:
        """What a job of the stage needs on its GPU, besides the weights prefetched for the next job.

        F keeps its input, its output and the largest transient of a segment; FB and B add what
        every segment saves and the gradients of weights and boundaries. User inputs are summed
        over segments, so one that several segments read errs upwards.
        """
        nbytes = self.weight_bytes(stage) + _between(self._inputs, stage)
        nbytes += max(self._peaks[stage.first : stage.last + 1])
        cuts = [self.chain.segments[cut] for cut in (stage.first - 1, stage.last) if cut >= 0]
        nbytes += sum(cut.boundary_bytes for cut in cuts)
        if stage.kind is not StageKind.F:
            nbytes += self.gradient_bytes(stage) + _between(self._saved, stage)
            nbytes += sum(cut.boundary_gradient_bytes for cut in cuts)
        return nbytes

    def iteration_s(self, stages: Sequence[Stage], gpus: int, microbatches: int) -> float:
        """Predicted seconds of one iteration."""
        compute_s = [self.compute_s(stage) for stage in stages]
        upload_s = [self.upload_s(stage) for stage in stages]
        hop_s = [0.0, *(self.hop_s(stage) if gpus > 1 else 0.0 for stage in stages[:-1])]
        return run_jobs(compute_s, upload_s, hop_s, gpus, microbatches)[1][-1]

    def resident_bytes(self, stages: Sequence[Stage], gpus: int) -> list[int]:
        """What each job needs on its GPU together with the weights of the next job there."""
        following = [self.weight_bytes(stage) for stage in stages[gpus:]] + [0] * gpus
        return [self.memory_bytes(stage) + after for stage, after in zip(stages, following, strict=False)]


def _between(prefix: list[Number], stage: Stage) -> Number:
    return prefix[stage.last + 1] - prefix[stage.first]


def _duplicates(users: tuple[int, ...], stage: Stage) -> int:
    """Users of a tied tensor inside the stage that need no copy of their own."""
    return max(0, sum(stage.first <= user <= stage.last for user in users) - 1)
