"""Timelines of real runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import rpcompile
from rpcompile.errors import ScheduleError
from rpcompile.ir import Op, Stream
from rpcompile.simulate import measured
from rpcompile.trace import write_trace
from tests import models


@pytest.mark.parametrize("updates", [{}, {"optimizer_ns": 1.0}])
def test_a_recorded_run_becomes_a_timeline_and_a_trace(updates: dict[str, float], tmp_path: Path) -> None:
    case = models.make("mlp")
    with rpcompile.compile(
        case.model,
        2,
        example_inputs=case.batch,
        microbatches=4,
        solver_time_s=0.5,
        gpu=models.SLOW_GPU,
        **updates,
    ) as compiled:
        schedule, engine = compiled.plan.schedule, compiled._training.engine
        compiled.forward_backward(**case.batch)
        with pytest.raises(ScheduleError, match=r"has no measured times; record the run of this schedule"):
            measured(schedule, engine.times)
        engine.record_times = True
        compiled.forward_backward(**case.batch)
    timeline = measured(schedule, engine.times)
    assert min(timeline.start_s.values()) == 0.0
    assert timeline.makespan_s == max(timeline.end_s.values()) > 0
    for queue in schedule.queues:
        # Weights are copied on a stream of their own beside h2d.
        timed = [a for a in queue.actions if queue.stream is not Stream.H2D and a.op is not Op.UPDATE]
        ends = [timeline.end_s[a.id] for a in timed]
        assert ends == sorted(ends)
    recorders = {event: action for action in schedule.actions() for event in action.records}
    ran = [action for action in schedule.actions() if action.op is not Op.UPDATE]
    assert timeline.start_s.keys() == {action.id for action in ran}
    assert (len(ran) < len(list(schedule.actions()))) == bool(updates)
    for action in ran:
        for event in action.waits:
            if recorders[event].stream is not Stream.H2D and action.stream is not Stream.H2D:
                assert timeline.start_s[action.id] >= timeline.end_s[recorders[event].id]
    write_trace(schedule, timeline, tmp_path / "trace.json", label="measured")
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert trace["metadata"]["source"] == "rpcompile, measured"
    names = {e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"}
    host = {"Host (measured)"} if any(action.stream is Stream.HOST for action in ran) else set()
    assert names == {"GPU 0 (measured)", "GPU 1 (measured)"} | host
