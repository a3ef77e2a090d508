"""Plans for mode "async": planned for overlapping iterations, proved, kept in files, and run as they say."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import rpcompile
from rpcompile.cli import main
from rpcompile.errors import InvalidArgument, PartitionError, PlanMismatch, ScheduleError
from rpcompile.event_loop import chain_events
from rpcompile.explain import explain
from rpcompile.ir import GpuKind, Op, Stream
from rpcompile.ordering import Edges
from rpcompile.plan import Plan
from rpcompile.planner import PlanOptions, plan_profile
from rpcompile.policies import compare_policies
from rpcompile.profile import Profile
from rpcompile.simulate import simulate
from rpcompile.verify import verify_schedule
from rpcompile.verify_iterations import check_versions
from tests import models
from tests.test_async_mode import Simulated, same_weights

PROFILE = Path(__file__).parents[1] / "benchmarks" / "profiles" / "qwen3-1.7b.json"


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_profile(Profile.load(PROFILE), PlanOptions(8, 16, "async", effort=None, max_traffic=0.65))


# ---------------------------------------------------------------- planning


def test_the_plan_is_for_the_steady_state(plan: Plan) -> None:
    predicted = plan.prediction
    assert (plan.mode, plan.schedule.mode) == ("async", "async")
    assert plan.schedule.rotate == len(plan.schedule.jobs) % 8 != 0
    # One job a stage, for no effort was asked for; RoundPipe's published bubble is 4.05 %.
    assert len(plan.schedule.jobs) == len(plan.partition.stages)
    assert 0 <= predicted.bubble < 0.01
    assert predicted.traffic is not None
    assert predicted.traffic <= 0.65
    # Anyone can chain iterations and find the same: 16 of them begin on each GPU twice.
    ends_s = simulate(plan.schedule, iterations=26).iteration_end_s
    assert (ends_s[25] - ends_s[9]) / 16 == pytest.approx(predicted.iteration_s, rel=5e-3)
    busy = sum(action.seconds for action in plan.schedule.actions() if action.stream is Stream.COMPUTE)
    assert predicted.bubble == pytest.approx(1 - busy / 8 / predicted.iteration_s, abs=1e-9)
    assert predicted.alone_s == plan.simulate().makespan_s > predicted.iteration_s


def test_a_synchronous_plan_is_slower_where_iterations_overlap(plan: Plan) -> None:
    other = plan_profile(Profile.load(PROFILE), PlanOptions(8, 16, "sync", solver_time_s=1.0, effort=None))
    period_s = simulate(other.schedule, iterations=12, mode="async").period_s
    assert plan.prediction.iteration_s < period_s


def test_effort_uses_replicas() -> None:
    profile = Profile.load(PROFILE)
    alone = plan_profile(profile, PlanOptions(8, 16, "async", effort=None))
    found = plan_profile(profile, PlanOptions(8, 16, "async", effort="fast"))
    assert len(found.schedule.jobs) > len(found.partition.stages)
    assert found.prediction.iteration_s < alone.prediction.iteration_s


def test_the_host_keeps_the_weights_of_before_the_update(plan: Plan) -> None:
    other = plan_profile(Profile.load(PROFILE), PlanOptions(8, 16, "sync", solver_time_s=0.5, effort=None))
    mine, theirs = plan.prediction.host, other.prediction.host
    assert mine is not None
    assert theirs is not None
    assert (mine.copy_bytes, theirs.copy_bytes) == (mine.gradient_bytes, 0)


# ---------------------------------------------------------------- proof


def test_the_plan_holds_and_its_mutants_do_not(plan: Plan) -> None:
    plan.verify()
    limits = replace(plan.partition, memory_limit_bytes=max(plan.prediction.gpu_peak_bytes) - 1)
    for schedule, partition, message in (
        (replace(plan.schedule, rotate=8), plan.partition, "shifted by 8 of 8 GPUs; use 0 to 7"),
        (replace(plan.schedule, rotate=-1), plan.partition, "shifted by -1 of 8 GPUs"),
        (replace(plan.schedule, mode="sync"), plan.partition, "in mode 'sync', where they do not overlap"),
        (plan.schedule, limits, "bytes at its"),
    ):
        with pytest.raises(ScheduleError, match=message):
            verify_schedule(schedule, plan.chain, partition)
    segments = plan.chain.segments
    seconds = (tuple(found.forward_s for found in segments), tuple(found.backward_s for found in segments))
    box = replace(plan.chain, kinds=(GpuKind(plan.chain.hardware, *seconds),), kind_of=(0,) * plan.gpus)
    with pytest.raises(ScheduleError, match="but the GPUs are not alike; use rotate=0"):
        verify_schedule(plan.schedule, box, plan.partition)


def test_every_upload_is_exactly_one_update_behind(plan: Plan) -> None:
    events = chain_events(plan.schedule, 4, "async", plan.schedule.rotate)
    check_versions(events, plan.chain.tied, "async")
    count = len(events.actions)
    upload = next(n for n, action in enumerate(events.actions) if action.op is Op.PREFETCH)
    target = upload + 2 * count
    sources, waiters = events.edges.sources, events.edges.waiters()
    kept = (waiters != target) | (sources >= count)
    lacking = Edges.of_pairs(sources[kept], waiters[kept], 4 * count)
    name = events.names()[target]
    with pytest.raises(ScheduleError, match=f"{name} may upload .* after 0 updates, .* {name} does not wait"):
        check_versions(replace(events, edges=lacking), plan.chain.tied, "async")


# ---------------------------------------------------------------- what people see


def test_print_explain_and_compare_speak_of_the_steady_state(plan: Plan) -> None:
    printed = str(plan)
    assert "· async" in printed
    assert "iterations overlap without a pause, each shifted by" in printed
    text = str(explain(plan, replan=False))
    assert "Each iteration is shifted by" in text
    assert "in the steady state" in text
    own, *others = compare_policies(plan)
    assert own.iteration_s == pytest.approx(plan.prediction.iteration_s)
    assert all(own.iteration_s < other.iteration_s for other in others if other.problem is None)


def test_a_file_keeps_it(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan.save(path)
    loaded = Plan.load(path)
    assert loaded == plan
    assert loaded.id == plan.id


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "plan.json")
    flags = ["--mode", "async", "--max-traffic", "0.65", "--gpus", "4", "--out", out]
    assert main(["plan", "--profile", str(PROFILE), *flags]) == 0
    assert "iterations overlap" in capsys.readouterr().out
    for command in ("show", "verify", "simulate"):
        assert main([command, out]) == 0
    assert main(["trace", out, "--out", str(tmp_path / "trace.json")]) == 0
    assert '"iterations": 4' in (tmp_path / "trace.json").read_text()
    capsys.readouterr()
    assert main(["plan", "--profile", str(PROFILE), "--mode", "asynk"]) == 2
    assert "mode='asynk'; it must be 'sync', 'async', 'forward'" in capsys.readouterr().err


# ---------------------------------------------------------------- mistakes


def test_traffic_below_any_schedule_says_the_least() -> None:
    for mode in ("sync", "async"):
        with pytest.raises(PartitionError, match=r"max_traffic=0\.1.*set max_traffic to 0\.\d+ or more"):
            plan_profile(
                Profile.load(PROFILE),
                PlanOptions(8, 16, mode, max_traffic=0.1, solver_time_s=0.5, effort=None),
            )


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_traffic_out_of_range(value: float) -> None:
    with pytest.raises(InvalidArgument, match="it must be above 0, or None to lift the limit"):
        plan_profile(Profile.load(PROFILE), PlanOptions(8, 16, max_traffic=value, effort=None))


# ---------------------------------------------------------------- running


def compile_mlp(**options: Any) -> tuple[models.Case, rpcompile.Compiled]:
    case = models.build(models.mlp)
    given = {"gpus": 3, "microbatches": 4, "gpu": models.SLOW_GPU, "mode": "async", "effort": None} | options
    return case, rpcompile.compile(case.model, example_inputs=case.batch, **given)


def test_iterations_run_shifted_with_the_bits_of_plain_pytorch() -> None:
    case, compiled = compile_mlp()
    plain = copy.deepcopy(case.model)
    simulated = Simulated(plain, torch.optim.AdamW(plain.parameters(), lr=0.05, fused=True), None)
    optimizer = torch.optim.AdamW(compiled.parameters(), lr=0.05, fused=True)
    rotate = compiled.plan.schedule.rotate
    gpus = {action.id: action.gpu for action in compiled.plan.schedule.actions()}
    ran: list[tuple[str, str]] = []
    assert rotate
    with compiled:
        compiled._training.engine.before_instruction = lambda name: ran.append(
            (name, threading.current_thread().name)
        )
        for iteration in range(5):
            ran.clear()
            loss = compiled.forward_backward(**case.batch)
            assert torch.equal(loss, simulated.forward_backward(max(iteration - 1, 0), case.batch))
            for name, thread in ran:
                if name in gpus:
                    assert thread.startswith(f"rpcompile-gpu{(gpus[name] + iteration * rotate) % 3}-"), name
            compiled.step(optimizer)
            optimizer.zero_grad()
            simulated.step()
        assert same_weights(case.model, simulated.versions[-1])
        assert compiled(**case.batch) is not None  # evaluation has a plan of its own


def test_a_plan_brings_its_mode() -> None:
    case, compiled = compile_mlp(effort="fast")
    compiled.close()
    again = rpcompile.compile(case.model, plan=compiled.plan, example_inputs=case.batch)
    assert again._options.mode == "async"
    again.close()
    with pytest.raises(PlanMismatch, match="the plan is for mode 'async', not 'sync'; leave mode out"):
        rpcompile.compile(case.model, plan=compiled.plan, example_inputs=case.batch, mode="sync")
    with pytest.raises(InvalidArgument, match="mode='later'; it must be 'sync' or 'async'"):
        compile_mlp(mode="later")
