"""Partitions by brute force, and what they cost straight from the definitions."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from rpcompile.ir import Hardware, Segment, SegmentChain, StageKind

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rpcompile.ir import Stage, TiedWeight

Spans = list[tuple[StageKind, int, int]]
"""Stages as (kind, first, last)."""

F, FB, B = StageKind.F, StageKind.FB, StageKind.B
SLOW_LINK = Hardware(
    name="toy",
    memory_bytes=10_000,
    usable_bytes=10_000,
    flops_per_s=1.0,
    memory_bytes_per_s=1.0,
    h2d_bytes_per_s=1.0,
    d2h_bytes_per_s=1.0,
    latency_s=0.0,
    sources={},
)
NOTHING: dict[str, Any] = {
    "forward_flops": 0,
    "backward_flops": 0,
    "weight_bytes": 0,
    "gradient_bytes": 0,
    "state_bytes": 0,
    "input_bytes": 0,
    "boundary_bytes": 0,
    "boundary_gradient_bytes": 0,
    "saved_bytes": 0,
    "peak_bytes": 0,
    "forward_peak_bytes": 0,
    "saved_input_bytes": 0,
    "rematerialised_bytes": 0,
}


def segment(
    name: str, forward_s: float, backward_s: float, *, needs_backward: bool = True, **sizes: Any
) -> Segment:
    """A segment of no bytes but the given ones."""
    return Segment(
        name=name,
        nodes=(),
        parameters=(),
        inputs=(),
        boundary=(),
        boundary_gradients=(),
        forward_s=forward_s,
        backward_s=backward_s,
        needs_backward=needs_backward,
        source="given",
        **(NOTHING | sizes),
    )


def make_chain(
    *segments: Segment, hardware: Hardware = SLOW_LINK, tied: tuple[TiedWeight, ...] = ()
) -> SegmentChain:
    return SegmentChain(segments, {"batch": 4, "sequence": 2048}, hardware, tied)


def seldom() -> dict[str, tuple[SegmentChain, int]]:
    """Chains and numbers of microbatches whose memory, on one GPU, hangs on what random ones seldom show."""
    one = {"weight_bytes": 1, "boundary_bytes": 1, "boundary_gradient_bytes": 1}
    sizes: dict[str, list[dict[str, Any]]] = {
        # The tail's gradients may still be there two jobs on, for the jobs between make none.
        "frozen between": [{}, {"peak_bytes": 40}, {}, {"gradient_bytes": 9}],
        "frozen behind": [{"peak_bytes": 40, "gradient_bytes": 5}, {}, {}, {"gradient_bytes": 9}],
        # What is handed on and copied down as well outlasts the job that reads it.
        "read and on its way": [{"boundary_bytes": 20}, {}, {"forward_peak_bytes": 200}, {}],
        "read at both ends": [
            {"boundary_bytes": 20},
            {"boundary_bytes": 30, "forward_peak_bytes": 200},
            {},
            {},
        ],
    }
    return {
        name: (make_chain(*(segment(f"s{i}", 1, 1, **(one | own)) for i, own in enumerate(given))), 3)
        for name, given in sizes.items()
    }


def text(stages: tuple[Stage, ...]) -> str:
    """E.g. "F0-1 FB2-2 B0-1"."""
    return " ".join(f"{stage.kind}{stage.first}-{stage.last}" for stage in stages)


def every_microbatch_s(
    compute: Sequence[float], upload: Sequence[float], hop: Sequence[float], gpus: int, microbatches: int
) -> tuple[list[float], list[float]]:
    """Start of the first and end of the last microbatch of each job, one microbatch at a time."""
    end: dict[tuple[int, int], float] = {}
    starts: list[float] = []
    uploaded: list[float] = []
    for j in range(len(compute)):
        begin = uploaded[j - gpus] if j >= gpus else 0
        begin = max(begin, end[j - 2 * gpus, microbatches - 1]) if j >= 2 * gpus else begin
        uploaded.append(begin + upload[j])
        for m in range(microbatches):
            ready = [uploaded[j]]
            if j:
                ready.append(end[j - 1, m] + hop[j])
            if m:
                ready.append(end[j, m - 1])
            if j >= gpus:
                ready.append(end[j - gpus, microbatches - 1])
            end[j, m] = max(ready) + compute[j]
            if m == 0:
                starts.append(max(ready))
    return starts, [end[j, microbatches - 1] for j in range(len(compute))]


def tilings(first: int, last: int) -> Iterator[tuple[tuple[int, int], ...]]:
    """All ways to divide first..last into runs."""
    if last < first:
        yield ()
        return
    for cuts in itertools.product((False, True), repeat=last - first):
        ends = [first + i for i, cut in enumerate(cuts) if cut] + [last]
        begins = [first, *(end + 1 for end in ends[:-1])]
        yield tuple(zip(begins, ends, strict=True))


def all_partitions(chain: SegmentChain, mode: str) -> Iterator[Spans]:
    """Every partition of the chain."""
    n, g = len(chain.segments), chain.first_backward
    if mode == "forward":
        for up in tilings(0, n - 1):
            yield [(F, *run) for run in up]
        return
    for t in range(n):
        for up, down in itertools.product(tilings(0, t - 1), tilings(g, t - 1)):
            yield [(F, *run) for run in up] + [(FB, t, n - 1)] + [(B, *run) for run in reversed(down)]


def price(chain: SegmentChain, stages: Spans, gpus: int, microbatches: int) -> tuple[float, int]:
    """Iteration seconds and largest residency, straight from the definitions."""
    hw, segments, n = chain.hardware, chain.segments, len(chain.segments)
    sets, backward_starts = min(2, microbatches), {first for kind, first, _ in stages if kind is B}
    compute: list[float] = []
    upload: list[float] = []
    hop = [0.0]
    weights: list[int] = []
    gradients: list[int] = []
    lingering: list[int] = []
    load: list[int] = []
    store: list[int] = []
    behind: list[int] = []
    alone: list[int] = []
    begin: list[int] = []
    for kind, first, last in stages:
        inside = segments[first : last + 1]
        again = [(t, max(0, sum(first <= s <= last for s in t.segments) - 1)) for t in chain.tied]
        weights.append(sum(s.weight_bytes for s in inside) - sum(t.weight_bytes * k for t, k in again))
        upload.append(weights[-1] / hw.h2d_bytes_per_s + hw.latency_s)
        compute.append(sum(s.forward_s + (0 if kind is F else s.backward_s) for s in inside))
        kept = [s.attention for s in inside if s.offloads and s.attention]
        compute[-1] -= sum(a.forward_s for a in kept) if kind is B else 0
        made = sum(s.gradient_bytes for s in inside) - sum(t.gradient_bytes * k for t, k in again)
        gradients.append(0 if kind is F else made)
        lingering.append(0 if kind is B else sum(s.weight_bytes for s in inside if s.state_bytes))

        x_in = segments[first - 1].boundary_bytes if first else 0
        dx_out = segments[first - 1].boundary_gradient_bytes if first else 0
        x_out = segments[last].boundary_bytes if last < n - 1 else 0
        dx_in = segments[last].boundary_gradient_bytes if last < n - 1 else 0
        into, out = {F: (x_in, x_out), FB: (x_in, dx_out), B: (dx_in, dx_out)}[kind]
        hop_s = out / hw.d2h_bytes_per_s + out / hw.h2d_bytes_per_s + 2 * hw.latency_s
        hop.append(hop_s if gpus > 1 else 0.0)

        load.append(sum(s.input_bytes for s in inside) + (x_in if kind is B else 0))
        load[-1] += sum(a.nbytes for a in kept) if kind is B else 0
        store.append(4 if last == n - 1 else 0)
        if kind is F:
            store[-1] += sum(a.nbytes for a in kept)
            store[-1] += sum(
                segments[s - 1].boundary_bytes for s in range(first + 1, last + 1) if s in backward_starts
            )
        # On one GPU, what stays there; some of it is also on its way down, once it has been read.
        late = gpus == 1 and kind is F and first in backward_starts
        held = [m * into + (microbatches + 1 - m) * out for m in range(1, microbatches + 1)]
        held = [nbytes + (into if late and m < microbatches else 0) for m, nbytes in enumerate(held, start=1)]
        behind.append(store[-1] + (into if late else 0))
        begins = microbatches * into
        if gpus > 1:
            load[-1], store[-1], held, begins = load[-1] + into, store[-1] + out, [0], 0
            behind[-1] = store[-1]
        workspace = own_bytes(segments, kind, first, last)
        workspace += 0 if kind is F else sum(t.gradient_bytes * k for t, k in again)
        alone.append(workspace + max(held))
        begin.append((workspace if kind is B else 0) + begins)
    resident: list[int] = []
    for j in range(len(stages)):
        line = range(j % gpus, len(stages), gpus)  # the jobs of this GPU
        before = [k for k in line if k < j]
        beside = [0, *(weights[k] for k in [j + gpus] if k in line), *(lingering[k] for k in before[-1:])]
        up = sorted([load[j]] * sets + [load[k] for k in [j + gpus] if k in line])[-2:]
        both = weights[j] + max(beside) + sum(up)
        # While it runs: copies down of its own, or of the microbatch before and its own.
        down = max(2 * store[j] if sets == 2 else 0, store[j] + sum(behind[k] for k in before[-1:]))
        resident.append(both + alone[j] + down + there(gradients, [*before, j]))
        # Before its first result: all that was made before.
        down = sum([behind[k] for k in before for _ in range(sets)][-2:])
        resident.append(both + begin[j] + down + there(gradients, before))
    return every_microbatch_s(compute, upload, hop, gpus, microbatches)[1][-1], max(resident)


def there(gradients: Sequence[int], jobs: Sequence[int]) -> int:
    """The gradients that may be on a GPU behind its jobs so far.

    The last job to make any has waited until those of two jobs before had left. No job since has.
    """
    while jobs and not gradients[jobs[-1]]:
        jobs = jobs[:-1]
    return sum(gradients[k] for k in jobs[-2:])


def own_bytes(segments: Sequence[Segment], kind: StageKind, first: int, last: int) -> int:
    """What a stage needs besides its buffers, moment by moment."""
    x = [*(s.boundary_bytes for s in segments[:-1]), 0, 0]  # x[-1] is in front of the first segment
    dx = [*(s.boundary_gradient_bytes for s in segments[:-1]), 0, 0]
    stage, moments = range(first, last + 1), []
    needs = [s.attention if kind is not FB and s.offloads and s.attention else s for s in segments]
    for now in stage:
        if kind is F:
            there = x[now - 1] if now > first else 0
            moments.append(there + needs[now].forward_peak_bytes + x[now] - x[last])
            continue
        saved = sum(needs[i].saved_bytes for i in stage if i <= now)
        saved += sum(segments[i].saved_input_bytes for i in stage if first < i <= now)
        made = dx[now - 1] - dx[first - 1]
        moments.append(saved + needs[now].peak_bytes + made + (dx[now] if now < last else 0))
    total = max(moments) + max(segments[i].rematerialised_bytes for i in stage)
    return max(0, total + (sum(segments[i].state_bytes for i in stage) if kind is B else 0))


def price_all(chain: SegmentChain, gpus: int, microbatches: int, mode: str) -> list[tuple[float, int]]:
    """Seconds and residency of every partition there is."""
    return [price(chain, stages, gpus, microbatches) for stages in all_partitions(chain, mode)]
