"""One capture planned at several sizes, and seconds from all three sources."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import rpcompile
from rpcompile.errors import InvalidArgument, PartitionError, ProfileFileError
from rpcompile.passes.capture_graph import ExampleInputs
from rpcompile.passes.partition_stages import PartitionStages
from rpcompile.passes.search_schedule import SearchSchedule
from rpcompile.planner import CapturedModel, PlanOptions, capture_model, plan_profile
from rpcompile.profile import Profile
from rpcompile.scheduling import find_schedule, traffic_of
from tests import chains, reference
from tests.models import SLOW_GPU, make

PROFILES = Path(__file__).parents[1] / "benchmarks" / "profiles"
OPTIONS = PlanOptions(gpus=2, microbatches=4, solver_time_s=0.5, effort=None)


def ids(batch: int, sequence: int) -> dict[str, torch.Tensor]:
    tokens = torch.zeros(batch, sequence, dtype=torch.long)
    return {"input_ids": tokens, "labels": tokens.clone()}


@pytest.fixture(scope="module")
def captured() -> CapturedModel:
    return capture_model(make("qwen3-tied").model, ExampleInputs.of(ids(2, 16)))


def test_rebinding_equals_a_new_capture(captured: CapturedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = capture_model(make("qwen3-tied").model, ExampleInputs.of(ids(3, 40)))
    wanted = fresh.bind(SLOW_GPU)
    monkeypatch.setattr("torch.export.export", lambda *_, **__: pytest.fail("captured again"))
    chain = captured.bind(SLOW_GPU, {"batch": 3, "sequence": 40})
    for own, other in zip(chain.segments, wanted.segments, strict=True):
        assert replace(own, forward_s=0, backward_s=0) == replace(other, forward_s=0, backward_s=0)
        assert own.forward_s == pytest.approx(other.forward_s, rel=1e-12)
        assert own.backward_s == pytest.approx(other.backward_s, rel=1e-12)
    # The whole plan follows, and differs from the one at the sizes of the example.
    larger = captured.plan(chain, OPTIONS)
    assert larger.chain.bindings == {"batch": 3, "sequence": 40}
    assert (
        larger.prediction.iteration_s > captured.plan(captured.bind(SLOW_GPU), OPTIONS).prediction.iteration_s
    )


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"sequence": 10**9}, "sequence=1000000000 is outside the captured range"),
        ({"batch": 0}, "batch=0 is outside the captured range"),
        ({"height": 3}, "size 'height' is not one that the graph was captured with"),
    ],
)
def test_sizes_out_of_range(captured: CapturedModel, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        captured.bind(SLOW_GPU, sizes)


def test_measured_seconds(captured: CapturedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    chain = captured.bind(SLOW_GPU, seconds="measured")
    assert {segment.source for segment in chain.segments} == {"measured"}
    assert all(segment.forward_s > 0 for segment in chain.segments)
    assert list(tmp_path.rglob("*.json"))


def test_given_seconds(captured: CapturedModel, tmp_path: Path) -> None:
    chain = captured.bind(SLOW_GPU)
    profile = Profile.from_chain(chain)
    doubled = tuple(
        type(s)(**{f: getattr(s, f) for f in s.__struct_fields__} | {"forward_s": 2 * s.forward_s})
        for s in profile.segments
    )
    profile = Profile(
        format=profile.format, version=profile.version, hardware=profile.hardware, segments=doubled
    )
    given = captured.bind(SLOW_GPU, seconds=profile)
    assert [s.forward_s for s in given.segments] == [2 * s.forward_s for s in chain.segments]
    assert {segment.source for segment in given.segments} == {"given"}
    # All else is the model's own: the plan can be run.
    assert [replace(s, forward_s=0, source="") for s in given.segments] == [
        replace(s, forward_s=0, source="") for s in chain.segments
    ]
    path = tmp_path / "profile.json"
    profile.save(path)
    compiled = rpcompile.compile(
        make("qwen3-tied").model,
        2,
        example_inputs=ids(8, 16),
        microbatches=4,
        gpu=SLOW_GPU,
        seconds=path,
        solver_time_s=0.5,
    )
    assert {segment.source for segment in compiled.plan.chain.segments} == {"given"}
    compiled.close()


def test_profiles_and_sources_that_do_not_fit(captured: CapturedModel, tmp_path: Path) -> None:
    profile = Profile.from_chain(captured.bind(SLOW_GPU))
    other = Profile(
        format=profile.format, version=1, hardware=profile.hardware, segments=profile.segments[1:]
    )
    with pytest.raises(InvalidArgument, match=r"the profile is of another model: it has .* this model"):
        captured.bind(SLOW_GPU, seconds=other)
    with pytest.raises(
        InvalidArgument, match="seconds='guessed'; it must be 'estimated', 'measured' or a profile"
    ):
        captured.bind(SLOW_GPU, seconds="guessed")
    with pytest.raises(ProfileFileError, match=r"none\.json: cannot be read"):
        rpcompile.compile(
            make("qwen3-tied").model, 2, example_inputs=ids(2, 16), seconds=tmp_path / "none.json"
        )


def test_a_profile_alone_makes_a_plan(captured: CapturedModel) -> None:
    chain = captured.bind(SLOW_GPU)
    from_model = captured.plan(chain, OPTIONS)
    plan = plan_profile(Profile.from_chain(chain), OPTIONS, "llama")
    plan.verify()
    # Whose graph is not there, what its stages need is bounded only.
    found = [replace(stage, workspace_bytes=None) for stage in from_model.partition.stages]
    assert list(plan.partition.stages) == found
    assert plan.prediction.iteration_s == pytest.approx(from_model.prediction.iteration_s)
    assert "llama" in str(plan)


def test_a_search_is_never_slower_than_round_robin() -> None:
    profile = Profile.load(PROFILES / "qwen3-1.7b.json")
    options = PlanOptions(gpus=8, microbatches=16, solver_time_s=1.0, effort=None)
    plain = plan_profile(profile, options)
    searched = plan_profile(profile, replace(options, effort="fast"))
    searched.verify()
    assert searched.prediction.iteration_s < plain.prediction.iteration_s
    assert searched.prediction.bubble < plain.prediction.bubble
    jobs_of = Counter(job.stage for job in searched.schedule.jobs)
    assert max(jobs_of.values()) > 1  # replicas


def test_a_searched_plan_trains() -> None:
    """Replicas' gradients are added job by job: equal to plain PyTorch but for rounding."""
    case = make("mlp")
    plain = copy.deepcopy(case.model)
    expected = reference.forward_backward(plain, case.batch, 4, random=False)
    with rpcompile.compile(
        case.model,
        3,
        example_inputs=case.batch,
        microbatches=4,
        gpu=SLOW_GPU,
        effort="fast",
        solver_time_s=0.5,
    ) as compiled:
        loss = compiled.forward_backward(**case.batch)
    torch.testing.assert_close(loss, expected)
    for mine, theirs in zip(case.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_refuses_efforts(captured: CapturedModel) -> None:
    with pytest.raises(InvalidArgument, match="effort='much'; it must be None, 'fast', 'normal', 'thorough'"):
        captured.plan(captured.bind(SLOW_GPU), replace(OPTIONS, effort="much"))


@pytest.mark.parametrize("option", ["gpus", "microbatches"])
def test_refuses_options(captured: CapturedModel, option: str) -> None:
    with pytest.raises(InvalidArgument, match=f"{option}=0 must be at least 1"):
        captured.plan(captured.bind(SLOW_GPU), replace(OPTIONS, **{option: 0}))


def no_luck(*_: object) -> None:
    raise PartitionError("no luck")


@pytest.mark.parametrize("effort", [None, "fast"])
def test_where_nothing_is_found_that_fits_stages_of_one_segment_are_tried(
    effort: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PartitionStages, "run", no_luck)
    monkeypatch.setattr(SearchSchedule, "run", no_luck)
    options = PlanOptions(2, 4, effort=effort, solver_time_s=0.2)
    found = find_schedule(chains.chain(3), options)
    assert [(s.kind.value, s.first, s.last) for s in found.partition.stages] == [
        ("F", 0, 0),
        ("F", 1, 1),
        ("FB", 2, 2),
        ("B", 1, 1),
        ("B", 0, 0),
    ]
    for changes, given in (
        ({"max_traffic": 0.1}, chains.chain(3)),
        ({"mode": "forward"}, chains.chain(3)),
        ({}, replace(chains.chain(3), hardware=replace(chains.HARDWARE, usable_bytes=5))),
    ):
        with pytest.raises(PartitionError, match="no luck"):
            find_schedule(given, replace(options, **changes))


def test_stages_of_one_segment_may_be_fewer_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SearchSchedule, "run", no_luck)
    options = PlanOptions(7, 4, effort="fast", max_traffic=1.0)
    assert len(find_schedule(chains.chain(3), options).partition.stages) == 5
    with pytest.raises(PartitionError, match="gpus=7 is more than the 3 segments of the model"):
        find_schedule(chains.chain(3), replace(options, effort=None))


