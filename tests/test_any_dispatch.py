"""Random dispatches and known policies through transfers, events, proof and simulation, and on workers."""

from __future__ import annotations

import copy
import random
import re
import time
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rpcompile.errors import ScheduleError
from rpcompile.ir import Op, SegmentChain, StageKind, Stream
from rpcompile.memory_bound import gpu_memory_bounds
from rpcompile.passes.bind_chain import BindChain
from rpcompile.passes.dispatch_round_robin import DispatchRoundRobin
from rpcompile.passes.estimate_costs import EstimateCosts
from rpcompile.passes.insert_event_waits import InsertEventWaits
from rpcompile.passes.insert_transfers import InsertTransfers
from rpcompile.passes.insert_updates import InsertUpdates
from rpcompile.passes.lay_out_dispatch import LayOutDispatch
from rpcompile.passes.lower_to_program import LowerToProgram
from rpcompile.random_streams import stream_seed
from rpcompile.runtime import batches
from rpcompile.runtime.engine import Engine
from rpcompile.runtime.stage_runner import Microbatch
from rpcompile.simulate import simulate
from rpcompile.verify import verify_schedule
from tests import models, reference, staged
from tests.chains import action, chain, ids, partition, rewrite
from tests.dispatches import (
    compiled,
    dispatched,
    drawn,
    gpipe,
    of_steps,
    one_forward_one_backward,
    two_rounds,
)

FOLDED = partition("F0-0", "F1-1", "FB2-2", "B1-1", "B0-0")
POLICIES = {
    "gpipe": gpipe(FOLDED, 3, 4),
    "1f1b": one_forward_one_backward(FOLDED, 3, 4),
    "two_rounds": two_rounds(FOLDED, 3, 4),
}


# --------------------------------------------------------------------------- schedules


@settings(max_examples=120, deadline=None)
@given(dispatched(), st.integers(1, 3), st.integers(1, 3), st.sampled_from([None, 0, 4]))
def test_any_dispatch_gives_a_schedule_that_verifies_and_ends(problem, slots, resident, waiting):
    chain, stages, dispatch, mode = problem
    schedule = compiled(
        chain, stages, dispatch, mode, waiting, activation_slots=slots, resident_jobs=resident
    )
    verify_schedule(schedule, chain, stages)
    timeline = simulate(schedule)
    assert timeline.end_s.keys() == {found.id for found in schedule.actions()}
    runs = {queue.gpu: queue for queue in schedule.queues if queue.stream is Stream.COMPUTE}
    for gpu, order in enumerate(dispatch.order):
        steps = [a for a in runs[gpu].actions if a.op not in (Op.FREE, Op.RECOMPUTE)] if order else []
        assert [(found.job, found.microbatch) for found in steps] == list(order)


@settings(max_examples=40, deadline=None)
@given(dispatched(max_segments=4), st.integers(0, 2**32))
def test_memory_bounds_hold_for_any_timing(problem, seed):
    schedule = compiled(*problem)
    bounds = gpu_memory_bounds(schedule)
    choose = random.Random(seed)
    for _ in range(4):
        timed = rewrite(schedule, lambda a: [replace(a, seconds=choose.choice([0, 0.1, 1, 5, 50]))])
        assert all(p <= b for p, b in zip(simulate(timed).gpu_peak_bytes, bounds, strict=True))


def test_memory_bounds_are_reached():
    schedule = compiled(chain(3), FOLDED, DispatchRoundRobin(2, 3).run(FOLDED))
    choose, found = random.Random(0), [0, 0]
    for _ in range(200):
        timed = rewrite(schedule, lambda a: [replace(a, seconds=choose.choice([0, 0.1, 1, 5, 50]))])
        found = [max(pair) for pair in zip(found, simulate(timed).gpu_peak_bytes, strict=True)]
    assert tuple(found) == gpu_memory_bounds(schedule)


