"""When the segments of a chain can be computed at the earliest and the latest, and who is idle till then."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from rpcompile.ir import Stage, StageKind
from rpcompile.round_robin_time import LOSS_BYTES, StageCosts
from rpcompile.stage_bytes import gradient_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rpcompile.dispatch_costs import Tables
    from rpcompile.dispatch_time import Machine
    from rpcompile.ir import SegmentChain

_PRICES = 12  # of a byte of traffic that are tried
_MOMENTS = 48  # at either end that are tried


class Reach:
    """A chain, and how soon its first and how late its last microbatch can be where: by no dispatch sooner.

    Nothing is computed before the first segment's weights are on a GPU; no forward runs before those in front
    of it, nor any stage before its own weights are there. Behind a backward come those of all segments in
    front of it, one after the other (other GPUs may recompute meanwhile), and then the last gradients' way
    down; behind every stage its own gradients'. Entry s of an array is for segment s; of those with `fused`
    for a fused stage that begins there. Entry n is behind the last segment.

    What chained iterations hide: see `least_seconds`. There, segments in front of `origin` are left out.

    Attributes:
        machine: What it runs on.
        microbatches: Number of microbatches.
        origin: First segment whose forward cannot overlap with the iteration before.
        first: The same of backwards.
        fitting: Segments at which a fused stage may begin that fits on some GPU.
        forward_s: (n,) forward.
        again_s: (n,) recompute and backward; 0 where there is none.
        ahead_s: (n + 1,) longest recompute of all segments in front, on any GPU.
        forward_bytes: (n,) at least uploaded by a forward stage that has the segment.
        backward_bytes: (n,) the same of a backward stage.
        gradient_bytes: (n,) at least made, and sent down, by a backward stage.
        forward_jobs: (n,) most jobs of a forward stage: 1 if it changes buffers.
        fused_s: (n,) forward and backward of the fused stage.
        fused_bytes: (n,) uploaded by it.
        fused_gradients: (n,) made by it.
        path_s: (n + 1,) start of the first forward of s, but for uploads of later segments.
        start_s: (n + 1,) start of the first forward of s.
        back_s: (n + 1,) from the end of s, or of the fused stage, to the end of all but for other gradients.
        end_s: (n + 1,) the same with the gradients of s itself and of segments in front.
        fused_start_s: (n,) start of the fused stage.
        fused_end_s: (n,) from its end to the end of all.
        update_s: The optimizer's work on the host.
    """

    def __init__(self, chain: SegmentChain, tables: Tables, machine: Machine, microbatches: int) -> None:
        segments, n = chain.segments, tables.segments
        self.machine, self.microbatches = machine, microbatches
        backward = np.arange(n) >= chain.first_backward
        self.forward_s = np.array([s.forward_s for s in segments])
        self.again_s = np.array([s.recompute_s + s.backward_s for s in segments]) * backward
        gpus = range(machine.speed.size) if chain.kinds else (0,)
        recompute = [max(chain.recompute_s_on(gpu, s) for gpu in gpus) for s in range(n)]
        self.ahead_s = np.concatenate(([0.0], np.cumsum(recompute)))
        # A stage with several users of a tied tensor has it once; which it has is not known here.
        weights = np.array([s.weight_bytes for s in segments], float)
        gradients = np.array([s.gradient_bytes for s in segments], float)
        for tied in chain.tied:
            for user in sorted(tied.segments)[1:]:
                weights[user] -= tied.weight_bytes
                gradients[user] -= tied.gradient_bytes
        self.forward_bytes = np.maximum(weights, 0.0)
        self.backward_bytes = self.forward_bytes * backward
        self.gradient_bytes = np.maximum(gradients, 0.0) * backward
        self.forward_jobs = np.array([1 if s.state_bytes else microbatches for s in segments])
        self.fused_s, self.fused_bytes, self.fused_gradients = tables.fused[:, [0, 2, 3]].T
        own = gradient_bytes(chain, range(n))
        self.update_s = sum(own.values()) * machine.update_s_per_byte
        self._find_ends(np.array([s.backward_s for s in segments]), own, chain.first_backward)
        self._find_fitting(chain, tables)

    def _find_ends(self, backward_s: np.ndarray, own: dict[int, int], first_backward: int) -> None:
        """Where the paths begin and end, and how far it is from there."""
        machine, n = self.machine, len(self.forward_s)
        fastest, latency_s = float(machine.speed.max()), machine.latency_s
        alone = machine.iterations == 1 and not machine.update_s_per_byte
        trained = (self.gradient_bytes > 0) & (self.forward_bytes > 0)
        self.origin = 0 if alone else int(np.argmax(trained)) if trained.any() else n
        self.first = max(self.origin, first_backward)
        uploads_s = self.forward_bytes / machine.up_bytes_per_s + latency_s * (self.forward_bytes > 0)
        downloads_s = self.gradient_bytes / machine.down_bytes_per_s + latency_s * (self.gradient_bytes > 0)
        ready_s = last_s = 0.0
        if self.origin < n:
            ready_s = float(uploads_s[self.origin]) + own[self.origin] * machine.update_s_per_byte
        if self.first < n:
            last_s = float(downloads_s[self.first])
        steps_s = self.forward_s / fastest * (np.arange(n) >= self.origin)
        back_s = backward_s / fastest * (np.arange(n) >= self.first)
        self.path_s = ready_s + np.concatenate(([0.0], np.cumsum(steps_s)))
        self.back_s = last_s + np.concatenate(([0.0], np.cumsum(back_s)))
        self.start_s, self.end_s = self.path_s.copy(), self.back_s.copy()
        self.fused_start_s, self.fused_end_s = self.path_s[:-1].copy(), self.back_s[:-1].copy()
        if machine.iterations == 1:
            # An upload may come ahead of the iteration if no update of the one before changes it.
            waits = trained | alone
            self._add_uploads(uploads_s * waits, steps_s, alone, self.forward_bytes * waits)
            self._add_downloads(downloads_s, back_s)

    def _add_uploads(
        self, uploads_s: np.ndarray, steps_s: np.ndarray, alone: bool, waiting_bytes: np.ndarray
    ) -> None:
        """Nothing starts before its weights are there."""
        for s, upload_s in enumerate(uploads_s.tolist()):
            self.start_s[s] = max(self.start_s[s], upload_s)
            self.start_s[s + 1] = max(self.start_s[s + 1], self.start_s[s] + steps_s[s])
        fused = self.fused_bytes if alone else np.cumsum(waiting_bytes[::-1])[::-1]
        upload_s = fused / self.machine.up_bytes_per_s + self.machine.latency_s * (fused > 0)
        self.fused_start_s = np.maximum(self.start_s[:-1], upload_s)

    def _add_downloads(self, downloads_s: np.ndarray, back_s: np.ndarray) -> None:
        """Behind everything its gradients have to come down."""
        for s, download_s in enumerate(downloads_s.tolist()):
            behind_s = self.end_s[s - 1] + back_s[s - 1] if s else 0.0
            self.fused_end_s[s] = max(self.back_s[s], behind_s)
            self.end_s[s] = max(self.fused_end_s[s], download_s)
        made = self.fused_gradients
        download_s = made / self.machine.down_bytes_per_s + self.machine.latency_s * (made > 0)
        self.fused_end_s = np.maximum(self.fused_end_s, download_s)

    def _find_fitting(self, chain: SegmentChain, tables: Tables) -> None:
        """What a fused stage has on its GPU while it runs: no less than its buffers and its own need."""
        costs, n = StageCosts(chain, self.machine.speed.size, self.microbatches), len(self.forward_s)
        needs = [costs.workspaces.of(Stage(0, StageKind.FB, begin, n - 1)) for begin in range(n)]
        inputs = np.cumsum([s.input_bytes for s in chain.segments[::-1]])[::-1]
        made = [b if s > chain.first_backward else 0 for s, b in enumerate(costs.crossing_gradients[:n])]
        around = np.array(costs.crossing[:n]) + np.array(made)
        needs = np.array(needs) + self.fused_bytes + self.fused_gradients + inputs + around + LOSS_BYTES
        self._widest = np.count_nonzero(self.machine.limit_bytes[:, None] >= needs, axis=0)
        changes = np.cumsum([bool(s.state_bytes) for s in chain.segments[::-1]])[::-1]
        self._widest = np.where(changes > 0, np.minimum(self._widest, 1), self._widest)
        self.fitting = [begin for begin in range(tables.first_fused, n) if self._widest[begin]]

    def widest(self, begin: int) -> int:
        """The most GPUs that may run a fused stage."""
        return int(self._widest[begin])

    def work_s(self, begin: int, *, all_of_it: bool = False) -> float:
        """What all microbatches compute, at speed 1; of the segments that count for paths, or all of it."""
        origin, first = (0, 0) if all_of_it else (self.origin, self.first)
        each = float(
            self.forward_s[origin:begin].sum() + self.fused_s[begin] + self.again_s[first:begin].sum()
        )
        return self.microbatches * each

    def line_s(
        self, begin: int, fused_s: np.ndarray | float, late_s: np.ndarray | float, early_s: np.ndarray | float
    ) -> np.ndarray:
        """From the first upload to the last gradient on a GPU that is at the fused stage for `fused_s`.

        Args:
            begin: Of the fused stage.
            fused_s: On a GPU of speed 1.
            late_s: By how much its first microbatch comes later than the first of all.
            early_s: By how much its last one must end sooner than the last of all.
        """
        if self.origin == len(self.forward_s):
            return np.zeros(np.shape(fused_s))
        start_s = np.maximum(self.fused_start_s[begin], self.path_s[begin] + late_s)
        end_s = np.maximum(self.fused_end_s[begin], self.back_s[begin] + early_s)
        line_s = start_s + fused_s / float(self.machine.speed.max()) + end_s
        return line_s / 2 if self.machine.iterations > 1 else line_s

    def slower_half(
        self, seconds: np.ndarray, nbytes: np.ndarray, low: int, begin: int
    ) -> tuple[float, float]:
        """Of the segments between, what the slower half takes at least, on the fastest GPU, and its bytes."""
        if low >= begin:
            return 0.0, 0.0
        half_s = float(np.median(seconds[low:begin]))
        slower = seconds[low:begin] >= half_s
        return half_s / float(self.machine.speed.max()), float(nbytes[low:begin][slower].sum())


class Idle:
    """What GPUs lack in work at both ends of an iteration.

    By the moment t, at most min(M c, r v (t - start)) seconds of a segment have been computed, of M c in all:
    on the r GPUs that have a job of it, of speed v at most. What is missing of V t, with V the speed of all
    GPUs together, is idle. No recompute lies before the moments that are looked at: one may run ahead of its
    gradient, but no other action comes between it and its backward, so that what gap there is may as well lie
    in front of both. Likewise in the last t seconds, in which no forward runs any more: recompute and
    backward of a segment end `end_s` before the end.

    Jobs of a segment take traffic: r - 1 times its bytes beyond the least. What the dispatch makes of that
    is not known; but for any price of a byte, work less price is at most what it is when every segment takes
    the number of jobs that is best for it, plus the price of all that traffic allows (a Lagrangian bound).
    The best of several prices is taken, and the best two moments that do not overlap.
    """

    def __init__(self, reach: Reach, most_jobs: int, limited: bool) -> None:
        self.reach, self.most_jobs = reach, most_jobs
        speed, paid = reach.machine.speed, reach.forward_bytes[reach.forward_bytes > 0]
        self._all, self._fastest = float(speed.sum()), float(speed.max())
        self.prices = np.zeros(1)
        most_s = max(float(reach.start_s[-1]), float(reach.end_s[-1]))
        if limited and paid.size and most_s > 0:
            scale = self._fastest * most_s / float(np.median(paid))
            self.prices = np.concatenate(([0.0], scale * 0.5 ** np.arange(_PRICES)))

    def least(self, begin: int, jobs: np.ndarray, spare_bytes: np.ndarray, least_s: np.ndarray) -> np.ndarray:
        """Idle seconds at speed 1 at both ends.

        Args:
            begin: Of the fused stage.
            jobs: (k,) GPUs that run it.
            spare_bytes: (k,) what traffic leaves for other jobs beyond one a stage.
            least_s: (k,) what the iteration takes at least: moments of both ends must fit into that.
        """
        reach, low, high = self.reach, self.reach.origin, self.reach.first
        if low == len(reach.forward_s):
            return np.zeros(jobs.size)
        fused_s = float(reach.fused_s[begin])
        arrives_s = float(reach.fused_start_s[begin]) + fused_s / self._fastest
        until_s = arrives_s - float(reach.ahead_s[begin])
        up_t = self._moments([*reach.start_s[low:begin], reach.fused_start_s[begin], until_s], until_s)
        last_s = float(reach.fused_end_s[begin]) + fused_s / self._fastest
        down_t = self._moments([*reach.end_s[high:begin], reach.fused_end_s[begin], last_s], last_s)
        up_fused = self._fused(up_t - reach.fused_start_s[begin], begin, jobs)
        down_fused = self._fused(down_t - reach.fused_end_s[begin], begin, jobs)
        # By job count and moment of the end, the last moment of the beginning before it.
        place = np.searchsorted(up_t, least_s[:, None] - down_t, side="right") - 1
        jobs_up = np.minimum(reach.forward_jobs[low:begin], self.most_jobs)
        jobs_down = np.full(max(0, begin - high), self.most_jobs)
        best = np.zeros(jobs.size)
        for price in self.prices:
            prices = price * reach.forward_bytes[low:begin]
            work = self._work(up_t, reach.start_s[low:begin], reach.forward_s[low:begin], jobs_up, prices)
            up = self._all * up_t - up_fused - work
            prices = price * reach.backward_bytes[high:begin]
            work = self._work(down_t, reach.end_s[high:begin], reach.again_s[high:begin], jobs_down, prices)
            down = self._all * down_t - down_fused - work
            both = np.take_along_axis(np.maximum.accumulate(up, axis=1), np.maximum(place, 0), axis=1) + down
            both = np.where(place >= 0, both, -np.inf).max(axis=1)
            best = np.maximum(best, both - (price * spare_bytes if price else 0.0))
        return best

    def _moments(self, moments: Sequence[float], until_s: float) -> np.ndarray:
        """Some of the moments, in order, from 0 on."""
        found = np.unique([0.0, *(t for t in moments if 0 < t <= until_s)])
        return found[np.unique(np.linspace(0, found.size - 1, _MOMENTS).astype(int))]

    def _fused(self, since_s: np.ndarray, begin: int, jobs: np.ndarray) -> np.ndarray:
        """(k, t) the most that k GPUs have computed of the fused stage."""
        most = self.reach.microbatches * float(self.reach.fused_s[begin])
        return np.minimum(most, jobs[:, None] * self._fastest * np.maximum(since_s, 0.0))

    def _work(
        self,
        moments: np.ndarray,
        starts_s: np.ndarray,
        seconds: np.ndarray,
        most_jobs: np.ndarray,
        prices: np.ndarray,
    ) -> np.ndarray:
        """(t,) the most work less price that all other stages have done, with the best numbers of jobs."""
        most = self.reach.microbatches * seconds
        each = self._fastest * np.maximum(moments[:, None] - starts_s, 0.0)  # what one job has done
        with np.errstate(divide="ignore", invalid="ignore"):
            wanted = np.clip(np.where(each > 0, most / each, 1.0), 1.0, most_jobs)
        jobs = np.where(each > prices, wanted, 1.0)
        return (np.minimum(most, jobs * each) - prices * (jobs - 1.0)).sum(axis=1)
