"""Thousands of mutants of valid schedules: each is refused by name, or proved to mean the same.

A mutant that the verifier accepts must compute the same results whatever the timing (`tests/meaning.py`)
and stay within the memory that the original was given, which is as little as it can live with. Where
iterations overlap, their uploads must find the same weights as well (`tests/versions_oracle.py`).

RPCOMPILE_MUTANTS sets how many there are of each schedule.
"""

from __future__ import annotations

import os
import random
from dataclasses import replace

import pytest

from rpcompile.errors import ScheduleError
from rpcompile.event_loop import chain_events
from rpcompile.ir import Action, GpuKind, Job, Op, Partition, Schedule, SegmentChain, Stream, TiedWeight
from rpcompile.memory_bound import gpu_memory_bounds
from rpcompile.passes.dispatch_round_robin import DispatchRoundRobin
from rpcompile.passes.insert_event_waits import InsertEventWaits
from rpcompile.passes.insert_transfers import InsertTransfers
from rpcompile.passes.insert_updates import InsertUpdates
from rpcompile.passes.lay_out_dispatch import LayOutDispatch
from rpcompile.simulate import simulate
from rpcompile.verify import verify_schedule
from rpcompile.verify_iterations import memory_limits
from tests.chains import attention, chain, partition, rewrite
from tests.dispatches import drawn, gpipe, one_forward_one_backward, two_rounds
from tests.meaning import Meaningless, meaning
from tests.versions_oracle import runs, wanted

FOLDED = partition("F0-0", "F1-1", "FB2-2", "B1-1", "B0-0")
UNEVEN = partition("F0-1", "FB2-2", "B1-1", "B0-0")
FORWARD = partition("F0-0", "F1-1", "F2-2")
# Input, changed buffers, a segment without weights: what makes operands differ.
RICH = chain(
    3,
    {
        1: {"state_bytes": 1, "inputs": ("mask",), "input_bytes": 1},
        2: {"inputs": ("labels",), "input_bytes": 3},
    },
)
PLAIN = chain(3, {1: {"weight_bytes": 0, "gradient_bytes": 0}})
ATTENTIVE = chain(3, {index: {"attention": attention(), "offloads": True} for index in range(2)})
TIED = chain(3, tied=(TiedWeight("embedding", (0, 2), 2, 2),))
# The second GPU is twice as fast, and may hold as much as it needs and no more (`valid`).
MIXED = replace(
    PLAIN,
    kinds=tuple(GpuKind(PLAIN.hardware, (2.0 / speed,) * 3, (3.0 / speed,) * 3) for speed in (1, 2)),
    kind_of=(0, 1),
)
SHIFTED = replace(DispatchRoundRobin(3, 2).run(FOLDED), rotate=2)
CASES = {
    "round_robin": (RICH, UNEVEN, DispatchRoundRobin(2, 2).run(UNEVEN), "sync", {}),
    "one gpu": (RICH, UNEVEN, DispatchRoundRobin(1, 2).run(UNEVEN), "sync", {}),
    "evaluation": (RICH, FORWARD, DispatchRoundRobin(2, 3).run(FORWARD), "forward", {}),
    "gpipe": (PLAIN, FOLDED, gpipe(FOLDED, 3, 3), "sync", {}),
    "1f1b": (RICH, FOLDED, one_forward_one_backward(FOLDED, 3, 3), "sync", {}),
    "two rounds": (PLAIN, FOLDED, two_rounds(FOLDED, 3, 4), "sync", {}),
    "replicas": (PLAIN, FOLDED, drawn(PLAIN, FOLDED, 2, 4, "sync", 1), "sync", {}),
    "replicas over the host": (
        RICH,
        FOLDED,
        drawn(RICH, FOLDED, 2, 4, "sync", 2),
        "sync",
        {"waiting_bytes": 0},
    ),
    "replicas and updates": (PLAIN, UNEVEN, drawn(PLAIN, UNEVEN, 2, 4, "sync", 3), "sync", {"clip": True}),
    "attention outputs": (ATTENTIVE, UNEVEN, DispatchRoundRobin(2, 2).run(UNEVEN), "sync", {}),
    "replicas of attention": (ATTENTIVE, FOLDED, drawn(ATTENTIVE, FOLDED, 2, 3, "sync", 4), "sync", {}),
    "mixed gpus": (MIXED, FOLDED, drawn(MIXED, FOLDED, 2, 3, "sync", 1), "sync", {"clip": False}),
    "asynchronous": (TIED, FOLDED, SHIFTED, "async", {}),
    "asynchronous replicas": (TIED, UNEVEN, drawn(TIED, UNEVEN, 2, 3, "async", 5), "async", {"clip": False}),
}
MUTANTS_A_CASE = int(os.environ.get("RPCOMPILE_MUTANTS", "209"))
ITERATIONS = 4


