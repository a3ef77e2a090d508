"""Round-robin stages in closed form: times against every microbatch, memory against the simulator."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rpcompile.ir import Partition, Schedule, SegmentChain, Stage, TiedWeight
from rpcompile.memory_bound import gpu_memory_bounds
from rpcompile.round_robin_time import StageCosts, run_jobs, stages_between
from rpcompile.simulate import simulate
from tests.chains import compiled, partition, problems, rewrite
from tests.partition_oracle import (
    FB,
    SLOW_LINK,
    B,
    F,
    all_partitions,
    every_microbatch_s,
    make_chain,
    price,
    segment,
    seldom,
    text,
)


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


def three_segments() -> SegmentChain:
    def sizes(*values: int) -> dict[str, Any]:
        names = ("weight_bytes", "gradient_bytes", "boundary_bytes", "boundary_gradient_bytes", "saved_bytes")
        found = dict(zip((*names, "peak_bytes", "input_bytes", "state_bytes"), values, strict=True))
        return {**found, "forward_peak_bytes": found["peak_bytes"]}

    return make_chain(
        segment("embed", 1, 2, **sizes(100, 50, 7, 3, 1000, 20, 4, 0)),
        segment("norm", 3, 5, **sizes(30, 30, 8, 2, 2000, 40, 0, 6)),
        segment("head", 7, 9, **sizes(110, 60, 0, 0, 4000, 90, 5, 0)),
        hardware=replace(SLOW_LINK, h2d_bytes_per_s=2.0, latency_s=0.5),
        tied=(TiedWeight("embed.weight", (0, 2), weight_bytes=100, gradient_bytes=50),),
    )


def test_cost_of_a_stage_by_hand() -> None:
    costs = StageCosts(three_segments(), gpus=2, microbatches=8)
    forward = costs.of(Stage(0, F, 0, 1))
    assert (forward.compute_s, forward.upload_s, forward.hop_s) == (4, 65.5, 8 + 4 + 1)
    assert (forward.weight_bytes, forward.gradient_bytes, forward.lingering_bytes) == (130, 0, 30)
    assert (forward.load_bytes, forward.store_bytes) == (4, 8)
    assert forward.memory_bytes == 130 + (40 + 7 + 8 - 8) + 2 * (4 + 8)

    backward = costs.of(Stage(0, B, 1, 1))
    assert (backward.compute_s, backward.upload_s, backward.hop_s) == (8, 15.5, 3 + 1.5 + 1)
    assert (backward.weight_bytes, backward.gradient_bytes, backward.lingering_bytes) == (30, 30, 0)
    assert (backward.load_bytes, backward.store_bytes) == (7 + 2, 3)
    assert backward.memory_bytes == 30 + 30 + 40 + 2000 + 6 + 2 * (9 + 3)

    whole = costs.of(Stage(0, FB, 0, 2))
    assert (whole.compute_s, whole.weight_bytes, whole.gradient_bytes) == (27, 140, 90)
    assert (whole.load_bytes, whole.store_bytes) == (9, 4)
    # the head's backward also holds the gradient behind the norm; the tied weight's gradient waits
    assert whole.memory_bytes == 140 + 90 + (90 + 2) + 7000 + 50 + 2 * (9 + 4)


def test_on_one_gpu_what_is_handed_on_stays() -> None:
    costs = StageCosts(three_segments(), gpus=1, microbatches=8)
    forward, backward = costs.of(Stage(0, F, 0, 0)), costs.of(Stage(0, B, 1, 1))
    assert (forward.hop_s, forward.load_bytes, forward.store_bytes) == (0, 4, 0)
    assert forward.memory_bytes == 100 + 20 + 8 * 7 + 2 * 4
    assert (backward.load_bytes, backward.store_bytes) == (7, 0)
    assert backward.memory_bytes == 30 + 30 + 40 + 2000 + 6 + (8 * 3 + 2) + 2 * 7


def test_jobs_share_their_gpu_with_the_ones_before_and_behind() -> None:
    """F 0..1, FB 2, B 1, B 0: the forward job also keeps boundary 7, where B 1 begins."""
    costs = StageCosts(three_segments(), gpus=2, microbatches=8)
    cuts = (0, 2, 4, 5, 6)
    stages = [costs.of(stage) for stage in stages_between(cuts, 3)]
    forward, fused, upper, lower = [stage.memory_bytes for stage in stages]
    assert costs.resident_bytes(cuts, stages) == [
        forward + 2 * 7 + 30 + (9 - 4),  # B 1's weights, and its first copies in place of a second set
        fused + 100,
        upper + 30 + (15 - 3),  # the norm's changed weights leave late, and so do copies of 15 bytes
        lower + 60 + 6,
    ]


def unrolled(chain: SegmentChain, stages: tuple[Stage, ...]) -> tuple[int, ...]:
    """The cuts that `stages_between` makes these stages of."""
    n = len(chain.segments)
    cuts = [0]
    for stage in stages:
        if stage.kind is F:
            cuts.append(stage.last + 1)
        else:
            lowest = stage is stages[-1] and stage.kind is FB
            cuts.append(2 * n - (max(stage.first, chain.first_backward) if lowest else stage.first))
    return tuple(cuts)


def timed(schedule: Schedule) -> Schedule:
    """With other seconds, some of them very long."""
    choose = random.Random(len(schedule.buffers))
    return rewrite(
        schedule, lambda found: [replace(found, seconds=choose.choice([0.0, 0.1, 1.0, 5.0, 50.0]))]
    )


@settings(max_examples=150, deadline=None)
@given(problem=problems())
def test_no_schedule_needs_more_memory_than_is_said(problem) -> None:
    chain, partition, gpus, microbatches, mode = problem
    assume(mode == "forward" or chain.first_backward < len(chain.segments))
    check_bound(chain, partition, gpus, microbatches, mode)


@pytest.mark.parametrize("name", seldom())
def test_nor_where_memory_hangs_on_what_is_seldom_there(name: str) -> None:
    chain, microbatches = seldom()[name]
    for spans in all_partitions(chain, "sync"):
        stages = partition(*(f"{kind}{first}-{last}" for kind, first, last in spans))
        check_bound(chain, stages, 1, microbatches, "sync")


def check_bound(chain: SegmentChain, partition: Partition, gpus: int, microbatches: int, mode: str) -> None:
    """However long actions take, which `gpu_memory_bounds` says from above, and any simulation from below.

    Where a job has no weights, the former has those of two jobs later beside its last compute action, which
    they wait for.
    """
    cuts, costs = unrolled(chain, partition.stages), StageCosts(chain, gpus, microbatches)
    assert [(s.kind, s.first, s.last) for s in stages_between(cuts, len(chain.segments))] == [
        (s.kind, s.first, s.last) for s in partition.stages
    ]
    each = [costs.of(stage) for stage in partition.stages]
    resident = costs.resident_bytes(cuts, each)
    schedule = compiled(chain, partition, gpus, microbatches, mode)
    peaks = [simulate(schedule).gpu_peak_bytes, simulate(timed(schedule)).gpu_peak_bytes]
    peaks += [gpu_memory_bounds(schedule)] if all(cost.weight_bytes for cost in each) else []
    for gpu, peak in enumerate(map(max, *peaks)):
        assert peak <= max(resident[gpu::gpus], default=0)
    spans = [(stage.kind, stage.first, stage.last) for stage in partition.stages]
    assert max(resident) == price(chain, spans, gpus, microbatches)[1]
    assert costs.excess_bytes(cuts, each, max(resident)) == 0
    assert costs.excess_bytes(cuts, each, max(resident) - 1) == 1
