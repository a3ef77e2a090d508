"""Explanations of plans made by hand, whose answers are known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rpcompile import variations
from rpcompile.explain import explain
from rpcompile.idle import COPY, DRAIN, OTHER_STAGE, OTHER_UPLOAD, UPLOAD, gaps
from rpcompile.ir import Op
from rpcompile.planner import PlanOptions, plan_profile
from rpcompile.profile import Profile
from rpcompile.simulate import simulate
from tests.chains import chain, compiled, partition
from tests.test_plan import plan_of

# One byte takes one second on either link; see tests/chains.py.


def one_gpu(microbatches: int, upload: int, input_bytes: int = 0):
    """F0 of 2 s, FB1 of 5 s, B0 of 5 s on one GPU; segment 0 has 1 byte of weights, segment 1 `upload`."""
    changes = {
        0: {"weight_bytes": 1, "gradient_bytes": 0, "input_bytes": input_bytes},
        1: {"weight_bytes": upload, "gradient_bytes": 0},
    }
    if not input_bytes:
        changes[0]["inputs"] = ()
    return plan_of((chain(2, changes), partition("F0-0", "FB1-1", "B0-0"), 1, microbatches, "sync"))


def test_gaps_cover_the_idle_time_and_name_the_upload() -> None:
    plan = one_gpu(microbatches=2, upload=12)
    timeline = plan.simulate()
    found = gaps(plan.schedule, timeline)
    idle = sum(gap.seconds for gap in found)
    assert idle == pytest.approx(timeline.bubble * timeline.makespan_s)
    assert all(sum(gap.causes.values()) == pytest.approx(gap.seconds) for gap in found)
    # Weights of F0 arrive at 1 s, two forwards end at 5 s; the upload of 12 s that began at 1 s ends at 13 s.
    first, second = found[:2]
    assert (first.action, first.start_s, first.end_s, dict(first.causes)) == ("0F0", 0, 1, {UPLOAD: 1})
    assert (second.action, second.start_s, second.end_s, dict(second.causes)) == ("1FB0", 5, 13, {UPLOAD: 8})


def test_waiting_for_the_stage_before_is_told_from_waiting_for_a_copy() -> None:
    changes = {index: {"weight_bytes": 0, "gradient_bytes": 0} for index in range(2)}
    stages = partition("F0-0", "FB1-1", "B0-0")
    plan = plan_of((chain(2, changes), stages, 2, 1, "sync"))
    found = {gap.action: gap for gap in gaps(plan.schedule, plan.simulate()) if gap.action}
    # gpu1 waits: input 2 s (copied to gpu0), forward 2 s, hand-off down 1 s and up 1 s; its own input of
    # the model is not read there.
    assert found["1FB0"].causes == pytest.approx({COPY: 4.0, OTHER_STAGE: 2.0})
    last = [gap for gap in gaps(plan.schedule, plan.simulate()) if gap.action is None]
    assert {gap.gpu for gap in last} <= {0, 1}
    assert all(set(gap.causes) == {DRAIN} for gap in last)


def test_upload_that_another_stage_waits_for_is_told_from_its_own() -> None:
    changes = {0: {"weight_bytes": 9, "inputs": (), "input_bytes": 0}, 1: {"weight_bytes": 1}}
    plan = plan_of((chain(2, changes), partition("F0-0", "FB1-1", "B0-0"), 2, 1, "sync"))
    found = {gap.action: gap for gap in gaps(plan.schedule, plan.simulate())}
    # Stage 0 has its weights after 9 s and computes for 2 s; a hand-off is 1 s down and 1 s up.
    assert found["1FB0"].causes == pytest.approx({OTHER_UPLOAD: 9.0, OTHER_STAGE: 2.0, COPY: 2.0})


def test_no_activation_waits_behind_weights() -> None:
    plan = one_gpu(microbatches=2, upload=20, input_bytes=2)
    found = {gap.action: gap for gap in gaps(plan.schedule, plan.simulate())}
    # The input of 0F1 comes while 0F0 runs, though the upload for the next stage began before.
    assert "0F1" not in found
    assert set(found["1FB0"].causes) == {UPLOAD}


@pytest.mark.parametrize(
    ("upload", "hidden_by", "text"),
    [
        # F0 of M microbatches ends at 1 + 2 M s, the upload at 1 + upload.
        (12, 4, "waits 8.00 s for its upload; 4 more microbatches hide the upload."),
        (6, 1, "waits 2.00 s for its upload; 1 more microbatch hides the upload."),
        (99, None, "waits 95.00 s for its upload; 16 more microbatches would not hide the upload."),
    ],
)
def test_more_microbatches_that_hide_an_upload_are_counted(
    upload: int, hidden_by: int | None, text: str
) -> None:
    found = explain(one_gpu(microbatches=2, upload=upload), replan=False)
    note = found.stages[1]
    assert note.hidden_by == hidden_by
    assert note.text == f"Stage 1 (FB, layer1) computes 10.00 s and {text}"
    assert (note.text in found.advice) == (hidden_by is not None)
    assert note.bound_by == ("upload" if upload == 99 else "compute")


def test_with_microbatches_adds_work_and_keeps_places() -> None:
    plan = plan_of((chain(4), partition("F0-1", "FB2-3", "B0-1"), 2, 3, "sync"))
    assert variations.with_microbatches(plan, 0) == plan.schedule
    grown = variations.with_microbatches(plan, 4)
    assert grown.microbatches == 7
    run = [
        (a.stage, a.microbatch, a.gpu) for a in grown.actions() if a.op in (Op.FORWARD, Op.FUSED, Op.BACKWARD)
    ]
    assert sorted((stage, m) for stage, m, _ in run) == [(stage, m) for stage in range(3) for m in range(7)]
    places = {job.stage: job.gpu for job in plan.schedule.jobs}
    assert all(places[stage] == gpu for stage, _, gpu in run)


def test_faster_links_are_simulated_not_guessed() -> None:
    plan = one_gpu(microbatches=2, upload=20)
    found = {variation.what: variation for variation in explain(plan, replan=False).variations}
    hardware = replace(plan.chain.hardware, h2d_bytes_per_s=2.0, d2h_bytes_per_s=2.0)
    by_hand = compiled(replace(plan.chain, hardware=hardware), plan.partition, 1, 2)
    assert found["links twice as fast"].iteration_s == simulate(by_hand).makespan_s
    twice = compiled(plan.chain, plan.partition, 1, 4)
    assert found["twice the microbatches (4)"].iteration_s == simulate(twice).makespan_s
    change = simulate(twice).makespan_s / 4 / (simulate(plan.schedule).makespan_s / 2) - 1
    assert found["twice the microbatches (4)"].change == pytest.approx(change)


def test_one_stage_fewer_and_one_more() -> None:
    plan = plan_of((chain(5), partition("F0-0", "F1-3", "FB4-4", "B2-3", "B0-1"), 2, 4, "sync"))
    found = {variation.what: variation for variation in explain(plan, replan=False).variations}
    fewer = compiled(plan.chain, partition("F0-3", "FB4-4", "B2-3", "B0-1"), 2, 4)
    more = compiled(plan.chain, partition("F0-0", "F1-3", "FB4-4", "B3-3", "B2-2", "B0-1"), 2, 4)
    assert found["one stage fewer"].iteration_s == simulate(fewer).makespan_s
    assert found["one stage more"].iteration_s == simulate(more).makespan_s


def test_words_about_balance_memory_and_the_solver() -> None:
    plan = plan_of((chain(2), partition("F0-0", "FB1-1", "B0-0"), 2, 2, "sync"))
    lines = explain(plan, replan=False).cut
    assert lines[0] == "The forward is cut into 1 stage of 2.00 s a microbatch."
    assert lines[1] == "The backward (with recompute) is cut into 1 stage of 5.00 s a microbatch."
    assert lines[2] == (
        "Stage 1 (layer1) runs forward and backward at once: no recompute, which saves 4.00 s of GPU time an "
        "iteration."
    )
    # GPU 0 has F and B of layer 0: 2 x (2 + 5); GPU 1 has 2 x 5; the mean is 12.
    assert lines[3] == (
        "GPU 0 computes longest: 14.00 s an iteration, 16.7 % over the mean of 12.00 s; an iteration cannot "
        "be shorter than that."
    )
    assert "memory does not bind the cuts" in lines[4]


def test_explanation_prints_and_is_json() -> None:
    plan = plan_of((chain(3), partition("F0-1", "FB2-2", "B0-1"), 2, 2, "sync"))
    found = explain(plan, replan=False)
    text = str(found)
    for title in (
        "Why these stages",
        "Where the idle time goes",
        "Stage by stage",
        "What would help",
    ):
        assert title in text
    lines = [line[4:] for line in text.splitlines() if line.startswith("  - ")]
    assert {lines.count(str(variation)) for variation in found.variations} == {1}
    assert found.as_dict()["source"] == "simulated"
    assert len(found.as_dict()["stages"]) == 3


def test_replanning_for_more_gpus_is_left_out_where_there_is_no_work_for_them() -> None:
    plan = plan_of((chain(2), partition("F0-0", "FB1-1", "B0-0"), 2, 2, "sync"))
    assert not [v for v in explain(plan).variations if "GPUs in place of" in v.what]


def test_replanning_for_one_gpu_more() -> None:
    plan = plan_of((chain(4), partition("F0-2", "FB3-3", "B0-2"), 1, 2, "sync"))
    found = [v for v in plan.explain().variations if v.what == "2 GPUs in place of 1"]
    assert found
    assert found[0].change < 0


def test_a_searched_plan_is_searched_again_for_more_gpus() -> None:
    profile = Profile.load(Path(__file__).parents[1] / "benchmarks" / "profiles" / "qwen3-1.7b.json")
    plan = plan_profile(profile, PlanOptions(2, 4, effort="fast"))
    change = {found.what: found.change for found in explain(plan).variations}
    # Stages that were not searched for would take longer on twice the GPUs.
    assert change["4 GPUs in place of 2"] < -0.3


def test_more_gpus_are_planned_for_under_the_same_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    given = Profile.load(Path(__file__).parents[1] / "benchmarks" / "profiles" / "qwen3-1.7b.json")
    limits = {"max_traffic": 0.9, "fused_segments": 1, "host_bytes": 10**15}
    plan = plan_profile(given, PlanOptions(2, 4, time_limit_s=0.2, **limits), progress=False)
    asked: list[PlanOptions] = []

    def planned(_: object, options: PlanOptions, *__: object) -> object:
        asked.append(options)
        return plan

    monkeypatch.setattr("rpcompile.chain_planner.plan_chain", planned)
    tried = [variation.what for variation in explain(plan).variations]
    assert "4 GPUs in place of 2 with as many uploads" in tried
    # Two rounds of 2 microbatches become 4 / 3 with 3 GPUs, and one with 4; the bytes stay.
    found = [(options.gpus, options.max_traffic) for options in asked]
    assert found == [(3, pytest.approx(1.35)), (4, pytest.approx(1.8))]
    assert {(options.fused_segments, options.host_bytes) for options in asked} == {(1, 10**15)}
    damaged = replace(plan, provenance={"max_traffic": "much"})
    assert not [v for v in explain(damaged).variations if "GPUs in place of" in v.what]