def valid(name: str) -> tuple[Schedule, SegmentChain, Partition]:
    """A schedule, and a partition that allows it no byte more than it may need."""
    chain, stages, dispatch, mode, options = CASES[name]
    schedule = LayOutDispatch(chain, stages, mode, options.get("waiting_bytes")).run(dispatch)
    schedule = InsertTransfers(chain).run(schedule)
    if "clip" in options:
        schedule = InsertUpdates(chain, clip=options["clip"]).run(schedule)
    schedule = InsertEventWaits().run(schedule)
    peaks = gpu_memory_bounds(schedule)
    if mode == "async":
        peaks = tuple(map(max, peaks, simulate(schedule, iterations=ITERATIONS).gpu_peak_bytes))
    kinds = tuple(
        replace(kind, hardware=replace(kind.hardware, usable_bytes=peak))
        for kind, peak in zip(chain.kinds, peaks, strict=False)
    )
    return schedule, replace(chain, kinds=kinds), replace(stages, memory_limit_bytes=max(peaks))


# --------------------------------------------------------------------------- mutations
# Each changes one thing, and returns the mutant and the actions that it touched.

Mutation = tuple[Schedule, list[Action]]


def replaced(schedule: Schedule, old: Action, *new: Action) -> Schedule:
    return rewrite(schedule, lambda found: new if found is old else [found])


def an_action(schedule: Schedule, choose: random.Random) -> Action:
    return choose.choice(list(schedule.actions()))


def remove_action(schedule, choose) -> Mutation:
    found = an_action(schedule, choose)
    return replaced(schedule, found), [found]


def repeat_action(schedule, choose) -> Mutation:
    found = an_action(schedule, choose)
    copy = replace(found, id=f"{found.id.split('.')[0]}.99", records=())
    return replaced(schedule, found, found, copy), [found, copy]


def move_action(schedule, choose) -> Mutation:
    """Touched are the actions that it is moved past, too."""
    found = an_action(schedule, choose)
    source = next(number for number, queue in enumerate(schedule.queues) if found in queue.actions)
    target = source if choose.random() < 0.8 else choose.randrange(len(schedule.queues))
    queues = [list(queue.actions) for queue in schedule.queues]
    old = queues[source].index(found)
    queues[source].remove(found)
    new = choose.randint(0, len(queues[target]))
    passed = queues[source][min(old, new) : max(old, new)] if target == source else []
    queues[target].insert(new, found)
    pairs = zip(schedule.queues, queues, strict=True)
    mutant = replace(schedule, queues=tuple(replace(q, actions=tuple(actions)) for q, actions in pairs))
    return mutant, [found, *passed]


def swap_neighbours(schedule, choose) -> Mutation:
    queue = choose.choice([queue for queue in schedule.queues if len(queue.actions) > 1])
    place = choose.randrange(len(queue.actions) - 1)
    left, right = queue.actions[place : place + 2]
    swapped = {left.id: right, right.id: left}
    return rewrite(schedule, lambda found: [swapped.get(found.id, found)]), [left, right]


def remove_wait(schedule, choose) -> Mutation:
    found = choose.choice([found for found in schedule.actions() if found.waits])
    lost = choose.choice(found.waits)
    changed = replace(found, waits=tuple(event for event in found.waits if event != lost))
    return replaced(schedule, found, changed), [found]


def redirect_wait(schedule, choose) -> Mutation:
    found = choose.choice([found for found in schedule.actions() if found.waits])
    events = [event for action in schedule.actions() for event in action.records]
    waits = list(found.waits)
    waits[choose.randrange(len(waits))] = choose.choice(events)
    return replaced(schedule, found, replace(found, waits=tuple(waits))), [found]


def add_wait(schedule, choose) -> Mutation:
    found = an_action(schedule, choose)
    source = choose.choice([found for found in schedule.actions() if found.records])
    changed = replace(found, waits=(*found.waits, *source.records))
    return replaced(schedule, found, changed), [found, source]


def remove_record(schedule, choose) -> Mutation:
    found = choose.choice([found for found in schedule.actions() if found.records])
    return replaced(schedule, found, replace(found, records=())), [found]


def move_record(schedule, choose) -> Mutation:
    found = choose.choice([found for found in schedule.actions() if found.records])
    target = choose.choice([other for other in schedule.actions() if other is not found])
    changed = {
        found.id: replace(found, records=()),
        target.id: replace(target, records=(*target.records, *found.records)),
    }
    return rewrite(schedule, lambda action: [changed.get(action.id, action)]), [found, target]


