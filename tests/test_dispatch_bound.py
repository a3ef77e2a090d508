"""The bound on an iteration's time: worked out by hand, and against what dispatches of all kinds take."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rpcompile.errors import InvalidArgument
from rpcompile.ir import Dispatch, Partition, SegmentChain, StageKind, TiedWeight
from rpcompile.memory_bound import gpu_memory_bounds
from rpcompile.mixed_gpus import Box, with_speeds
from rpcompile.passes import search_schedule
from rpcompile.passes.search_schedule import SearchSchedule
from rpcompile.round_robin_time import stages_between
from rpcompile.simulate import simulate, simulate_steady
from rpcompile.simulate_dispatch import upload_bytes
from rpcompile.stage_bytes import upload_unit_bytes
from rpcompile.variations import lay_out
from tests.dispatches import dispatched, of_steps
from tests.test_search_schedule import decoder

GB = 10**9
BARE = {"gradient_bytes": 0, "boundary_bytes": 0, "boundary_gradient_bytes": 0}


def least(
    chain: SegmentChain, gpus: int, microbatches: int, limit: int = 100 * GB, **options: object
) -> float:
    searching = SearchSchedule(gpus, microbatches, **options)  # type: ignore[arg-type]
    return searching._problem(chain, [limit] * gpus)[1]


def test_whoever_waits_at_the_ends_is_idle_unless_traffic_allows_replicas() -> None:
    """Two equal layers of 1 + 2 s, the last one fused, 0.1 s of upload; 2 microbatches on 2 GPUs.

    With 3 uploads each stage has one job: 0.1 + 1, twice 3 s fused, 2 s of backward. With 4 the last layer is
    on both GPUs, and at 1.1 s one of them has not begun; when 2 s are left, one has ended: 0.1 + (14 + 1 + 2)
    / 2. With 5 one end has two jobs, best the last one. With 6 both GPUs work from the upload to the end.
    """
    chain = decoder(1, 1.0, **BARE)
    for uploads, seconds in {3: 9.1, 4: 8.6, 5: 7.6, 6: 7.1}.items():
        found = least(chain, 2, 2, fused_segments=1, max_traffic=uploads / 3)
        assert found == pytest.approx(seconds)


def test_a_long_fused_stage_is_uploaded_before_it_begins() -> None:
    """Two layers of 1 + 2 s and 1 GB each, up and down at 1 GB/s, on one GPU.

    If both are fused, 2 s up, 6 s and 2 s down. If not, the first one is recomputed for 1 s, and what is
    copied at the ends is half of that; but it takes 3 uploads.
    """
    chain = decoder(1, 1.0, weight_bytes=GB, gradient_bytes=GB)
    assert least(chain, 1, 1) == pytest.approx(1 + 7 + 1)
    assert least(chain, 1, 1, max_traffic=2 / 3) == pytest.approx(2 + 6 + 2)


def test_gpus_of_the_fused_stage_begin_one_after_the_other() -> None:
    """A head of 30 s behind one layer of 1 + 2 s, 4 microbatches on 4 GPUs: one each, and one job a layer.

    The heads begin after 1.1, 2.1, 3.1 and 4.1 s; behind them come 2 s, which the others have 3 s apart. The
    longest of them takes no less than the mean. With replicas everywhere each GPU has all of one microbatch.
    """
    chain = decoder(1, 10.0, **BARE)
    found = least(chain, 4, 4, fused_segments=1, max_traffic=6 / 3)
    assert found == pytest.approx(1.1 + 1.5 + 30 + 4.5 + 2)
    assert least(chain, 4, 4, fused_segments=1) == pytest.approx(0.1 + 1 + 30 + 3)


def test_what_changes_buffers_or_may_not_be_replicated_has_one_job() -> None:
    chain = decoder(1, 10.0, **BARE)
    single = least(chain, 4, 4, fused_segments=1, max_traffic=1.0)
    assert single == pytest.approx(1.1 + 4 * 30 + 2)
    last = replace(chain.segments[-1], state_bytes=8)
    changing = replace(chain, segments=(chain.segments[0], last))
    assert least(changing, 4, 4, fused_segments=1) == pytest.approx(single)
    options = {"gpus": 4, "microbatches": 4, "fused_segments": 1}
    problem, _ = SearchSchedule(**options)._problem(chain, [GB * 100] * 4)  # type: ignore[arg-type]
    found = search_schedule.least_seconds(chain, problem.tables, problem.machine, 4, most_jobs=1)
    assert found == pytest.approx(single)


def test_memory_limits_the_fused_stage_and_how_many_gpus_have_it() -> None:
    """Head and layer fused need 1.2 GB on their GPU, the head alone 0.8 GB."""
    chain = decoder(1, 1.0, saved_bytes=4 * 10**8, boundary_bytes=0, boundary_gradient_bytes=0)
    searching = SearchSchedule(2, 2)
    both, one, none = ([limit] * 2 for limit in (1_300_000_000, 1_300_000_000, 1_000_000_000))
    one[1] = 700_000_000
    found = [searching._problem(chain, limits)[1] for limits in (both, one, none)]
    # 0.2 s up and down around two GPUs with 6 s, or one that has both; recomputed: 7 s, and 0.1 s.
    assert found == pytest.approx([6.4, 7.2, 7.2])


def test_a_gradient_that_nothing_needs_takes_no_memory() -> None:
    """The head behind a frozen layer fits on the small GPU: both have 0.1 s up, 1 + 3 s, and 0.1 s down."""
    chain = decoder(1, 1.0, boundary_gradient_bytes=GB)
    frozen = replace(chain.segments[0], backward_s=0.0, gradient_bytes=0, needs_backward=False)
    chain = replace(chain, segments=(frozen, chain.segments[1]))
    _, found = SearchSchedule(2, 2)._problem(chain, [2 * GB, 600_000_000])
    assert found == pytest.approx(4.2)


def test_a_recompute_may_run_ahead_of_its_gradient() -> None:
    """10 s forward, 3 s for the head, then 1 s back: the other GPU has recomputed 10 s meanwhile."""
    chain = decoder(1, 1.0, weight_bytes=0, **BARE)
    slow = replace(chain.segments[0], forward_s=10.0, backward_s=1.0)
    chain = replace(chain, segments=(slow, chain.segments[1]))
    stages = Partition(stages_between((0, 1, 3, 4), 2), 100 * GB, 0.0, 0.0, "FEASIBLE", 0.0, "by hand")
    dispatch = of_steps("by hand", 2, 1, [(0, 0, 0, 0), (0, 1, 0, 0), (1, 2, 0, 0)])
    assert least(chain, 2, 1, fused_segments=1) == pytest.approx(14.0)
    assert taken_s(chain, stages, dispatch, "sync", 0.0)[0] == pytest.approx(14.0, abs=1e-3)


def test_the_two_ends_are_not_the_same_seconds() -> None:
    """One of two GPUs has nothing to do for 3 s, once."""
    assert least(decoder(0, 1.0, weight_bytes=0, **BARE), 2, 1) == pytest.approx(3.0)


def test_a_tied_tensor_is_uploaded_and_sent_once_by_a_stage() -> None:
    """Two tied layers and a head: with three uploads, 0.1 + 2 s, 4 x 3 s fused, 4 s back.

    With gradients of 10 s each on one GPU, 0.1 s, 11 s of work and the last gradients; two of three are made.
    """
    tied = TiedWeight("shared", (0, 1), 10**8, 0)
    chain = replace(decoder(2, 1.0, **BARE), tied=(tied,))
    assert least(chain, 4, 4, max_traffic=3 / 5) == pytest.approx(18.1)
    chain = decoder(2, 1.0, **(BARE | {"gradient_bytes": 10 * GB}))
    chain = replace(chain, tied=(replace(tied, gradient_bytes=10 * GB),))
    assert least(chain, 1, 1) == pytest.approx(0.1 + 11 + 10)


def test_frozen_layers_in_front_overlap_with_the_iteration_before() -> None:
    """A frozen layer of 1 s, a trained one of 3 s: its copies and its update take 0.3 s of that second."""
    chain = decoder(1, 1.0, boundary_bytes=0, boundary_gradient_bytes=0)
    frozen = replace(chain.segments[0], backward_s=0.0, gradient_bytes=0, needs_backward=False)
    chain = replace(chain, segments=(frozen, chain.segments[1]))
    stages = Partition(stages_between((0, 1, 3), 2), 100 * GB, 0.0, 0.0, "FEASIBLE", 0.0, "by hand")
    dispatch = of_steps("by hand", 1, 1, [(0, 0, 0, 0), (0, 1, 0, 0)])
    taken = simulate_steady(lay_out(chain, stages, dispatch, "sync", 1e-9)).period_s
    assert least(chain, 1, 1, fused_segments=1, update_s_per_byte=1e-9) == pytest.approx(4.0)
    assert taken == pytest.approx(4.0)


def test_a_tied_gradient_is_updated_once() -> None:
    chain = decoder(1, 1.0, boundary_bytes=0, boundary_gradient_bytes=0)
    plain = least(chain, 1, 1, update_s_per_byte=1e-6)
    assert plain == pytest.approx(200.0)
    tied = TiedWeight("shared", (0, 1), 10**8, 10**8)
    assert least(replace(chain, tied=(tied,)), 1, 1, update_s_per_byte=1e-6) < 0.6 * plain


def test_two_asynchronous_iterations_fit_what_an_update_waits_for() -> None:
    """One GPU at most has the fused stage of 4 microbatches: half of 0.1 + 1 + 4 x 30 + 2 + 0.1 s."""
    chain = decoder(1, 10.0, boundary_bytes=0, boundary_gradient_bytes=0)
    found = least(chain, 8, 4, mode="async", fused_segments=1, max_traffic=1.0)
    assert found == pytest.approx((0.1 + 1 + 4 * 30 + 2 + 0.1) / 2)


def taken_s(chain: SegmentChain, stages: Partition, dispatch: Dispatch, mode: str, update_s: float):
    """What a dispatch takes, and the memory of each GPU that it needs."""
    schedule = lay_out(chain, stages, dispatch, mode, update_s)
    peaks = [max(1, peak) for peak in gpu_memory_bounds(schedule)]
    if dispatch.rotate:
        peaks = [max(peaks)] * len(peaks)
    if mode == "async" or update_s:
        return simulate_steady(schedule).period_s, peaks
    return simulate(schedule).makespan_s, peaks


@settings(max_examples=100, deadline=None)
@given(
    problem=dispatched(mode="sync"),
    mode=st.sampled_from(["sync", "sync", "async"]),
    update_s=st.sampled_from([0.0, 0.0, 0.5]),
    rotate=st.integers(0, 4),
    latency_s=st.sampled_from([0.0, 0.5]),
    speeds=st.one_of(st.none(), st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=5, max_size=5)),
)
def test_no_dispatch_beats_the_bound(problem, mode, update_s, rotate, latency_s, speeds) -> None:
    """With no more traffic, memory and fused segments than the dispatch itself has."""
    chain, stages, dispatch, _ = problem
    chain = replace(chain, hardware=replace(chain.hardware, latency_s=latency_s))
    if speeds:
        speeds = speeds[: dispatch.gpus]
        gpus = tuple(replace(chain.hardware, name=f"{speed}x") for speed in speeds)
        chain = with_speeds(chain, Box(gpus, tuple(speeds)))
    elif mode == "async":
        dispatch = replace(dispatch, rotate=rotate % dispatch.gpus)
    seconds, peaks = taken_s(chain, stages, dispatch, mode, update_s)
    unit = upload_unit_bytes(chain, dispatch.gpus, dispatch.microbatches)
    uploads = upload_bytes(chain, stages, dispatch) / unit if unit else None
    fused = next(len(stage.segments) for stage in stages.stages if stage.kind is StageKind.FB)
    searching = SearchSchedule(
        dispatch.gpus,
        dispatch.microbatches,
        mode,
        max_traffic=uploads or None,
        fused_segments=fused,
        update_s_per_byte=update_s,
    )
    try:
        _, bound_s = searching._problem(chain, peaks)
    except InvalidArgument:
        assume(False)
    assert bound_s <= seconds * (1 + 1e-9)


def test_some_dispatches_reach_the_bound() -> None:
    """Both layers fused on both GPUs, a microbatch each; and all of it in turn on one."""
    chain = decoder(1, 1.0)
    stages = Partition(stages_between((0, 4), 2), 100 * GB, 0.0, 0.0, "FEASIBLE", 0.0, "by hand")
    halves = of_steps("halves", 2, 2, [(m, 0, m, m) for m in range(2)])
    seconds, _ = taken_s(chain, stages, halves, "sync", 0.0)
    assert least(chain, 2, 2) == pytest.approx(seconds, rel=0.02)
    seconds, _ = taken_s(chain, stages, of_steps("all", 1, 3, [(0, 0, m, 0) for m in range(3)]), "sync", 0.0)
    assert least(chain, 1, 3) == pytest.approx(seconds, rel=0.02)
