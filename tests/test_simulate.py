"""Timelines of schedules."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings

from rpcompile.errors import ScheduleError
from rpcompile.ir import Action, Schedule, Stream
from rpcompile.simulate import MemorySteps, Timeline, simulate
from tests.chains import act, chain, compiled, computes, hand_made, partition, problems

COMPUTE, H2D, WEIGHTS = Stream.COMPUTE, Stream.H2D, Stream.WEIGHTS
D2H, GRADIENTS = Stream.D2H, Stream.GRADIENTS


@pytest.fixture(scope="module")
def single() -> Timeline:
    """One segment, one GPU, one microbatch."""
    return simulate(compiled(chain(1), partition("FB0-0"), gpus=1, microbatches=1))


def test_times_by_hand(single):
    # A byte takes a second: weights 4 s, input 2 s, 2 + 3 s of compute, loss 4 s, gradient 4 s. Input and
    # loss go first, weights and gradient stand still meanwhile.
    times = {"0P@0.0": (0, 6), "0L0": (0, 2), "0FB0": (6, 11), "0O0": (11, 15), "0G@0.0": (11, 19)}
    assert {id: (single.start_s[id], single.end_s[id]) for id in times} == times
    assert single.makespan_s == 19
    assert single.busy_s == {
        (0, COMPUTE): 5, (0, H2D): 2, (0, WEIGHTS): 6, (0, D2H): 4, (0, GRADIENTS): 8,
    }  # fmt: skip
    assert single.bubble == pytest.approx(1 - 5 / 19)


def test_memory_by_hand(single):
    # Gradient 4, loss 4 and workspace 5 + 7 join weights and input while 0FB0 runs.
    assert single.gpu_memory == (MemorySteps((0, 6, 11, 15, 19), (6, 26, 8, 4, 0)),)
    assert single.gpu_peak_bytes == (26,)
    # The model's weights are there from the start; loss and gradient come and stay.
    assert single.host_memory == MemorySteps((0, 11), (4, 12))
    assert single.host_peak_bytes == 12


def test_critical_path_by_hand(single):
    assert single.critical_path == ("0P@0.0", "0FB0", "0G@0.0")
    assert [step.wait_s for step in single.steps] == [2, 0, 4]  # behind the input, and behind the loss


def test_queues_overlap_and_events_hold():
    a, b = act("0F0", seconds=2, records=("e0",)), act("0F1", seconds=2, records=("e1",))
    c, d = act("1F0", seconds=1, waits=("e0",)), act("1F1", seconds=5, waits=("e1",))
    timeline = simulate(hand_made((0, COMPUTE, [a, b]), (1, COMPUTE, [c, d])))
    assert timeline.start_s == {"0F0": 0, "0F1": 2, "1F0": 2, "1F1": 4}
    assert (timeline.makespan_s, timeline.bubble) == (9, pytest.approx(1 - 10 / 18))
    assert timeline.critical_path == ("0F0", "0F1", "1F1")


def test_without_events_queues_run_independently():
    timeline = simulate(computes(chain(3), partition("F0-1", "FB2-2", "B1-1", "B0-0"), 2, 2))
    assert timeline.makespan_s == 2 * 5 + 2 * 5
    assert timeline.bubble == pytest.approx(1 - 38 / 40)


def test_nothing_takes_no_time():
    timeline = simulate(Schedule("by hand", "sync", 1, 0, (), ()))
    assert (timeline.makespan_s, timeline.bubble, timeline.critical_path) == (0.0, 0.0, ())
    assert (timeline.gpu_peak_bytes, timeline.host_peak_bytes) == ((0,), 0)


@settings(max_examples=40, deadline=None)
@given(problems())
def test_a_timeline_is_tight(problem):
    schedule = compiled(*problem)
    timeline = simulate(schedule)
    recorders = {event: action.id for action in schedule.actions() for event in action.records}
    for queue in schedule.queues:
        for previous, action in pairwise((None, *queue.actions)):
            sources = [recorders[event] for event in action.waits] + ([previous.id] if previous else [])
            assert timeline.start_s[action.id] == max((timeline.end_s[id] for id in sources), default=0)
            stands_s = stands_still_s(schedule, timeline, action)
            end_s = timeline.start_s[action.id] + action.seconds + stands_s
            assert timeline.end_s[action.id] == (pytest.approx(end_s) if stands_s else end_s)
    path = timeline.critical_path
    assert timeline.start_s[path[0]] == 0
    assert timeline.end_s[path[-1]] == timeline.makespan_s == max(timeline.end_s.values())
    assert all(timeline.end_s[left] == timeline.start_s[right] for left, right in pairwise(path))


def stands_still_s(schedule: Schedule, timeline: Timeline, action: Action) -> float:
    """Seconds in which activations have the link that weights or gradients are on."""
    first = {WEIGHTS: H2D, GRADIENTS: D2H}.get(action.stream)
    times = [
        (timeline.start_s[other.id], timeline.end_s[other.id])
        for other in schedule.actions()
        if (other.gpu, other.stream) == (action.gpu, first) and other.nbytes
    ]
    begin_s, end_s = timeline.start_s[action.id], timeline.end_s[action.id]
    return sum(max(0.0, min(end, end_s) - max(begin, begin_s)) for begin, end in times)


def memory_at(schedule: Schedule, timeline: Timeline, space: str, time: float) -> int:
    """Brute force: everything that is in `space` right behind `time`."""
    total = 0
    for buffer, nbytes in schedule.buffers.items():
        writers = [timeline.start_s[a.id] for a in schedule.actions() if buffer in a.writes]
        frees = [timeline.end_s[a.id] for a in schedule.actions() if buffer in a.frees]
        if buffer.startswith("host:weights"):
            writers = [0.0]
        if buffer.startswith(space) and writers and min(writers) <= time < min(frees, default=float("inf")):
            total += nbytes
    for action in schedule.actions():
        if space == f"gpu{action.gpu}:" and timeline.start_s[action.id] <= time < timeline.end_s[action.id]:
            total += action.workspace_bytes
    return total


@settings(max_examples=15, deadline=None)
@given(problems(max_segments=3))
def test_memory_steps_against_brute_force(problem):
    schedule = compiled(*problem)
    timeline = simulate(schedule)
    moments = sorted({*timeline.start_s.values(), *timeline.end_s.values()})
    spaces = {f"gpu{gpu}:": steps for gpu, steps in enumerate(timeline.gpu_memory)}
    for space, steps in {**spaces, "host:": timeline.host_memory}.items():
        assert all(left < right for left, right in pairwise(steps.times_s))
        for moment in moments:
            known = [n for time, n in zip(steps.times_s, steps.nbytes, strict=True) if time <= moment]
            assert known[-1] == memory_at(schedule, timeline, space, moment)
    assert all(steps.nbytes[-1] == 0 for steps in timeline.gpu_memory)


@pytest.mark.parametrize(
    ("queues", "message"),
    [
        (
            [(0, COMPUTE, [act("0F0", waits=("e0",))])],
            "0F0 waits for event e0, which no action records",
        ),
        (
            [(0, COMPUTE, [act("0F0", records=("e0",))]), (1, COMPUTE, [act("1F0", records=("e0",))])],
            "event e0 is recorded by 0F0 and by 1F0; an event has one recorder",
        ),
        (
            [
                (0, COMPUTE, [act("0F0", waits=("e1",)), act("0F1"), act("0F2", records=("e0",))]),
                (1, D2H, [act("1H0", waits=("e0",), records=("e1",))]),
            ],
            "deadlock: 0F0 (gpu0 compute) waits for 1H0 (gpu1 d2h), which waits for 0F2 (gpu0 compute), "
            "which is queued behind 0F0 (gpu0 compute)",
        ),
        (
            [(0, COMPUTE, [act("0F0", waits=("e0",), records=("e0",))])],
            "deadlock: 0F0 (gpu0 compute) waits for 0F0 (gpu0 compute)",
        ),
        (
            [(0, COMPUTE, [act("0F0", writes=("gpu0:loss.m0",))])],
            "gpu0:loss.m0 has no size; add it to the schedule's buffers",
        ),
    ],
)
def test_refuses_what_cannot_run(queues, message):
    with pytest.raises(ScheduleError, match=f"^{re.escape(message)}$"):
        simulate(hand_made(*queues))


def test_a_deadlock_names_a_circle_not_a_bystander():
    schedule = compiled(chain(3), partition("F0-1", "FB2-2", "B1-1", "B0-0"), 2, 2)
    queues = tuple(
        replace(queue, actions=queue.actions[::-1]) if (queue.gpu, queue.stream) == (1, H2D) else queue
        for queue in schedule.queues
    )
    with pytest.raises(ScheduleError) as caught:
        simulate(replace(schedule, queues=queues))
    text = str(caught.value)
    assert text.startswith("deadlock: ")
    names = re.findall(r"(\S+) \(gpu", text)
    assert names[0] == names[-1]
    assert len(names) > 2
