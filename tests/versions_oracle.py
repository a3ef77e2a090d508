"""Which weights the uploads of chained iterations find, by letting each come first and last: an oracle."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import networkx

from rpcompile.ir import Op

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rpcompile.event_loop import Events
    from rpcompile.ir import TiedWeight

_SETS = {"sync": 1, "async": 2}  # of weights on the host, which updates write and iterations read in turn

Seen = dict[tuple[int, str], tuple[int, int]]
"""(Upload, what it reads) -> updates that this has gone through, at least and at most."""


def wanted(events: Events, tied: Sequence[TiedWeight]) -> Seen:
    """What DESIGN asks for: weights after i updates in iteration i, asynchronously after max(i - 1, 0)."""
    behind = _SETS[events.schedule.mode] - 1
    version = [max(0, i - behind) for i in range(events.iterations)]
    return {
        key: (version[key[0] // len(events.actions)],) * 2  # type: ignore[misc]
        for key in runs(events, tied)
    }


def runs(events: Events, tied: Sequence[TiedWeight]) -> Seen:
    """What each upload finds if nothing runs before it that need not, and if everything does that can."""
    count, sets = len(events.actions), _SETS[events.schedule.mode]
    graph = networkx.DiGraph()
    graph.add_nodes_from(range(count * events.iterations))
    for queue in events.order:
        graph.add_edges_from(pairwise(queue.tolist()))
    graph.add_edges_from(zip(events.edges.sources.tolist(), events.edges.waiters().tolist(), strict=True))
    every = set(graph)
    found: Seen = {}
    for upload in every:
        read = events.actions[upload % count]
        if read.op is not Op.PREFETCH:
            continue
        segment, iteration = int(read.reads[0].partition(".s")[2]), upload // count
        soon = networkx.ancestors(graph, upload)
        late = every - networkx.descendants(graph, upload) - {upload}
        for weight, parts in _changing(events, tied, segment).items():
            mine = max(0, iteration - sets + 1) % sets
            over = [all(part + j * count in soon for part in parts) for j in range(events.iterations)]
            may = [all(part + j * count in late for part in parts) for j in range(events.iterations)]
            # Updates come one after another: behind one that cannot have begun, none can.
            may = [all(may[: j + 1]) or over[j] for j in range(events.iterations)]
            found[upload, weight] = _content(over, sets, mine), _content(may, sets, mine)
    return found


def _content(updated: list[bool], sets: int, mine: int) -> int:
    """What is in one of the sets of weights, as the number of updates behind it, after some updates."""
    found = [0] * sets
    for j, done in enumerate(updated):
        if done:
            found[(j + 1) % sets] = j + 1
    return found[mine]


def _changing(events: Events, tied: Sequence[TiedWeight], segment: int) -> dict[str, list[int]]:
    """What an upload of a segment reads that changes -> what changes it, in the first iteration."""
    updates = any(action.op is Op.UPDATE for action in events.actions)
    ops = {Op.UPDATE} if updates else {Op.GRADIENT, Op.SUM}

    def made(*segments: int) -> list[int]:
        ends = tuple(f".s{other}" for other in segments)
        return [n for n, a in enumerate(events.actions) if a.op in ops and a.writes[0].endswith(ends)]

    found = {f"the weights of segment {segment}": made(segment)}
    for each in tied:
        if segment in each.segments:
            found[each.name] = made(min(each.segments)) if updates else made(*each.segments)
    return {weight: parts for weight, parts in found.items() if parts}
