"""partition-stages: the solver against brute force, and what it says about mistakes."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ortools.sat.python import cp_model

from rpcompile.errors import InvalidArgument, PartitionError, StageTooLarge
from rpcompile.ir import AttentionOutputs, Segment, SegmentChain, StageKind, TiedWeight
from rpcompile.passes import partition_stages
from rpcompile.passes._stage_memory import MemoryRows
from rpcompile.passes._stage_search import StageSearch
from rpcompile.passes._stage_slots import StageSlots
from rpcompile.passes.partition_stages import PartitionStages
from rpcompile.round_robin_time import StageCost, StageCosts
from tests.partition_oracle import (
    FB,
    SLOW_LINK,
    B,
    F,
    Spans,
    all_partitions,
    make_chain,
    price,
    price_all,
    segment,
    seldom,
    text,
)

# ---------------------------------------------------------------- the solver


@st.composite
def chains(draw: st.DrawFn, most: int = 5) -> SegmentChain:
    """Whole seconds and small sizes, so that every limit in between binds for some partition."""
    n = draw(st.integers(1, most))
    frozen = draw(st.integers(0, n - 1))
    small, medium = st.integers(0, 6), st.integers(3, 8)
    users = draw(st.lists(st.integers(0, n - 1), unique=True, max_size=3))
    # A backward passes through some segments that have nothing to train, as with LoRA.
    untrained = set(range(n)) - set(users) if draw(st.booleans()) else set()
    segments: list[Segment] = []
    for index in range(n):
        live = index >= frozen
        boundary = 0 if index == n - 1 else draw(small)
        forward_s, attention = float(draw(small)), None
        trained = live and not (index in untrained and draw(st.booleans()))
        if live and index < n - 1 and draw(st.booleans()):
            saved_s = float(draw(st.integers(0, int(forward_s))))
            attention = AttentionOutputs(("a",), draw(small), saved_s, *(draw(small) for _ in range(3)))
        segments.append(
            segment(
                f"s{index}",
                forward_s,
                float(draw(small)) if live else 0.0,
                weight_bytes=draw(medium),
                gradient_bytes=draw(medium) if trained else 0,
                boundary_bytes=boundary,
                boundary_gradient_bytes=min(boundary, draw(small)) if live else 0,
                saved_bytes=draw(small) if live else 0,
                peak_bytes=draw(small),
                forward_peak_bytes=draw(small),
                saved_input_bytes=draw(small) if live else 0,
                rematerialised_bytes=draw(small),
                input_bytes=draw(st.sampled_from((0, 0, 5))),
                state_bytes=draw(st.sampled_from((0, 0, 3))),
                needs_backward=live,
                attention=attention,
                offloads=draw(st.booleans()),
            )
        )
    tied = TiedWeight("w", tuple(users), draw(st.integers(1, 3)), 3 if min(users, default=0) >= frozen else 0)
    latency_s = float(draw(st.integers(0, 1)))
    hardware = replace(SLOW_LINK, latency_s=latency_s)
    return make_chain(*segments, hardware=hardware, tied=(tied,) if len(users) > 1 else ())


@settings(max_examples=300, deadline=None)
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


@settings(max_examples=200, deadline=None)
@given(
    chain=chains(),
    gpus=st.integers(1, 3),
    microbatches=st.integers(1, 4),
    choose=st.randoms(use_true_random=False),
)
def test_the_solver_counts_every_byte(chain, gpus: int, microbatches: int, choose) -> None:
    """Of stages that are given, the model allows what the definitions say they take, and no byte less."""
    check_rows(chain, choose.choice(list(all_partitions(chain, "sync"))), gpus, microbatches)


@pytest.mark.parametrize("name", seldom())
def test_the_solver_counts_what_is_seldom_there(name: str) -> None:
    chain, microbatches = seldom()[name]
    for stages in all_partitions(chain, "sync"):
        check_rows(chain, stages, 1, microbatches)


def check_rows(chain: SegmentChain, stages: Spans, gpus: int, microbatches: int) -> None:
    resident = price(chain, stages, gpus, microbatches)[1]
    assert allows(chain, stages, gpus, microbatches, resident)
    assert not allows(chain, stages, gpus, microbatches, resident - 1)


def allows(chain: SegmentChain, stages: Spans, gpus: int, microbatches: int, limit: int) -> bool:
    """Whether the model's memory rows allow these stages, in slots of which some stay empty."""
    n, lowest = len(chain.segments), chain.first_backward
    layout = StageSlots(chain, range(n), n, n, None)
    large = StageCost(*[10**6] * len(StageCost._fields))  # no row is left out
    MemoryRows(StageCosts(chain, gpus, microbatches), layout, limit).add(dict.fromkeys(StageKind, large))
    kinds = [kind for kind, _, _ in stages]
    spans = [(0, -1)] * (n - kinds.count(F)) + [(first, last) for _, first, last in stages]
    spans += [(lowest, lowest - 1)] * (len(layout.slots) - len(spans))
    for slot, (first, last) in zip(layout.slots, spans, strict=True):
        layout.model.add(slot.low == first)
        layout.model.add(slot.high == last + 1)
    return cp_model.CpSolver().solve(layout.model) == cp_model.OPTIMAL


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
            sizes |= {
                "saved_bytes": 500_000_000,
                "peak_bytes": int(forward_s * 2e10),
                "forward_peak_bytes": int(forward_s * 1e10),
            }
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
    """Weights, gradients and a loss take 18 bytes in the fused stage of one segment, 28 in one of two."""
    fast = replace(SLOW_LINK, h2d_bytes_per_s=1e9)
    segments = (segment(name, 1, 1, weight_bytes=5, gradient_bytes=5) for name in "abc")
    chain = make_chain(*segments, hardware=fast)
    partition = PartitionStages(gpus=1, microbatches=2, memory_limit_bytes=24).run(chain)
    assert text(partition.stages).endswith("FB2-2 B1-1 B0-0")
    roomy = PartitionStages(gpus=1, microbatches=2, memory_limit_bytes=38).run(chain)
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
    partition = PartitionStages(1, 3, memory_limit_bytes=150).run(
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


def test_optimal_is_said_of_all_partitions_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proof about partitions of few stages goes on with more, up to as many as there can be."""
    allowed: list[tuple[int, int]] = []
    model = PartitionStages._model

    def noting(self: PartitionStages, search: Any, best: Any, forward: int, backward: int) -> Any:
        allowed.append((forward, backward))
        return model(self, search, best, forward, backward)

    monkeypatch.setattr(PartitionStages, "_model", noting)
    monkeypatch.setattr(partition_stages, "_SLOTS", 1)
    # Uploads that no computing hides: one stage is best, and the first proof is about three at most.
    chain = make_chain(*(segment(f"s{index}", 1.0, 1.0, weight_bytes=100) for index in range(6)))
    assert PartitionStages(1, 1, time_limit_s=60.0).run(chain).status == "OPTIMAL"
    assert allowed[0] < allowed[-1] == (5, 5)


def test_large_chain_in_little_time() -> None:
    chain = transformer(30)
    partition = PartitionStages(gpus=4, microbatches=8, time_limit_s=2.0).run(chain)
    costs, limit = StageCosts(chain, 4, 8), chain.hardware.usable_bytes
    greedy = StageSearch(costs, 122, limit, seed=0).run(effort=0)
    assert partition.status == "FEASIBLE"
    assert partition.objective_s < greedy.iteration_s
    assert 0 < partition.gap < 0.1
    stages = [(stage.kind, stage.first, stage.last) for stage in partition.stages]
    assert price(chain, stages, 4, 8)[1] <= limit


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
    """Alone, the second half holds the boundary and its gradient; together they hold one at a time."""
    wide = segment("a", 1, 1, boundary_bytes=40, boundary_gradient_bytes=40)
    chain = make_chain(wide, segment("b", 1, 1))
    assert text(PartitionStages(1, 1, memory_limit_bytes=50).run(chain).stages) == "FB0-1"


def test_prefetch_does_not_fit() -> None:
    chain = make_chain(*(segment(name, 1, 1, weight_bytes=6_000_000_000) for name in ("a", "b")))
    message = (
        "no partition fits in 10.0 GB, not even with one segment a stage: the FB job of b needs 6.0 GB, and"
        " 6.0 GB on the same GPU belong to the jobs before and behind it (weights prefetched, gradients on"
        " their way down). Use more microbatches (smaller ones), another number of GPUs or GPUs with more"
        " memory."
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
