"""When jobs' weights, gradients and microbatches may be on a GPU: the slots of `insert-transfers`."""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rpcompile.ir import COMPUTE_OPS, Action, Op, Stream

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from rpcompile.buffers import ParsedNames


@dataclass(frozen=True)
class Tenure:
    """One job's stay on its GPU.

    Attributes:
        job: Its index.
        behind: Jobs that must have left before this one may come, besides those of tenures before.
    """

    job: int
    behind: tuple[int, ...]


def tenures(jobs: Sequence[int], resident_jobs: int) -> list[Tenure]:
    """The stays of one GPU's jobs, by first use.

    A job may come when at most `resident_jobs` - 1 of those before it (by first use) are still there;
    those whose last use comes last are the ones that stay. A job that is used after this one begins
    has to stay in any case: where a GPU alternates between more jobs than `resident_jobs`, all of
    those are there, and no others.

    Args:
        jobs: The job of each compute action of the GPU, in order.
        resident_jobs: The slots.
    """
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for position, job in enumerate(jobs):
        first.setdefault(job, position)
        last[job] = position
    leaving: list[int] = []  # the jobs so far, by last use
    gone = 0
    found: list[Tenure] = []
    for job in first:
        before = gone
        while gone <= len(leaving) - resident_jobs and last[leaving[gone]] < first[job]:
            gone += 1
        found.append(Tenure(job, tuple(leaving[before:gone])))
        insort(leaving, job, key=last.__getitem__)
    return found


def limit_residency(
    emitted: Iterable[Action], stays: dict[int, list[Tenure]], slots: int, names: ParsedNames
) -> Iterator[Action]:
    """Makes what fills memory wait (`after`) for what empties it, GPU by GPU.

    A prefetch waits for the weights, and the first gradient of a job for the gradients, of the jobs
    that its tenure lies behind; a microbatch's copies up (or its compute, for the output's sake) wait
    for the input (or output) of the microbatch `slots` before.

    Args:
        emitted: All actions; what one has to wait for comes before it.
        stays: By GPU, the tenures of its jobs.
        slots: Microbatches whose copies in one direction may be on a GPU at once.
        names: The buffers' names.
    """
    gpus = {gpu: _Gpu(tenures, slots, names) for gpu, tenures in stays.items()}
    for action in emitted:
        after = gpus[action.gpu].admit(action)
        yield action.ordered(after) if after else action


class _Leaving:
    """What ends each job's hold on one kind of memory of one GPU."""

    def __init__(self, stays: list[Tenure]) -> None:
        self._stays = stays
        self._place = {tenure.job: place for place, tenure in enumerate(stays)}
        self._admitted = 0
        self.ends: dict[int, list[str]] = {tenure.job: [] for tenure in stays}

    def admit(self, job: int) -> list[str]:
        """What `job` has to wait for, as far as no job on the same queue did before."""
        reached = self._place[job] + 1
        behind = [other for tenure in self._stays[self._admitted : reached] for other in tenure.behind]
        self._admitted = max(self._admitted, reached)
        return [end for other in behind for end in self.ends[other]]


class _Gpu:
    """Who frees what on one GPU, in order."""

    def __init__(self, stays: list[Tenure], slots: int, names: ParsedNames) -> None:
        self.slots = slots
        self.names = names
        self.weights = _Leaving(stays)
        self.gradients = _Leaving(stays)
        self.inputs: list[str] = []  # what ends the input of each microbatch's last compute action
        self.outputs: list[str | None] = []  # what ends its output's way down, if it has one

    def admit(self, action: Action) -> tuple[str, ...]:
        """What the next action that was emitted for this GPU has to wait for."""
        after: list[str | None] = []
        if action.op is Op.FREE:
            self._free(action)
        elif action.op is Op.PREFETCH:
            after += self.weights.admit(action.job)
        elif action.op in (Op.LOAD, Op.RECEIVE):
            if len(self.inputs) >= self.slots:
                after.append(self.inputs[-self.slots])
        elif action.op is Op.RECOMPUTE:
            pass  # what it was given and what it makes stay for its BACKWARD
        elif action.op in COMPUTE_OPS:
            if len(self.outputs) >= self.slots:
                after.append(self.outputs[-self.slots])
            if self._has(action.writes, "gradients") and not self._has(action.reads, "gradients"):
                after += self.gradients.admit(action.job)
            self._hold_without_weights(action)
            self.inputs.append(action.id)
            self.outputs.append(None)
        elif action.microbatch is not None and action.stream is Stream.D2H:
            self.outputs[-1] = action.id
        return tuple([name for name in after if name is not None]) if after else ()

    def _free(self, action: Action) -> None:
        if action.microbatch is not None:
            if action.stream is Stream.COMPUTE:
                self.inputs[-1] = action.id
            elif action.stream is Stream.D2H:
                self.outputs[-1] = action.id
            return
        for kind, leaving in (("weights", self.weights), ("gradients", self.gradients)):
            if self._has(action.frees, kind):
                leaving.ends[action.job].append(action.id)

    def _hold_without_weights(self, action: Action) -> None:
        """A job without weights counts too: next to it, memory holds those of no more jobs than ever."""
        if not self._has(action.reads, "weights"):
            self.weights.ends[action.job] = [action.id]

    def _has(self, buffers: tuple[str, ...], kind: str) -> bool:
        return any(self.names[buffer].kind == kind for buffer in buffers)