def repeat_record(schedule, choose) -> Mutation:
    found = choose.choice([found for found in schedule.actions() if found.records])
    target = an_action(schedule, choose)
    changed = replace(target, records=(*target.records, *found.records))
    return replaced(schedule, target, changed), [found, target]


def redirect_operand(schedule, choose) -> Mutation:
    found = an_action(schedule, choose)
    field = choose.choice([name for name in ("reads", "writes", "frees") if getattr(found, name)])
    operands = list(getattr(found, field))
    place = choose.randrange(len(operands))
    names = sorted(schedule.buffers)
    if choose.random() < 0.7:  # most mistakes mix up things of one kind
        kind = operands[place].partition(":")[2].partition(".")[0]
        names = [name for name in names if f":{kind}." in name] or names
    operands[place] = choose.choice(names)
    return replaced(schedule, found, replace(found, **{field: tuple(operands)})), [found]


def remove_operand(schedule, choose) -> Mutation:
    found = an_action(schedule, choose)
    field = choose.choice([name for name in ("reads", "writes", "frees") if getattr(found, name)])
    operands = list(getattr(found, field))
    del operands[choose.randrange(len(operands))]
    return replaced(schedule, found, replace(found, **{field: tuple(operands)})), [found]


def add_operand(schedule, choose) -> Mutation:
    found = an_action(schedule, choose)
    field = choose.choice(("reads", "writes", "frees"))
    more = (*getattr(found, field), choose.choice(sorted(schedule.buffers)))
    return replaced(schedule, found, replace(found, **{field: more})), [found]


def swap_operands(schedule, choose) -> Mutation:
    """Two actions of one op take each other's place in everything but their names."""
    found = an_action(schedule, choose)
    twin = choose.choice([other for other in schedule.actions() if other.op is found.op])
    field = choose.choice(("reads", "writes", "frees", "after"))
    changed = {
        found.id: replace(found, **{field: getattr(twin, field)}),
        twin.id: replace(twin, **{field: getattr(found, field)}),
    }
    return rewrite(schedule, lambda action: [changed.get(action.id, action)]), [found, twin]


def change_field(schedule, choose) -> Mutation:
    found = an_action(schedule, choose)
    new = choose.choice(
        [
            {"gpu": choose.randrange(schedule.gpus + 1)},
            {"stage": choose.randrange(6)},
            {"job": choose.randrange(len(schedule.jobs) + 1)},
            {"microbatch": choose.choice([None, *range(schedule.microbatches + 1)])},
            {"op": choose.choice(list(Op))},
            {"stream": choose.choice(list(Stream))},
            {"nbytes": found.nbytes + choose.choice((-1, 1))},
            {"workspace_bytes": found.workspace_bytes + 1000},
        ]
    )
    return replaced(schedule, found, replace(found, **new)), [found]


def change_after(schedule, choose) -> Mutation:
    found = an_action(schedule, choose)
    after = (*found.after, an_action(schedule, choose).id)
    return replaced(schedule, found, replace(found, after=after)), [found]


def change_job(schedule, choose) -> Mutation:
    place = choose.randrange(len(schedule.jobs))
    job: Job = schedule.jobs[place]
    new = choose.choice(
        [
            {"gpu": choose.randrange(schedule.gpus)},
            {"stage": choose.randrange(len(schedule.jobs))},
            {"microbatches": job.microbatches[1:]},
            {"microbatches": (*job.microbatches, choose.randrange(schedule.microbatches))},
            {"index": choose.randrange(len(schedule.jobs))},
        ]
    )
    jobs = list(schedule.jobs)
    jobs[place] = replace(job, **new)
    return replace(schedule, jobs=tuple(jobs)), [a for a in schedule.actions() if a.job == place]


def change_size(schedule, choose) -> Mutation:
    buffer = choose.choice(sorted(schedule.buffers))
    sizes = {**schedule.buffers, buffer: schedule.buffers[buffer] + 1}
    users = [a for a in schedule.actions() if buffer in (*a.reads, *a.writes, *a.frees)]
    return replace(schedule, buffers=sizes), users


def change_iterations(schedule, choose) -> Mutation:
    """How iterations follow one another; touched is all that moves weights to and fro."""
    new = choose.choice(
        [
            {"rotate": choose.randint(-1, schedule.gpus)},
            {"tied": choose.choice([(), ((0, 1),), ((0, 2),), ((1, 2), (0, 2))])},
        ]
    )
    moves = [found for found in schedule.actions() if found.op in (Op.PREFETCH, Op.GRADIENT, Op.UPDATE)]
    return replace(schedule, **new), moves


