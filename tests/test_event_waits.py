"""Events between queues."""

from __future__ import annotations

import gc
import re
from dataclasses import replace
from itertools import pairwise

import networkx
import pytest
from hypothesis import given, settings

from rpcompile.collection import collection_paused
from rpcompile.errors import ScheduleError
from rpcompile.ir import Op, Schedule, Stream
from rpcompile.ordering import ActionGraph, HappensBefore
from rpcompile.passes.insert_event_waits import InsertEventWaits
from tests.chains import act, compiled, hand_made, problems, with_transfers

H2D, COMPUTE, D2H = Stream.H2D, Stream.COMPUTE, Stream.D2H


def events(schedule: Schedule) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    result = InsertEventWaits().run(schedule)
    return {action.id: (action.waits, action.records) for action in result.actions()}


X, Y, W = "gpu0:x.s0.j0.m0", "gpu0:x.s1.j0.m0", "host:weights.s0"
G, HOST_G = "gpu0:gradients.j0.s0", "host:gradients.j0.s0"


def test_reader_waits_for_writer_and_free_for_reader():
    schedule = hand_made(
        (0, COMPUTE, [act("0F0", reads=(X,))]),
        (0, H2D, [act("0V0", writes=(X,)), act("0X0.1", Op.FREE, frees=(X,))]),
    )
    assert events(schedule) == {
        "0F0": (("e1",), ("e0",)),
        "0V0": ((), ("e1",)),
        "0X0.1": (("e0",), ()),
    }


def test_waiters_share_an_event():
    schedule = hand_made(
        (0, COMPUTE, [act("0F0", writes=(X,))]),
        (0, D2H, [act("0H0", reads=(X,))]),
        (1, COMPUTE, [act("1F0", reads=(X,))]),
    )
    assert events(schedule) == {"0F0": ((), ("e0",)), "0H0": (("e0",), ()), "1F0": (("e0",), ())}


def test_implied_needs_get_no_event():
    # 0F0 needs both copies, of which the second is queued behind the first; 0H0 needs 0V0 through 0F0.
    schedule = hand_made(
        (0, COMPUTE, [act("0F0", reads=(X, Y))]),
        (0, H2D, [act("0V0", writes=(X,)), act("0V1", writes=(Y,))]),
        (0, D2H, [act("0H0", reads=(X,), after=("0F0",))]),
    )
    assert events(schedule) == {
        "0F0": (("e1",), ("e0",)),
        "0V0": ((), ()),
        "0V1": ((), ("e1",)),
        "0H0": (("e0",), ()),
    }


def test_a_download_waits_for_the_last_update():
    schedule = hand_made(
        (0, COMPUTE, [act("0FB0", writes=(G,)), act("0FB1", reads=(G,), writes=(G,)), act("0F9")]),
        (0, D2H, [act("0G@0.0", reads=(G,), writes=(HOST_G,))]),
    )
    assert events(schedule)["0G@0.0"] == (("e0",), ())
    assert events(schedule)["0FB1"] == ((), ("e0",))


def test_a_free_waits_for_the_last_update():
    schedule = hand_made(
        (0, COMPUTE, [act("0FB0", writes=(G,)), act("0FB1", reads=(G,), writes=(G,))]),
        (0, D2H, [act("0X@0.3", Op.FREE, frees=(G,))]),
    )
    assert events(schedule) == {"0FB0": ((), ()), "0FB1": ((), ("e0",)), "0X@0.3": (("e0",), ())}


def test_the_callers_buffers_need_no_writer():
    schedule = hand_made((0, H2D, [act("0P@0.0", reads=(W,), writes=(X,))]))
    assert events(schedule) == {"0P@0.0": ((), ())}


def test_events_are_replaced_not_added():
    schedule = hand_made(
        (0, COMPUTE, [act("0F0", writes=(X,), records=("old",))]),
        (0, D2H, [act("0H0", reads=(X,), waits=("old",))]),
    )
    once = InsertEventWaits().run(schedule)
    assert once == InsertEventWaits().run(once)
    assert events(schedule) == {"0F0": ((), ("e0",)), "0H0": (("e0",), ())}


def conflicts(schedule: Schedule) -> set[tuple[int, int]]:
    """Brute force: pairs of actions that use one buffer and do not both just read it; and `after`."""
    actions = list(schedule.actions())
    pairs: set[tuple[int, int]] = set()
    for left, first in enumerate(actions):
        for right, second in enumerate(actions):
            changed = {*first.writes, *first.frees}
            if left != right and changed & {*second.reads, *second.writes, *second.frees}:
                pairs.add((min(left, right), max(left, right)))
            if first.id in second.after:
                pairs.add((min(left, right), max(left, right)))
    return pairs