@settings(max_examples=60, deadline=None)
@given(dispatched(), st.integers(1, 3))
def test_weights_on_a_gpu_belong_to_few_jobs(problem, resident):
    """By brute force: between upload and FREE there are `resident_jobs` jobs, or those that take turns."""
    chain, stages, dispatch, mode = problem
    schedule = compiled(chain, stages, dispatch, mode, resident_jobs=resident)
    timeline = simulate(schedule)
    for gpu, order in enumerate(dispatch.order):
        stays: dict[int, tuple[float, float]] = {}
        for found in schedule.actions():
            uploads = found.op is Op.PREFETCH
            if found.gpu == gpu and (uploads or any(":weights." in name for name in found.frees)):
                begin, end = stays.get(found.job, (timeline.start_s[found.id], 0.0))
                begin = min(begin, timeline.start_s[found.id])
                stays[found.job] = begin, max(end, timeline.end_s[found.id])
        steps = [job for job, _ in order]
        first = {job: steps.index(job) for job in steps}
        last = {job: place for place, job in enumerate(steps)}
        turns = [sum(first[job] <= place <= last[job] for job in first) for place in range(len(steps))]
        for begin, _ in stays.values():
            together = sum(start <= begin < end for start, end in stays.values())
            assert together <= max([resident, *turns])


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_verify(policy):
    schedule = compiled(chain(3), FOLDED, POLICIES[policy])
    verify_schedule(schedule, chain(3), FOLDED)
    assert simulate(schedule).makespan_s > 0


@settings(max_examples=80, deadline=None)
@given(dispatched(mode="sync"))
def test_what_was_saved_is_freed_where_it_is_recomputed(problem):
    """No queue waits, in order to free a boundary, for the recompute on another GPU, which is much later."""
    schedule = compiled(*problem)
    loads = {name: a.stage for a in schedule.actions() if a.op is Op.LOAD for name in a.reads}
    for found in schedule.actions():
        for name in found.frees:
            assert not name.startswith("host:x.") or loads.get(name, found.stage) == found.stage


def test_a_recompute_that_could_begin_early_is_loaded_behind_who_reads_the_same():
    """GPU 2 could recompute stage 3 as soon as GPU 0 is done; what it loads is freed behind it even so."""
    steps = [(gpu, stage, m, 0) for gpu, stage in ((0, 0), (1, 1), (1, 2), (2, 3), (2, 4)) for m in range(2)]
    stages = partition("F0-0", "F1-1", "FB2-2", "B1-1", "B0-0")
    schedule = compiled(chain(3), stages, of_steps("early", 3, 2, steps))
    freed = {name: found.id for found in schedule.actions() for name in found.frees}
    assert [freed[f"host:x.s0.m{m}"] for m in range(2)] == ["3X0.1", "3X1.1"]


def test_jobs_in_turns_keep_their_weights():
    schedule = compiled(chain(3), FOLDED, POLICIES["1f1b"])
    assert ids(schedule, 1, "compute").startswith("1F0 1X0.0 1F1 1X1.0 3R0 3B0 3X0.0 1F2 1X2.0 3R1 3B1")
    # Both uploads come before the first turn of each; nothing is uploaded twice or waits for a slot.
    uploads = [found for found in schedule.actions() if found.op is Op.PREFETCH and found.gpu == 1]
    assert [found.after for found in uploads] == [(), ()]
    assert len(uploads) == 2


def test_the_third_of_three_jobs_in_turns_waits_for_none_of_them():
    """With two slots, jobs 0, 1 and 2 of one GPU take turns; job 3 comes when two of them have left."""
    stages = partition("F0-0", "F1-1", "F2-2", "F3-3")
    steps = [(0, stage, m, 0) for m in range(2) for stage in range(3)] + [(0, 3, m, 0) for m in range(2)]
    schedule = compiled(chain(4), stages, of_steps("turns", 1, 2, steps), "forward")
    assert [action(schedule, f"{j}P@{j}.{j}").after for j in range(4)] == [(), (), (), ("0X@0.0", "1X@1.0")]
    verify_schedule(schedule, chain(4), stages)


def test_one_resident_job_uploads_when_the_last_one_has_left():
    stages = partition("F0-0", "F1-1")
    dispatch = DispatchRoundRobin(1, 2).run(stages)
    schedule = compiled(chain(2), stages, dispatch, "forward", resident_jobs=1)
    assert action(schedule, "1P@1.1").after == ("0X@0.0",)
    assert ids(schedule, 0, "weights") == "0P@0.0 1P@1.1"


def test_a_job_without_weights_takes_a_slot():
    """Beside it the partition's bound counts the weights of one more job, not of two."""
    stages = partition("F0-0", "F1-1", "F2-2", "F3-3")
    weightless = chain(4, {1: {"weight_bytes": 0}})
    schedule = compiled(weightless, stages, DispatchRoundRobin(1, 1).run(stages), "forward")
    assert action(schedule, "2P@2.2").after == ("0X@0.0",)
    assert action(schedule, "3P@3.3").after == ("1F0",)