MUTATIONS = (
    remove_action,
    repeat_action,
    move_action,
    swap_neighbours,
    remove_wait,
    redirect_wait,
    add_wait,
    remove_record,
    move_record,
    repeat_record,
    redirect_operand,
    remove_operand,
    add_operand,
    swap_operands,
    change_field,
    change_after,
    change_job,
    change_size,
    change_iterations,
)


# --------------------------------------------------------------------------- the verdict


def refusal(schedule: Schedule, chain: SegmentChain, stages: Partition) -> str | None:
    try:
        verify_schedule(schedule, chain, stages)
    except ScheduleError as error:
        return str(error)
    return None


def content(schedule: Schedule) -> tuple[object, ...]:
    return schedule.queues, schedule.jobs, schedule.buffers, schedule.rotate, schedule.tied


def is_named(message: str, touched: list[Action], schedule: Schedule) -> bool:
    """Whether a message has the id, an operand or an event of what was changed, or its place."""
    clues: set[str] = set()
    for found in touched:
        clues |= {found.id, *found.reads, *found.writes, *found.frees}
        clues |= {f"event {event}" for event in (*found.records, *found.waits)}
        clues |= {f"job {found.job} ", f"job {found.job}:", f"microbatch {found.microbatch} "}
    # Memory is short by the sum of what is there, and a shift moves all: no single instruction is to blame.
    clues |= {"at its peak, over the limit", "where iterations overlap, over the limit", "shifted by"}
    return any(clue in message for clue in clues)


def finds_its_weights(schedule: Schedule, chain: SegmentChain) -> bool:
    """Whether every upload of chained iterations finds what DESIGN asks for, first or last as it may come."""
    events = chain_events(schedule, ITERATIONS, "async", schedule.rotate)
    return runs(events, chain.tied) == wanted(events, chain.tied)


def within_memory(schedule: Schedule, chain: SegmentChain, stages: Partition, choose: random.Random) -> bool:
    limits = memory_limits(chain, stages, schedule.gpus)
    for _ in range(3):
        timed = rewrite(schedule, lambda a: [replace(a, seconds=choose.choice([0, 0.1, 1, 5, 50]))])
        peaks = simulate(timed).gpu_peak_bytes
        if any(peak > limit for peak, limit in zip(peaks, limits, strict=True)):
            return False
    return True


@pytest.mark.parametrize("case", CASES)
def test_every_mutant_is_refused_by_name_or_means_the_same(case):
    schedule, chain, stages = valid(case)
    assert refusal(schedule, chain, stages) is None
    expected = meaning(schedule)
    choose = random.Random(case)
    refused, same = 0, 0
    for number in range(MUTANTS_A_CASE):
        mutate = MUTATIONS[number % len(MUTATIONS)]
        mutant, touched = mutate(schedule, choose)
        if content(mutant) == content(schedule):
            continue
        message = refusal(mutant, chain, stages)
        label = f"{mutate.__name__} of {' '.join(found.id for found in touched)}: {message}"
        if message is not None:
            refused += 1
            assert is_named(message, touched, mutant), label
            continue
        same += 1
        try:
            assert meaning(mutant) == expected, label
        except Meaningless as error:
            raise AssertionError(f"{label} {error}") from error
        assert within_memory(mutant, chain, stages, choose), label
        assert mutant.mode != "async" or finds_its_weights(mutant, chain), label
    assert refused > 3 * same > 0


@pytest.mark.parametrize("case", CASES)
def test_every_single_wait_is_needed(case):
    schedule, chain, stages = valid(case)
    recorder = {event: action.id for action in schedule.actions() for event in action.records}
    for found in schedule.actions():
        for event in found.waits:
            changed = replace(found, waits=tuple(other for other in found.waits if other != event))
            message = refusal(replaced(schedule, found, changed), chain, stages) or ""
            assert message.startswith(f"{found.id} does not wait for {recorder[event]}, ")


@pytest.mark.parametrize("gpu", [0, 1])
def test_each_gpu_of_its_own_kind_has_its_own_limit(gpu):
    schedule, chain, stages = valid("mixed gpus")
    peak = chain.kinds[gpu].hardware.usable_bytes
    kinds = [*chain.kinds]
    kinds[gpu] = replace(kinds[gpu], hardware=replace(kinds[gpu].hardware, usable_bytes=peak - 1))
    message = refusal(schedule, replace(chain, kinds=tuple(kinds)), stages) or ""
    assert message.startswith(f"gpu{gpu} may need {peak} bytes at its peak, over the limit of {peak - 1};")
