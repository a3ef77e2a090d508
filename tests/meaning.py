"""What a schedule computes, found by running it on symbols: the oracle for the verifier."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import networkx

from rpcompile import buffers
from rpcompile.ir import COMPUTE_OPS, Op

if TYPE_CHECKING:
    from rpcompile.ir import Action, Schedule

_RESULTS = ("gradients", "state", "loss", "updated", "norm")


class Meaningless(Exception):
    """The schedule deadlocks, races, leaks, or uses what is not there."""


def meaning(schedule: Schedule) -> dict[str, object]:
    """Host buffer -> the formula of its content when the schedule is over.

    Two actions that touch one buffer, and do not both read it, must be ordered by queues and events.
    Then every order that those allow computes the same, so one of them is executed. Slots (`after`)
    have to be ordered as well.

    Raises:
        Meaningless: The reason.
    """
    actions = {action.id: action for action in schedule.actions()}
    order = _order(schedule, actions)
    store: dict[str, object] = {}
    for buffer in schedule.buffers:
        name = buffers.parse(buffer)
        if name.space == buffers.HOST and name.kind in ("weights", "inputs"):
            store[buffer] = (name.kind, name.segment, name.microbatch)
    owned = dict(store)
    for id in order:
        _execute(actions[id], store)
    if any(store.get(buffer) != value for buffer, value in owned.items()):
        raise Meaningless("the caller's buffers changed")
    results = {buffer: value for buffer, value in store.items() if buffer not in owned}
    for buffer in results:
        name = buffers.parse(buffer)
        if name.space != buffers.HOST or name.kind not in _RESULTS:
            raise Meaningless(f"{buffer} is never freed")
    return results


def _order(schedule: Schedule, actions: dict[str, Action]) -> list[str]:
    graph = networkx.DiGraph()
    recorders = {event: action.id for action in actions.values() for event in action.records}
    graph.add_nodes_from(actions)
    for queue in schedule.queues:
        graph.add_edges_from(pairwise(action.id for action in queue.actions))
    for action in actions.values():
        graph.add_edges_from((recorders[event], action.id) for event in action.waits)
    if not networkx.is_directed_acyclic_graph(graph):
        raise Meaningless("deadlock")
    after = {name: networkx.descendants(graph, name) for name in graph}
    users: dict[str, list[tuple[str, bool]]] = {}
    for action in actions.values():
        changes = {*action.writes, *action.frees}
        for buffer in {*action.reads, *changes}:
            users.setdefault(buffer, []).append((action.id, buffer in changes))
        if any(action.id not in after[name] for name in action.after):
            raise Meaningless(f"{action.id} does not wait for its slot")
    for buffer, found in users.items():
        for place, (left, left_changes) in enumerate(found):
            for right, right_changes in found[:place]:
                if (left_changes or right_changes) and right not in after[left] and left not in after[right]:
                    raise Meaningless(f"{left} and {right} race for {buffer}")
    return list(networkx.topological_sort(graph))


def _execute(action: Action, store: dict[str, object]) -> None:
    for buffer in (*action.reads, *action.frees):
        if buffer not in store:
            raise Meaningless(f"{action.id} uses {buffer}, which is not there")
    if action.op is Op.FREE:
        for buffer in action.frees:
            del store[buffer]
        return
    values = [store[buffer] for buffer in action.reads]
    if action.op in COMPUTE_OPS or action.op in (Op.SUM, Op.UPDATE):
        # Operands are told apart by what they are, not by where they lie or in whose name.
        operands = frozenset(
            (buffers.parse(buffer)._replace(space="", job=None), value)
            for buffer, value in zip(action.reads, values, strict=True)
            if buffer not in action.writes or buffers.parse(buffer).kind != "gradients"
        )
        made = (action.op, action.stage, action.microbatch, operands)
        for buffer in action.writes:
            if buffer in store and buffer not in action.reads:
                raise Meaningless(f"{action.id} overwrites {buffer}")
        for buffer in action.writes:
            what = buffers.parse(buffer)._replace(space="", job=None)
            store[buffer] = (hash((what, made)), hash(store.get(buffer)))
        return
    for buffer, value in zip(action.writes, values, strict=True):
        if buffer in store:
            raise Meaningless(f"{action.id} overwrites {buffer}")
        store[buffer] = value
