"""Several iterations behind one another, and what a timeline says besides times."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from itertools import accumulate

import pytest
from hypothesis import given, settings

from rpcompile.errors import InvalidArgument, ScheduleError
from rpcompile.idle_time import steady_period
from rpcompile.ir import Op, Stream
from rpcompile.simulate import MemorySteps, Step, simulate
from tests.chains import act, chain, compiled, hand_made, partition, problems

COMPUTE, H2D, D2H, HOST = Stream.COMPUTE, Stream.H2D, Stream.D2H, Stream.HOST
SINGLE = compiled(chain(1), partition("FB0-0"), gpus=1, microbatches=1)  # times: tests/test_simulate.py


def test_without_updates_a_synchronous_iteration_waits_for_the_one_before():
    timeline = simulate(SINGLE, iterations=3)
    assert timeline.iteration_end_s == (19, 38, 57)
    assert timeline.period_s == 19
    assert timeline.start_s["0P@0.0#2"] == 38


def test_asynchronous_iterations_wait_for_the_gradients_of_the_last_but_one():
    timeline = simulate(SINGLE, iterations=3, mode="async")
    # All three inputs come first, while the weights stand still; the second loss interrupts a gradient.
    starts = {"0L0#2": 4, "0P@0.0#1": 10, "0FB0#1": 15, "0O0#1": 20, "0P@0.0#2": 27}
    assert {id: timeline.start_s[id] for id in starts} == starts
    assert timeline.critical_path[:4] == ("0P@0.0", "0FB0", "0G@0.0", "0P@0.0#2")


def test_memory_over_iterations_counts_what_lasts_once():
    timeline = simulate(SINGLE, iterations=2)
    # As in one iteration, twice; on the host the second loss and gradient take the place of the first.
    assert timeline.host_memory == MemorySteps((0, 11), (4, 12))
    assert timeline.gpu_memory[0].nbytes == (6, 26, 8, 4, 6, 26, 8, 4, 0)
    assert (timeline.weight_bytes, timeline.upload_bytes, timeline.download_bytes) == (8, 12, 16)


def updated(update_s: float):
    upload = act("0P@0.0", Op.PREFETCH, seconds=1, reads=("host:weights.s0",), records=("e0",))
    compute = act("0FB0", Op.FUSED, seconds=2, waits=("e0",), records=("e1",))
    other = act("1P@1.1", Op.PREFETCH, seconds=1, reads=("host:weights.s1",))
    download = act(
        "0G@0.0", Op.GRADIENT, seconds=1, reads=("gpu0:gradients.j0.s0",), waits=("e1",), records=("e2",)
    )
    update = act("0U@0.0", Op.UPDATE, seconds=update_s, writes=("host:updated.s0",), waits=("e2",))
    schedule = hand_made(
        (0, H2D, [upload]),
        (0, COMPUTE, [compute]),
        (0, D2H, [download]),
        (0, HOST, [update]),
        (1, H2D, [other]),
    )
    return replace(schedule, buffers={"host:updated.s0": 0})


def test_an_upload_waits_for_the_update_of_its_segment_and_others_do_not():
    timeline = simulate(updated(5), iterations=3)
    assert [timeline.start_s[f"0P@0.0{i}"] for i in ("", "#1", "#2")] == [0, 9, 18]
    assert [timeline.start_s[f"1P@1.1{i}"] for i in ("", "#1", "#2")] == [0, 1, 2]
    assert timeline.bound_s == {"upload": 3, "compute": 6, "download": 3, "host": 15}
    behind = simulate(updated(5), iterations=3, mode="async")
    assert [behind.start_s[f"0P@0.0{i}"] for i in ("", "#1", "#2")] == [0, 1, 9]
    assert behind.period_s == 5


def test_iterations_move_on_to_other_gpus():
    schedule = hand_made((0, COMPUTE, [act("0F0", seconds=5)]))
    fixed = simulate(schedule, iterations=6, mode="async")
    moved = simulate(schedule, iterations=6, mode="async", rotate=1)
    assert fixed.iteration_end_s == (5, 10, 15, 20, 25, 30)
    assert moved.iteration_end_s == (5, 5, 10, 10, 15, 15)
    assert (fixed.period_s, moved.period_s) == (5, 2.5)
    assert moved.busy_s == {(0, COMPUTE): 15, (1, COMPUTE): 15}


def test_updates_stay_on_the_host_when_iterations_move_on():
    compute = act("0F0", seconds=1, records=("e0",))
    update = act("0U@0.0", Op.UPDATE, seconds=5, writes=("host:updated.s0",), waits=("e0",))
    schedule = hand_made((0, COMPUTE, [compute]), (0, HOST, [update]))
    schedule = replace(schedule, buffers={"host:updated.s0": 0})
    moved = simulate(schedule, iterations=4, mode="async", rotate=1)
    assert [moved.start_s[f"0F0{i}"] for i in ("", "#1", "#2")] == [0, 0, 1]
    assert moved.iteration_end_s == (6, 11, 16, 21)


def test_a_gpu_holds_the_weights_of_two_jobs_across_iterations():
    def job(index: int, seconds: float):
        upload = act(f"{index}P@{index}.0", Op.PREFETCH, seconds=1, records=(f"e{index}",))
        compute = act(f"{index}F0", seconds=seconds, waits=(f"e{index}",))
        free = act(f"{index}X@{index}.0", Op.FREE, frees=(f"gpu0:weights.j{index}.s0",))
        return replace(upload, job=index), replace(compute, job=index), replace(free, job=index)

    (up0, run0, free0), (up1, run1, free1) = job(0, 10), job(1, 10)
    schedule = hand_made((0, H2D, [up0, up1]), (0, COMPUTE, [run0, free0, run1, free1]))
    sizes = {"gpu0:weights.j0.s0": 1, "gpu0:weights.j1.s0": 1}
    timeline = simulate(replace(schedule, buffers=sizes), iterations=2, mode="async")
    # Job 0 of the next iteration takes the place of this iteration's job 0, free at 11.
    assert [timeline.start_s[id] for id in ("0P@0.0", "1P@1.0", "0P@0.0#1", "1P@1.0#1")] == [0, 1, 11, 21]


@settings(max_examples=20, deadline=None)
@given(problems(max_segments=4, mode="sync"))
def test_iterations_keep_their_order_and_bubbles_shrink(problem):
    schedule = compiled(*problem)
    gpus = schedule.gpus
    one = simulate(schedule)
    sync, behind = (simulate(schedule, iterations=3, mode=mode) for mode in ("sync", "async"))
    assert sync.iteration_end_s == pytest.approx([one.makespan_s * i for i in (1, 2, 3)])
    assert list(behind.iteration_end_s) == sorted(behind.iteration_end_s)
    assert behind.makespan_s <= sync.makespan_s + 1e-9
    for timeline in (one, sync, behind):
        idle_s = timeline.bubble * gpus * timeline.makespan_s
        assert timeline.idle.total_s == pytest.approx(idle_s, abs=1e-9)
        assert sum(timeline.bound_s.values()) == pytest.approx(timeline.makespan_s)


def test_the_critical_path_says_what_bounds_it():
    timeline = simulate(compiled(chain(2), partition("F0-0", "FB1-1", "B0-0"), gpus=2, microbatches=1))
    # 4 s of weights, which stand still for the 2 s of the input and the 2 s of the next one.
    assert timeline.steps[0] == Step("0P@0.0", 8, "upload", 4.0)
    bounds = [step.bound for step in timeline.steps if step.seconds]
    assert bounds == [
        "upload",
        "compute",
        "hop",
        "hop",
        "compute",
        "hop",
        "hop",
        "compute",
        "download",
    ]


@pytest.mark.parametrize("seconds", [-1.0, math.nan, math.inf])
def test_refuses_times_that_cannot_be(seconds):
    message = f"0F0 takes {seconds} seconds; give its segments and links finite times, 0 or more"
    with pytest.raises(InvalidArgument, match=f"^{re.escape(message)}$"):
        simulate(hand_made((0, COMPUTE, [act("0F0", seconds=seconds)])))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "late"}, "mode is 'late'; iterations are chained 'sync' or 'async'"),
        ({"iterations": 0}, "iterations=0 must be at least 1"),
    ],
)
def test_refuses_options(options, message):
    with pytest.raises(InvalidArgument, match=f"^{re.escape(message)}$"):
        simulate(SINGLE, **options)


def test_one_iteration_has_no_period():
    message = "one iteration has no period; use simulate(schedule, iterations=16) or so"
    with pytest.raises(InvalidArgument, match=re.escape(message)):
        _ = simulate(SINGLE).period_s


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([9, 5, 5, 5, 5, 5], (5, True)),
        ([9, 4, 2, 3, 4, 2, 3, 4, 2, 3, 4], (3, True)),
        ([5, 5, 7, 5, 5, 7, 5, 5], (17 / 3, True)),
        ([9, 8, 7, 6, 5, 4], (5, False)),
        ([7], (7, False)),
    ],
)
def test_the_period_is_that_of_the_shortest_turn(steps, expected):
    found = steady_period(list(accumulate(steps, initial=3.0)))
    assert found == (pytest.approx(expected[0]), expected[1])


@pytest.mark.parametrize(
    ("ends_s", "busy_s", "rotate", "expected"),
    [
        ((10, 20, 30, 39), (0, 0), 0, 10),  # nothing follows the last, which is early
        ((10, 20), (0, 0), 0, 10),
        ((10, 20, 30, 40, 50), (80, 40), 0, 16),  # no faster than the GPU with most work
        ((10, 20, 30, 40, 50), (80, 40), 1, 12),  # which each is in turn
        # Steps of 11, 12, ... 17 do not repeat: the mean over the last four, for two begin on every GPU once.
        ((10, 21, 33, 46, 60, 75, 91, 108, 109), (0, 0), 1, (108 - 46) / 4),
    ],
)
def test_the_period_of_a_timeline(ends_s, busy_s, rotate, expected):
    plain = simulate(compiled(chain(1), partition("FB0-0"), gpus=2, microbatches=1))
    busy = {(gpu, Stream.COMPUTE): seconds for gpu, seconds in enumerate(busy_s)}
    found = replace(plain, iteration_end_s=ends_s, busy_s=busy, rotate=rotate)
    assert found.period_s == pytest.approx(expected)


def test_a_deadlock_is_named_with_several_iterations_too():
    schedule = hand_made((0, COMPUTE, [act("0F0", waits=("e0",)), act("0F1", records=("e0",))]))
    with pytest.raises(ScheduleError, match=r"^deadlock: 0F0 \(gpu0 compute\) waits for 0F1"):
        simulate(schedule, iterations=2)
