"""Plans with the optimizer's updates in them: timed, proved, kept in files, and run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rpcompile import policies
from rpcompile.cli import main
from rpcompile.errors import InvalidArgument, ScheduleError
from rpcompile.ir import Op, Stream
from rpcompile.plan import Plan
from rpcompile.planner import PlanOptions, laid_out_again, plan_profile, update_s_per_byte
from rpcompile.profile import Profile
from rpcompile.simulate import simulate
from rpcompile.variations import with_microbatches
from rpcompile.verify import verify_schedule
from tests import training

PROFILE = Path(__file__).parents[1] / "benchmarks" / "profiles" / "qwen3-1.7b.json"
NS = 0.15  # a parameter
OPTIONS = PlanOptions(
    8, 16, solver_time_s=0.5, effort=None, update_s_per_byte=update_s_per_byte(NS, "bfloat16")
)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_profile(Profile.load(PROFILE), OPTIONS)


def test_each_segment_is_updated_once_at_the_price_given(plan: Plan) -> None:
    updates = [action for action in plan.schedule.actions() if action.op is Op.UPDATE]
    trained = [segment for segment in plan.chain.segments if segment.gradient_bytes]
    assert len(updates) == len(trained) + 1  # and the norm
    parameters = sum(segment.gradient_bytes for segment in trained) / 2
    assert sum(action.seconds for action in updates) == pytest.approx(parameters * NS * 1e-9)


def test_a_step_is_predicted_with_its_updates(plan: Plan) -> None:
    predicted = plan.prediction
    ends_s = simulate(plan.schedule, iterations=8).iteration_end_s
    assert predicted.iteration_s == pytest.approx(ends_s[7] - ends_s[6])
    plain = plan_profile(Profile.load(PROFILE), replace(OPTIONS, update_s_per_byte=0.0))
    whole_s = sum(action.seconds for action in plan.schedule.actions() if action.op is Op.UPDATE)
    # Behind a barrier the whole step would come on top of the iteration.
    assert plain.prediction.iteration_s < predicted.iteration_s < plain.prediction.iteration_s + 0.6 * whole_s
    assert predicted.alone_s == plan.simulate().makespan_s
    assert "each layer's forward follows its update" in str(plan)
    assert "Iterations" not in str(plain)


def test_a_layer_is_uploaded_behind_its_own_update_only(plan: Plan) -> None:
    timeline = simulate(plan.schedule, iterations=2)
    last = max(timeline.end_s[action.id] for action in plan.schedule.actions() if action.op is Op.UPDATE)
    first = min(timeline.start_s[f"{a.id}#1"] for a in plan.schedule.actions() if a.stream is Stream.COMPUTE)
    assert first < last


def test_the_search_plans_for_them() -> None:
    profile, short = Profile.load(PROFILE), replace(OPTIONS, effort="fast")
    found = plan_profile(profile, short)
    sums = [action for action in found.schedule.actions() if action.op is Op.SUM]
    assert len(found.schedule.jobs) > len(found.partition.stages)
    assert sums
    assert found.prediction.iteration_s < plan_profile(profile, OPTIONS).prediction.iteration_s
    assert found.partition.bound_s <= found.prediction.iteration_s


def test_an_update_that_is_missing_is_found(plan: Plan) -> None:
    schedule = plan.schedule
    queues = tuple(
        replace(queue, actions=queue.actions[:-1]) if queue.stream is Stream.HOST else queue
        for queue in schedule.queues
    )
    with pytest.raises(ScheduleError, match="one update of segment"):
        verify_schedule(replace(schedule, queues=queues), plan.chain, plan.partition)


def test_files_and_variations_keep_them(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert laid_out_again(loaded).schedule == plan.schedule
    assert any(action.op is Op.UPDATE for action in with_microbatches(plan, 2).actions())
    assert "steady state" in str(plan.explain())
    own, *others = policies.compare_policies(plan)
    assert own.iteration_s == plan.prediction.iteration_s
    alone = policies.compare_chain(plan.chain, 8, 16)
    assert all(a.iteration_s > b.iteration_s for a, b in zip(others, alone, strict=True) if a.problem is None)


def test_such_a_plan_trains_bit_for_bit() -> None:
    found = training.pair("mlp with updates", optimizer_ns=NS)
    schedule = found.compiled.plan.schedule
    assert any(action.op is Op.UPDATE for action in schedule.actions())
    mine, theirs = (torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (found.model, found.plain))
    for step in range(3):
        found.forward_backward(step)
        found.compiled.step(mine)
        theirs.step()
        found.assert_equal()
        mine.zero_grad()
        theirs.zero_grad()
    found.compiled.close()


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--profile", str(PROFILE), "--gpus", "4", "--microbatches", "4", "--effort", "none"]
    assert main([*command, "--optimizer-ns", "0.3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["update_s_per_byte"] == pytest.approx(0.15e-9)
    assert found["prediction"]["alone_s"] > 0
    assert main([*command, "--optimizer-ns", "-1"]) == 2
    assert "optimizer_ns=-1.0; it must be finite and above 0" in capsys.readouterr().err
    assert main([*command, "--optimizer-ns", "1", "--mode", "forward"]) == 2
    assert "no gradients to update weights with" in capsys.readouterr().err


@pytest.mark.parametrize("value", [-1e-9, float("nan"), float("inf")])
def test_prices_out_of_range(value: float) -> None:
    with pytest.raises(InvalidArgument, match="update_s_per_byte"):
        plan_profile(Profile.load(PROFILE), replace(OPTIONS, update_s_per_byte=value))


@pytest.mark.parametrize(("dtype", "nbytes"), [("bfloat16", 2), ("float32", 4), ("given", 2), ("none", 2)])
def test_gradients_are_as_large_as_parameters(dtype: str, nbytes: int) -> None:
    assert update_s_per_byte(1.0, dtype) == 1e-9 / nbytes