@pytest.mark.parametrize("effort", [None, "fast"])
def test_a_limit_on_uploads_where_there_are_no_weights(effort: str | None) -> None:
    bare = chains.chain(2, {index: {"weight_bytes": 0, "gradient_bytes": 0} for index in range(2)})
    options = PlanOptions(2, 2, effort=effort, max_traffic=1.0, solver_time_s=0.2, time_limit_s=0.2)
    found = find_schedule(bare, options)
    assert traffic_of(bare, found.schedule, found.timeline) == 0.0


def test_an_evaluation_has_one_pass() -> None:
    options = PlanOptions(2, 4, "forward", solver_time_s=0.2)
    found = find_schedule(chains.chain(4), options)
    assert traffic_of(chains.chain(4), found.schedule, found.timeline) == 0.5  # one upload in two rounds
    with pytest.raises(
        PartitionError, match=r"one upload a stage takes 0\.50; set max_traffic to 0\.50 or more$"
    ):
        find_schedule(chains.chain(4), replace(options, max_traffic=0.4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fused_segments": 0}, "fused_segments=0 must be at least 1: the loss is"),
        ({"fused_segments": 1, "effort": None}, "fused_segments=1 is for a search; set effort to 'fast', "),
        ({"time_limit_s": -1.0}, "time_limit_s=-1.0 must be at least 0"),
        ({"time_limit_s": float("nan")}, "time_limit_s=nan must be at least 0"),
    ],
)
def test_limits_of_a_search_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        find_schedule(chains.chain(3), replace(OPTIONS, **changes))
