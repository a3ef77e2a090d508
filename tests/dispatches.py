"""Dispatches of every kind: random ones, and the policies that pipelines are known for."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from hypothesis import strategies as st

from rpcompile.ir import Dispatch, Job, Partition, Schedule, SegmentChain, StageKind
from rpcompile.passes.insert_event_waits import InsertEventWaits
from rpcompile.passes.insert_transfers import InsertTransfers
from rpcompile.passes.lay_out_dispatch import LayOutDispatch
from tests.chains import problems

if TYPE_CHECKING:
    from collections.abc import Iterable

Step = tuple[int, int]  # stage, microbatch


def of_steps(
    policy: str, gpus: int, microbatches: int, steps: Iterable[tuple[int, int, int, int]]
) -> Dispatch:
    """A dispatch from (gpu, stage, microbatch, replica) in an order in which they can run.

    What has stage and replica in common is one job; jobs are numbered by their first step.
    """
    numbers: dict[tuple[int, int], int] = {}
    runs: dict[int, list[int]] = {}
    gpu_of: dict[int, int] = {}
    order: list[list[tuple[int, int]]] = [[] for _ in range(gpus)]
    for gpu, stage, microbatch, replica in steps:
        job = numbers.setdefault((stage, replica), len(numbers))
        assert gpu_of.setdefault(job, gpu) == gpu
        runs.setdefault(job, []).append(microbatch)
        order[gpu].append((job, microbatch))
    jobs = tuple(
        Job(number, stage, 0, replica, tuple(runs[number]), gpu_of[number])
        for (stage, replica), number in numbers.items()
    )
    return Dispatch(policy, gpus, microbatches, jobs, tuple(map(tuple, order)))


def drawn(
    chain: SegmentChain, stages: Partition, gpus: int, microbatches: int, mode: str, seed: int
) -> Dispatch:
    """Any dispatch: random replicas on random GPUs, in a random order that data allows.

    Runs of one job are likely, so that jobs come one after another as well as in turns.
    """
    choose = random.Random(seed)
    replica_of: dict[Step, int] = {}
    gpu_of: dict[tuple[int, int], int] = {}
    for stage in stages.stages:
        keeps_state = any(chain.segments[segment].state_bytes for segment in stage.segments)
        whole = keeps_state and stage.kind is not StageKind.B and mode == "sync"
        replicas = 1 if whole else choose.randint(1, min(3, microbatches))
        for microbatch in range(microbatches):
            replica = choose.randrange(replicas)
            replica_of[stage.index, microbatch] = replica
            gpu_of.setdefault((stage.index, replica), choose.randrange(gpus))
    stickiness, last = choose.random(), (0, 0)
    ready: list[Step] = [(0, microbatch) for microbatch in range(microbatches)]
    steps: list[tuple[int, int, int, int]] = []
    while ready:
        again = [step for step in ready if (step[0], replica_of[step]) == last]
        step = choose.choice(again if again and choose.random() < stickiness else ready)
        ready.remove(step)
        last = (step[0], replica_of[step])
        steps.append((gpu_of[last], *step, last[1]))
        if step[0] + 1 < len(stages.stages):
            ready.append((step[0] + 1, step[1]))
    return of_steps("random", gpus, microbatches, steps)


@st.composite
def dispatched(draw: st.DrawFn, mode: str | None = None, max_segments: int = 5):
    """Random (chain, partition, dispatch, mode)."""
    chain, stages, gpus, microbatches, mode = draw(problems(max_segments, mode))
    seed = draw(st.integers(0, 2**32))
    return chain, stages, drawn(chain, stages, gpus, microbatches, mode, seed), mode


def gpipe(stages: Partition, gpus: int, microbatches: int) -> Dispatch:
    """Every GPU has one forward stage and the backward stage of the same place; all forwards first."""
    order = [(s, m) for s in range(len(stages.stages)) for m in range(microbatches)]
    return of_steps("gpipe", gpus, microbatches, [(_folded(stages, s), s, m, 0) for s, m in order])


def one_forward_one_backward(stages: Partition, gpus: int, microbatches: int) -> Dispatch:
    """Stages as in `gpipe`; a microbatch's backward goes before the forward of a later one."""
    done = [0] * len(stages.stages)
    steps: list[tuple[int, int, int, int]] = []
    while len(steps) < len(done) * microbatches:
        for stage in reversed(range(len(done))):
            ready = done[stage] < (microbatches if stage == 0 else done[stage - 1])
            if ready:
                steps.append((_folded(stages, stage), stage, done[stage], 0))
                done[stage] += 1
    return of_steps("1f1b", gpus, microbatches, steps)


def _folded(stages: Partition, stage: int) -> int:
    tail = next(found.index for found in stages.stages if found.kind is StageKind.FB)
    return stage if stage <= tail else 2 * tail - stage


def two_rounds(stages: Partition, gpus: int, microbatches: int) -> Dispatch:
    """Round robin on one half of the microbatches, and behind it on the other, one GPU further on."""
    half = microbatches // 2
    steps = [
        ((stage + number) % gpus, stage, microbatch, number)
        for number, part in enumerate((range(half), range(half, microbatches)))
        for stage in range(len(stages.stages))
        for microbatch in part
    ]
    return of_steps("two_rounds", gpus, microbatches, steps)


def compiled(
    chain: SegmentChain,
    stages: Partition,
    dispatch: Dispatch,
    mode: str = "sync",
    waiting_bytes: int | None = None,
    **options: int,
) -> Schedule:
    """The schedule with transfers and events."""
    schedule = LayOutDispatch(chain, stages, mode, waiting_bytes).run(dispatch)
    return InsertEventWaits().run(InsertTransfers(chain, **options).run(schedule))
