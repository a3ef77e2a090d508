"""Round-robin compute schedules."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings

from rpcompile import buffers
from rpcompile.errors import InvalidArgument, PartitionError, ScheduleError
from rpcompile.ir import Dispatch, Job, Op, StageKind, TiedWeight
from rpcompile.passes.dispatch_round_robin import DispatchRoundRobin
from rpcompile.passes.lay_out_dispatch import LayOutDispatch
from tests.chains import action, chain, computes, ids, partition, problems

STAGES = partition("F0-1", "FB2-2", "B1-1", "B0-0")


def test_jobs_go_round_the_gpus():
    schedule = computes(chain(3), STAGES, gpus=3, microbatches=2)
    assert schedule.jobs == tuple(Job(j, j, 0, 0, (0, 1), gpu) for j, gpu in enumerate((0, 1, 2, 0)))
    assert [(queue.gpu, queue.stream) for queue in schedule.queues] == [(g, "compute") for g in (0, 1, 2)]
    assert ids(schedule, 0, "compute") == "0F0 0F1 3R0 3B0 3R1 3B1"
    assert (schedule.policy, schedule.mode, schedule.gpus, schedule.microbatches) == (
        "round_robin",
        "sync",
        3,
        2,
    )


def test_forward_reads_and_writes():
    forward = action(computes(chain(3), STAGES, 2, 2), "0F1")
    assert forward.reads == ("gpu0:weights.j0.s0", "gpu0:weights.j0.s1", "gpu0:inputs.j0.m1")
    # Boundary 0 is the input of stage 3 (B 1..1 begins at segment 1), boundary 1 goes to stage 1.
    assert forward.writes == ("gpu0:x.s0.j0.m1", "gpu0:x.s1.j0.m1")
    assert (forward.op, forward.gpu, forward.job, forward.stage, forward.microbatch) == (
        Op.FORWARD,
        0,
        0,
        0,
        1,
    )


def test_fused_reads_and_writes():
    schedule = computes(chain(3), STAGES, 2, 2)
    first, second = action(schedule, "1FB0"), action(schedule, "1FB1")
    assert first.reads == ("gpu1:weights.j1.s2", "gpu1:x.s1.j1.m0")
    assert first.writes == ("gpu1:gradients.j1.s2", "gpu1:dx.s1.j1.m0", "gpu1:loss.m0")
    assert second.reads == ("gpu1:weights.j1.s2", "gpu1:x.s1.j1.m1", "gpu1:gradients.j1.s2")
    assert second.writes == ("gpu1:gradients.j1.s2", "gpu1:dx.s1.j1.m1", "gpu1:loss.m1")


def test_recompute_and_backward_read_and_write():
    schedule = computes(chain(3), STAGES, 2, 2)
    assert action(schedule, "2R0").reads == ("gpu0:weights.j2.s1", "gpu0:x.s0.j2.m0")
    assert action(schedule, "2R0").writes == ("gpu0:tape.j2.m0",)
    backward = action(schedule, "2B0")
    assert backward.reads == (*action(schedule, "2R0").reads, "gpu0:dx.s1.j2.m0", "gpu0:tape.j2.m0")
    assert backward.writes == ("gpu0:gradients.j2.s1", "gpu0:dx.s0.j2.m0")
    assert "gpu0:gradients.j2.s1" in action(schedule, "2B1").reads
    assert action(schedule, "2R1").reads == ("gpu0:weights.j2.s1", "gpu0:x.s0.j2.m1")
    last = action(schedule, "3B0")
    inputs = ("gpu1:weights.j3.s0", "gpu1:inputs.j3.m0")
    assert action(schedule, "3R0").reads == inputs
    assert last.reads == (*inputs, "gpu1:dx.s0.j3.m0", "gpu1:tape.j3.m0")
    assert last.writes == ("gpu1:gradients.j3.s0",)


def test_one_gpu_passes_boundaries_on_in_place():
    schedule = computes(chain(3), STAGES, 1, 1)
    assert "gpu0:x.s1.j0.m0" in action(schedule, "0F0").writes
    assert "gpu0:x.s1.j0.m0" in action(schedule, "1FB0").reads
    assert "gpu0:dx.s1.j1.m0" in action(schedule, "2B0").reads
    # The saved input comes back from the host under the backward job's own name.
    assert "gpu0:x.s0.j2.m0" in action(schedule, "2B0").reads


def test_backward_ends_at_frozen_segments():
    frozen = {0: {"needs_backward": False, "gradient_bytes": 0, "weight_bytes": 0}}
    schedule = computes(chain(3, frozen), partition("F0-1", "FB2-2", "B1-1"), 2, 1)
    assert action(schedule, "0F0").reads == ("gpu0:weights.j0.s1", "gpu0:inputs.j0.m0")
    assert action(schedule, "2B0").writes == ("gpu0:gradients.j2.s1",)
    whole = computes(chain(3, frozen), partition("F0-0", "FB1-2"), 2, 1)
    assert action(whole, "1FB0").writes == ("gpu1:gradients.j1.s1", "gpu1:gradients.j1.s2", "gpu1:loss.m0")


def test_only_forwards_change_the_models_buffers():
    batch_norm = {1: {"state_bytes": 1}, 2: {"state_bytes": 1}}
    schedule = computes(chain(3, batch_norm), STAGES, 2, 1)
    assert "gpu0:weights.j0.s1" in action(schedule, "0F0").writes
    assert "gpu0:weights.j0.s0" not in action(schedule, "0F0").writes
    assert "gpu1:weights.j1.s2" in action(schedule, "1FB0").writes
    assert "gpu0:weights.j2.s1" not in action(schedule, "2B0").writes
    evaluation = computes(chain(3, batch_norm), partition("F0-1", "F2-2"), 2, 1, mode="forward")
    assert action(evaluation, "0F0").writes == ("gpu0:x.s1.j0.m0",)


def test_evaluation_ends_with_the_outputs():
    schedule = computes(chain(3), partition("F0-1", "F2-2"), 2, 1, mode="forward")
    assert action(schedule, "1F0").reads == ("gpu1:weights.j1.s2", "gpu1:x.s1.j1.m0")
    assert action(schedule, "1F0").writes == ("gpu1:loss.m0",)


def test_seconds_and_workspace():
    batch_norm = {1: {"state_bytes": 3, "peak_bytes": 9, "forward_peak_bytes": 9}}
    schedule = computes(chain(3, batch_norm), partition("F0-1", "FB2-2", "B0-1"), 2, 1)
    assert [action(schedule, id).seconds for id in ("0F0", "1FB0", "2R0", "2B0")] == [4.0, 5.0, 4.0, 6.0]
    # F: the largest transient, with the boundary in front. FB: saved + transient. B: both segments'
    # saved, the second one's transient with the gradient in front of it, and scratch buffers; it is a buffer.
    assert [action(schedule, id).workspace_bytes for id in ("0F0", "1FB0", "2R0", "2B0")] == [
        9 + 1,
        5 + 7,
        0,
        0,
    ]
    assert schedule.buffers["gpu0:tape.j2.m0"] == 5 + 5 + 9 + 1 + 3


def test_a_last_segment_that_runs_in_tiles_is_not_recomputed_ahead():
    tiled = {index: {"reruns": True, "forward_s": 1.0 + index} for index in (0, 1)}
    schedule = computes(chain(3, tiled), partition("F0-1", "FB2-2", "B0-1"), 2, 1)
    # Of the two, only the last one's result is nobody's but the next stage's.
    assert [action(schedule, id).seconds for id in ("0F0", "2R0", "2B0")] == [3.0, 1.0, 2.0 + 3.0 + 3.0]


def test_sizes_count_a_tied_weight_once_in_a_stage():
    tied = (TiedWeight("embed", (0, 2), weight_bytes=3, gradient_bytes=2),)
    together = computes(chain(3, tied=tied), partition("FB0-2"), 1, 1).buffers
    assert [together[f"gpu0:weights.j0.s{s}"] for s in range(3)] == [4, 4, 1]
    assert [together[f"gpu0:gradients.j0.s{s}"] for s in range(3)] == [4, 4, 2]
    apart = computes(chain(3, tied=tied), STAGES, 2, 1).buffers
    assert (apart["gpu0:weights.j0.s0"], apart["gpu1:weights.j1.s2"]) == (4, 4)


def test_sizes_of_boundaries_and_inputs():
    sizes = {
        0: {"boundary_bytes": 6, "boundary_gradient_bytes": 3},
        1: {"inputs": ("mask",), "input_bytes": 5},
    }
    found = computes(chain(3, sizes), partition("F0-0", "FB1-2", "B0-0"), 2, 1).buffers
    assert found["gpu0:x.s0.j0.m0"] == found["gpu1:x.s0.j1.m0"] == 6
    assert found["gpu1:dx.s0.j1.m0"] == found["gpu0:dx.s0.j2.m0"] == 3
    assert (found["gpu0:inputs.j0.m0"], found["gpu1:inputs.j1.m0"], found["gpu1:loss.m0"]) == (2, 5, 4)


@settings(max_examples=60, deadline=None)
@given(problems())
def test_each_gpu_runs_its_jobs_in_order(problem):
    chain, stages, gpus, microbatches, mode = problem
    schedule = computes(chain, stages, gpus, microbatches, mode)
    for queue in schedule.queues:
        done = [action for action in queue.actions if action.op is not Op.RECOMPUTE]
        steps = [(action.job, action.microbatch) for action in done]
        assert all(left < right for left, right in pairwise(steps))
        assert {job % gpus for job, _ in steps} == {queue.gpu}
    actions = sum(2 if stage.kind is StageKind.B else 1 for stage in stages.stages) * microbatches
    assert sum(len(queue.actions) for queue in schedule.queues) == actions
    used = {name for action in schedule.actions() for name in (*action.reads, *action.writes)}
    assert used == schedule.buffers.keys()


@pytest.mark.parametrize(
    ("mode", "stages", "message"),
    [
        ("sync", (), "mode 'sync' takes F stages, one FB stage, then B stages; the partition has: none"),
        ("sync", ("F0-2",), "mode 'sync' takes F stages, one FB stage, then B stages; the partition has: F"),
        ("sync", ("F0-0", "B0-0", "FB1-2"), "then B stages; the partition has: F B FB"),
        ("forward", ("F0-1", "FB2-2"), "mode 'forward' takes F stages only; the partition has: F FB"),
        (
            "forward",
            ("F0-0", "F2-2"),
            "stage 1 (F, segments 2..2) must begin at segment 1, where the last one",
        ),
        ("sync", ("F0-0", "FB1-1"), "stage 1 (FB, segments 1..1) must end at the last segment, 2"),
        (
            "sync",
            ("F0-1", "FB2-2", "B0-0"),
            "stage 2 (B, segments 0..0) must end at segment 1, behind the last",
        ),
        (
            "sync",
            ("F0-1", "FB2-2", "B1-1", "B0-0"),
            "stage 3 (B, segments 0..0) needs no backward: the first se",
        ),
        ("sync", ("F0-1", "FB2-2"), "no stage runs the backward of segments 1..1"),
    ],
)
def test_refuses_stages_that_are_no_iteration(mode, stages, message):
    frozen = chain(3, {0: {"needs_backward": False}})
    with pytest.raises(PartitionError, match=re.escape(message)):
        computes(frozen, partition(*stages), 2, 1, mode)


def test_refuses_misnumbered_stages():
    right = partition("F0-0", "FB1-2", "B0-0")
    wrong = replace(right, stages=(*right.stages[:2], replace(right.stages[2], index=5)))
    with pytest.raises(PartitionError, match="the stages of a partition must be numbered in order, from 0"):
        computes(chain(3), wrong, 2, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpus": 0, "microbatches": 1}, "gpus=0 must be at least 1"),
        ({"gpus": 1, "microbatches": -2}, "microbatches=-2 must be at least 1"),
    ],
)
def test_refuses_options(options, message):
    with pytest.raises(InvalidArgument, match=re.escape(message)):
        DispatchRoundRobin(**options).run(STAGES)


def test_refuses_other_modes():
    with pytest.raises(InvalidArgument, match="mode is 'asynk'; schedules are for"):
        computes(chain(3), STAGES, 1, 1, mode="asynk")


DISPATCH = DispatchRoundRobin(2, 2).run(STAGES)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"order": (DISPATCH.order[0][1:], DISPATCH.order[1])},
            "no job runs microbatch 0 of stage 0 (F, seg",
        ),
        (
            {"order": (DISPATCH.order[0] * 2, DISPATCH.order[1])},
            "stage 0 runs microbatch 0 more than once",
        ),
        (
            {"order": (DISPATCH.order[1], DISPATCH.order[0])},
            "gpu0 is to run microbatch 0 of job 1, which is job 1 on gpu1 with microbatches (0, 1)",
        ),
        ({"microbatches": 1}, "the dispatch runs 8 (stage, microbatch) pairs; the partition has 4 stages"),
        ({"gpus": 3}, "the dispatch orders 2 GPUs; it has 3"),
        ({"jobs": DISPATCH.jobs[::-1]}, "job 0 of the dispatch is numbered 3"),
        ({"jobs": DISPATCH.jobs[:3]}, "gpu1 is to run job 3; there are 3 jobs"),
        ({"jobs": (replace(DISPATCH.jobs[0], stage=9),)}, "job 0 runs stage 9; there are 4 stages"),
        ({"jobs": (replace(DISPATCH.jobs[0], microbatches=()),)}, "job 0 has no microbatches; leave it out"),
        (
            {"order": (DISPATCH.order[0][1::-1] + DISPATCH.order[0][2:], DISPATCH.order[1])},
            "gpu0 runs microbatches (1, 0) of job 0, whose microbatches are (0, 1); all must run, in this",
        ),
    ],
)
def test_refuses_a_dispatch_that_is_no_iteration(changed, message):
    with pytest.raises(ScheduleError, match=re.escape(message)):
        LayOutDispatch(chain(3), STAGES).run(replace(DISPATCH, **changed))


def test_refuses_a_negative_limit():
    with pytest.raises(InvalidArgument, match="waiting_bytes is -1; it must be at least 0, or None"):
        LayOutDispatch(chain(3), STAGES, waiting_bytes=-1).run(DISPATCH)


def test_replicas_share_a_stage():
    dispatch = Dispatch(
        "by_hand",
        2,
        2,
        (
            Job(0, 0, 0, 0, (0, 1), 0),
            Job(1, 1, 0, 0, (0,), 0),
            Job(2, 1, 0, 1, (1,), 1),
            Job(3, 2, 0, 0, (0, 1), 0),
        ),
        (((0, 0), (1, 0), (0, 1), (3, 0), (3, 1)), ((2, 1),)),
    )
    stages = partition("F0-1", "FB2-2", "B0-1")
    schedule = LayOutDispatch(chain(3), stages).run(dispatch)
    assert ids(schedule, 0, "compute") == "0F0 1FB0 0F1 2R0 2B0 2R1 2B1"
    # Microbatch 0 stays on its GPU; microbatch 1 goes to the replica's GPU and back.
    assert "gpu0:x.s1.j0.m0" in action(schedule, "1FB0").reads
    assert "gpu1:x.s1.j2.m1" in action(schedule, "1FB1").reads
    assert "gpu0:dx.s1.j1.m0" in action(schedule, "2B0").reads
    assert "gpu0:dx.s1.j3.m1" in action(schedule, "2B1").reads
    # Each replica starts a gradient of its own.
    assert "gpu1:gradients.j2.s2" not in action(schedule, "1FB1").reads


def test_buffer_names_come_apart():
    names = {
        buffers.weights("host", 4): ("host", "weights", 4, None, None),
        buffers.weights("gpu1", 4, 2): ("gpu1", "weights", 4, 2, None),
        buffers.inputs("host", 3): ("host", "inputs", None, None, 3),
        buffers.inputs("gpu10", 3, 2): ("gpu10", "inputs", None, 2, 3),
        buffers.boundary("host", 6, 0): ("host", "x", 6, None, 0),
        buffers.boundary("gpu1", 6, 0, 2): ("gpu1", "x", 6, 2, 0),
        buffers.boundary_gradient("gpu1", 6, 0, 9): ("gpu1", "dx", 6, 9, 0),
        buffers.gradients("gpu1", 4, 9): ("gpu1", "gradients", 4, 9, None),
        buffers.state(4, 2): ("host", "state", 4, 2, None),
        buffers.loss("gpu1", 0): ("gpu1", "loss", None, None, 0),
        buffers.updated(4): ("host", "updated", 4, None, None),
        buffers.NORM: ("host", "norm", None, None, None),
    }
    assert {name: tuple(buffers.parse(name)) for name in names} == names


@pytest.mark.parametrize("text", ["", "gpu:x.s1", "host:y.s1", "host:x.q1", "gpu0:x.s1 "])
def test_refuses_other_names(text):
    message = f"{text!r} is not a buffer; write e.g. host:weights.s4 or gpu1:x.s6.j2.m0"
    with pytest.raises(ScheduleError, match=f"^{re.escape(message)}$"):
        buffers.parse(text)
