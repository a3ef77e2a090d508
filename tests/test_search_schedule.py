"""search-schedule: the fast model against its definition, the search against CP-SAT, and mistakes."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpcompile.dispatch_costs import price_stages
from rpcompile.dispatch_time import SLICES, Machine, Played, play
from rpcompile.errors import InvalidArgument, PartitionError, StageTooLarge
from rpcompile.ir import Dispatch, Partition, Schedule, SegmentChain
from rpcompile.memory_bound import gpu_memory_bounds
from rpcompile.mixed_gpus import Box, with_speeds
from rpcompile.passes._dispatch_moves import stages_of
from rpcompile.passes._dispatch_starts import _divided, _given, first_starts
from rpcompile.passes.insert_event_waits import InsertEventWaits
from rpcompile.passes.insert_transfers import InsertTransfers
from rpcompile.passes.lay_out_dispatch import LayOutDispatch
from rpcompile.passes.search_schedule import SearchedSchedule, SearchSchedule, _dispatched, _Run
from rpcompile.profile import Profile
from rpcompile.round_robin_time import stages_between
from rpcompile.simulate import simulate, simulate_steady
from rpcompile.simulate_dispatch import simulate_dispatch
from rpcompile.variations import lay_out
from rpcompile.verify import verify_schedule
from tests.dispatch_oracle import least_makespan, play_by_definition
from tests.partition_oracle import SLOW_LINK, make_chain, segment

BOUNDLESS = 1e18
PROFILES = Path(__file__).parents[1] / "benchmarks" / "profiles"


def decoder(layers: int, head: float = 3.0, **changes: object) -> SegmentChain:
    """Layers of 1 s forward and 2 s backward with 0.1 GB, and a head of `head` times that."""
    sizes: dict[str, Any] = {
        "weight_bytes": 100_000_000,
        "gradient_bytes": 100_000_000,
        "saved_bytes": 300_000_000,
        "boundary_bytes": 10_000_000,
        "boundary_gradient_bytes": 10_000_000,
    } | changes
    hardware = replace(
        SLOW_LINK,
        h2d_bytes_per_s=1e9,
        d2h_bytes_per_s=1e9,
        memory_bytes=10_000_000_000,
        usable_bytes=10_000_000_000,
    )
    last: dict[str, Any] = sizes | {"boundary_bytes": 0, "boundary_gradient_bytes": 0}
    body = [segment(f"layer{index}", 1.0, 2.0, **sizes) for index in range(layers)]
    return make_chain(*body, segment("head", head, 2 * head, **last), hardware=hardware)


def search(chain: SegmentChain, gpus: int, microbatches: int, **options: object) -> SearchedSchedule:
    return SearchSchedule(gpus, microbatches, **{"effort": "fast", **options}).run(chain)  # type: ignore[arg-type]


def mixed(chain: SegmentChain, speeds: tuple[float, ...]) -> SegmentChain:
    """The chain on GPUs that compute this much faster than the one its seconds are for."""
    gpus = tuple(replace(chain.hardware, name=f"{speed}x") for speed in speeds)
    return with_speeds(chain, Box(gpus, speeds))


def compiled(chain: SegmentChain, found: SearchedSchedule, **options: object) -> Schedule:
    """What was found with all copies and events."""
    layout = LayOutDispatch(chain, found.partition, **options)  # type: ignore[arg-type]
    return InsertEventWaits().run(InsertTransfers(chain).run(layout.run(found.dispatch)))


# ---------------------------------------------------------------- the fast model


@st.composite
def dispatches(draw: st.DrawFn):
    """A chain, cuts of its line, a GPU for each microbatch of each stage, and speeds."""
    n = draw(st.integers(1, 4))
    small = st.integers(0, 5)
    segments = [
        segment(
            f"s{index}",
            float(draw(st.integers(1, 5))),
            float(draw(small)),
            weight_bytes=draw(small),
            gradient_bytes=draw(small),
            boundary_bytes=0 if index == n - 1 else draw(small),
            boundary_gradient_bytes=0 if index == n - 1 else draw(small),
        )
        for index in range(n)
    ]
    chain = make_chain(*segments, hardware=replace(SLOW_LINK, latency_s=float(draw(st.integers(0, 1)))))
    begin = draw(st.integers(0, n - 1))
    inner = {u for u in range(1, 2 * n) if (u < begin or u > 2 * n - begin) and draw(st.booleans())}
    cuts = sorted(inner | {0, begin, 2 * n - begin, 2 * n})
    gpus, microbatches = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    gpu = st.integers(0, gpus - 1)
    gpu_of = np.array([[draw(gpu) for _ in range(microbatches)] for _ in cuts[1:]], np.int64)
    return chain, cuts, gpu_of, [draw(st.sampled_from([1.0, 2.0])) for _ in range(gpus)]


def machine(chain: SegmentChain, speed: list[float], **changes: object) -> Machine:
    hardware = chain.hardware
    plain = Machine(
        speed=np.array(speed),
        limit_bytes=np.full(len(speed), BOUNDLESS),
        up_bytes_per_s=hardware.h2d_bytes_per_s,
        down_bytes_per_s=hardware.d2h_bytes_per_s,
        latency_s=hardware.latency_s,
        host_bytes_per_s=BOUNDLESS,
        update_s_per_byte=0.0,
        slice_s=1000.0 / SLICES,
        iterations=1,
        ring=False,
    )
    return plain._replace(**changes)


def played_until(
    chain: SegmentChain, cuts: list[int], gpu_of: np.ndarray, speed: list[float], limit_s: float = math.inf
) -> tuple[Played, np.ndarray]:
    """What the fast model says, and the order that it finds."""
    size = len(cuts) - 1
    stages = stages_of(price_stages(chain, len(speed), gpu_of.shape[1]), size, np.array(cuts))
    # The definition has links without activations.
    stages = stages._replace(loaded_bytes=np.zeros(size), handed_bytes=np.zeros(size))
    order, ends = np.empty_like(gpu_of), np.empty(gpu_of.shape)
    nowhere = np.zeros(size, np.int64)
    return play(machine(chain, speed), stages, gpu_of, nowhere, order, ends, limit_s), order


def played_once(chain: SegmentChain, cuts: list[int], gpu_of: np.ndarray, speed: list[float]):
    """What the fast model says, and what it was asked about."""
    played, order = played_until(chain, cuts, gpu_of, speed)
    jobs, by_gpu = _dispatched(gpu_of, order, len(speed))
    dispatch = Dispatch("random", len(speed), gpu_of.shape[1], jobs, by_gpu)
    stages = stages_between(cuts, len(chain.segments))
    return played, Partition(stages, 0, 0.0, 0.0, "FEASIBLE", 0.0, "random"), dispatch


@settings(max_examples=200, deadline=None)
@given(case=dispatches())
def test_fast_model_plays_by_its_definition(case) -> None:
    chain, cuts, gpu_of, speed = case
    played, partition, dispatch = played_once(chain, cuts, gpu_of, speed)
    assert played.time_s == pytest.approx(play_by_definition(chain, partition, dispatch, speed))


@settings(max_examples=100, deadline=None)
@given(case=dispatches(), share=st.sampled_from([0.2, 0.5, 0.9, 1 + 1e-9]))
def test_only_what_takes_longer_than_the_limit_is_given_up(case, share: float) -> None:
    chain, cuts, gpu_of, speed = case
    played, _ = played_until(chain, cuts, gpu_of, speed)
    limited, _ = played_until(chain, cuts, gpu_of, speed, share * played.time_s)
    assert limited == played or (share < 1 and limited.time_s == math.inf)
    assert limited.work <= played.work


def test_a_hopeless_dispatch_is_given_up_early() -> None:
    chain = make_chain(*(segment(f"s{index}", 1.0, 2.0) for index in range(4)))
    where, cuts = np.zeros((7, 2), np.int64), [0, 1, 2, 3, 5, 6, 7, 8]
    # Two GPUs have 30 s of work to do.
    played, _ = played_until(chain, cuts, where, [1.0, 1.0], 14.0)
    assert (played.time_s, played.work) == (math.inf, 2 * 2 + 4)
    # One has done 12 s of it when the other ends, at 14 s; 12 s are left, and 38 s / 2 in all.
    where[4] = 1
    played, _ = played_until(chain, cuts, where, [1.0, 1.0], 18.9)
    assert (played.time_s, played.work) == (math.inf, 5 * (2 * 2 + 4))


@settings(max_examples=100, deadline=None)
@given(case=dispatches())
def test_fast_model_agrees_with_the_simulation_of_compute(case) -> None:
    chain, cuts, gpu_of, _ = case
    nothing = dict.fromkeys(
        ("weight_bytes", "gradient_bytes", "boundary_bytes", "boundary_gradient_bytes"), 0
    )
    segments = tuple(replace(found, **nothing) for found in chain.segments)
    chain = replace(chain, segments=segments, hardware=replace(chain.hardware, latency_s=0.0))
    played, partition, dispatch = played_once(chain, cuts, gpu_of, [1.0] * int(gpu_of.max() + 1))
    timeline = simulate_dispatch(chain, partition, replace(dispatch, recompute_ahead=True), hop_s=0.0)
    assert played.time_s == pytest.approx(timeline.makespan_s)


def two_jobs(chain: SegmentChain, **changes: object) -> float:
    """One segment, fused, with a microbatch on each of two GPUs."""
    tables = price_stages(chain, 2, 2)
    stages = stages_of(tables, 1, np.array([0, 2]))
    room = np.empty((1, 2), np.int64), np.empty((1, 2))
    options = {"slice_s": 0.01, **changes}
    return play(
        machine(chain, [1.0, 1.0], **options),
        stages,
        np.array([[0, 1]]),
        np.zeros(1, np.int64),
        *room,
        math.inf,
    ).time_s


def test_replicas_are_added_up_and_share_the_host() -> None:
    chain = make_chain(segment("head", 3.0, 4.0, weight_bytes=2, gradient_bytes=2))
    # Up 2 s, 7 s of work, down 2 s; then 3 x 2 bytes pass through the host's memory.
    assert two_jobs(chain, host_bytes_per_s=6.0) == pytest.approx(2 + 7 + 2 + 1)
    # With 1 byte a second in all, two uploads take 4 s and so do two downloads.
    assert two_jobs(chain, host_bytes_per_s=1.0) == pytest.approx(4 + 7 + 2 + 6, abs=2.1)


def modelled_bytes(chain: SegmentChain, cuts: list[int], gpu_of: list[list[int]]) -> tuple[float, int]:
    """Most memory of any GPU: by the fast model, and of the schedule with every copy."""
    gpus, shape = max(map(max, gpu_of)) + 1, (len(gpu_of), len(gpu_of[0]))
    tables = price_stages(chain, gpus, shape[1])
    stages = stages_of(tables, shape[0], np.array(cuts))
    order, nowhere = np.empty(shape, np.int64), np.zeros(shape[0], np.int64)
    nothing = machine(chain, [1.0] * gpus, limit_bytes=np.zeros(gpus))
    played = play(nothing, stages, np.array(gpu_of), nowhere, order, np.empty(shape), math.inf)
    jobs, by_gpu = _dispatched(np.array(gpu_of), order, gpus)
    partition = Partition(stages_between(cuts, tables.segments), 0, 0.0, 0.0, "FEASIBLE", 0.0, "by hand")
    schedule = lay_out(chain, partition, Dispatch("by hand", gpus, shape[1], jobs, by_gpu), "sync")
    return played.excess_bytes, max(gpu_memory_bounds(schedule))


def test_the_fast_model_has_the_copies_of_the_jobs_around() -> None:
    """Two backward stages recompute from inside the first stage, which copies those inputs down as well.

    It has 0.3 GB of weights, 1 GB to work in, and two microbatches' worth of three boundaries, while 0.1 GB
    of weights and two boundaries come for the GPU's next job.
    """
    chain = decoder(3, boundary_bytes=10**9, boundary_gradient_bytes=10**9)
    modelled, _ = modelled_bytes(chain, [0, 3, 5, 6, 7, 8], [[0] * 3, [1] * 3, [0] * 3, [1] * 3, [0] * 3])
    assert modelled == 0.3e9 + 1e9 + 2 * 3e9 + 0.1e9 + 2e9


def test_the_fast_model_keeps_in_place_what_was_made_there() -> None:
    chain = decoder(3, boundary_bytes=10**9, boundary_gradient_bytes=10**9)
    first, then = [0, 1, 0], [1, 0, 1]
    modelled, exact = modelled_bytes(chain, [0, 2, 3, 5, 6, 8], [first, first, first, then, then])
    assert exact <= modelled <= exact + 2 * 10**9


def test_an_upload_waits_for_the_update_of_its_weights() -> None:
    chain = make_chain(segment("head", 3.0, 4.0, weight_bytes=2, gradient_bytes=2))
    later = two_jobs(chain, update_s_per_byte=5.0) - two_jobs(chain)
    assert later == pytest.approx(10.0, rel=1e-3)


# ---------------------------------------------------------------- the search


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_search_is_near_the_optimum_of_small_problems(data) -> None:
    draw = data.draw
    n, gpus, microbatches = draw(st.integers(2, 3)), draw(st.integers(2, 3)), draw(st.integers(2, 3))
    seconds, nbytes = st.integers(1, 6), st.integers(0, 1)
    segments = [
        segment(
            f"s{index}",
            float(draw(seconds)),
            float(draw(seconds)),
            boundary_bytes=0 if index == n - 1 else draw(nbytes),
            boundary_gradient_bytes=0 if index == n - 1 else draw(nbytes),
        )
        for index in range(n)
    ]
    chain = make_chain(*segments)
    found = search(chain, gpus, microbatches).partition
    least = least_makespan(chain, gpus, microbatches)
    assert found.bound_s <= least * (1 + 1e-9)
    assert least * (1 - 1e-9) <= found.objective_s <= 1.1 * least


@pytest.mark.parametrize(
    ("gpus", "microbatches", "mode"),
    [(1, 1, "sync"), (2, 5, "sync"), (4, 2, "sync"), (7, 3, "async"), (3, 8, "async"), (64, 4, "sync")],
)
def test_any_shape_is_planned_and_proved(gpus: int, microbatches: int, mode: str) -> None:
    chain = decoder(5)
    found = search(chain, gpus, microbatches, mode=mode)
    assert 0 < found.partition.bound_s <= found.partition.objective_s
    verify_schedule(compiled(chain, found, mode=mode), chain, found.partition)


def test_more_gpus_than_work_says_which_are_unused() -> None:
    found = search(decoder(1), 64, 2)
    assert len(found.unused_gpus) == 64 - len({job.gpu for job in found.dispatch.jobs}) > 0


def test_traffic_is_held_to_its_limit_and_what_it_buys() -> None:
    chain = decoder(8)
    tight, free = search(chain, 4, 8, max_traffic=0.7), search(chain, 4, 8)
    assert tight.traffic <= 0.7 < free.traffic
    assert free.partition.objective_s < tight.partition.objective_s
    each = {job.index: tight.partition.stages[job.stage].segments for job in tight.dispatch.jobs}
    uploads = sum(chain.segments[index].weight_bytes for own in each.values() for index in own)
    assert tight.upload_bytes == uploads
    assert tight.traffic == pytest.approx(uploads / (2 * (2 * 8 + 1) * 100_000_000))


def test_asynchronous_iterations_leave_no_bubble() -> None:
    found = search(decoder(12), 4, 8, mode="async", fused_segments=1)
    assert found.bubble < 1e-3
    assert found.dispatch.rotate == len(found.dispatch.jobs) % 4


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_without_replicas_every_stage_has_one_job(mode: str) -> None:
    for replicas in (False, True):
        found = search(decoder(8), 4, 8, mode=mode, replicas=replicas)
        assert (len(found.dispatch.jobs) > len(found.partition.stages)) == replicas


@pytest.mark.parametrize("usable", [1.4, 2.0, 2.7])
def test_what_is_searched_for_fits_as_it_is_laid_out(usable: float) -> None:
    """But for one copy of a boundary, where jobs of few microbatches take turns on a GPU."""
    limit, chain = int(usable * 1e9), decoder(8, boundary_bytes=10**8, boundary_gradient_bytes=10**8)
    found = search(chain, 4, 8, memory_limit_bytes=limit)
    assert max(gpu_memory_bounds(compiled(chain, found))) <= limit + 10**8


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_no_more_segments_are_fused_than_allowed_also_by_given_partitions(mode: str) -> None:
    chain = decoder(6)
    given = Partition(stages_between((0, 2, 12, 14), 7), 0, 0.0, 0.0, "FEASIBLE", 0.0, "by hand")
    for most in (1, 2):
        found = search(chain, 3, 6, mode=mode, fused_segments=most, partitions=(given,))
        assert [len(stage.segments) for stage in found.partition.stages if stage.kind == "FB"] <= [most]


def test_more_effort_is_never_worse_than_a_fast_search() -> None:
    chain, values = decoder(9, 2.5), {}
    for effort in ("fast", "normal"):
        searching = SearchSchedule(4, 6, max_traffic=1.0, effort=effort, time_limit_s=1e9)
        problem, bound_s = searching._problem(chain, [10**10] * 4)
        # Rounds that find nothing: what the fast search found is kept.
        values[effort] = problem.energy(searching._improve(problem, bound_s)[0])[0]
    assert values["normal"] <= values["fast"]


def test_stages_around_a_fused_one_take_its_pace() -> None:
    # Outwards from the fused stage: stages of about 4 s, or the outermost half as long.
    seconds = [2.0, 2.0, 3.0, 1.0, 4.0, 2.0, 2.0, 1.0, 1.0]
    assert _divided(seconds, 4.0, (), 9) == ([2, 2, 1, 2, 2], [1, 1, 1, 1, 1])
    assert _divided(seconds, 4.0, ((0.5, 3),), 9) == ([2, 2, 1, 2, 2], [1, 1, 1, 1, 3])
    assert _divided(seconds, 100.0, (), 4) == ([4, 4, 1], [1, 1, 1])  # no stage is longer than that
    assert _divided([], 4.0, ((0.5, 3),), 9) == ([], [])


def test_starts_have_fused_stages_of_several_lengths() -> None:
    problem, _ = SearchSchedule(3, 6)._problem(decoder(12), [10**10] * 3)
    states = first_starts(problem, []).best(8)
    assert len({problem.fused_begin(state.cuts[: state.size[0] + 1].tolist()) for state in states}) >= 4


def test_a_fused_stage_starts_with_as_many_jobs_as_keep_pace_with_the_others() -> None:
    # Backward stages of one layer take 4 s a microbatch, the head alone takes 12.
    problem, _ = SearchSchedule(8, 8, mode="async", max_traffic=0.7)._problem(decoder(12, 4.0), [10**10] * 8)
    cuts = (0, 4, 8, 12, *range(14, 27))
    wanted = [shape[3] for own, shape in _given(problem, [cuts]) if shape[0] == 1]
    assert 3 in wanted


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_the_bound_holds_whatever_the_traffic(data) -> None:
    draw, part = data.draw, st.integers(1, 9)
    layers, gpus, microbatches = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 6))
    sizes = {"weight_bytes": 10**8 * draw(part), "gradient_bytes": 10**8 * draw(st.integers(0, 2))}
    chain = decoder(layers, float(draw(part)), **sizes)
    mode, most = draw(st.sampled_from(["sync", "async"])), draw(st.sampled_from([None, 0.6, 1.0, 2.0]))
    searching = SearchSchedule(gpus, microbatches, mode, most, "fast", time_limit_s=0.1)
    _, bound_s = searching._problem(chain, [10**10] * gpus)
    try:
        found = searching.run(chain)
    except PartitionError:
        return
    assert bound_s <= found.partition.objective_s * (1 + 1e-9)
    assert bound_s <= simulated_s(chain, found, mode) * (1 + 1e-9)


def simulated_s(chain: SegmentChain, found: SearchedSchedule, mode: str) -> float:
    """Seconds of an iteration with every copy."""
    schedule = compiled(chain, found, mode=mode)
    if mode == "sync":
        return simulate(schedule).makespan_s
    return simulate(schedule, iterations=24, mode="async", rotate=found.dispatch.rotate).period_s


def test_a_period_is_that_of_a_long_run_also_where_its_turns_are_not_those_of_the_rotation() -> None:
    # Six jobs on eight GPUs: every iteration begins two GPUs on, and every third one takes longer.
    chain = Profile.load(PROFILES / "qwen3-1.7b.json").to_chain()
    stages = stages_between([0, 23, 35, 41, 46, 52, 58], len(chain.segments))
    partition = Partition(stages, chain.hardware.usable_bytes, 0.0, 0.0, "FEASIBLE", 0.0, "by hand")
    jobs, by_gpu = _dispatched(np.repeat(np.arange(6)[:, None], 16, 1), np.tile(np.arange(16), (6, 1)), 8)
    layout = LayOutDispatch(chain, partition, mode="async")
    schedule = layout.run(Dispatch("by hand", 8, 16, jobs, by_gpu, rotate=6))
    schedule = InsertEventWaits().run(InsertTransfers(chain).run(schedule))
    ends_s = simulate(schedule, iterations=61, mode="async", rotate=6).iteration_end_s
    assert simulate_steady(schedule).period_s == pytest.approx((ends_s[54] - ends_s[30]) / 24, rel=1e-3)


def test_a_limit_of_traffic_raises_the_bound() -> None:
    """Four equal layers of 1 + 2 s, 0.1 s to upload one of them, 4 microbatches on 4 GPUs; 7 uploads are 1.

    Unlimited, all layers are fused, and uploaded first, on every GPU. With 7, 3 + 3 for the others leave one
    job of the last: 3 s there, 4 x 3 s, 6 s back. With 6, 2 + 2 leave one job of two: 2 s, 4 x 6 s, 4 s.
    """
    chain = decoder(3, 1.0, gradient_bytes=0)
    limits = {None: 12.4, 1.0: 21.1, 6 / 7: 30.1}
    for most, least_s in limits.items():
        _, bound_s = SearchSchedule(4, 4, max_traffic=most)._problem(chain, [10**10] * 4)
        assert bound_s == pytest.approx(least_s)


def test_given_partitions_are_among_the_starts() -> None:
    chain = decoder(6)
    cuts = [(0, 1, 6, 8, 14), (0, 3, 6, 8, 14), (0, 2, 6, 8, 9, 14), (0, 5, 6, 8, 12, 14), (0, 4, 6, 8, 14)]
    given = [Partition(stages_between(each, 7), 0, 0.0, 0.0, "FEASIBLE", 0.0, "by hand") for each in cuts]
    problem, _ = SearchSchedule(3, 6)._problem(chain, [10**10] * 3)

    def starts(partitions: list[Partition]) -> list[tuple[int, ...]]:
        states = first_starts(problem, partitions).best(8)
        energies = [problem.energy(state)[0] for state in states]
        assert energies == sorted(energies)
        return [tuple(state.cuts[: state.size[0] + 1].tolist()) for state in states]

    assert not set(cuts) & set(starts([]))
    assert len(starts(given)) == len(set(starts(given))) == 8
    # Half of the places are theirs, and go to the best of them.
    assert len(set(cuts) & set(starts(given))) == 4
    assert set(cuts[:2]) <= set(starts(given[:2]))


def test_a_dispatch_within_the_limits_is_found_where_a_little_more_would_be_faster() -> None:
    chain = Profile.load(PROFILES / "qwen3-1.7b.json").to_chain()
    assert search(chain, 64, 1, mode="async", max_traffic=0.65).traffic <= 0.65


def test_a_limit_of_traffic_allows_what_uploads_nothing() -> None:
    chain = decoder(4, weight_bytes=0, gradient_bytes=0)
    assert search(chain, 2, 4, max_traffic=0.5).traffic == 0.0


def test_the_same_seed_gives_the_same_schedule() -> None:
    chain = decoder(6)
    first, second = (search(chain, 3, 6, seed=5, time_limit_s=1e9) for _ in range(2))
    assert first.dispatch == second.dispatch
    assert first.partition.stages == second.partition.stages
    assert first.ended_by == "moves"


def test_a_clock_that_ends_the_search_is_reported_with_the_gap() -> None:
    found = search(decoder(6), 3, 6, time_limit_s=0.0)
    assert found.ended_by == "clock"
    assert found.partition.status == "FEASIBLE"
    assert found.partition.solver == "search (fast, ended by clock)"
    assert 0 < found.partition.gap < 1


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_faster_gpus_get_more_work(mode: str) -> None:
    chain = mixed(decoder(8), (3.0, 1.0))
    found = search(chain, 2, 8, mode=mode)
    stages = found.partition.stages
    work = [0.0, 0.0]
    for job in found.dispatch.jobs:
        own = [chain.segments[index] for index in stages[job.stage].segments]
        seconds = sum(s.forward_s + (s.backward_s if stages[job.stage].kind != "F" else 0.0) for s in own)
        work[job.gpu] += seconds * len(job.microbatches)
    assert work[0] / work[1] == pytest.approx(3.0, rel=0.1)


def test_a_small_gpu_gets_what_fits() -> None:
    chain = decoder(8, saved_bytes=1_000_000_000)
    found = search(chain, 2, 4, memory_limit_bytes=(10_000_000_000, 2_000_000_000))
    for job in found.dispatch.jobs:
        stage = found.partition.stages[job.stage]
        if job.gpu == 1 and stage.kind != "F":
            assert len(stage.segments) == 1


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_stage_that_changes_buffers_has_one_job(mode: str) -> None:
    chain = decoder(4, state_bytes=8)
    found = search(chain, 3, 6, mode=mode)
    jobs = [job.stage for job in found.dispatch.jobs]
    kinds = [stage.kind for stage in found.partition.stages]
    assert all(jobs.count(index) == 1 for index, kind in enumerate(kinds) if kind != "B")
    verify_schedule(compiled(chain, found, mode=mode), chain, found.partition)


def test_a_predicted_time_is_that_of_all_copies_and_events() -> None:
    chain = decoder(8)
    found = search(chain, 4, 8)
    assert simulate(compiled(chain, found)).makespan_s == pytest.approx(found.partition.objective_s, rel=0.03)


def test_faster_gpus_compute_faster_in_the_schedule() -> None:
    chain = mixed(decoder(2), (2.0, 1.0))
    found = search(chain, 2, 4)
    schedule = compiled(chain, found)
    assert simulate(schedule).makespan_s == pytest.approx(found.partition.objective_s, rel=0.05)


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpus": 0}, "gpus=0 must be from 1 to 64"),
        ({"gpus": 65}, "gpus=65 must be from 1 to 64"),
        ({"microbatches": 513}, "microbatches=513 must be from 1 to 512"),
        ({"mode": "fast"}, "mode='fast' is unknown; use one of sync, async"),
        ({"effort": "most"}, "effort='most' is unknown; use one of fast, normal, thorough"),
        ({"max_traffic": 0.0}, "max_traffic=0.0 must be above 0; None lifts the limit"),
        ({"time_limit_s": math.nan}, "time_limit_s=nan must be at least 0"),
        ({"fused_segments": 0}, "fused_segments=0 must be at least 1"),
        ({"host_bytes_per_s": 0.0}, "host_bytes_per_s=0.0 must be above 0"),
        ({"update_s_per_byte": -1.0}, "update_s_per_byte=-1.0 must be finite, at least 0"),
        (
            {"memory_limit_bytes": (1, 2, 3)},
            "memory_limit_bytes=(1, 2, 3) must be at least 1, once",
        ),
        ({"time_limit_s": -1.0}, "time_limit_s=-1.0 must be at least 0"),
    ],
)
def test_options_out_of_range(options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidArgument, match=re.escape(message)):
        SearchSchedule(**{"gpus": 2, "microbatches": 2} | options).run(decoder(2))  # type: ignore[arg-type]


@pytest.mark.parametrize("seconds", [-1.0, math.nan, math.inf])
def test_times_that_are_none(seconds: float) -> None:
    chain = make_chain(segment("a", seconds, 1.0), segment("b", 1.0, 1.0))
    with pytest.raises(InvalidArgument, match=f"forward_s of segment a is {seconds}; give a finite time"):
        search(chain, 2, 2)


def test_no_times_at_all() -> None:
    with pytest.raises(InvalidArgument, match="all times of the chain are 0; give what the segments take"):
        search(make_chain(segment("a", 0.0, 0.0)), 1, 1)


def test_a_segment_that_does_not_fit() -> None:
    with pytest.raises(StageTooLarge, match=r"layer1 needs .* has 300.0 MB usable. Use more microbatches"):
        search(decoder(2), 2, 2, memory_limit_bytes=300_000_000)


def test_nothing_that_fits_names_the_tightest() -> None:
    with pytest.raises(PartitionError, match=r"over the 560.0 MB .* The tightest is the backward of layer"):
        search(decoder(3), 2, 2, memory_limit_bytes=560_000_000)


def test_traffic_below_what_is_possible() -> None:
    with pytest.raises(PartitionError, match=r"max_traffic=0.1 allows .* set max_traffic to 0.5"):
        search(decoder(4), 2, 4, max_traffic=0.1, fused_segments=1)


def test_an_interrupt_stops_all_walks() -> None:
    class Walks:
        stopped = Event()
        ended: ClassVar[list[bool]] = []

        def anneal(self, state: str, seed: int) -> tuple[float, bool]:
            if state == "interrupted":
                raise KeyboardInterrupt
            self.ended.append(self.stopped.wait(60))
            return 0.0, False

    with pytest.raises(KeyboardInterrupt):
        SearchSchedule(2, 2)._anneal(Walks(), ["interrupted", "long"])  # type: ignore[arg-type, list-item]
    assert all(Walks.ended)


def test_a_walk_that_is_stopped_ends_with_its_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, bound_s = SearchSchedule(3, 6)._problem(decoder(6), [10**10] * 3)
    state, pieces = first_starts(problem, []).best(1)[0], []

    def piece(*options: Any) -> tuple[float, float]:
        pieces.append(options)
        return 2 * bound_s, 0.0

    monkeypatch.setattr("rpcompile.passes.search_schedule.anneal", piece)
    run = _Run(problem, bound_s, 1e9, 1e-3, 1e-4, math.inf)
    run.anneal(state, 0)
    assert len(pieces) == 20
    run.stopped.set()
    run.anneal(state, 0)
    assert len(pieces) == 21
