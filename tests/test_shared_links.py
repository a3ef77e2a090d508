"""Transfers that share host memory, PCIe roots and both directions of a link."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings

from rpcompile.errors import InvalidArgument, ScheduleError
from rpcompile.ir import ActionId, Op, Stream
from rpcompile.probe import HardwareProbe
from rpcompile.shared_links import SharedLinks
from rpcompile.simulate import Timeline, simulate
from tests.chains import HARDWARE, act, compiled, hand_made, problems

COMPUTE, H2D, D2H, HOST = Stream.COMPUTE, Stream.H2D, Stream.D2H, Stream.HOST
WEIGHTS, GRADIENTS = Stream.WEIGHTS, Stream.GRADIENTS


def copies(links: SharedLinks | None, *given: tuple[str, int, Stream, int]) -> Timeline:
    """Copies that begin at once, each (id, GPU, stream, bytes); a byte takes a second on an idle link."""
    queues = [
        (gpu, stream, [act(id, ActionId.parse(id).op, nbytes=size, seconds=float(size))])
        for id, gpu, stream, size in given
    ]
    return simulate(replace(hand_made(*queues), gpus=3), links=links)


def test_host_memory_is_shared_evenly_and_what_is_left_goes_faster():
    timeline = copies(SharedLinks(host_bytes_per_s=1.0), ("0P@0.0", 0, H2D, 10), ("1P@1.0", 1, H2D, 5))
    # Half the rate each; 1P is over at 10, and 0P moves its other 5 bytes alone.
    assert timeline.end_s == {"0P@0.0": 15.0, "1P@1.0": 10.0}
    assert timeline.steps[-1].wait_s == 5.0
    assert timeline.bound_s == {"upload": 10.0, "wait": 5.0}


def test_activations_go_before_weights():
    timeline = copies(SharedLinks(host_bytes_per_s=1.0), ("0P@0.0", 0, H2D, 10), ("1V0", 1, H2D, 5))
    assert timeline.end_s == {"0P@0.0": 15.0, "1V0": 5.0}


def test_activations_have_their_gpus_link_for_themselves():
    given = ("0P@0.0", 0, WEIGHTS, 10), ("0V0", 0, H2D, 5), ("1P@1.0", 1, WEIGHTS, 10)
    for links in (None, SharedLinks(None)):
        timeline = copies(links, *given, ("0G@0.0", 0, GRADIENTS, 3))
        # The other direction and the other GPU's link do not notice.
        assert timeline.end_s == {"0P@0.0": 15.0, "0V0": 5.0, "1P@1.0": 10.0, "0G@0.0": 3.0}
    timeline = copies(None, ("0G@0.0", 0, GRADIENTS, 4), ("0H0", 0, D2H, 6))
    assert timeline.end_s == {"0G@0.0": 10.0, "0H0": 6.0}


def test_weights_have_what_a_slow_activation_leaves_of_the_link():
    # Host memory lets the two activations have half a byte a second each, so half of each link is free; but
    # host memory is not, until both are over.
    given = ("0V0", 0, H2D, 2), ("1V0", 1, H2D, 2), ("0P@0.0", 0, WEIGHTS, 3)
    assert copies(SharedLinks(1.0), *given).end_s == {"0V0": 4.0, "1V0": 4.0, "0P@0.0": 7.0}
    # With 1.5 bytes a second each activation has 0.75; a quarter of link 0 is left, and none of host memory.
    assert copies(SharedLinks(1.5), *given).end_s["0P@0.0"] == pytest.approx(2 / 0.75 + 3)
    # The root leaves an activation half of its link: the weights have the other half meanwhile.
    links = SharedLinks(None, roots=((0, 1),), root_bytes_per_s=1.0)
    root = copies(links, ("0V0", 0, H2D, 2), ("1V0", 1, H2D, 2), ("0G@0.0", 0, GRADIENTS, 3))
    assert root.end_s == {"0V0": 4.0, "1V0": 4.0, "0G@0.0": 3.0}


def test_rates_are_max_min_fair():
    links = SharedLinks(host_bytes_per_s=1.8, roots=((0, 1),), root_bytes_per_s=1.0)
    timeline = copies(links, ("0P@0.0", 0, H2D, 5), ("1P@1.0", 1, H2D, 5), ("2P@2.0", 2, H2D, 8))
    # The root gives half a byte per second each; the third has the 0.8 that host memory has left.
    assert timeline.end_s == pytest.approx({"0P@0.0": 10.0, "1P@1.0": 10.0, "2P@2.0": 10.0})


def test_a_root_has_each_direction_for_itself():
    links = SharedLinks(None, roots=((0, 1),), root_bytes_per_s=1.0)
    timeline = copies(links, ("0P@0.0", 0, H2D, 4), ("1G@1.0", 1, D2H, 4))
    assert timeline.end_s == {"0P@0.0": 4.0, "1G@1.0": 4.0}


def test_both_directions_of_one_link_share_it():
    links = SharedLinks(None, both_ways_bytes_per_s=1.5)
    timeline = copies(links, ("0P@0.0", 0, H2D, 3), ("0G@0.0", 0, D2H, 3), ("1P@1.0", 1, H2D, 3))
    assert timeline.end_s == pytest.approx({"0P@0.0": 4.0, "0G@0.0": 4.0, "1P@1.0": 3.0})


def test_host_work_draws_on_host_memory_and_compute_does_not():
    update = act("0U@0.0", Op.UPDATE, nbytes=12, seconds=4.0)
    queues = (
        (0, HOST, [update]),
        (0, H2D, [act("1V0", Op.RECEIVE, nbytes=2, seconds=2.0)]),
        (0, COMPUTE, [act("0F0", seconds=4.0)]),
    )
    timeline = simulate(hand_made(*queues), links=SharedLinks(host_bytes_per_s=3.0))
    # The update could use 3 bytes a second; the upload takes its 1 of them for 2 seconds.
    assert timeline.end_s == pytest.approx({"0U@0.0": 14 / 3, "1V0": 2.0, "0F0": 4.0})


def test_host_work_that_does_not_say_its_bytes_uses_all_of_host_memory():
    queues = (
        (0, HOST, [act("0U@0.0", Op.UPDATE, seconds=4.0)]),
        (0, H2D, [act("1V0", Op.RECEIVE, nbytes=2, seconds=2.0)]),
    )
    timeline = simulate(hand_made(*queues), links=SharedLinks(host_bytes_per_s=2.0))
    # Half the rate for 2 seconds.
    assert timeline.end_s == {"0U@0.0": 5.0, "1V0": 2.0}
    assert simulate(hand_made(*queues), links=SharedLinks(None)).end_s == {"0U@0.0": 4.0, "1V0": 2.0}


@settings(max_examples=30, deadline=None)
@given(problems())
def test_links_without_limits_change_nothing(problem):
    schedule = compiled(*problem)
    assert simulate(schedule, links=SharedLinks(None)) == simulate(schedule)
    assert simulate(schedule, links=SharedLinks(1e9, both_ways_bytes_per_s=2.0)) == simulate(schedule)


@settings(max_examples=30, deadline=None)
@given(problems(max_segments=4))
def test_no_limit_is_ever_exceeded(problem):
    schedule = compiled(*problem)
    timeline = simulate(schedule, links=SharedLinks(1.5, both_ways_bytes_per_s=1.2))
    moved = [a for a in schedule.actions() if a.nbytes]
    assert timeline.makespan_s >= max(
        sum(a.nbytes for a in moved) / 1.5,
        max((sum(a.nbytes for a in moved if a.gpu == gpu) / 1.2 for gpu in range(schedule.gpus)), default=0),
    ) * (1 - 1e-9)
    for action in moved:
        assert timeline.end_s[action.id] - timeline.start_s[action.id] >= action.seconds * (1 - 1e-9)
    assert timeline.makespan_s >= simulate(schedule).makespan_s * (1 - 1e-9)


def test_a_deadlock_is_named_here_too():
    queues = ((0, COMPUTE, [act("0F0", waits=("e0",), records=("e0",))]),)
    message = "deadlock: 0F0 (gpu0 compute) waits for 0F0 (gpu0 compute)"
    with pytest.raises(ScheduleError, match=f"^{re.escape(message)}$"):
        simulate(hand_made(*queues), links=SharedLinks())


def test_a_probe_says_what_is_shared():
    found = HardwareProbe(HARDWARE, 90e9, h2d_both_bytes_per_s=11e9, d2h_both_bytes_per_s=13e9)
    assert SharedLinks.of(found) == SharedLinks(90e9, both_ways_bytes_per_s=24e9)
    assert SharedLinks.of(replace(found, h2d_both_bytes_per_s=None)) == SharedLinks(90e9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host_bytes_per_s": 0.0}, "host_bytes_per_s is 0.0; give a rate above 0, or None for no limit"),
        ({"root_bytes_per_s": math.nan}, "root_bytes_per_s is nan; give a rate above 0"),
        ({"roots": ((0, 1), (1, 2)), "root_bytes_per_s": 1.0}, "GPU 1 is behind more than one root"),
        ({"roots": ((0, 1),)}, "roots are given without root_bytes_per_s, which they share"),
    ],
)
def test_refuses_links_that_cannot_be(options, message):
    with pytest.raises(InvalidArgument, match=f"^{re.escape(message)}"):
        SharedLinks(**options)
