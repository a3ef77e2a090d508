"""Compute-only timelines of dispatches, by hand and against full schedules with links that take no time."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rpcompile.errors import InvalidArgument, ScheduleError
from rpcompile.idle_time import IdleTime
from rpcompile.ir import Dispatch, Job
from rpcompile.passes.dispatch_1f1b import Dispatch1F1B
from rpcompile.passes.dispatch_gpipe import DispatchGPipe
from rpcompile.passes.dispatch_interleaved_1f1b import DispatchInterleaved1F1B
from rpcompile.passes.dispatch_looped_bfs import DispatchLoopedBFS
from rpcompile.passes.dispatch_round_robin import DispatchRoundRobin
from rpcompile.passes.insert_event_waits import InsertEventWaits
from rpcompile.passes.insert_transfers import InsertTransfers
from rpcompile.passes.lay_out_dispatch import LayOutDispatch
from rpcompile.passes.partition_pipeline import PartitionPipeline
from rpcompile.simulate import simulate
from rpcompile.simulate_dispatch import (
    simulate_dispatch,
    simulate_steady_state,
    upload_bytes,
)
from rpcompile.stage_bytes import upload_unit_bytes
from tests.chains import HARDWARE, chain, partition, problems

THREE = partition("F0-1", "FB2-2", "B0-1")


def test_round_robin_by_hand():
    # Two GPUs, two microbatches, hops of 1: F 4 s, FB 5 s, B 10 s, of which 4 s recompute.
    dispatch = DispatchRoundRobin(2, 2).run(THREE)
    assert dispatch.order == (((0, 0), (0, 1), (2, 0), (2, 1)), ((1, 0), (1, 1)))
    timeline = simulate_dispatch(chain(3), THREE, dispatch, hop_s=1)
    # The recompute of 2B0 starts when 0F1 is over; its gradient comes at 11.
    assert timeline.start_s == ((0, 4, 8, 18), (5, 10))
    assert timeline.end_s == ((4, 8, 18, 28), (10, 15))
    assert timeline.idle == IdleTime(fill_s=5, switch_s=0, drain_s=13, intra_s=0)
    assert (timeline.makespan_s, timeline.work_s, timeline.bubble) == (28, 38, 1 - 38 / 56)
    whole = simulate_dispatch(chain(3), THREE, replace(dispatch, recompute_ahead=False), hop_s=1)
    assert (whole.start_s[0], whole.idle.switch_s) == ((0, 4, 11, 21), 3)


def test_published_semantics_let_the_fused_forward_run_before_its_input_is_there():
    dispatch = DispatchRoundRobin(2, 2).run(THREE)
    timeline = simulate_dispatch(chain(3), THREE, dispatch, hop_s=1, semantics="published")
    assert timeline.start_s == ((0, 4, 8, 18), (3, 8))


def test_a_recompute_waits_for_the_input_it_starts_from():
    stages = partition("F0-0", "F1-1", "FB2-2", "B1-1", "B0-0")
    jobs = tuple(Job(i, i, 0, 0, (0,), gpu) for i, gpu in enumerate((0, 0, 0, 1, 1)))
    dispatch = Dispatch("by hand", 2, 1, jobs, (((0, 0), (1, 0), (2, 0)), ((3, 0), (4, 0))), True)
    # The gradient from 2FB0, which ends at 9, is on GPU 1 at 11; 2 s of recompute come before it.
    assert simulate_dispatch(chain(3), stages, dispatch).start_s == ((0, 2, 4), (9, 14))
    # Stage 0 ends at 2, and its 20 bytes take 40 s.
    large = chain(3, {0: {"boundary_bytes": 20}})
    assert simulate_dispatch(large, stages, dispatch).start_s == ((0, 2, 4), (42, 47))
    quirk = simulate_dispatch(large, stages, dispatch, semantics="published")
    assert quirk.start_s == ((0, 2, 4), (9, 14))


def test_hops_follow_from_bytes_unless_they_are_given():
    dispatch = DispatchRoundRobin(2, 1).run(THREE)
    # One byte down and one up, a second each.
    assert simulate_dispatch(chain(3), THREE, dispatch).start_s[1] == (6,)


def test_pipelines_by_hand():
    stages = PartitionPipeline(2).run(chain(4))
    assert [f"{s.kind}{s.first}-{s.last}" for s in stages.stages] == ["F0-1", "F2-3", "B2-3", "B0-1"]
    orders = {
        DispatchGPipe: ("F0 F1 B0 B1", "F0 F1 B0 B1"),
        Dispatch1F1B: ("F0 F1 B0 B1", "F0 B0 F1 B1"),
        DispatchLoopedBFS: ("F0 F1 B0 B1", "F0 F1 B0 B1"),
        DispatchInterleaved1F1B: ("F0 F1 B0 B1", "F0 B0 F1 B1"),
    }
    for kind, expected in orders.items():
        dispatch = kind(2, 2).run(stages)
        found = [" ".join(f"{'FFBB'[job]}{m}" for job, m in order) for order in dispatch.order]
        assert tuple(found) == expected
    # B of the last stage keeps the head: 5 s of layer 2, 3 s of the head.
    timeline = simulate_dispatch(chain(4), stages, Dispatch1F1B(2, 2).run(stages), hop_s=0)
    assert timeline.start_s == ((0, 4, 16, 28), (4, 8, 16, 20))
    assert timeline.idle == IdleTime(fill_s=4, switch_s=8, drain_s=10, intra_s=2)


def test_looped_orders_by_hand():
    stages = PartitionPipeline(2, chunks=2).run(chain(4))
    looped = DispatchLoopedBFS(2, 4).run(stages)
    assert [job for job, m in looped.order[1] if m == 0] == [1, 3, 4, 6]
    interleaved = DispatchInterleaved1F1B(2, 4).run(stages)
    # GPU 1 warms up with 2 forwards, then takes turns: groups of two microbatches, stages 1 and 3.
    assert interleaved.order[1][:8] == ((1, 0), (1, 1), (3, 0), (4, 0), (3, 1), (4, 1), (1, 2), (6, 0))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 11), st.booleans())
def test_no_pipeline_deadlocks(gpus, chunks, microbatches, fused):
    length = gpus * chunks + 2
    stages = PartitionPipeline(gpus, chunks, fused).run(chain(length))
    passes = [DispatchLoopedBFS(gpus, microbatches), DispatchInterleaved1F1B(gpus, microbatches)]
    if chunks == 1:
        passes += [DispatchGPipe(gpus, microbatches), Dispatch1F1B(gpus, microbatches)]
    for step in passes:
        dispatch = step.run(stages)
        done = sorted((dispatch.jobs[job].stage, m) for order in dispatch.order for job, m in order)
        assert done == [(s, m) for s in range(len(stages.stages)) for m in range(microbatches)]
        timeline = simulate_dispatch(chain(length), stages, dispatch, hop_s=0.1)
        assert timeline.idle.total_s == pytest.approx(timeline.bubble * gpus * timeline.makespan_s, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(problems(max_segments=5, mode="sync"), st.integers(1, 3))
def test_equals_a_full_schedule_whose_links_take_no_time(problem, rounds):
    given_chain, stages, gpus, microbatches, _ = problem
    assume(any(segment.forward_s or segment.backward_s for segment in given_chain.segments))
    if any(segment.state_bytes for segment in given_chain.segments):
        rounds = 1  # a stage that changes buffers is not divided among jobs
    fast = replace(HARDWARE, h2d_bytes_per_s=1e30, d2h_bytes_per_s=1e30)
    quick = replace(given_chain, hardware=fast)
    dispatch = DispatchRoundRobin(gpus, microbatches, min(rounds, microbatches)).run(stages)
    schedule = LayOutDispatch(quick, stages).run(dispatch)
    timeline = simulate(InsertEventWaits().run(InsertTransfers(quick, 1000).run(schedule)))
    ahead = simulate_dispatch(quick, stages, dispatch, hop_s=0)
    assert ahead.makespan_s == pytest.approx(timeline.makespan_s)
    assert ahead.bubble == pytest.approx(timeline.bubble)
    for gpu, order in enumerate(dispatch.order):
        for place, (job, m) in enumerate(order):
            stage = stages.stages[dispatch.jobs[job].stage]
            assert ahead.end_s[gpu][place] == pytest.approx(timeline.end_s[f"{stage.index}{stage.kind}{m}"])
    for part in ("fill_s", "switch_s", "drain_s", "intra_s"):
        assert getattr(ahead.idle, part) == pytest.approx(getattr(timeline.idle, part))
    whole = simulate_dispatch(quick, stages, replace(dispatch, recompute_ahead=False), hop_s=0)
    quirks = simulate_dispatch(quick, stages, dispatch, hop_s=0, semantics="published")
    assert quirks.makespan_s <= ahead.makespan_s <= whole.makespan_s


def test_steady_state_fills_the_pipeline():
    dispatch = DispatchRoundRobin(2, 2).run(THREE)
    steady = simulate_steady_state(chain(3), THREE, dispatch, hop_s=0, rotate=1)
    # GPUs change places each time: iterations end at 28, 49, 70, ...: the fused stage of one waits for the
    # last backward of the one before on its GPU, 28 to 33 in the second.
    assert (steady.period_s, steady.bubble) == (pytest.approx(21), pytest.approx(1 - 38 / 42))
    fixed = simulate_steady_state(chain(3), THREE, dispatch, hop_s=0)
    assert (fixed.period_s, fixed.bubble) == (pytest.approx(28), pytest.approx(1 - 38 / 56))


def test_traffic_counts_uploads_by_job():
    two_rounds = DispatchRoundRobin(2, 4, rounds=2).run(THREE)
    assert upload_bytes(chain(3), THREE, two_rounds) == 2 * (8 + 4 + 8)
    assert upload_unit_bytes(chain(3), 2, 4) == 2 * (8 + 4 + 8)
    assert upload_unit_bytes(chain(3), 2, 5) == 2.5 * (8 + 4 + 8)
    assert upload_unit_bytes(chain(3), 8, 4) == 8 + 4 + 8
    frozen = chain(3, {0: {"needs_backward": False}})
    assert upload_unit_bytes(frozen, 2, 2) == 8 + 4 + 4


@pytest.mark.parametrize("seconds", [-1.0, math.nan, math.inf])
def test_refuses_times_that_cannot_be(seconds):
    dispatch = DispatchRoundRobin(2, 2).run(THREE)
    message = f"segment layer1 has backward_s = {seconds}; give a finite number of seconds, 0 or more"
    with pytest.raises(InvalidArgument, match=f"^{re.escape(message)}$"):
        simulate_dispatch(chain(3, {1: {"backward_s": seconds}}), THREE, dispatch)
    with pytest.raises(InvalidArgument, match=f"^hop_s is {seconds}; give a finite number"):
        simulate_dispatch(chain(3), THREE, dispatch, hop_s=seconds)


def test_refuses_a_chain_without_any_time():
    nothing = chain(3, {i: {"forward_s": 0.0, "backward_s": 0.0} for i in range(3)})
    with pytest.raises(InvalidArgument, match=r"^all compute times are zero; a bubble needs at least one"):
        simulate_dispatch(nothing, THREE, DispatchRoundRobin(2, 2).run(THREE))


def test_refuses_unknown_semantics():
    with pytest.raises(InvalidArgument, match=r"^semantics is 'loose'; choose one of strict, published$"):
        simulate_dispatch(chain(3), THREE, DispatchRoundRobin(2, 2).run(THREE), semantics="loose")


def test_names_the_circle_of_a_deadlock():
    dispatch = DispatchRoundRobin(2, 2).run(THREE)
    (first, second, *rest), other = dispatch.order
    stuck = replace(dispatch, order=((*rest, first, second), other))
    message = (
        "deadlock: 2B0 (gpu0) waits for 1FB0, which is queued behind 1FB0 (gpu1) waits for 0F0, which is "
        "queued behind 2B0 (gpu0)"
    )
    with pytest.raises(ScheduleError, match=f"^{re.escape(message)}$"):
        simulate_dispatch(chain(3), THREE, stuck)


def test_names_what_no_job_runs():
    dispatch = DispatchRoundRobin(2, 2).run(THREE)
    lost = replace(dispatch, order=(dispatch.order[0][1:], dispatch.order[1]))
    with pytest.raises(ScheduleError, match=r"^no job runs microbatch 0 of stage 0$"):
        simulate_dispatch(chain(3), THREE, lost)
