"""Trace files and the printed grid."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from decimal import Decimal
from itertools import groupby, pairwise

import pytest
from hypothesis import given, settings

from rpcompile.errors import ScheduleError
from rpcompile.ir import ActionId, Op, Queue, Stream
from rpcompile.simulate import simulate
from rpcompile.trace import Run, format_schedule, parse_ids, write_trace
from tests.chains import act, chain, compiled, partition, problems

STAGES = partition("F0-1", "FB2-2", "B1-1", "B0-0")

GOLDEN = """\
gpu0 compute    e6,e12>0F0>e0 0X0.0>e1 e7>0F1>e2 0X1.0>e3 0X@0.0 e8,e13>2R0 e9,e16>2B0>e4 2X0.0 e10>2R1 \
e11,e19>2B1>e5 2X1.0 2X@2.0
gpu0 h2d        0L0>e6 0L1>e7 e1,e15>2L0>e8 e35>2V0>e9 2X0.1 e3,e18>2L1>e10 e37>2V1>e11 2X1.1
gpu0 weights    0P@0.0 0P@0.1>e12 2P@2.1>e13
gpu0 d2h        e0>0H0>e14 0O0.0>e15 0X0.2>e16 e2>0H1>e17 0O1.0>e18 0X1.2>e19 e4>2H0>e20 2X0.2 e5>2H1>e21 \
2X1.2
gpu0 gradients  e5>2G@2.1 2X@2.3
gpu1 compute    e27,e33>1FB0>e22 1X0.0>e23 e28>1FB1>e24 1X1.0>e25 1X@1.0 e29,e34>3R0 e30,e36>3B0 3X0.0 \
e31>3R1 e32,e38>3B1>e26 3X1.0 3X@3.0
gpu1 h2d        e14>1V0>e27 1X0.1 e17>1V1>e28 1X1.1 e23>3L0>e29 e20>3V0>e30 3X0.1 e25>3L1>e31 e21>3V1>e32 \
3X1.1
gpu1 weights    1P@1.2>e33 3P@3.0>e34
gpu1 d2h        e22>1H0>e35 1O0 1X0.2>e36 e24>1H1>e37 1O1 1X1.2>e38
gpu1 gradients  e24>1G@1.2 1X@1.3 e26>3G@3.0 3X@3.3
"""


@pytest.fixture
def trace(tmp_path):
    schedule = compiled(chain(3), STAGES, gpus=2, microbatches=2)
    write_trace(schedule, simulate(schedule), tmp_path / "trace.json")
    return json.loads((tmp_path / "trace.json").read_text())


def slices(trace) -> list[dict]:
    return [event for event in trace["traceEvents"] if event["ph"] in "Xi"]


def test_the_grid_of_two_gpus():
    assert format_schedule(compiled(chain(3), STAGES, gpus=2, microbatches=2)) == GOLDEN


@settings(max_examples=30, deadline=None)
@given(problems())
def test_the_grid_parses_back(problem):
    schedule = compiled(*problem)
    assert parse_ids(format_schedule(schedule)) == {
        (queue.gpu, queue.stream): tuple(ActionId.parse(action.id) for action in queue.actions)
        for queue in schedule.queues
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpu0 0F0", "'gpu0 0F0' must begin with a GPU and a stream, e.g. gpu0 compute"),
        ("0 x 0F0", "'0 x 0F0' must begin with a GPU and a stream"),
        ("gpu0", "'gpu0' must begin with a GPU and a stream"),
        ("gpu0 h2d 0L0>0L1", "'0L0>0L1' must hold one action, e.g. e1,e2>0F0>e3"),
        ("gpu0 h2d e1>e2", "'e1>e2' must hold one action"),
        ("gpu0 h2d 0Z0", "'0Z0' is not an action"),
    ],
)
def test_the_grid_refuses_other_text(text, message):
    with pytest.raises(ScheduleError, match=re.escape(message)):
        parse_ids(text)


def test_every_action_is_in_the_trace_where_it_runs(trace):
    schedule = compiled(chain(3), STAGES, gpus=2, microbatches=2)
    threads = {
        (event["pid"], event["tid"]): event["args"]["name"]
        for event in trace["traceEvents"]
        if event["name"] == "thread_name"
    }
    found = {event["name"]: (event["pid"], threads[event["pid"], event["tid"]]) for event in slices(trace)}
    assert found == {action.id: (action.gpu, action.stream) for action in schedule.actions()}


def test_slices_carry_times_in_microseconds_and_arguments(trace):
    forward = next(event for event in slices(trace) if event["name"] == "0F1")
    # Two inputs 4 s, weights 8 s, 0F0 4 s: 16 s, then 4 s.
    assert (forward["ph"], forward["ts"], forward["dur"]) == ("X", 16e6, 4e6)
    assert forward["args"] == {"op": "FORWARD", "stage": 0, "job": 0, "segments": [0, 1], "microbatch": 1}
    upload = next(event for event in slices(trace) if event["name"] == "2P@2.1")
    assert upload["args"] == {"op": "PREFETCH", "stage": 2, "job": 2, "segments": [1], "bytes": 4}


def test_the_trace_says_that_it_is_simulated(trace):
    names = [event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "process_name"]
    assert names == ["GPU 0 (simulated)", "GPU 1 (simulated)"]
    assert trace["metadata"]["source"] == "rpcompile, simulated"
    assert trace["metadata"]["runs"][0]["makespan_s"] == 42.0


def test_arrows_lead_from_hand_off_to_receive(trace):
    at = {
        (event["pid"], event["tid"], event["ts"]): event["name"]
        for event in slices(trace)
        if event["ph"] == "X"
    }
    arrows = sorted(
        (e for e in trace["traceEvents"] if e["ph"] in "sf"), key=lambda e: (e["id"], e["ph"] == "f")
    )
    ends = [at[event["pid"], event["tid"], event["ts"]] for event in arrows]
    assert sorted(zip(ends[::2], ends[1::2], strict=True)) == [
        ("0H0", "1V0"),
        ("0H1", "1V1"),
        ("1H0", "2V0"),
        ("1H1", "2V1"),
        ("2H0", "3V0"),
        ("2H1", "3V1"),
    ]


def test_memory_counters_follow_the_timeline(trace):
    timeline = simulate(compiled(chain(3), STAGES, gpus=2, microbatches=2))
    for gpu, steps in enumerate(timeline.gpu_memory):
        found = [
            (event["ts"], event["args"]["bytes"])
            for event in trace["traceEvents"]
            if event["ph"] == "C" and event["pid"] == gpu
        ]
        assert found == [(time * 1e6, n) for time, n in zip(steps.times_s, steps.nbytes, strict=True)]


@pytest.mark.parametrize("number", [float, Decimal])
@settings(max_examples=25, deadline=None)
@given(problem=problems())
def test_slices_of_a_track_never_overlap(tmp_path_factory, number, problem):
    schedule = compiled(*problem)
    # Thirds of microseconds, so that rounding has something to do.
    timeline = simulate(schedule)
    odd = {
        name: {id: time / 3e6 for id, time in getattr(timeline, name).items()}
        for name in ("start_s", "end_s")
    }
    timeline = replace(timeline, **odd)
    path = tmp_path_factory.mktemp("trace") / "trace.json"
    write_trace(schedule, timeline, path)
    found = [e for e in slices(json.loads(path.read_text(), parse_float=number)) if e["ph"] == "X"]
    assert len(found) == sum(action.op is not Op.FREE for action in schedule.actions())
    found.sort(key=lambda event: (event["pid"], event["tid"], event["ts"], event["ts"] + event["dur"]))
    for _, track in groupby(found, key=lambda event: (event["pid"], event["tid"])):
        assert all(left["ts"] + left["dur"] <= right["ts"] for left, right in pairwise(track))


def test_a_failed_write_leaves_the_old_file(tmp_path):
    schedule = compiled(chain(3), STAGES, gpus=2, microbatches=2)
    timeline = simulate(schedule)
    path = tmp_path / "trace.json"
    path.write_text("old")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_trace(schedule, replace(timeline, bubble=float("nan")), path)
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("trace.json", "old")]
    write_trace(schedule, timeline, path)
    assert [found.name for found in tmp_path.iterdir()] == ["trace.json"]
    assert path.read_text() != "old"


def test_several_runs_and_iterations_in_one_file(tmp_path):
    schedule = compiled(chain(3), STAGES, gpus=2, microbatches=2)
    update = replace(act("2U@2.1", Op.UPDATE, seconds=3), stream=Stream.HOST)
    updated = replace(schedule, queues=(*schedule.queues, Queue(0, Stream.HOST, (update,))))
    simulated = simulate(updated, iterations=2, mode="async", rotate=1)
    measured = simulate(schedule)
    path = tmp_path / "trace.json"
    write_trace(updated, simulated, path, Run(schedule, measured, "measured"))
    trace = json.loads(path.read_text())
    names = [e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"]
    assert names == [
        "GPU 0 (simulated)",
        "GPU 1 (simulated)",
        "Host (simulated)",
        "GPU 0 (measured)",
        "GPU 1 (measured)",
    ]
    found = {(e["pid"], e["name"]): e["ts"] for e in slices(trace)}
    # GPUs 3 and 4 are the second run's; its host would be 5.
    assert found[0, "0F0"] == 1e6 * simulated.start_s["0F0"]
    assert found[1, "0F0#1"] == 1e6 * simulated.start_s["0F0#1"]
    assert found[2, "2U@2.1#1"] == 3e6
    assert found[3, "0F0"] == 1e6 * measured.start_s["0F0"]
    assert len(found) == 2 * (len(list(schedule.actions())) + 1) + len(list(schedule.actions()))
    ids = [e["id"] for e in trace["traceEvents"] if e["ph"] == "s"]
    assert ids == list(range(18))
    assert trace["metadata"]["source"] == "rpcompile, simulated and measured"
    assert [run["iterations"] for run in trace["metadata"]["runs"]] == [2, 1]
