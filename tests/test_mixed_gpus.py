"""GPUs that are not alike: planned with each one's speed, link and memory, shown, kept in files, and run."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

import rpcompile
from rpcompile import hardware as catalogue
from rpcompile.cli import main
from rpcompile.errors import InvalidArgument, PartitionError, PlanMismatch, ScheduleError
from rpcompile.explain import explain
from rpcompile.fit import _Search
from rpcompile.ir import COMPUTE_OPS, Hardware, Op, SegmentChain
from rpcompile.mixed_gpus import Box, box_text, with_speeds
from rpcompile.passes.capture_graph import ExampleInputs
from rpcompile.plan import Plan
from rpcompile.plan_summary import compute_s, summary
from rpcompile.planner import CapturedModel, PlanOptions, capture_model, plan_profile
from rpcompile.policies import compare_policies, schedule_policy
from rpcompile.profile import Profile
from rpcompile.roofline import SHARES
from rpcompile.simulate import simulate
from rpcompile.verify import verify_schedule
from tests import models, reference
from tests.test_planner import ids

PROFILE = Path(__file__).parents[1] / "benchmarks" / "profiles" / "qwen3-1.7b.json"
SLOW = models.SLOW_GPU
# Matrix products half as fast, memory as fast; a quarter of the memory; a link of half the rate.
WEAK = replace(SLOW, name="weak", flops_per_s=SLOW.flops_per_s / 2, h2d_bytes_per_s=5e8, usable_bytes=2**28)


@pytest.fixture(scope="module")
def captured() -> CapturedModel:
    return capture_model(models.make("qwen3-tied").model, ExampleInputs.of(ids(2, 16)))


@pytest.fixture(scope="module")
def plan() -> Plan:
    box = Box.parse("2xrtx4090,rtx3090@0.5")
    return plan_profile(Profile.load(PROFILE), PlanOptions(3, 12, effort="fast"), box=box)


# ---------------------------------------------------------------- what the GPUs are


def test_lists_are_parsed() -> None:
    box = Box.parse("2xrtx4090, rtx3090@0.45")
    assert [gpu.name for gpu in box.gpus] == ["rtx4090", "rtx4090", "rtx3090"]
    assert box.speeds == (None, None, 0.45)
    assert [kind.name for kind in box.kinds] == ["rtx4090", "rtx3090"]
    assert Box.of(["rtx4090", "rtx5090"]).smallest.name == "rtx4090"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2xrtx409", "hardware 'rtx409' is not in the catalogue; did you mean rtx4090"),
        ("rtx4090,,rtx3090", "'' is no GPU; write e.g. 2xrtx4090,rtx3090"),
        ("0xrtx4090", "'0xrtx4090' counts 0 GPUs; give 1 to 64"),
        ("rtx4090@fast", "the speed 'fast' must be a finite number above 0"),
        ("rtx4090@0", "the speed '0' must be a finite number above 0"),
        ("rtx4090@nan", "the speed 'nan' must be a finite number above 0"),
    ],
)
def test_lists_that_are_none(text: str, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        Box.parse(text)


def test_segments_are_priced_by_class_of_operator(captured: CapturedModel) -> None:
    """A segment bound by memory is as fast on a GPU that only multiplies at half the speed."""
    box = Box.of([SLOW, WEAK, SLOW])
    chain = captured.bind(box)
    assert chain.hardware == WEAK  # the smallest: segments have to fit there
    assert chain.kind_of == (0, 1, 0)
    for kind, hardware in zip(chain.kinds, (SLOW, WEAK), strict=True):
        alone = captured.bind(hardware)
        assert kind.hardware == hardware
        assert kind.forward_s == pytest.approx([segment.forward_s for segment in alone.segments])
        assert kind.backward_s == pytest.approx([segment.backward_s for segment in alone.segments])
    ratios = [a / b for a, b in zip(chain.kinds[1].forward_s, chain.kinds[0].forward_s, strict=True)]
    assert min(ratios) < 1.3 < 1.7 < max(ratios)  # not one scalar
    assert captured.bind(Box.of([SLOW] * 3)) == captured.bind(SLOW)


def test_measured_seconds_are_scaled_by_the_estimates(captured: CapturedModel) -> None:
    given = Profile.from_chain(captured.bind(SLOW))
    chain = captured.bind(Box.of([SLOW, WEAK]), seconds=given)
    estimated = captured.bind(Box.of([SLOW, WEAK]))
    assert [segment.source for segment in chain.segments] == ["given"] * len(chain.segments)
    for index, segment in enumerate(captured.bind(SLOW).segments):
        ratio = estimated.kinds[0].forward_s[index] / estimated.kinds[1].forward_s[index]
        assert chain.kinds[1].forward_s[index] == pytest.approx(segment.forward_s)
        assert chain.kinds[0].forward_s[index] == pytest.approx(segment.forward_s * ratio)


def test_a_profile_needs_the_speeds() -> None:
    profile = Profile.load(PROFILE)
    with pytest.raises(InvalidArgument, match=r"say how fast rtx3090 is beside it, e\.g\. rtx3090@0.5"):
        plan_profile(profile, PlanOptions(2, 4), box=Box.parse("rtx4090,rtx3090"))
    with pytest.raises(InvalidArgument, match="the GPUs rtx3090 have several speeds"):
        plan_profile(profile, PlanOptions(3, 4), box=Box.parse("rtx4090,rtx3090@0.5,rtx3090@0.4"))
    with pytest.raises(InvalidArgument, match="gpus=4, but the chain was priced for 2 GPUs"):
        plan_profile(profile, PlanOptions(4, 4), box=Box.parse("rtx4090,rtx3090@0.5"))


# ---------------------------------------------------------------- the plan


def test_work_goes_to_who_does_it_faster(plan: Plan) -> None:
    plan.verify()
    work = [0.0] * 3
    for action in plan.schedule.actions():
        if action.op in COMPUTE_OPS:
            work[action.gpu] += action.seconds
    # All are busy nearly all the time, so the slow one does half as much.
    assert plan.prediction.bubble < 0.08
    assert min(work) > 0.9 * max(work)
    slow, fast = plan.chain.kinds[1], plan.chain.kinds[0]
    assert slow.forward_s == pytest.approx([2 * seconds for seconds in fast.forward_s])


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_every_mode_and_one_job_a_stage(mode: str) -> None:
    box = Box.parse("2xrtx4090,rtx3090@0.5")
    found = plan_profile(Profile.load(PROFILE), PlanOptions(3, 6, mode, effort=None), box=box)
    found.verify()
    assert found.schedule.rotate == 0  # which only GPUs that are alike can
    assert len(found.schedule.jobs) == len(found.partition.stages)


def test_durations_and_copies_are_each_gpu_s_own() -> None:
    gpus = Box((SLOW, replace(WEAK, usable_bytes=SLOW.usable_bytes)), (1.0, 0.25))
    chain = with_speeds(Profile.load(PROFILE).to_chain(), gpus)
    schedule = schedule_policy(chain, partition_of(chain), "round_robin", 2, 2)
    seconds: dict[tuple[Op, int], set[float]] = {}
    for action in schedule.actions():
        if action.op in (Op.FORWARD, Op.PREFETCH) and action.nbytes in (0, chain.segments[1].weight_bytes):
            seconds.setdefault((action.op, action.gpu), set()).add(action.seconds)
    assert min(seconds[Op.FORWARD, 1]) == pytest.approx(4 * min(seconds[Op.FORWARD, 0]))
    (fast,), (slow,) = seconds[Op.PREFETCH, 0], seconds[Op.PREFETCH, 1]
    assert slow == pytest.approx(2 * fast, rel=1e-3)


def partition_of(chain: SegmentChain):
    from rpcompile.policies import default_partition

    return default_partition(chain, "round_robin", 2)


def test_the_small_gpu_s_memory_is_its_own() -> None:
    """What fits on the large GPU only stays off the small one; without a large one nothing fits."""
    profile = Profile.load(PROFILE)
    need = 2_000_000_000
    small = replace(catalogue.lookup("rtx3090"), name="small", usable_bytes=need)
    found = plan_profile(
        profile, PlanOptions(2, 6, effort="fast"), box=Box((catalogue.lookup("rtx4090"), small), (1, 1))
    )
    assert found.prediction.gpu_peak_bytes[1] <= need < found.prediction.gpu_peak_bytes[0]
    tighter = replace(small, usable_bytes=found.prediction.gpu_peak_bytes[1] - 1)
    kinds = (found.chain.kinds[0], replace(found.chain.kinds[1], hardware=tighter))
    with pytest.raises(ScheduleError, match=r"gpu1 may need .* over the limit of"):
        verify_schedule(found.schedule, replace(found.chain, kinds=kinds), found.partition)
    tiny = replace(small, usable_bytes=10**8)
    with pytest.raises(PartitionError, match=r"The tightest is|needs .* usable"):
        plan_profile(
            profile, PlanOptions(2, 6, effort="fast"), box=Box((tiny, replace(tiny, name="b")), (1, 1))
        )


def test_what_people_see(plan: Plan) -> None:
    assert box_text(plan.chain, 3) == "2 x rtx4090 24 GiB + 1 x rtx3090 24 GiB"
    assert "2 x rtx4090 24 GiB + 1 x rtx3090 24 GiB · h2d 25.0 GB/s" in str(plan)
    found = summary(plan)
    assert [gpu["name"] for gpu in found["gpu_hardware"]] == ["rtx4090", "rtx4090", "rtx3090"]
    stage = plan.partition.stages[0]
    assert compute_s(plan, stage, 2) == pytest.approx(2 * compute_s(plan, stage, 0))
    text = str(explain(plan, replan=False))
    assert "GPUs are idle for" in text
    own, *others = compare_policies(plan)
    assert all(own.iteration_s < other.iteration_s for other in others if other.problem is None)


def test_a_file_keeps_it(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan.save(path)
    assert Plan.load(path) == plan
    content = json.loads(path.read_text())
    content["plan"]["chain"]["kind_of"][1] = 5
    path.write_text(json.dumps(content))
    assert main(["show", str(path)]) == 2


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "plan.json")
    flags = ["plan", "--profile", str(PROFILE)]
    assert main([*flags, "--gpu", "2xrtx4090,rtx3090@0.45", "--out", out]) == 0
    for command in ("show", "verify", "simulate", "compare"):
        assert main([command, out]) == 0
    assert main(["report", out, "--out", str(tmp_path / "r.html")]) == 0
    capsys.readouterr()
    for gpu, gpus, message in (
        ("2xrtx4090,rtx3090@0.45", "8", "lists 3 GPUs, --gpus says 8; leave --gpus out"),
        ("2xrtx4090,rtx3090", None, "say how fast rtx3090 is"),
        ("2xrtx4090;rtx3090", None, "is not in the catalogue"),
    ):
        assert main([*flags, "--gpu", gpu, *(["--gpus", gpus] if gpus else [])]) == 2
        assert message in capsys.readouterr().err
    assert main(["simulate", out, "--policy", "gpipe", "--gpus", "2"]) == 2
    assert "priced for 3 GPUs that are not alike" in capsys.readouterr().err


def test_fit_is_bound_by_the_smallest(captured: CapturedModel) -> None:
    small = replace(SLOW, name="small", usable_bytes=2**20)
    own, mixed = (
        _Search(captured, gpus, "batch", {"sequence": 16}, 2, 2, 2**34, {})
        for gpus in (small, Box.of([SLOW, small]))
    )
    own.bar = mixed.bar = tqdm(disable=True)
    assert mixed.usable_bytes == 2**20
    for size in (1, 10_000):
        assert own.finest(size) == mixed.finest(size)
    assert mixed.finest(10_000) > mixed.usable_bytes
    assert mixed.problem(1) is None
    assert mixed.plans[1].chain.kind_of == (0, 1)


# ---------------------------------------------------------------- shared links


def test_what_a_hardware_file_says_of_the_box_is_simulated(tmp_path: Path) -> None:
    path = tmp_path / "box.json"
    fields = ("name", "memory_bytes", "usable_bytes", "h2d_bytes_per_s", "d2h_bytes_per_s", "latency_s")
    gpu = catalogue.lookup("rtx4090")
    content = {
        "format": "rpcompile.hardware",
        "version": 1,
        "hardware": {name: getattr(gpu, name) for name in fields},
        "host_memory_bytes_per_s": 40e9,
        "roots": [[0, 1], [2, 3]],
        "root_bytes_per_s": 20e9,
    }
    path.write_text(json.dumps(content))
    box = Box.of([str(path)])
    assert box.links is not None
    assert (box.links.host_bytes_per_s, box.links.roots) == (40e9, ((0, 1), (2, 3)))
    options = PlanOptions(4, 4, solver_time_s=0.5, effort=None)
    free = plan_profile(Profile.load(PROFILE), options)
    shared = plan_profile(Profile.load(PROFILE), replace(options, links=box.links))
    assert shared.prediction.iteration_s == simulate(shared.schedule, links=box.links).makespan_s
    assert shared.prediction.iteration_s > free.prediction.iteration_s
    shared.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded.links == box.links
    assert loaded.simulate().makespan_s == shared.prediction.iteration_s
    content["host_memory_bytes_per_s"] = 50e9
    (tmp_path / "other.json").write_text(json.dumps(content))
    with pytest.raises(InvalidArgument, match="say different things about one box"):
        Box.of([str(path), str(tmp_path / "other.json")])


# ---------------------------------------------------------------- running


def test_mixed_gpus_train_like_plain_pytorch() -> None:
    case = models.make("mlp")
    plain = copy.deepcopy(case.model)
    expected = reference.forward_backward(plain, case.batch, 4, random=False)
    fast = replace(
        SLOW, name="fast", flops_per_s=3e7, memory_bytes_per_s=3e7, efficiency=dict.fromkeys(SHARES, 1.0)
    )
    gpus: list[str | Hardware] = [fast, SLOW, fast]
    options = {"example_inputs": case.batch, "microbatches": 4, "effort": None}
    with rpcompile.compile(case.model, gpus, **options) as compiled:
        assert compiled.plan.chain.kind_of == (0, 1, 0)
        loss = compiled.forward_backward(**case.batch)
        assert torch.equal(loss, expected)
        for mine, theirs in zip(case.model.parameters(), plain.parameters(), strict=True):
            assert mine.grad is not None
            assert theirs.grad is not None
            assert torch.equal(mine.grad, theirs.grad)
        assert compiled(**case.batch) is not None
    again = rpcompile.compile(case.model, gpus, plan=compiled.plan, **options)
    again.close()
    with pytest.raises(PlanMismatch, match="the plan is for fast, slow, fast, not slow, slow, slow"):
        rpcompile.compile(case.model, [SLOW] * 3, plan=compiled.plan, **options)
    with pytest.raises(
        InvalidArgument, match="says what the GPUs are, and so does gpu='rtx4090'; leave gpu out"
    ):
        rpcompile.compile(case.model, gpus, gpu="rtx4090", **options)
    with pytest.raises(InvalidArgument, match=r"gpus=\[\]; give a number, or a list"):
        rpcompile.compile(case.model, [], **options)
