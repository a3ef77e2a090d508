"""Any number of GPUs and microbatches in every mode, alike or not; and what cannot be planned says why."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rpcompile
from rpcompile.cli import main
from rpcompile.errors import InvalidArgument, PartitionError, RpcompileError, StageTooLarge
from rpcompile.ir import COMPUTE_OPS, StageKind
from rpcompile.mixed_gpus import Box, with_speeds
from rpcompile.passes.propose_partitions import ProposePartitions
from rpcompile.plan import Plan
from rpcompile.planner import ModelDescription, PlanOptions, plan_chain
from rpcompile.round_robin_time import StageCosts
from tests import models
from tests.partition_oracle import make_chain, segment
from tests.test_cli import profile
from tests.test_search_schedule import decoder

MODEL = ModelDescription("shapes", "", "bfloat16")
WAYS: dict[str, list[str]] = {
    "sync": [],
    "async": ["--mode", "async"],
    "searched": ["--effort", "fast"],
    "mixed": ["--gpu", "rtx4090,rtx3090@0.5"],
    "mixed async": ["--gpu", "rtx4090,rtx3090@0.5", "--mode", "async"],
}


# ---------------------------------------------------------------- any shape


@settings(max_examples=40, deadline=None)
@given(
    layers=st.integers(0, 5),
    gpus=st.sampled_from([1, 2, 3, 5, 8, 64]),
    microbatches=st.sampled_from([1, 2, 3, 7, 16]),
    mode=st.sampled_from(["sync", "async"]),
    mixed=st.booleans(),
)
def test_any_shape_is_planned(layers: int, gpus: int, microbatches: int, mode: str, mixed: bool) -> None:
    chain = decoder(layers)
    if mixed:
        kinds = (chain.hardware, replace(chain.hardware, name="other", usable_bytes=6_000_000_000))
        speeds = tuple((1.0, 0.4)[gpu % 2] for gpu in range(gpus))
        chain = with_speeds(chain, Box(tuple(kinds[gpu % 2] for gpu in range(gpus)), speeds))
    plan = plan_chain(chain, PlanOptions(gpus, microbatches, mode, effort="fast"), MODEL)  # verifies
    busy = [0.0] * gpus
    for action in plan.schedule.actions():
        if action.op in COMPUTE_OPS:
            busy[action.gpu] += action.seconds
    predicted = plan.prediction
    least = sum(busy) / gpus if plan.schedule.rotate else max(busy)
    assert predicted.iteration_s >= least * (1 - 1e-9)
    assert 0 <= predicted.bubble < 1
    assert plan.partition.bound_s <= predicted.iteration_s * (1 + 1e-9)
    for gpu, peak in enumerate(predicted.gpu_peak_bytes):
        assert peak <= chain.hardware_of(gpu).usable_bytes


def test_the_most_of_both() -> None:
    plan = plan_chain(decoder(1), PlanOptions(64, 512, solver_time_s=0.5, effort="fast"), MODEL)
    assert {m for job in plan.schedule.jobs for m in job.microbatches} == set(range(512))


@pytest.mark.parametrize(("gpus", "microbatches"), [(65, 1), (2, 513)])
def test_more_than_that_is_refused(gpus: int, microbatches: int) -> None:
    with pytest.raises(InvalidArgument, match="must be from 1 to"):
        plan_chain(decoder(1), PlanOptions(gpus, microbatches, effort="fast"), MODEL)


def test_more_gpus_than_segments() -> None:
    with pytest.raises(PartitionError, match='use gpus=2 or fewer, or effort="fast", which divides stages'):
        plan_chain(decoder(1), PlanOptions(8, 4, effort=None), MODEL)
    # Replicas give all of them work, and evaluation leaves some idle.
    plan = plan_chain(decoder(1), PlanOptions(4, 8, effort="fast"), MODEL)
    assert {job.gpu for job in plan.schedule.jobs} == {0, 1, 2, 3}
    plan_chain(decoder(1), PlanOptions(8, 4, "forward"), MODEL)


# ---------------------------------------------------------------- what cannot be planned


def _every(**changes: float) -> Callable[[dict[str, Any]], None]:
    return lambda content: [each.update(changes) for each in content["segments"]]  # type: ignore[func-returns-value]


def _one(index: int, **changes: float) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["segments"][index].update(changes)


BAD: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "large": (_one(2, saved_bytes=10**11), "layers.2 needs 100.3 GB for one microbatch of"),
    "large head": (_one(-1, saved_bytes=10**11), "head needs 100.2 GB for one microbatch of"),
    "no times": (_every(forward_s=0, backward_s=0), "all times of the 6 segments are 0"),
    "negative": (_one(1, forward_s=-1), "Expected `float` >= 0.0 - at `$.segments[1].forward_s`"),
    "nan": (_one(1, forward_s=float("nan")), "$.segments[1].forward_s is not a finite number"),
    "infinite": (_one(1, backward_s=float("inf")), "$.segments[1].backward_s is not a finite number"),
    "nothing to train": (_every(backward_s=0, gradient_bytes=0), "so there is nothing to train"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", BAD)
def test_bad_input_says_what_is_wrong_in_every_way(
    case: str, way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = BAD[case]
    content = profile()
    change(content)
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(content))
    gpus = [] if "mixed" in way else ["--gpus", "2"]
    assert main(["plan", "--profile", str(path), *gpus, *WAYS[way]]) == 2
    found = capsys.readouterr().err
    assert message in found
    assert found.count("\n") == 1


@pytest.mark.parametrize("way", ["sync", "async", "searched"])
def test_a_limit_that_cannot_be_met_names_the_tightest(
    way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(profile() | {"gpu_memory_bytes": 5 * 10**8}))
    assert main(["plan", "--profile", str(path), "--gpus", "2", *WAYS[way]]) == 2
    found = capsys.readouterr().err
    assert "job of layers." in found or "The tightest is the backward of layers." in found
    assert "Use more microbatches (smaller ones)" in found


def test_a_clock_that_ends_the_search_leaves_the_best_and_its_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rpcompile.scheduling.EFFORTS, "normal", 0.01)
    plan = plan_chain(decoder(10), PlanOptions(3, 6, effort="normal"), MODEL)
    assert plan.partition.status == "FEASIBLE"
    assert "ended by clock" in plan.partition.solver or plan.partition.solver == "a regular cut"
    assert 0 < plan.partition.gap < 1
    assert f"gap {100 * plan.partition.gap:.1f} %" in str(plan)


@pytest.mark.parametrize("options", [{"effort": None}, {"effort": None, "mode": "async"}, {}])
def test_compile_says_the_same(options: dict[str, Any]) -> None:
    case = models.make("mlp")
    small = replace(models.SLOW_GPU, memory_bytes=2000, usable_bytes=2000)
    given: dict[str, Any] = {"example_inputs": case.batch, "microbatches": 4, **options}
    with pytest.raises(StageTooLarge, match=r"needs .* but slow has 2\.0 kB usable\. Use more microbatches"):
        rpcompile.compile(case.model, 2, gpu=small, **given)
    with pytest.raises(StageTooLarge, match="needs"):
        rpcompile.compile(case.model, [small, replace(small, name="b")], **given)
    for wrong in ({"gpus": 0}, {"gpus": -1}, {"gpus": 2, "microbatches": 0}):
        with pytest.raises(RpcompileError, match="must be at least 1"):
            rpcompile.compile(case.model, **(given | {"gpu": models.SLOW_GPU} | wrong))


# ---------------------------------------------------------------- proposed partitions


def test_partitions_are_distinct_valid_and_of_several_sizes() -> None:
    chain = decoder(30)
    found = ProposePartitions(4, 8, time_limit_s=2.0).run(chain)
    assert len({partition.stages for partition in found}) == len(found) >= 3
    assert len({len(partition.stages) for partition in found}) >= 2
    costs = StageCosts(chain, 4, 8)
    for partition in found:
        up = [stage for stage in partition.stages if stage.kind is not StageKind.B]
        assert [index for stage in up for index in stage.segments] == list(range(31))
        assert up[-1].kind is StageKind.FB
        each = [costs.of(stage) for stage in partition.stages]
        assert costs.iteration_s(each) == pytest.approx(partition.objective_s)
        assert partition.bound_s <= partition.objective_s
    times = [partition.objective_s for partition in found]
    assert times == sorted(times)
    assert any(partition.solver.startswith("CP-SAT") for partition in found)


def test_cp_sat_improves_on_where_it_starts_and_is_repeatable() -> None:
    chain = decoder(8)
    regular = ProposePartitions(3, 5, time_limit_s=0.0).run(chain)
    assert {partition.solver for partition in regular} == {"a regular cut"}
    found = [ProposePartitions(3, 5, time_limit_s=2.0).run(chain) for _ in range(2)]
    assert found[0][0].objective_s < regular[0].objective_s
    assert [p.stages for p in found[0]] == [p.stages for p in found[1]]


def test_nothing_that_fits_is_proposed_as_nothing() -> None:
    chain = decoder(3)
    tight = replace(chain, hardware=replace(chain.hardware, usable_bytes=560_000_000))
    assert ProposePartitions(2, 2).run(tight) == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpus": 0}, "gpus=0 must be at least 1"),
        ({"microbatches": -1}, "microbatches=-1 must be at least 1"),
        ({"time_limit_s": float("nan")}, "time_limit_s=nan must be at least 0"),
    ],
)
def test_proposals_refuse_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        ProposePartitions(**({"gpus": 2, "microbatches": 2} | options)).run(
            make_chain(segment("a", 1.0, 1.0))
        )


def test_a_plan_is_found_from_what_is_proposed() -> None:
    """The search is not worse than the best proposal that is laid out as it is."""
    chain = decoder(8)
    proposed = ProposePartitions(4, 8, time_limit_s=0.4).run(chain)
    found: Plan = plan_chain(chain, PlanOptions(4, 8, effort="fast"), MODEL)
    assert found.prediction.iteration_s <= proposed[0].objective_s * 1.02
