"""partition-stages: the time model against every microbatch, the solver against brute force."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpcompile.errors import InvalidArgument, PartitionError, StageTooLarge
from rpcompile.ir import Hardware, Segment, SegmentChain, Stage, StageKind, TiedWeight
from rpcompile.passes._stage_search import StageSearch
from rpcompile.passes.partition_stages import PartitionStages
from rpcompile.round_robin_time import StageCosts, run_jobs, stages_between

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
}


def segment(
    name: str, forward_s: float, backward_s: float, *, needs_backward: bool = True, **sizes: int
) -> Segment:
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


def text(stages: tuple[Stage, ...]) -> str:
    return " ".join(f"{stage.kind}{stage.first}-{stage.last}" for stage in stages)


# ---------------------------------------------------------------- oracle


def every_microbatch_s(compute, upload, hop, gpus: int, microbatches: int) -> tuple[list, list]:
    """Start of the first and end of the last microbatch of each job, one microbatch at a time."""
    end: dict[tuple[int, int], float] = {}
    starts, uploaded = [], []
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


def tilings(first: int, last: int):
    """All ways to divide first..last into runs."""
    if last < first:
        yield ()
        return
    for cuts in itertools.product((False, True), repeat=last - first):
        ends = [first + i for i, cut in enumerate(cuts) if cut] + [last]
        begins = [first, *(end + 1 for end in ends[:-1])]
        yield tuple(zip(begins, ends, strict=True))


def all_partitions(chain: SegmentChain, mode: str):
    n, g = len(chain.segments), chain.first_backward
    if mode == "forward":
        for up in tilings(0, n - 1):
            yield [(F, *run) for run in up]
        return
    for t in range(n):
        for up, down in itertools.product(tilings(0, t - 1), tilings(g, t - 1)):
            yield [(F, *run) for run in up] + [(FB, t, n - 1)] + [(B, *run) for run in reversed(down)]


def price(chain: SegmentChain, stages, gpus: int, microbatches: int) -> tuple[float, int]:
    """Iteration seconds and largest residency, straight from the definitions."""
    hw, segments = chain.hardware, chain.segments
    compute, upload, hop, weights, memory = [], [], [0.0], [], []
    for index, (kind, first, last) in enumerate(stages):
        inside = segments[first : last + 1]
        once = [(t, max(0, sum(first <= s <= last for s in t.segments) - 1)) for t in chain.tied]
        weights.append(sum(s.weight_bytes for s in inside) - sum(t.weight_bytes * k for t, k in once))
        compute.append(sum(s.forward_s + (0 if kind is F else s.backward_s) for s in inside))
        upload.append(weights[-1] / hw.h2d_bytes_per_s + hw.latency_s)
        if index + 1 < len(stages):
            out = segments[last].boundary_bytes if kind is F else segments[first - 1].boundary_gradient_bytes
            there_s = out / hw.d2h_bytes_per_s + out / hw.h2d_bytes_per_s + 2 * hw.latency_s
            hop.append(there_s if gpus > 1 else 0.0)
        cuts = [segments[s] for s in (first - 1, last) if s >= 0]
        need = weights[-1] + max(s.peak_bytes for s in inside) + sum(s.input_bytes for s in inside)
        need += sum(s.boundary_bytes for s in cuts)
        if kind is not F:
            need += sum(s.saved_bytes + s.gradient_bytes for s in inside)
            need += sum(s.boundary_gradient_bytes for s in cuts) - sum(t.gradient_bytes * k for t, k in once)
        memory.append(need)
    resident = [need + (weights[j + gpus] if j + gpus < len(stages) else 0) for j, need in enumerate(memory)]
    return every_microbatch_s(compute, upload, hop, gpus, microbatches)[1][-1], max(resident)


def price_all(chain: SegmentChain, gpus: int, microbatches: int, mode: str) -> list[tuple[float, int]]:
    """Seconds and residency of every partition there is."""
    return [price(chain, stages, gpus, microbatches) for stages in all_partitions(chain, mode)]


# ---------------------------------------------------------------- the time model


@given(
    jobs=st.lists(st.tuples(*[st.integers(0, 9)] * 3), min_size=1, max_size=12),
    gpus=st.integers(1, 5),
    microbatches=st.integers(1, 6),
)
def test_two_times_a_job_say_what_every_microbatch_says(jobs, gpus: int, microbatches: int) -> None:
    compute, upload, hop = map(list, zip(*jobs, strict=True))
    hop[0] = 0
    assert run_jobs(compute, upload, hop, gpus, microbatches) == every_microbatch_s(
        compute, upload, hop, gpus, microbatches
    )


def test_jobs_by_hand() -> None:
    # GPU 0: upload 0..1, run 1..5; GPU 1: upload 0..1, first microbatch ready at 1 + 2 + 1 = 4.
    # Job 2 is uploaded to GPU 0 beside job 0, at 1..2, and gets its first microbatch at 4 + 1 + 2 = 7.
    starts, ends = run_jobs([2, 1, 3], [1, 1, 1], [0, 1, 2], gpus=2, microbatches=2)
    assert starts == [1, 4, 7]
    assert ends == [5, 7, 13]


def test_third_upload_waits_for_the_first_job() -> None:
    starts, ends = run_jobs([5, 5, 5], [1, 1, 4], [0, 0, 0], gpus=1, microbatches=1)
    assert (starts, ends) == ([1, 6, 11], [6, 11, 16])
    starts, ends = run_jobs([5, 5, 5], [1, 1, 7], [0, 0, 0], gpus=1, microbatches=1)
    assert (starts, ends) == ([1, 6, 13], [6, 11, 18])


def test_stages_between_cuts() -> None:
    assert text(stages_between((0, 1, 5, 6), 3)) == "F0-0 FB1-2 B0-0"
    assert text(stages_between((0, 1, 3), 3)) == "F0-0 F1-2"
    assert text(stages_between((0, 2, 5), 3)) == "F0-1 FB2-2"


def test_costs_of_a_stage_by_hand() -> None:
    tied = TiedWeight("embed.weight", (0, 2), weight_bytes=100, gradient_bytes=50)
    wide: dict[str, Any] = {
        "weight_bytes": 100,
        "gradient_bytes": 50,
        "boundary_bytes": 7,
        "boundary_gradient_bytes": 3,
    }
    slim: dict[str, Any] = {
        "weight_bytes": 30,
        "gradient_bytes": 30,
        "boundary_bytes": 8,
        "boundary_gradient_bytes": 2,
    }
    head: dict[str, Any] = {"weight_bytes": 110, "gradient_bytes": 60}
    chain = make_chain(
        segment("embed", 1, 2, saved_bytes=1000, peak_bytes=20, input_bytes=4, **wide),
        segment("mlp", 3, 5, saved_bytes=2000, peak_bytes=40, **slim),
        segment("head", 7, 9, saved_bytes=4000, peak_bytes=90, input_bytes=5, **head),
        hardware=replace(SLOW_LINK, h2d_bytes_per_s=2.0, latency_s=0.5),
        tied=(tied,),
    )
    costs = StageCosts(chain)
    forward, backward, whole = Stage(0, F, 0, 1), Stage(0, B, 1, 1), Stage(0, FB, 0, 2)
    assert [costs.compute_s(s) for s in (forward, backward, whole)] == [4, 8, 27]
    assert [costs.weight_bytes(s) for s in (forward, backward, whole)] == [130, 30, 140]
    assert [costs.gradient_bytes(s) for s in (forward, backward, whole)] == [0, 30, 90]
    assert [costs.upload_s(s) for s in (forward, backward, whole)] == [65.5, 15.5, 70.5]
    assert [costs.boundary_bytes(s) for s in (forward, backward, whole)] == [8, 3, 0]
    assert costs.hop_s(forward) == 8 + 4 + 1
    assert costs.memory_bytes(forward) == 130 + 40 + 4 + 8
    assert costs.memory_bytes(backward) == 30 + 40 + 7 + 8 + 30 + 2000 + 3 + 2
    assert costs.memory_bytes(whole) == 140 + 90 + 9 + 90 + 7000
    assert costs.resident_bytes((forward, backward), gpus=1) == [182 + 30, 2120]
    assert costs.resident_bytes((forward, backward), gpus=2) == [182, 2120]


# ---------------------------------------------------------------- the solver


@st.composite
def chains(draw, most: int = 5) -> SegmentChain:
    n = draw(st.integers(1, most))
    frozen = draw(st.integers(0, n - 1))
    segments = []
    for index in range(n):
        small, boundary = st.integers(0, 6), 0 if index == n - 1 else draw(st.integers(0, 4))
        live = index >= frozen
        segments.append(
            segment(
                f"s{index}",
                float(draw(small)),
                float(draw(small)) if live else 0.0,
                weight_bytes=draw(st.integers(3, 8)),
                gradient_bytes=draw(st.integers(1, 3)) if live else 0,
                boundary_bytes=boundary,
                boundary_gradient_bytes=min(boundary, draw(small)) if live else 0,
                saved_bytes=draw(small) if live else 0,
                peak_bytes=draw(small),
                input_bytes=draw(st.integers(0, 1)),
                needs_backward=live,
            )
        )
    users = draw(st.lists(st.integers(0, n - 1), unique=True, max_size=3))
    tied = (
        (TiedWeight("w", tuple(users), draw(st.integers(1, 3)), draw(st.integers(0, 1))),)
        if len(users) > 1
        else ()
    )
    return make_chain(
        *segments, hardware=replace(SLOW_LINK, latency_s=float(draw(st.integers(0, 1)))), tied=tied
    )


@settings(max_examples=80, deadline=None)
@given(
    chain=chains(),
    gpus=st.integers(1, 3),
    microbatches=st.integers(1, 4),
    mode=st.sampled_from(("sync", "sync", "forward")),
    data=st.data(),
)
def test_optimum_is_that_of_brute_force(chain, gpus: int, microbatches: int, mode: str, data) -> None:
    gpus = min(gpus, len(chain.segments))
    prices = price_all(chain, gpus, microbatches, mode)
    sizes = sorted({resident for _, resident in prices})
    # Limits below what the best partition needs are the ones that bind.
    binding = [size for size in sizes if size < min(prices)[1]]
    limit = data.draw(st.sampled_from([sizes[0] - 1, *binding, *binding, sizes[-1]]), label="limit")
    solver = PartitionStages(gpus, microbatches, limit, time_limit_s=60.0, mode=mode)
    if limit < sizes[0]:
        with pytest.raises(PartitionError, match=r"no partition fits|needs .* for one microbatch"):
            solver.run(chain)
        return
    partition = solver.run(chain)
    stages = [(stage.kind, stage.first, stage.last) for stage in partition.stages]
    assert stages in list(all_partitions(chain, mode))
    assert [stage.index for stage in partition.stages] == list(range(len(stages)))
    seconds, resident = price(chain, stages, gpus, microbatches)
    best = min(seconds for seconds, resident in prices if resident <= limit)
    assert seconds == partition.objective_s == partition.bound_s == best
    assert resident <= limit
    assert (partition.status, partition.gap) == ("OPTIMAL", 0.0)


@settings(max_examples=30, deadline=None)
@given(chain=chains(), gpus=st.integers(1, 3), microbatches=st.integers(1, 4))
def test_without_time_the_bound_still_holds(chain, gpus: int, microbatches: int) -> None:
    gpus = min(gpus, len(chain.segments))
    best, _ = min(price_all(chain, gpus, microbatches, "sync"))
    partition = PartitionStages(gpus, microbatches, 10_000, time_limit_s=0.0).run(chain)
    assert partition.bound_s <= best <= partition.objective_s
    work_s = microbatches * sum(segment.forward_s + segment.backward_s for segment in chain.segments)
    assert partition.bound_s >= work_s / gpus - 1e-6


def transformer(layers: int, usable_bytes: int = 22_000_000_000) -> SegmentChain:
    """Attention and MLP segments, then a head of 1.7 layers, in rounded figures of an 8B model on 24 GB."""
    link = replace(
        SLOW_LINK, usable_bytes=usable_bytes, h2d_bytes_per_s=24e9, d2h_bytes_per_s=24e9, latency_s=2e-5
    )
    edge: dict[str, Any] = {"boundary_bytes": 67_000_000, "boundary_gradient_bytes": 67_000_000}
    segments: list[Segment] = []
    for layer in range(layers):
        for part, forward_s, parameters in (("attn", 0.011, 84_000_000), ("mlp", 0.021, 352_000_000)):
            sizes: dict[str, Any] = {"weight_bytes": parameters, "gradient_bytes": parameters, **edge}
            sizes |= {"saved_bytes": 500_000_000, "peak_bytes": int(forward_s * 2e10)}
            segments.append(segment(f"layers.{layer}.{part}", forward_s, 2 * forward_s, **sizes))
    sizes: dict[str, Any] = {
        "weight_bytes": 10**9,
        "gradient_bytes": 10**9,
        "saved_bytes": 3 * 10**9,
        "peak_bytes": 4 * 10**9,
    }
    return make_chain(*segments, segment("lm_head", 0.055, 0.11, **sizes), hardware=link)


def test_one_gpu_with_room_recomputes_nothing() -> None:
    chain = make_chain(segment("a", 1, 2), segment("b", 3, 4), segment("c", 5, 6))
    partition = PartitionStages(gpus=1, microbatches=3).run(chain)
    assert text(partition.stages) == "FB0-2"
    assert (partition.objective_s, partition.status, partition.memory_limit_bytes) == (
        3 * 21.0,
        "OPTIMAL",
        10_000,
    )
    assert re.fullmatch(r"CP-SAT 9\.\d+", partition.solver)
    assert partition.solve_s > 0


def test_memory_forces_recompute() -> None:
    """Each segment alone takes 5 bytes of weights, 5 of gradients and 5 prefetched; two never fit."""
    fast = replace(SLOW_LINK, h2d_bytes_per_s=1e9)
    segments = (segment(name, 1, 1, weight_bytes=5, gradient_bytes=5) for name in "abc")
    chain = make_chain(*segments, hardware=fast)
    partition = PartitionStages(gpus=1, microbatches=2, memory_limit_bytes=15).run(chain)
    assert text(partition.stages) == "F0-0 F1-1 FB2-2 B1-1 B0-0"
    roomy = PartitionStages(gpus=1, microbatches=2, memory_limit_bytes=30).run(chain)
    assert text(roomy.stages) == "FB0-2"


def test_nothing_runs_backward_below_the_first_trainable_segment() -> None:
    """LoRA on the last two segments; the heavy frozen half runs forward only."""
    frozen = [segment(f"frozen.{i}", 4, 0, needs_backward=False) for i in range(3)]
    chain = make_chain(*frozen, segment("live", 1, 1), segment("head", 1, 1))
    partition = PartitionStages(gpus=2, microbatches=8).run(chain)
    best = min(price_all(chain, 2, 8, "sync"))[0]
    assert partition.objective_s == best
    assert all(stage.first >= 3 for stage in partition.stages if stage.kind is B)
    assert [s for stage in partition.stages if stage.kind is not B for s in stage.segments] == list(range(5))


def test_a_tail_that_begins_in_the_frozen_part_has_no_backward_stages() -> None:
    frozen = segment("frozen", 1, 0, needs_backward=False)
    chain = make_chain(frozen, segment("live", 1, 1), segment("head", 1, 1))
    partition = PartitionStages(gpus=1, microbatches=2).run(chain)
    assert partition.objective_s == 10.0
    assert partition.stages[-1].kind is FB


def test_forward_only() -> None:
    """Two GPUs, four microbatches: halves of 2 s would take 10 s; the first microbatch waits 2 s."""
    chain = make_chain(*(segment(name, 1, 9) for name in "abcd"))
    partition = PartitionStages(gpus=2, microbatches=4, mode="forward").run(chain)
    assert {stage.kind for stage in partition.stages} == {F}
    assert [s for stage in partition.stages for s in stage.segments] == [0, 1, 2, 3]
    assert partition.objective_s == min(price_all(chain, 2, 4, "forward"))[0] == 9.0


def test_hops_cost_nothing_on_one_gpu() -> None:
    sizes: dict[str, Any] = {"weight_bytes": 1, "gradient_bytes": 9, "saved_bytes": 80}
    first = segment("a", 1, 1, boundary_bytes=10, boundary_gradient_bytes=10, **sizes)
    partition = PartitionStages(1, 3, memory_limit_bytes=125).run(
        make_chain(first, segment("b", 1, 1, **sizes))
    )
    assert text(partition.stages) == "F0-0 FB1-1 B0-0"
    # Nothing hides the first upload of a second; a hop would take 20 s.
    assert partition.objective_s == 1 + 3 * (1 + 2 + 2)


def test_same_seed_same_partition() -> None:
    runs = [
        PartitionStages(gpus=2, microbatches=4, time_limit_s=60, seed=5).run(transformer(3)) for _ in range(2)
    ]
    assert replace(runs[0], solve_s=0.0) == replace(runs[1], solve_s=0.0)
    assert runs[0].status == "OPTIMAL"


def test_large_chain_in_little_time() -> None:
    chain = transformer(30)
    partition = PartitionStages(gpus=4, microbatches=8, time_limit_s=0.3).run(chain)
    greedy = StageSearch(StageCosts(chain), 61, 122, 4, 8, chain.hardware.usable_bytes, 0).run(effort=0)
    assert partition.status == "FEASIBLE"
    assert partition.objective_s < greedy.iteration_s
    assert 0 < partition.gap < 0.1
    resident = StageCosts(chain).resident_bytes(partition.stages, 4)
    assert max(resident) <= chain.hardware.usable_bytes


# ---------------------------------------------------------------- mistakes


def test_bad_options() -> None:
    chain = make_chain(segment("a", 1, 1))
    with pytest.raises(InvalidArgument, match=re.escape("gpus=0 must be at least 1")):
        PartitionStages(0, 1).run(chain)
    with pytest.raises(InvalidArgument, match=re.escape("microbatches=-1 must be at least 1")):
        PartitionStages(1, -1).run(chain)
    with pytest.raises(InvalidArgument, match=re.escape("mode='async' is unknown; use one of sync, forward")):
        PartitionStages(1, 1, mode="async").run(chain)
    with pytest.raises(InvalidArgument, match=re.escape("time_limit_s=nan must be at least 0")):
        PartitionStages(1, 1, time_limit_s=math.nan).run(chain)
    with pytest.raises(InvalidArgument, match="the memory limit of 0 bytes must be at least 1"):
        PartitionStages(1, 1, memory_limit_bytes=0).run(chain)


def test_a_model_that_takes_no_time() -> None:
    chain = make_chain(*(segment(name, 0, 0, boundary_bytes=1) for name in "ab"), segment("c", 0, 0))
    partition = PartitionStages(2, 2).run(chain)
    assert (partition.objective_s, partition.bound_s, partition.status) == (0.0, 0.0, "OPTIMAL")


@pytest.mark.parametrize("seconds", [math.nan, -1.0, math.inf])
def test_times_that_are_none(seconds: float) -> None:
    with pytest.raises(
        InvalidArgument, match=f"forward_s of segment mlp is {seconds}; give a finite time >= 0"
    ):
        PartitionStages(1, 1).run(make_chain(segment("attn", 1, 1), segment("mlp", seconds, 1)))
    with pytest.raises(InvalidArgument, match=f"backward_s of segment attn is {seconds}"):
        PartitionStages(1, 1).run(make_chain(segment("attn", 1, seconds), segment("mlp", 1, 1)))


def test_links_that_are_none() -> None:
    chain = make_chain(segment("a", 1, 1), hardware=replace(SLOW_LINK, d2h_bytes_per_s=0.0))
    with pytest.raises(InvalidArgument, match=re.escape("d2h_bytes_per_s of toy is 0.0; give a rate > 0")):
        PartitionStages(1, 1).run(chain)
    chain = make_chain(segment("a", 1, 1), hardware=replace(SLOW_LINK, latency_s=-1.0))
    with pytest.raises(InvalidArgument, match=re.escape("latency_s of toy is -1.0; give a finite time >= 0")):
        PartitionStages(1, 1).run(chain)


def test_more_gpus_than_segments() -> None:
    message = "gpus=3 is more than the 2 segments of the model; use gpus=2 or fewer"
    with pytest.raises(PartitionError, match=re.escape(message)):
        PartitionStages(3, 1).run(make_chain(segment("a", 1, 1), segment("b", 1, 1)))


def test_nothing_to_train() -> None:
    chain = make_chain(segment("a", 1, 0, needs_backward=False))
    message = "none of the 1 segments has a backward, so there is nothing to train; set requires_grad"
    with pytest.raises(PartitionError, match=re.escape(message)):
        PartitionStages(1, 1).run(chain)
    assert text(PartitionStages(1, 1, mode="forward").run(chain).stages) == "F0-0"


def test_segment_too_large() -> None:
    message = (
        "lm_head needs 9.1 GB for one microbatch of batch=4, sequence=2048 but toy has 8.0 GB usable."
        " Use more microbatches (smaller ones), shorter sequences or GPUs with more memory."
    )
    with pytest.raises(StageTooLarge, match=re.escape(message)):
        PartitionStages(1, 1, memory_limit_bytes=8 * 10**9).run(transformer(2))


def test_a_wide_boundary_inside_a_stage_is_no_reason_to_give_up() -> None:
    """Alone, each half holds a boundary of 40 bytes; together they do not."""
    wide = segment("a", 1, 1, boundary_bytes=40, boundary_gradient_bytes=40)
    chain = make_chain(wide, segment("b", 1, 1))
    assert text(PartitionStages(1, 1, memory_limit_bytes=10).run(chain).stages) == "FB0-1"


def test_prefetch_does_not_fit() -> None:
    chain = make_chain(*(segment(name, 1, 1, weight_bytes=6_000_000_000) for name in ("a", "b")))
    message = (
        "no partition fits in 10.0 GB, not even with one segment a stage: F of a needs 6.0 GB and the weights"
        " prefetched behind it, of b, 6.0 GB. Use more microbatches (smaller ones), another number of GPUs or"
        " GPUs with more memory."
    )
    with pytest.raises(PartitionError, match=re.escape(message)):
        PartitionStages(1, 1, memory_limit_bytes=10_000_000_000).run(chain)


def test_no_time_to_find_one_that_fits() -> None:
    message = (
        "no partition that fits in 10.0 GB was found in time_limit_s=0.0, nor a proof that there is none"
    )
    chain = make_chain(*(segment(name, 1, 1, weight_bytes=6_000_000_000) for name in ("a", "b")))
    with pytest.raises(PartitionError, match=re.escape(message)):
        PartitionStages(1, 1, memory_limit_bytes=10_000_000_000, time_limit_s=0.0).run(chain)