def test_three_resident_jobs_upload_two_ahead():
    stages = partition("F0-0", "F1-1", "F2-2", "F3-3")
    dispatch = DispatchRoundRobin(1, 2).run(stages)
    schedule = compiled(chain(4), stages, dispatch, "forward", resident_jobs=3)
    assert ids(schedule, 0, "weights") == "0P@0.0 1P@1.1 2P@2.2 3P@3.3"
    assert [action(schedule, f"{j}P@{j}.{j}").after for j in range(4)] == [(), (), (), ("0X@0.0",)]


def test_what_stays_on_the_gpu_and_what_is_over_the_limit():
    stages = partition("F0-0", "FB1-1", "B0-0")
    dispatch = DispatchRoundRobin(1, 3).run(stages)
    stay = compiled(chain(2), stages, dispatch)
    assert not [found for found in stay.actions() if found.op in (Op.HANDOFF, Op.RECEIVE)]
    # One boundary of 1 byte may wait for its reader: those of microbatches 1 and 2 go over the host.
    spill = compiled(chain(2), stages, dispatch, waiting_bytes=1)
    assert [found.id for found in spill.actions() if found.op is Op.HANDOFF] == ["0H1", "0H2", "1H1", "1H2"]
    assert action(spill, "1V1").writes == ("gpu0:x.s0.j1.m1",)
    verify_schedule(spill, chain(2), stages)


def test_what_the_next_action_reads_never_spills():
    stages = partition("F0-0", "FB1-1", "B0-0")
    steps = [(0, stage, m, 0) for m in range(2) for stage in range(3)]
    schedule = compiled(chain(2), stages, of_steps("depth first", 1, 2, steps), waiting_bytes=0)
    assert not [found for found in schedule.actions() if found.op is Op.HANDOFF]


def test_each_replica_sends_a_gradient_of_its_own():
    stages = partition("FB0-0")
    schedule = compiled(chain(1), stages, of_steps("halves", 2, 4, [(m % 2, 0, m, m % 2) for m in range(4)]))
    gradients = {found.id: found.writes for found in schedule.actions() if found.op is Op.GRADIENT}
    assert gradients == {"0G@0.0": ("host:gradients.j0.s0",), "0G@1.0": ("host:gradients.j1.s0",)}


def test_refuses_gpus_that_wait_for_one_another():
    stages = partition("F0-0", "F1-1")
    dispatch = of_steps("late", 2, 2, [(0, 0, 0, 0), (0, 0, 1, 0), (1, 1, 0, 0), (1, 1, 1, 0)])
    crossed = replace(
        dispatch,
        jobs=(dispatch.jobs[0], replace(dispatch.jobs[1], gpu=0)),
        order=(((1, 0), (0, 0), (0, 1), (1, 1)), ()),
    )
    message = "deadlock: 1F0 (gpu0 compute) waits for 0F0 (gpu0 compute), which is queued behind 1F0"
    with pytest.raises(ScheduleError, match=f"^{re.escape(message)}"):
        InsertTransfers(chain(2)).run(LayOutDispatch(chain(2), stages, "forward").run(crossed))


def test_refuses_to_divide_a_stage_that_changes_buffers():
    stages = partition("FB0-0")
    dispatch = of_steps("halves", 2, 2, [(m, 0, m, m) for m in range(2)])
    message = (
        "stage 0 (FB, segments 0..0) is divided among jobs 0 and 1, but its forward changes buffers of "
        "segment 0, which pass through all microbatches in one job; give the stage one job"
    )
    with pytest.raises(ScheduleError, match=f"^{re.escape(message)}$"):
        LayOutDispatch(chain(1, {0: {"state_bytes": 1}}), stages).run(dispatch)
    LayOutDispatch(chain(1), stages).run(dispatch)


# --------------------------------------------------------------------------- on workers


