"""A plan bound to another batch keeps its stages and gets the times and bytes of planning there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rpcompile.errors import InvalidArgument, PlanMismatch, ScheduleError
from rpcompile.hardware import lookup
from rpcompile.plan import Plan
from rpcompile.planner import CapturedModel, ExampleInputs, PlanOptions, capture_model
from tests.test_cost_file import Small

HARDWARE = replace(lookup("rtx4090"), usable_bytes=10**7)


@pytest.fixture(scope="module")
def captured() -> CapturedModel:
    return capture_model(Small(), ExampleInputs.of({"x": torch.zeros(4, 8), "target": torch.zeros(4, 8)}))


@pytest.fixture(scope="module")
def plan(captured: CapturedModel) -> Plan:
    return captured.plan(
        captured.bind(HARDWARE), PlanOptions(1, 3, solver_time_s=0.2, effort=None), progress=False
    )


def test_same_stages_new_times_and_bytes(captured: CapturedModel, plan: Plan) -> None:
    assert captured.rebind(plan, {}) == plan
    larger = captured.rebind(plan, {"batch": 400})
    spans = [[(stage.kind, stage.first, stage.last) for stage in p.partition.stages] for p in (larger, plan)]
    assert spans[0] == spans[1]
    assert larger.schedule.jobs == plan.schedule.jobs
    needs = [max(stage.workspace_bytes or 0 for stage in p.partition.stages) for p in (larger, plan)]
    assert needs[0] > needs[1] > 0
    assert larger.chain == captured.bind(HARDWARE, {"batch": 400})
    assert max(larger.prediction.gpu_peak_bytes) > max(plan.prediction.gpu_peak_bytes)
    assert larger.prediction.iteration_s == larger.simulate().makespan_s > plan.prediction.iteration_s
    larger.verify()


def test_memory_is_checked_again(captured: CapturedModel, plan: Plan) -> None:
    with pytest.raises(ScheduleError, match="over the limit of 10,000,000"):
        captured.rebind(plan, {"batch": 200_000})


def test_other_models_and_sizes_are_refused(captured: CapturedModel, plan: Plan) -> None:
    with pytest.raises(PlanMismatch, match="make a new plan"):
        captured.rebind(replace(plan, fingerprint="0" * 64), {"batch": 8})
    with pytest.raises(InvalidArgument, match="batch=0 is outside the captured range"):
        captured.rebind(plan, {"batch": 0})