@settings(max_examples=40, deadline=None)
@given(problems(max_segments=4))
def test_events_are_the_transitive_reduction(problem):
    schedule = compiled(*problem)
    graph = ActionGraph.from_events(schedule)
    edges = networkx.DiGraph()
    edges.add_nodes_from(range(len(graph.actions)))
    queues = {(number, number + 1) for number in range(len(graph.actions) - 1)}
    queues = {(left, right) for left, right in queues if graph.queue_of[left] == graph.queue_of[right]}
    between = set(zip(graph.edges.sources.tolist(), graph.edges.waiters().tolist(), strict=True))
    edges.add_edges_from(queues | between)
    # No event is implied by others ...
    reduced = set(networkx.transitive_reduction(edges).edges)
    assert {edge for edge in reduced if edge not in queues} == between
    # ... each stands for a need of its own, and all needs are met.
    closure = {number: networkx.descendants(edges, number) for number in edges}
    needs = conflicts(schedule)
    assert all((min(edge), max(edge)) in needs for edge in between)
    assert all(right in closure[left] or left in closure[right] for left, right in needs)
    by_id = {action.id: number for number, action in enumerate(graph.actions)}
    for number, found in enumerate(graph.actions):
        assert all(number in closure[by_id[name]] for name in found.after)


@settings(max_examples=40, deadline=None)
@given(problems(max_segments=4))
def test_happens_before_is_reachability(problem):
    schedule = compiled(*problem)
    graph = ActionGraph.from_events(schedule)
    order = HappensBefore(graph)
    edges = networkx.DiGraph()
    edges.add_nodes_from(range(len(graph.actions)))
    edges.add_edges_from(
        (left, right)
        for left, right in pairwise(range(len(graph.actions)))
        if graph.queue_of[left] == graph.queue_of[right]
    )
    edges.add_edges_from(zip(graph.edges.sources.tolist(), graph.edges.waiters().tolist(), strict=True))
    for number in edges:
        after = networkx.descendants(edges, number)
        assert {other for other in edges if order.before(number, other)} == after


@settings(max_examples=40, deadline=None)
@given(problems())
def test_one_event_per_source_and_nothing_else_changes(problem):
    before, after = with_transfers(*problem), compiled(*problem)
    assert [replace(action, waits=(), records=()) for action in after.actions()] == list(before.actions())
    assert all(len(action.records) <= 1 for action in after.actions())
    recorded = [event for action in after.actions() for event in action.records]
    assert set(recorded) == {event for action in after.actions() for event in action.waits}
    assert recorded == [f"e{number}" for number in range(len(recorded))]


@pytest.mark.parametrize(
    ("queues", "message"),
    [
        (
            [(0, COMPUTE, [act("0F0", reads=(X,))])],
            "0F0 uses gpu0:x.s0.j0.m0, which no action writes; run insert-transfers",
        ),
        (
            [(0, H2D, [act("0V0", writes=(X,))]), (0, COMPUTE, [act("0F0", writes=(X,))])],
            "gpu0:x.s0.j0.m0 is written from scratch more than once: by 0V0 and 0F0",
        ),
        (
            [
                (0, H2D, [act("0V0", writes=(X,)), act("0V1", reads=(X,), writes=(X,))]),
                (0, COMPUTE, [act("0F0", reads=(X,), writes=(X,))]),
            ],
            "gpu0:x.s0.j0.m0 is updated in place from several queues, in no order: 0V1 and 0F0",
        ),
        (
            [(0, COMPUTE, [act("0F0", after=("7F7",))])],
            "0F0 must come after 7F7, which the schedule does not have",
        ),
        (
            [(0, COMPUTE, [act("0F0", reads=(X,)), act("0F1", writes=(X,))])],
            "deadlock: 0F0 (gpu0 compute) waits for 0F1 (gpu0 compute), "
            "which is queued behind 0F0 (gpu0 compute)",
        ),
        (
            [
                (0, COMPUTE, [act("0F0", reads=(X,)), act("0F1"), act("0F2", writes=(Y,))]),
                (1, H2D, [act("1V0", reads=(Y,)), act("1V1", writes=(X,))]),
            ],
            "deadlock: 0F0 (gpu0 compute) waits for 1V1 (gpu1 h2d), which is queued behind 1V0 (gpu1 h2d), "
            "which waits for 0F2 (gpu0 compute), which is queued behind 0F0 (gpu0 compute)",
        ),
    ],
)
def test_refuses_what_has_no_order(queues, message):
    with pytest.raises(ScheduleError, match=f"^{re.escape(message)}$"):
        InsertEventWaits().run(hand_made(*queues))


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_as_it_was(enabled):
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with collection_paused():
            assert not gc.isenabled()
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()
