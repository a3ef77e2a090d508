"""Which weights the uploads of chained iterations find, against runs in which each comes first or last."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from rpcompile.errors import ScheduleError
from rpcompile.event_loop import Events, chain_events
from rpcompile.ir import Schedule, TiedWeight
from rpcompile.ordering import Edges
from rpcompile.passes.dispatch_round_robin import DispatchRoundRobin
from rpcompile.passes.insert_event_waits import InsertEventWaits
from rpcompile.passes.insert_transfers import InsertTransfers
from rpcompile.passes.insert_updates import InsertUpdates
from rpcompile.passes.lay_out_dispatch import LayOutDispatch
from rpcompile.verify import verify_schedule
from rpcompile.verify_iterations import check_versions, versions_seen
from tests.chains import action, chain, edit, partition
from tests.dispatches import drawn
from tests.versions_oracle import runs, wanted

SHARED = TiedWeight("embedding", (0, 2), 2, 2)
TIED = chain(3, tied=(SHARED,))
STAGES = partition("F0-0", "F1-1", "FB2-2", "B1-1", "B0-0")
ITERATIONS = 4


def scheduled(mode: str, updates: bool, gpus: int = 2, rotate: int = 0, seed: int | None = None) -> Schedule:
    dispatch = replace(DispatchRoundRobin(gpus, 2).run(STAGES), rotate=rotate)
    if seed is not None:
        dispatch = drawn(TIED, STAGES, gpus, 3, mode, seed)
    schedule = InsertTransfers(TIED).run(LayOutDispatch(TIED, STAGES, mode).run(dispatch))
    return InsertEventWaits().run(InsertUpdates(TIED).run(schedule) if updates else schedule)


CASES = {
    "the caller steps": scheduled("async", updates=False, gpus=3),
    "shifted": scheduled("async", updates=False, rotate=1),
    # Iterations that share no GPU are ordered by their updates alone.
    "more GPUs than work": scheduled("async", updates=False, gpus=8, rotate=5),
    "with updates": scheduled("async", updates=True),
    "replicas": scheduled("async", updates=False, seed=5),
    "replicas with updates": scheduled("async", updates=True, seed=6),
    "synchronous": scheduled("sync", updates=True),
}


def chained(schedule: Schedule) -> Events:
    return chain_events(schedule, ITERATIONS, schedule.mode, schedule.rotate)


def refusal(events: Events, tied: tuple[TiedWeight, ...] = (SHARED,)) -> str | None:
    try:
        check_versions(events, tied, events.schedule.mode)
    except ScheduleError as error:
        return str(error)
    return None


def sources_of(events: Events) -> list[list[int]]:
    return [events.edges.of(number) for number in range(len(events.edges.starts) - 1)]


def with_sources(events: Events, sources: list[list[int]]) -> Events:
    flat = np.array([source for found in sources for source in found], np.int32)
    return replace(events, edges=Edges.of_counts(flat, np.array([*map(len, sources)])))


def without_edges(events: Events, choose: random.Random, across: bool, most: int) -> Events:
    """Some edges between queues removed, of one iteration or between two."""
    count, sources = len(events.actions), sources_of(events)
    edges = [(n, s) for n, found in enumerate(sources) for s in found if (n // count != s // count) == across]
    for number, source in choose.sample(edges, choose.randint(1, most)):
        sources[number] = [other for other in sources[number] if other != source]
    return with_sources(events, sources)


# ---------------------------------------------------------------- what is proved


@pytest.mark.parametrize("case", CASES)
def test_every_upload_finds_the_weights_that_design_asks_for(case: str) -> None:
    events = chained(CASES[case])
    assert runs(events, (SHARED,)) == wanted(events, (SHARED,))
    assert refusal(events) is None
    verify_schedule(events.schedule, TIED, STAGES)


@pytest.mark.parametrize("across", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_what_mutants_may_find_is_what_their_runs_find(case: str, across: bool) -> None:
    events, choose = chained(CASES[case]), random.Random(case)
    unharmed, refused = runs(events, (SHARED,)), 0
    for number in range(8):
        mutant = without_edges(events, choose, across, most=1 if number < 4 else 12)
        expected = runs(mutant, (SHARED,))
        seen = [*versions_seen(mutant, (SHARED,), mutant.schedule.mode)]
        assert {(s.upload, s.weight): (s.least, s.most) for s in seen} == expected
        message = refusal(mutant)
        assert (message is None) == (expected == unharmed), message
        refused += message is not None
    assert refused


# ---------------------------------------------------------------- messages


def lacking(events: Events, waiter: str, source: str) -> Events:
    """Without one edge of a later iteration."""
    names, sources = events.names(), sources_of(events)
    number, lost = names.index(waiter), names.index(source)
    assert lost in sources[number]
    sources[number] = [other for other in sources[number] if other != lost]
    return with_sources(events, sources)


def test_an_upload_that_does_not_wait_for_the_update_of_what_it_shares() -> None:
    """Segment 0's upload of the third iteration needs segment 2's gradient of the first."""
    events = chained(replace(CASES["the caller steps"], tied=()))
    assert refusal(events) == (
        "0P@0.0#2 may upload embedding after 0 updates, where mode 'async' asks for those after 1: "
        "0P@0.0#2 does not wait for 2G@2.2"
    )
    assert refusal(events, tied=()) is None


def test_an_upload_that_does_not_wait_for_its_own_update() -> None:
    events = lacking(chained(CASES["with updates"]), "0P@0.0#2", "4U@4.0")
    assert refusal(events) == (
        "0P@0.0#2 may upload the weights of segment 0 after 0 updates, where mode 'async' asks for those "
        "after 1: 0P@0.0#2 does not wait for 4U@4.0"
    )


def test_an_upload_moved_over_an_update() -> None:
    """The upload of the backward stage comes behind the update of its segment, in the second iteration."""
    schedule = CASES["with updates"]
    events = chained(schedule)
    names, sources = events.names(), sources_of(events)
    upload, update = names.index("4P@4.0#1"), names.index("4U@4.0#1")
    sources[update] = []
    sources[upload] = [*sources[upload], update]
    message = refusal(with_sources(events, sources))
    assert message is not None
    assert "4P@4.0#1 may upload the weights of segment 0 after 2 updates" in message
    assert message.endswith("asks for those after 0: 4U@4.0#1 does not wait for 4P@4.0#1")
    moved = edit(schedule, "4U@4.0", waits=())
    with pytest.raises(ScheduleError, match=r"4U@4\.0 does not wait for"):
        verify_schedule(moved, TIED, STAGES)


def test_a_schedule_that_leaves_out_what_is_shared_is_refused() -> None:
    schedule = replace(CASES["the caller steps"], tied=())
    with pytest.raises(ScheduleError, match=r"0P@0\.0#2 may upload embedding after 0 updates"):
        verify_schedule(schedule, TIED, STAGES)


def test_the_update_of_what_is_shared_comes_with_the_first_segment() -> None:
    schedule = CASES["with updates"]
    assert "host:updated.s0" in action(schedule, "4U@4.0").writes
    events = chained(replace(schedule, tied=()))
    assert refusal(events) is None  # segment 2's own update comes behind that of segment 0


@pytest.mark.parametrize("frozen", [0, 2])
@pytest.mark.parametrize(("mode", "updates"), [("async", False), ("async", True), ("sync", True)])
def test_a_frozen_tied_tensor_is_not_changed_by_what_its_segments_train(
    mode: str, updates: bool, frozen: int
) -> None:
    # One of the segments that read it trains other weights; the other trains nothing.
    shared = TiedWeight("embedding", (0, 2), 2, 0)
    frozen_chain = chain(3, {frozen: {"gradient_bytes": 0}}, (shared,))
    laid_out = LayOutDispatch(frozen_chain, STAGES, mode).run(DispatchRoundRobin(2, 2).run(STAGES))
    schedule = InsertTransfers(frozen_chain).run(laid_out)
    schedule = InsertUpdates(frozen_chain).run(schedule) if updates else schedule
    verify_schedule(InsertEventWaits().run(schedule), frozen_chain, STAGES)