class Line:
    """One model, captured once, to run under many dispatches."""

    microbatches, gpus = 4, 3

    def __init__(self, family: str) -> None:
        self.case = models.make(family)
        self.capture = staged.capture(self.case.model, self.case.batch, self.microbatches)
        costed = EstimateCosts().run(self.capture)
        self.chain: SegmentChain = BindChain(dict(self.capture.example_sizes), models.SLOW_GPU).run(costed)

    def partition(self, seed: int):
        choose, count = random.Random(seed), len(self.chain.segments)
        cuts = [set(choose.sample(range(count), choose.randrange(count))) for _ in range(2)]
        found = staged.partition(self.chain.first_backward, count, choose.randrange(1, count), *cuts)
        return replace(found, memory_limit_bytes=2**40)

    def run(self, schedule, stages, seed: int, delays: int | None = None):
        """Loss, gradients and changed buffers of one iteration on CPU workers."""
        program = LowerToProgram(self.capture, self.chain, stages).run(schedule)
        engine = Engine(program, self.chain)
        if delays is not None:
            choose = random.Random(delays)
            engine.before_instruction = lambda _: time.sleep(choose.choice((0, 0, 0, 0.001)))
        tensors = {
            **dict(self.case.model.named_parameters(remove_duplicate=False)),
            **dict(self.case.model.named_buffers(remove_duplicate=False)),
            **self.capture.constants,
        }
        parts = batches.split_batch(
            self.capture, batches.named_batch(self.capture, (), self.case.batch), self.microbatches
        )
        facts = [
            Microbatch(
                stream_seed(seed, i), batches.microbatch_sizes(self.capture, part), 1 / self.microbatches
            )
            for i, part in enumerate(parts)
        ]
        try:
            return engine.run(tensors, parts, facts)
        finally:
            engine.close()

    def expected(self, schedule, stages, seed: int):
        """Plain PyTorch's gradients by microbatch, summed job by job in the order of each, then over jobs."""
        plain = copy.deepcopy(self.case.model)
        by_microbatch: list[dict[str, torch.Tensor]] = []
        losses: list[torch.Tensor] = []
        for index in range(self.microbatches):
            part = {n: value.chunk(self.microbatches)[index] for n, value in self.case.batch.items()}
            with reference.kept_generator(), reference.Reseed(stream_seed(seed, index)):
                loss = reference.loss_of(plain(**part))
            (loss / self.microbatches).backward()
            losses.append(loss.detach())
            by_microbatch.append({n: p.grad for n, p in plain.named_parameters() if p.grad is not None})
            plain.zero_grad(set_to_none=True)
        segment_of = {
            name: index for index, found in enumerate(self.chain.segments) for name in found.parameters
        }
        gradients: dict[str, list[torch.Tensor]] = defaultdict(list)
        for job in schedule.jobs:
            stage = stages.stages[job.stage]
            for name in by_microbatch[0]:
                if stage.kind is not StageKind.F and segment_of[name] in stage.segments:
                    total = by_microbatch[job.microbatches[0]][name]
                    for microbatch in job.microbatches[1:]:
                        total = total + by_microbatch[microbatch][name]
                    gradients[name].append(total)
        sums = {name: found[0] for name, found in gradients.items()}
        for name, found in gradients.items():
            for other in found[1:]:
                sums[name] = sums[name] + other
        return losses, sums, dict(plain.named_buffers())


@pytest.fixture(scope="module", params=["mlp", "qwen3-lora", "unet-batchnorm"])
def line(request):
    return Line(request.param)


@pytest.mark.parametrize("seed", range(4))
def test_workers_equal_plain_pytorch_with_the_same_order_of_summation(line, seed):
    stages = line.partition(seed)
    dispatch = drawn(line.chain, stages, line.gpus, line.microbatches, "sync", seed)
    if line.capture.mutations:  # running statistics take the microbatches in order
        dispatch = DispatchRoundRobin(line.gpus, line.microbatches).run(stages)
    schedule = compiled(line.chain, stages, dispatch, waiting_bytes=None if seed % 2 else 0)
    if seed % 2:  # else sums are taken when the iteration is over
        schedule = InsertEventWaits().run(InsertUpdates(line.chain, updates=False).run(schedule))
    verify_schedule(schedule, line.chain, stages)
    losses, gradients, state = line.expected(schedule, stages, seed)
    for delays in (None, seed):
        result = line.run(schedule, stages, seed, delays)
        assert [found[line.capture.outputs[0]] for found in result.outputs] == losses
        assert result.gradients.keys() == gradients.keys()
        for name, expected in gradients.items():
            assert torch.equal(result.gradients[name], expected), name
        for name, value in result.states.items():
            assert torch.equal(value, state[name]), name


def test_a_program_leaves_updates_to_the_optimizer(line):
    stages = line.partition(1)
    dispatch = DispatchRoundRobin(line.gpus, line.microbatches).run(stages)
    schedule = LayOutDispatch(line.chain, stages).run(dispatch)
    for step in (InsertTransfers(line.chain), InsertUpdates(line.chain, clip=True), InsertEventWaits()):
        schedule = step.run(schedule)
    verify_schedule(schedule, line.chain, stages)
    assert any(found.op is Op.UPDATE for found in schedule.actions())
    _, gradients, _ = line.expected(schedule, stages, 1)
    result = line.run(schedule, stages, 1)
    assert all(torch.equal(result.gradients[name], expected) for name, expected in gradients.items())
