"""Optimizer updates in the schedule."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpcompile.errors import InvalidArgument, ScheduleError
from rpcompile.ir import Op, Queue, Stream, TiedWeight
from rpcompile.passes.insert_event_waits import InsertEventWaits
from rpcompile.passes.insert_transfers import InsertTransfers
from rpcompile.passes.insert_updates import InsertUpdates
from rpcompile.passes.lay_out_dispatch import LayOutDispatch
from rpcompile.simulate import simulate
from rpcompile.verify import verify_schedule
from tests.chains import action, chain, edit, ids, partition, rewrite, with_transfers, without
from tests.dispatches import dispatched, of_steps

STAGES = partition("F0-1", "FB2-2", "B1-1", "B0-0")
# 4 bytes of gradient a segment are 2 parameters: 2 s an update.
PRICES = {"seconds_per_parameter": 1.0, "parameter_bytes": 2, "host_bytes_per_s": 1.0}
TIED = (TiedWeight("embed", (0, 2), weight_bytes=2, gradient_bytes=2),)


def updated(found=None, stages=STAGES, **options):
    """Two GPUs, one microbatch."""
    found = found or chain(3)
    schedule = with_transfers(found, stages, gpus=2, microbatches=1)
    return InsertEventWaits().run(InsertUpdates(found, **{**PRICES, **options}).run(schedule))


def halves():
    """One fused stage; even and odd microbatches on GPUs of their own."""
    stages = partition("FB0-0")
    dispatch = of_steps("halves", 2, 4, [(m % 2, 0, m, m % 2) for m in range(4)])
    return stages, InsertTransfers(chain(1)).run(LayOutDispatch(chain(1), stages).run(dispatch))


def test_each_segment_is_updated_by_its_last_job_on_one_queue():
    schedule = updated(order=(0, 1, 2))
    assert ids(schedule, 0, "host") == "3U@3.0 2U@2.1 1U@1.2"
    first = action(schedule, "3U@3.0")
    assert (first.stream, first.gpu, first.stage, first.seconds) == (Stream.HOST, 0, 3, 2.0)
    assert (first.reads, first.writes) == (("host:gradients.j3.s0",), ("host:updated.s0",))
    assert {name: schedule.buffers[name] for name in schedule.buffers if ":updated" in name} == {
        "host:updated.s0": 0,
        "host:updated.s1": 0,
        "host:updated.s2": 0,
    }
    verify_schedule(schedule, chain(3), STAGES)


def test_the_lowest_that_is_ready_goes_first():
    # Gradients come down from the last segment to the first, a backward apart: each is updated at once.
    assert ids(updated(), 0, "host") == "1U@1.2 2U@2.1 3U@3.0"
    # So slow an optimizer is still at the head when both others have come.
    assert ids(updated(seconds_per_parameter=100.0), 0, "host") == "1U@1.2 3U@3.0 2U@2.1"


def test_clipping_waits_for_all_gradients():
    schedule = updated(clip=True)
    assert ids(schedule, 0, "host") == "1U@1 3U@3.0 2U@2.1 1U@1.2"
    norm = action(schedule, "1U@1")
    assert norm.reads == ("host:gradients.j3.s0", "host:gradients.j2.s1", "host:gradients.j1.s2")
    assert (norm.writes, norm.seconds, schedule.buffers["host:norm"]) == (("host:norm",), 0.0, 4)
    assert action(schedule, "3U@3.0").reads == ("host:gradients.j3.s0", "host:norm")
    verify_schedule(schedule, chain(3), STAGES)
    ends = simulate(schedule).end_s
    assert simulate(schedule).start_s["1U@1"] == max(ends[f"{g}"] for g in ("3G@3.0", "2G@2.1", "1G@1.2"))


def test_gradients_of_replicas_are_summed_as_they_land():
    stages, transfers = halves()
    schedule = InsertEventWaits().run(InsertUpdates(chain(1), **PRICES).run(transfers))
    assert ids(schedule, 0, "host") == "0S@1.0 0U@1.0"
    added, update = action(schedule, "0S@1.0"), action(schedule, "0U@1.0")
    assert added.reads == ("host:gradients.j0.s0", "host:gradients.j1.s0")
    assert added.writes == update.reads == ("host:gradients.j0.s0",)
    # 4 bytes added to 4 bytes: 12 bytes at 1 byte/s. Two parameters at 1 s.
    assert (added.seconds, update.seconds) == (12, 2)
    verify_schedule(schedule, chain(1), stages)
    # The norm of the sum reads 4 bytes more.
    clipped = InsertUpdates(chain(1), clip=True, **PRICES).run(transfers)
    assert [action(clipped, id).seconds for id in ("0S@1.0", "0U@1", "0U@1.0")] == [16, 0, 2]


def test_gradients_that_land_together_are_added_in_one_pass():
    stages = partition("FB0-0")
    dispatch = of_steps("quarters", 4, 4, [(m, 0, m, m) for m in range(4)])
    plain = InsertTransfers(chain(1)).run(LayOutDispatch(chain(1), stages).run(dispatch))
    schedule = InsertEventWaits().run(InsertUpdates(chain(1), **PRICES).run(plain))
    assert ids(schedule, 0, "host") == "0S@3.0 0U@3.0"
    assert action(schedule, "0S@3.0").reads == tuple(f"host:gradients.j{job}.s0" for job in range(4))
    assert action(schedule, "0S@3.0").seconds == 4 * 4 + 4
    verify_schedule(schedule, chain(1), stages)


def test_sums_keep_the_order_of_jobs():
    stages = partition("F0-0", "FB1-1", "B0-0")
    # Stage 2 has three jobs; the middle one has two microbatches, and its gradient lands last.
    steps = [(0, 0, m, 0) for m in range(4)] + [(0, 1, m, 1) for m in range(4)]
    steps += [(1, 2, 0, 2), (2, 2, 1, 3), (2, 2, 3, 3), (1, 2, 2, 4)]
    dispatch = of_steps("three", 3, 4, steps)
    plain = InsertTransfers(chain(2)).run(LayOutDispatch(chain(2), stages).run(dispatch))
    ends = simulate(InsertEventWaits().run(plain)).end_s
    assert ends["2G@2.0"] < ends["2G@4.0"] < ends["2G@3.0"]
    for clip, expected in ((False, "2S@4.0 2U@4.0 1U@1.1"), (True, "2S@4.0 1U@1 2U@4.0 1U@1.1")):
        schedule = InsertEventWaits().run(InsertUpdates(chain(2), clip=clip, **PRICES).run(plain))
        assert ids(schedule, 0, "host") == expected
        assert action(schedule, "2S@4.0").reads == tuple(f"host:gradients.j{job}.s0" for job in (2, 3, 4))
        # One pass reads three times 4 bytes and writes 4.
        assert action(schedule, "2S@4.0").seconds == 16 + 4 * clip
        assert simulate(schedule).start_s["2S@4.0"] == ends["2G@3.0"]
        verify_schedule(schedule, chain(2), stages)


def test_a_tied_weight_is_updated_with_its_first_segment():
    tied = chain(3, tied=TIED)
    schedule = updated(tied)
    first, last = action(schedule, "3U@3.0"), action(schedule, "1U@1.2")
    assert first.reads == ("host:gradients.j3.s0", "host:gradients.j1.s2")
    assert first.seconds == 2 + 3 * 2
    assert last.reads == ("host:gradients.j1.s2", "host:updated.s0")
    assert last.seconds == 1
    assert ids(schedule, 0, "host") == "2U@2.1 3U@3.0 1U@1.2"
    verify_schedule(schedule, tied, STAGES)


def test_nothing_to_update():
    frozen = chain(1, {0: {"gradient_bytes": 0}})
    schedule = with_transfers(frozen, partition("FB0-0"), 1, 1)
    assert InsertUpdates(frozen).run(schedule) is schedule


@settings(max_examples=60, deadline=None)
@given(dispatched(mode="sync"), st.booleans())
def test_any_dispatch_with_updates_verifies(problem, clip):
    chain, stages, dispatch, mode = problem
    plain = InsertTransfers(chain).run(LayOutDispatch(chain, stages, mode).run(dispatch))
    schedule = InsertEventWaits().run(InsertUpdates(chain, clip=clip).run(plain))
    verify_schedule(schedule, chain, stages)
    assert simulate(schedule).makespan_s > 0
    jobs = {job for found in plain.actions() if found.op is Op.GRADIENT for job in [found.job]}
    assert bool(jobs) == any(found.op is Op.UPDATE for found in schedule.actions())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seconds_per_parameter": -1.0}, "seconds_per_parameter is -1.0; it must not be negative"),
        ({"parameter_bytes": 0}, "parameter_bytes is 0; it must be above 0"),
        ({"host_bytes_per_s": 0.0}, "host_bytes_per_s is 0.0; it must be above 0"),
        ({"order": (0, 1)}, "order is (0, 1); it must have each of (0, 1, 2) once"),
        (
            {"order": (2, 0, 1)},
            "order has segment 2 before segment 0, with which its tied weights are updated",
        ),
    ],
)
def test_refuses_options(options, message):
    with pytest.raises(InvalidArgument, match=f"^{re.escape(message)}$"):
        updated(chain(3, tied=TIED), **options)


def test_refuses_to_run_twice():
    with pytest.raises(ScheduleError, match=re.escape("1U@1.2 is an update; insert-updates runs once")):
        InsertUpdates(chain(3)).run(updated())


VALID = updated(clip=True)


def anew(schedule):
    return InsertEventWaits().run(schedule)


@pytest.mark.parametrize(
    ("mutant", "message"),
    [
        (
            anew(without(VALID, "2U@2.1")),
            "host:gradients.j2.s1 goes into no action; one update of segment 1 must",
        ),
        (
            anew(edit(VALID, "2U@2.1", reads=("host:norm",))),
            "2U@2.1 leaves out host:gradients.j2.s1, which goes into host:updated.s1",
        ),
        (
            anew(edit(VALID, "2U@2.1", reads=("host:gradients.j2.s1",))),
            "2U@2.1 leaves out host:norm, which goes into host:updated.s1",
        ),
        (
            anew(edit(VALID, "2U@2.1", reads=(*action(VALID, "2U@2.1").reads, "host:gradients.j3.s0"))),
            "2U@2.1 reads host:gradients.j3.s0, which does not go into host:updated.s1",
        ),
        (
            anew(edit(VALID, "1U@1", reads=action(VALID, "1U@1").reads[1:])),
            "1U@1 leaves out host:gradients.j3.s0, which goes into host:norm",
        ),
        (
            edit(VALID, "1U@1", waits=()),
            "1U@1 does not wait for 3G@3.0, which writes host:gradients.j3.s0",
        ),
        (
            edit(VALID, "2U@2.1", writes=("host:loss.m0",)),
            "1O0 uses host:loss.m0, which 1O0 and 2U@2.1 writes from scratch; one action must",
        ),
    ],
)
def test_broken_updates_are_refused(mutant, message):
    with pytest.raises(ScheduleError) as caught:
        verify_schedule(mutant, chain(3), STAGES)
    assert message in str(caught.value)


def summed():
    """Three jobs of one fused stage, the last of which has two microbatches, with their sums."""
    stages = partition("FB0-0")
    dispatch = of_steps("thirds", 3, 4, [(min(m, 2), 0, m, min(m, 2)) for m in range(4)])
    plain = InsertTransfers(chain(1)).run(LayOutDispatch(chain(1), stages).run(dispatch))
    return InsertUpdates(chain(1)).run(plain), stages


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda found: without(found, "0S@2.0"),
            "host:gradients.j2.s0 is never added to host:gradients.j0.s0; one sum must",
        ),
        (
            lambda found: edit(found, "0S@1.0", reads=("host:gradients.j0.s0", "host:gradients.j2.s0")),
            "0S@1.0 reads ('host:gradients.j0.s0', 'host:gradients.j2.s0'); it is to add "
            "host:gradients.j1.s0 to host:gradients.j0.s0",
        ),
        (
            lambda found: rewrite(
                found, lambda old: [old, replace(old, id="0S@2.9")] if old.id == "0S@2.0" else [old]
            ),
            "it is to add nothing more to host:gradients.j0.s0",
        ),
        (
            lambda found: edit(
                found,
                "0S@2.0",
                reads=("host:gradients.j2.s0", "host:gradients.j1.s0"),
                writes=("host:gradients.j2.s0",),
            ),
            "host:gradients.j2.s0 is never added to host:gradients.j0.s0; one sum must",
        ),
        (
            lambda found: rewrite(
                found,
                lambda old: (
                    [old, replace(old, id="0S@2.9", reads=old.reads[::-1], writes=old.reads[1:])]
                    if old.id == "0S@2.0"
                    else [old]
                ),
            ),
            "0S@2.9 adds to no gradient of a segment's first job",
        ),
        (
            lambda found: rewrite(found, lambda old: [] if old.op is Op.UPDATE else [old]),
            "host:gradients.j0.s0 goes into no action; one update of segment 0 must",
        ),
    ],
)
def test_broken_sums_are_refused(change, message):
    schedule, stages = summed()
    assert ids(schedule, 0, "host") == "0S@1.0 0S@2.0 0U@2.0"
    verify_schedule(anew(schedule), chain(1), stages)
    with pytest.raises(ScheduleError) as caught:
        verify_schedule(anew(change(schedule)), chain(1), stages)
    assert message in str(caught.value)


def test_updates_that_are_all_left_out():
    schedule = updated()
    without_host = replace(schedule, queues=tuple(q for q in schedule.queues if q.stream is not Stream.HOST))
    with pytest.raises(
        ScheduleError, match=re.escape("host:gradients.j3.s0 goes into no action; one update")
    ):
        verify_schedule(InsertEventWaits().run(without_host), chain(3), STAGES)


def test_sums_of_one_gradient_on_two_queues_need_an_order():
    schedule, stages = summed()
    schedule = anew(schedule)
    there = [event for id in ("0G@0.0", "0G@2.0") for event in action(schedule, id).records]
    late, update = (replace(action(schedule, id), gpu=1) for id in ("0S@2.0", "0U@2.0"))
    rest = without(without(schedule, "0S@2.0"), "0U@2.0")
    second = Queue(1, Stream.HOST, (replace(late, waits=tuple(there)), update))
    with pytest.raises(ScheduleError) as caught:
        verify_schedule(replace(rest, queues=(*rest.queues, second)), chain(1), stages)
    assert (
        str(caught.value) == "0S@2.0 does not wait for 0S@1.0, which adds to host:gradients.j0.s0 before it"
    )
