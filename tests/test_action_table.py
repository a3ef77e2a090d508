"""The plan file's table of compute actions: anyone can compute makespan, bubble and traffic from it."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings

from rpcompile.action_table import schedule_table
from rpcompile.ir import StageKind
from rpcompile.simulate import simulate
from tests.chains import chain, compiled, partition, problems
from tests.test_plan import plan_of


def recomputed(table: dict, weights: list[int]) -> tuple[float, float, int]:
    """Makespan, bubble and uploaded bytes, from the file's data alone."""
    ends, work, uploaded = [0.0], 0.0, 0
    for gpu in table["gpus"]:
        now = 0.0
        for action in gpu:
            assert now <= action["start_s"] <= action["end_s"]
            now = action["end_s"]
            work += action["end_s"] - action["start_s"]
        ends.append(now)
    for job in table["jobs"]:
        uploaded += sum(weights[job["first"] : job["last"] + 1])
    return max(ends), 1 - work / (len(table["gpus"]) * max(ends)) if max(ends) else 0.0, uploaded


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(problem=problems())
def test_a_plan_file_holds_all_it_takes(problem, tmp_path):
    plan = plan_of(problem)
    plan.save(tmp_path / "plan.json")
    content = json.loads((tmp_path / "plan.json").read_text())
    table, segments = content["actions"], content["plan"]["chain"]["segments"]
    timeline = simulate(plan.schedule)
    compute_end_s, bubble, uploaded = recomputed(table, [s["weight_bytes"] for s in segments])
    last = max(timeline.end_s[a.id] for a in plan.schedule.actions() if a.stream == "compute")
    assert compute_end_s == last
    work_s = (1 - bubble) * plan.gpus * compute_end_s
    assert 1 - work_s / (plan.gpus * timeline.makespan_s) == pytest.approx(timeline.bubble)
    if not plan.chain.tied:
        assert uploaded == timeline.weight_bytes
    done = {(a["stage"], a["kind"], a["microbatch"]) for gpu in table["gpus"] for a in gpu}
    stages = [(s.index, s.kind.value) for s in plan.partition.stages]
    stages += [(s.index, "R") for s in plan.partition.stages if s.kind is StageKind.B]
    assert done == {(*stage, m) for stage in stages for m in range(plan.microbatches)}


def test_the_table_of_a_schedule_by_hand():
    stages = partition("F0-1", "FB2-2", "B0-1")
    schedule = compiled(chain(3), stages, gpus=2, microbatches=2)
    timeline = simulate(schedule)
    table = msgspec.to_builtins(schedule_table(stages, schedule, timeline))
    # Both microbatches' inputs (2 s each) arrive, then two segments' weights (4 s each); each computes 2 s.
    assert table["gpus"][0][0] == {
        "stage": 0, "kind": "F", "microbatch": 0, "job": 0, "start_s": 12.0, "end_s": 16.0,
    }  # fmt: skip
    assert table["jobs"][1] == {
        "stage": 1, "kind": "FB", "first": 2, "last": 2,
        "round": 0, "replica": 0, "gpu": 1, "microbatches": (0, 1),
    }  # fmt: skip
    # The recompute (4 s) and the backward (6 s) of stage 2 are entries of their own.
    backward = [entry for entry in table["gpus"][0] if entry["job"] == 2 and not entry["microbatch"]]
    assert [(entry["kind"], entry["end_s"] - entry["start_s"]) for entry in backward] == [("R", 4), ("B", 6)]
    assert [job["kind"] for job in table["jobs"]] == ["F", "FB", "B"]
