"""Copies and FREEs around the compute actions."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpcompile import stage_bytes
from rpcompile.errors import InvalidArgument, ScheduleError
from rpcompile.ir import Op, SegmentChain, Stream, TiedWeight
from rpcompile.passes.insert_event_waits import InsertEventWaits
from rpcompile.passes.insert_transfers import InsertTransfers
from rpcompile.simulate import simulate
from rpcompile.verify import verify_schedule
from tests.chains import (
    HARDWARE,
    action,
    chain,
    compiled,
    computes,
    edit,
    ids,
    partition,
    problems,
    with_transfers,
)

STAGES = partition("F0-1", "FB2-2", "B1-1", "B0-0")


def copy(schedule, id):
    found = action(schedule, id)
    return found.gpu, found.stream, found.reads, found.writes, found.nbytes


def test_queues_of_two_gpus():
    schedule = with_transfers(chain(3), STAGES, gpus=2, microbatches=1)
    assert ids(schedule, 0, "h2d") == "0L0 2L0 2V0 2X0.1"
    assert ids(schedule, 0, "weights") == "0P@0.0 0P@0.1 2P@2.1"
    assert ids(schedule, 0, "compute") == "0F0 0X0.0 0X@0.0 2R0 2B0 2X0.0 2X@2.0"
    assert ids(schedule, 0, "d2h") == "0H0 0O0.0 0X0.2 2H0 2X0.2"
    assert ids(schedule, 0, "gradients") == "2G@2.1 2X@2.3"
    assert ids(schedule, 1, "h2d") == "1V0 1X0.1 3L0 3V0 3X0.1"
    assert ids(schedule, 1, "weights") == "1P@1.2 3P@3.0"
    assert ids(schedule, 1, "compute") == "1FB0 1X0.0 1X@1.0 3R0 3B0 3X0.0 3X@3.0"
    assert ids(schedule, 1, "d2h") == "1H0 1O0 1X0.2"
    assert ids(schedule, 1, "gradients") == "1G@1.2 1X@1.3 3G@3.0 3X@3.3"
    assert [(queue.gpu, queue.stream) for queue in schedule.queues] == [
        (gpu, stream) for gpu in (0, 1) for stream in ("compute", "h2d", "weights", "d2h", "gradients")
    ]


def test_copies_name_both_sides_and_their_bytes():
    schedule = with_transfers(chain(3), STAGES, gpus=2, microbatches=1)
    h2d, d2h = Stream.H2D, Stream.D2H
    assert copy(schedule, "2P@2.1") == (0, Stream.WEIGHTS, ("host:weights.s1",), ("gpu0:weights.j2.s1",), 4)
    assert copy(schedule, "0L0") == (0, h2d, ("host:inputs.m0",), ("gpu0:inputs.j0.m0",), 2)
    assert copy(schedule, "2L0") == (0, h2d, ("host:x.s0.m0",), ("gpu0:x.s0.j2.m0",), 1)
    assert copy(schedule, "1V0") == (1, h2d, ("host:x.s1.m0",), ("gpu1:x.s1.j1.m0",), 1)
    assert copy(schedule, "2V0") == (0, h2d, ("host:dx.s1.j1.m0",), ("gpu0:dx.s1.j2.m0",), 1)
    assert copy(schedule, "0H0") == (0, d2h, ("gpu0:x.s1.j0.m0",), ("host:x.s1.m0",), 1)
    assert copy(schedule, "1H0") == (1, d2h, ("gpu1:dx.s1.j1.m0",), ("host:dx.s1.j1.m0",), 1)
    assert copy(schedule, "0O0.0") == (0, d2h, ("gpu0:x.s0.j0.m0",), ("host:x.s0.m0",), 1)
    assert copy(schedule, "1O0") == (1, d2h, ("gpu1:loss.m0",), ("host:loss.m0",), 4)
    gradients = (0, Stream.GRADIENTS, ("gpu0:gradients.j2.s1",), ("host:gradients.j2.s1",), 4)
    assert copy(schedule, "2G@2.1") == gradients


def test_a_load_brings_inputs_and_saved_boundary_together():
    reads_mask = chain(3, {1: {"inputs": ("mask",), "input_bytes": 3}})
    schedule = with_transfers(reads_mask, STAGES, 2, 1)
    load = action(schedule, "2L0")
    assert load.reads == ("host:inputs.m0", "host:x.s0.m0")
    assert load.writes == ("gpu0:inputs.j2.m0", "gpu0:x.s0.j2.m0")
    assert load.nbytes == 3 + 1
    assert action(schedule, "0L0").nbytes == 2 + 3


def test_seconds_are_latency_and_bandwidth():
    hardware = replace(HARDWARE, h2d_bytes_per_s=2.0, d2h_bytes_per_s=4.0, latency_s=0.5)
    slow = SegmentChain(chain(3).segments, {}, hardware)
    schedule = with_transfers(slow, STAGES, 2, 1)
    assert (action(schedule, "0P@0.0").seconds, action(schedule, "1G@1.2").seconds) == (2.5, 1.5)
    assert action(schedule, "0X0.0").seconds == 0.0


def test_frees_follow_the_last_reader():
    schedule = with_transfers(chain(3), STAGES, 2, 1)
    frees = {found.id: found.frees for found in schedule.actions() if found.op is Op.FREE}
    assert frees == {
        "0X0.0": ("gpu0:inputs.j0.m0",),
        "0X@0.0": ("gpu0:weights.j0.s0", "gpu0:weights.j0.s1"),
        "0X0.2": ("gpu0:x.s0.j0.m0", "gpu0:x.s1.j0.m0"),
        "1X0.1": ("host:x.s1.m0",),
        "1X0.0": ("gpu1:x.s1.j1.m0",),
        "1X@1.0": ("gpu1:weights.j1.s2",),
        "1X0.2": ("gpu1:dx.s1.j1.m0", "gpu1:loss.m0"),
        "1X@1.3": ("gpu1:gradients.j1.s2",),
        "2X0.1": ("host:dx.s1.j1.m0", "host:x.s0.m0"),
        "2X0.0": ("gpu0:dx.s1.j2.m0", "gpu0:tape.j2.m0", "gpu0:x.s0.j2.m0"),
        "2X@2.0": ("gpu0:weights.j2.s1",),
        "2X0.2": ("gpu0:dx.s0.j2.m0",),
        "2X@2.3": ("gpu0:gradients.j2.s1",),
        "3X0.1": ("host:dx.s0.j2.m0",),
        "3X0.0": ("gpu1:dx.s0.j3.m0", "gpu1:inputs.j3.m0", "gpu1:tape.j3.m0"),
        "3X@3.0": ("gpu1:weights.j3.s0",),
        "3X@3.3": ("gpu1:gradients.j3.s0",),
    }


def test_a_handed_off_boundary_serves_its_backward_too():
    stages = partition("F0-0", "F1-1", "FB2-2", "B1-1", "B0-0")
    schedule = with_transfers(chain(3), stages, gpus=2, microbatches=1)
    # Boundary 0 goes to stage 1 and is stage 3's saved input: one copy down, two up, one FREE.
    assert ids(schedule, 0, "d2h").startswith("0H0 0X0.2")
    assert action(schedule, "1V0").reads == action(schedule, "3L0").reads == ("host:x.s0.m0",)
    assert not any("host:x.s0.m0" in found.frees for found in schedule.actions() if found.job == 1)
    assert "host:x.s0.m0" in action(schedule, "3X0.1").frees


def test_one_gpu_keeps_what_the_next_job_reads():
    stages = partition("F0-0", "F1-1", "FB2-2", "B1-1", "B0-0")
    schedule = with_transfers(chain(3), stages, gpus=1, microbatches=2)
    assert not {found.op for found in schedule.actions()} & {Op.HANDOFF, Op.RECEIVE}
    assert copy(schedule, "0O1.0")[2:4] == (("gpu0:x.s0.j0.m1",), ("host:x.s0.m1",))
    # Read by 1F0 and copied down: freed on d2h, among what stage 1 sends down.
    assert "gpu0:x.s0.j0.m0" in action(schedule, "1X0.2").frees
    # Boundary 1 is only read by 2FB0, so compute frees it.
    assert action(schedule, "2X0.0").frees == ("gpu0:x.s1.j1.m0",)
    assert ids(schedule, 0, "d2h").startswith("0O0.0 0O1.0 1X0.2 1X1.2")


def test_changed_buffers_do_not_wait_for_gradients():
    stages = partition("FB0-1")
    schedule = with_transfers(chain(2, {1: {"state_bytes": 3}}), stages, gpus=1, microbatches=2)
    assert ids(schedule, 0, "d2h") == "0O0 0X0.2 0O1 0X1.2 0O@0.1 0X@0.2"
    assert ids(schedule, 0, "gradients") == "0G@0.0 0G@0.1 0X@0.3"
    assert copy(schedule, "0O@0.1")[2:] == (("gpu0:weights.j0.s1",), ("host:state.j0.s1",), 3)
    assert action(schedule, "0X@0.0").frees == ("gpu0:weights.j0.s0",)
    assert action(schedule, "0X@0.2").frees == ("gpu0:weights.j0.s1",)


def test_evaluation_only_sends_outputs_down():
    state = {1: {"state_bytes": 1}}
    schedule = with_transfers(chain(3, state), partition("F0-1", "F2-2"), 2, 2, mode="forward")
    assert ids(schedule, 0, "d2h") == "0H0 0X0.2 0H1 0X1.2"
    assert ids(schedule, 1, "d2h") == "1O0 1X0.2 1O1 1X1.2"


def test_the_next_jobs_weights_come_while_this_one_computes():
    stages = partition("F0-0", "FB1-3", "B0-0")
    schedule = InsertEventWaits().run(with_transfers(chain(4), stages, gpus=1, microbatches=4))
    assert ids(schedule, 0, "h2d").startswith("0L0 0L1 0L2 0L3")
    assert ids(schedule, 0, "weights") == "0P@0.0 1P@1.1 1P@1.2 1P@1.3 2P@2.0"
    timeline = simulate(schedule)
    # 2 s of the first input and 4 s of weights; then 12 s more of weights and 6 s of inputs, of one link.
    assert (timeline.start_s["0F0"], timeline.start_s["1P@1.1"]) == (8, 8)


def test_a_prefetch_waits_for_the_weights_of_the_job_two_before():
    schedule = with_transfers(chain(3, {1: {"state_bytes": 1}}), STAGES, gpus=1, microbatches=2)
    assert [action(schedule, id).after for id in ("0P@0.0", "1P@1.2")] == [(), ()]
    # Job 0 has segment 0's weights freed by compute and segment 1's, changed, on d2h.
    assert action(schedule, "2P@2.1").after == ("0X@0.0", "0X@0.2")
    assert action(schedule, "3P@3.0").after == ("1X@1.0",)


def test_a_recompute_waits_for_what_was_saved_and_its_backward_for_the_gradient():
    schedule = InsertEventWaits().run(with_transfers(chain(3), STAGES, 2, 2))
    recorder = {event: found.id for found in schedule.actions() for event in found.records}

    def waits(id):
        return [recorder[event] for event in action(schedule, id).waits]

    assert waits("2R0") == ["2L0", "2P@2.1"]
    assert waits("2B0") == ["2V0", "0X0.2"]  # and room for its result
    assert waits("2R1") == ["2L1"]


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_activations_wait_for_slots(slots):
    schedule = with_transfers(chain(2), partition("F0-0", "FB1-1", "B0-0"), 2, 4, slots=slots)
    loads = [action(schedule, f"0L{m}").after for m in range(4)]
    assert loads == [()] * slots + [(f"0X{m}.0",) for m in range(4 - slots)]
    forwards = [action(schedule, f"0F{m}").after for m in range(4)]
    assert forwards == [()] * slots + [(f"0X{m}.2",) for m in range(4 - slots)]
    # The next job on the GPU goes on where this one ended.
    assert action(schedule, "2V0").after == (f"0X{4 - slots}.0",)
    assert action(schedule, "2R0").after == ()
    assert action(schedule, "2B0").after == (f"0X{4 - slots}.2",)
    # A microbatch's gradient and its saved input share a slot, and a gradient can come while another is used.
    backwards = [action(schedule, f"2V{m}").after for m in range(slots, 4)]
    assert backwards == [(f"2X{m}.0",) for m in range(4 - slots)]
    assert backwards == [action(schedule, f"2L{m}").after for m in range(slots, 4)]


def test_gradients_wait_for_those_of_the_job_two_before():
    schedule = with_transfers(chain(3), STAGES, gpus=1, microbatches=1)
    # Jobs 1, 2 and 3 make gradients; two sets may be on the GPU.
    assert [action(schedule, id).after for id in ("1FB0", "2B0")] == [(), ("0X0.2",)]
    assert action(schedule, "3B0").after == ("1X0.2", "1X@1.3")


def test_sizes_of_the_host():
    tied = (TiedWeight("embed", (0, 2), weight_bytes=3, gradient_bytes=2),)
    schedule = with_transfers(chain(3, {2: {"input_bytes": 5, "inputs": ("labels",)}}, tied), STAGES, 2, 1)
    host = {name: size for name, size in schedule.buffers.items() if name.startswith("host:")}
    assert host == {
        "host:weights.s0": 4,
        "host:weights.s1": 4,
        "host:weights.s2": 1,
        "host:inputs.m0": 7,
        "host:x.s0.m0": 1,
        "host:x.s1.m0": 1,
        "host:dx.s0.j2.m0": 1,
        "host:dx.s1.j1.m0": 1,
        "host:loss.m0": 4,
        "host:gradients.j1.s2": 4,
        "host:gradients.j2.s1": 4,
        "host:gradients.j3.s0": 4,
    }


@settings(max_examples=150, deadline=None)
@given(problems(), st.integers(1, 3))
def test_any_problem_gives_a_schedule_that_verifies_and_ends(problem, slots):
    chain, stages, gpus, microbatches, mode = problem
    schedule = compiled(chain, stages, gpus, microbatches, mode, slots)
    verify_schedule(schedule, chain, stages)
    timeline = simulate(schedule)
    assert timeline.makespan_s > 0
    assert timeline.end_s.keys() == {found.id for found in schedule.actions()}


@settings(max_examples=80, deadline=None)
@given(problems(mode="sync"), st.integers(1, 3))
def test_memory_has_a_bound_that_microbatches_do_not_raise(problem, slots):
    chain, stages, gpus, microbatches, mode = problem
    if gpus == 1:  # one GPU keeps every microbatch's boundary for the next job
        return
    schedule = compiled(chain, stages, gpus, microbatches, mode, slots)
    boundaries = sum(found.boundary_bytes + found.boundary_gradient_bytes for found in chain.segments)
    inputs = sum(found.input_bytes for found in chain.segments)
    weights = sorted(sum(stage_bytes.weight_bytes(chain, stage.segments).values()) for stage in stages.stages)
    gradients = sorted(
        sum(stage_bytes.gradient_bytes(chain, stage.segments).values()) for stage in stages.stages
    )
    workspace = max(stage_bytes.Workspaces(chain).of(stage) for stage in stages.stages)
    bound = sum(weights[-2:]) + sum(gradients[-2:]) + workspace + slots * (inputs + 2 * boundaries + 4)
    assert max(simulate(schedule).gpu_peak_bytes) <= bound


def test_refuses_to_run_twice():
    with pytest.raises(
        ScheduleError, match=re.escape("0X0.0 is not a compute action; insert-transfers runs once")
    ):
        InsertTransfers(chain(3)).run(with_transfers(chain(3), STAGES, 2, 1))


@pytest.mark.parametrize("option", ["activation_slots", "resident_jobs"])
def test_refuses_no_slots(option):
    with pytest.raises(InvalidArgument, match=f"{option}=0 must be at least 1"):
        InsertTransfers(chain(3), **{option: 0}).run(computes(chain(3), STAGES, 2, 1))


def test_refuses_a_read_that_nothing_makes():
    schedule = edit(computes(chain(3), STAGES, 2, 1), "0F0", writes=("gpu0:x.s0.j0.m0",))
    with pytest.raises(ScheduleError, match=re.escape("1FB0 reads gpu1:x.s1.j1.m0, which no action makes")):
        InsertTransfers(chain(3)).run(schedule)
