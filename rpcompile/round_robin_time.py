"""Time and memory of round-robin stages in closed form: what `partition-stages` goes by.

Job j runs stage j on GPU j mod N, on all M microbatches in order. With c_j the compute seconds of
one microbatch, h_j the hop into job j, u_j the upload of its weights, s_j the start of its first
microbatch and e_j the end of its last::

    upload_end_j = max(upload_end_{j-N}, e_{j-2N}) + u_j       a GPU holds the weights of two jobs
    s_j = max(s_{j-1} + c_{j-1} + h_j, e_{j-N}, upload_end_j)
    e_j = max(s_j + M c_j, e_{j-1} + h_j + c_j)

This equals the recurrence over every microbatch, start(j, m) = max(end(j-1, m) + h_j, end(j, m-1),
end(j-N, M-1), upload_end_j): by induction over j, end(j, m) is convex in m, so what delays the last
microbatch of a job is the first or the last microbatch of the job before.

Left out of the time: downloads of gradients and of inputs kept for recompute, links shared by GPUs,
the optimizer. The simulator has those. Memory is the most that can come together on a GPU under the
rules of `insert-transfers`, however long anything takes: weights of two jobs, gradients of two, and the
copies to and from the host of two microbatches. What a job makes waits until what was made before has
left; what it needs in order to begin, its recompute included, does not. So there are two moments to look
at: while it runs, and before it has made anything, see `StageCosts.resident_bytes`.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, NamedTuple

from rpcompile.ir import Stage, StageKind
from rpcompile.stage_bytes import Workspaces, duplicates

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rpcompile.ir import SegmentChain

LOSS_BYTES = 4


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


class StageCost(NamedTuple):
    """What one stage costs; times and copies are those of one microbatch.

    Attributes:
        compute_s: F forward, FB forward and backward, B recompute and both.
        upload_s: Upload of the weights, in one transfer.
        hop_s: From the end of a microbatch to its earliest start in the next stage on another GPU.
        weight_bytes: Weights and buffers; a tensor tied inside the stage counts once.
        gradient_bytes: Weight gradients it makes, by the same rule.
        lingering_bytes: Weights of segments whose changed buffers are copied down after the job.
        load_bytes: Copied up: user inputs, a boundary kept for recompute, attention outputs, what the stage
            before hands on.
        store_bytes: Copied down, but for boundaries inside the stage that are kept for recompute.
        memory_bytes: All that one job of the stage can have on its GPU, those boundaries left out.
        begin_bytes: The part of it that can be there before the job has made anything: weights, copies up, a
            backward stage's recompute and, on one GPU, what was handed to it.
    """

    compute_s: float
    upload_s: float
    hop_s: float
    weight_bytes: int
    gradient_bytes: int
    lingering_bytes: int
    load_bytes: int
    store_bytes: int
    memory_bytes: int
    begin_bytes: int


NO_JOB = StageCost(0.0, 0.0, 0.0, 0, 0, 0, 0, 0, 0, 0)


class StageCosts:
    """Prices the stages of one chain on N GPUs with M microbatches, from prefix sums.

    Attributes:
        chain: The segments.
        gpus: N.
        microbatches: M.
        workspaces: What stages need besides their buffers.
        sets: Microbatches whose copies a GPU holds at once: one is copied while one is computed.
    """

    def __init__(self, chain: SegmentChain, gpus: int, microbatches: int) -> None:
        segments = chain.segments
        self.chain, self.gpus, self.microbatches = chain, gpus, microbatches
        self.sets = min(2, microbatches)
        self._forward_s = list(accumulate((s.forward_s for s in segments), initial=0.0))
        self._backward_s = list(accumulate((s.backward_s for s in segments), initial=0.0))
        self._kept_s = list(accumulate((s.forward_s - s.recompute_s for s in segments), initial=0.0))
        self._kept = list(accumulate((s.kept_bytes for s in segments), initial=0))
        self._weights = list(accumulate((s.weight_bytes for s in segments), initial=0))
        self._gradients = list(accumulate((s.gradient_bytes for s in segments), initial=0))
        changed = (s.weight_bytes if s.state_bytes else 0 for s in segments)
        self._changed = list(accumulate(changed, initial=0))
        self._inputs = list(accumulate((s.input_bytes for s in segments), initial=0))
        self.workspaces = Workspaces(chain)
        self.crossing = self.workspaces.crossing
        self.crossing_gradients = self.workspaces.crossing_gradients

    def of(self, stage: Stage) -> StageCost:
        """The cost of one stage."""
        kind, low, high = stage.kind, stage.first, stage.last + 1
        hardware, n = self.chain.hardware, len(self.chain.segments)
        into = self.crossing_gradients[high] if kind is StageKind.B else self.crossing[low]
        out = self.crossing[high] if kind is StageKind.F else self.crossing_gradients[low]
        hop_s = out / hardware.d2h_bytes_per_s + out / hardware.h2d_bytes_per_s + 2 * hardware.latency_s

        compute_s, workspace = self._forward_s[high] - self._forward_s[low], self.workspaces.of(stage)
        weights, gradients = self._weights[high] - self._weights[low], 0
        lingering = self._changed[high] - self._changed[low]
        load, store = self._inputs[high] - self._inputs[low], LOSS_BYTES if high == n else 0
        for tied in self.chain.tied:
            weights -= duplicates(tied, low, high) * tied.weight_bytes
        if kind is not StageKind.F:
            compute_s += self._backward_s[high] - self._backward_s[low]
            gradients += self._gradients[high] - self._gradients[low]
            for tied in self.chain.tied:
                gradients -= duplicates(tied, low, high) * tied.gradient_bytes
        if kind is StageKind.B:
            # Its recompute runs on scratch copies of the buffers, and changes none.
            load, lingering = load + self.crossing[low] + self._kept[high] - self._kept[low], 0
            compute_s -= self._kept_s[high] - self._kept_s[low]
        elif kind is StageKind.F:
            store += self._kept[high] - self._kept[low]
        begin = weights + (workspace if kind is StageKind.B else 0)
        if self.gpus > 1:
            load, store = load + into, store + out
        else:
            # What one job hands to the next stays on the GPU, for all microbatches.
            workspace += max(self.microbatches * into + out, into + self.microbatches * out)
            begin += self.microbatches * into
        return StageCost(
            compute_s=compute_s,
            upload_s=weights / hardware.h2d_bytes_per_s + hardware.latency_s,
            hop_s=hop_s if self.gpus > 1 else 0.0,
            weight_bytes=weights,
            gradient_bytes=gradients,
            lingering_bytes=lingering,
            load_bytes=load,
            store_bytes=store,
            memory_bytes=weights + gradients + workspace + self.sets * (load + store),
            begin_bytes=begin + self.sets * load,
        )

    def iteration_s(self, costs: Sequence[StageCost]) -> float:
        """Predicted seconds of one iteration of these stages."""
        compute_s, upload_s, hop_s = zip(*((c.compute_s, c.upload_s, c.hop_s) for c in costs), strict=True)
        return run_jobs(compute_s, upload_s, (0.0, *hop_s[:-1]), self.gpus, self.microbatches)[1][-1]

    def resident_bytes(self, cuts: Sequence[int], costs: Sequence[StageCost]) -> list[int]:
        """The most that each job's GPU can hold from the end of its job before to the end of the job.

        Beside the job itself: the weights prefetched for the GPU's next job, or those that the job
        before lingers with; one microbatch's copies up for the next job, as far as they are larger than
        the second set of the job itself; gradients and copies down. Of those, while the job runs,

        - the gradients that may be there when it is over;
        - one microbatch's copies down for the job before, as far as they are larger than the second set.

        Before the job has made anything, when its first recompute may run already,

        - the gradients that may be there when the job before is over;
        - the copies down of the last two microbatches before, none of its own.

        Args:
            cuts: Of the unrolled line.
            costs: Of the stages between them.
        """
        kept, passed_on = self._kept_bytes(cuts)
        stores = [cost.store_bytes + inside for cost, inside in zip(costs, kept, strict=True)]
        outputs = [store + front for store, front in zip(stores, passed_on, strict=True)]
        leaving, second_set = self._leaving(costs), self.sets - 1
        found: list[int] = []
        for j, own in enumerate(costs):
            before = costs[j - self.gpus] if j >= self.gpus else NO_JOB
            after = costs[j + self.gpus] if j + self.gpus < len(costs) else NO_JOB
            # By microbatch, from the last one before this job.
            left = [outputs[i] for i in range(j - self.gpus, -1, -self.gpus) for _ in range(self.sets)]
            runs = own.memory_bytes - own.gradient_bytes + leaving[j] + self.sets * kept[j]
            runs += max(0, sum(left[:1]) - second_set * stores[j])
            if passed_on[j]:
                # Microbatches wait at both ends of the job, and one is still on its way down.
                runs += second_set * min(passed_on[j], self.crossing[cuts[j + 1]])
            begins = own.begin_bytes + (leaving[j - self.gpus] if j >= self.gpus else 0) + sum(left[:2])
            found.append(
                max(runs, begins)
                + max(after.weight_bytes, before.lingering_bytes)
                + max(0, after.load_bytes - second_set * own.load_bytes)
            )
        return found

    def _leaving(self, costs: Sequence[StageCost]) -> list[int]:
        """By job, the gradients that may be on its GPU when it is over.

        Only a job that makes gradients waits for those of two jobs before, with the first that it makes.
        """
        found: list[int] = []
        for j, own in enumerate(costs):
            before = j - self.gpus
            if own.gradient_bytes:
                found.append(own.gradient_bytes + (costs[before].gradient_bytes if before >= 0 else 0))
            else:
                found.append(found[before] if before >= 0 else 0)
        return found

    def excess_bytes(self, cuts: Sequence[int], costs: Sequence[StageCost], limit_bytes: int) -> int:
        """How far the largest of `resident_bytes` is over a limit."""
        # Most partitions fit even if every largest figure came together, which is quick to see.
        largest = StageCost(*map(max, zip(*costs, strict=True)))
        together = max(largest.memory_bytes, largest.begin_bytes + largest.store_bytes)
        together += max(largest.weight_bytes, largest.lingering_bytes)
        together += 2 * largest.gradient_bytes + largest.load_bytes + largest.store_bytes
        together += (self.sets + 1) * sum(map(sum, self._kept_bytes(cuts)))
        if together <= limit_bytes:
            return 0
        return max(0, max(self.resident_bytes(cuts, costs)) - limit_bytes)

    def _kept_bytes(self, cuts: Sequence[int]) -> tuple[list[int], list[int]]:
        """By forward job, boundaries that a backward stage recomputes from: inside its stage; in front of it.

        Those in front matter on one GPU alone: handed on there, they are copied down too, and leave behind
        the job that reads them. On several GPUs, the way to the next one is their way to the host.
        """
        n = len(self.chain.segments)
        inside, in_front = [0] * (len(cuts) - 1), [0] * (len(cuts) - 1)
        for begin, end in pairwise(cuts):
            first = 2 * n - end
            job = bisect_left(cuts, first) - 1
            if begin > n and first and cuts[job + 1] > first:
                inside[job] += self.crossing[first]
            elif begin > n and first and self.gpus == 1:
                in_front[job + 1] = self.crossing[first]
        return inside, in_front
