"""The streams of a CUDA device, without one, with two asynchronous iterations in flight."""

from __future__ import annotations

import gc
import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from rpcompile import buffers
from rpcompile.errors import ExecutionError
from rpcompile.runtime import engine as engine_module
from rpcompile.runtime.cuda_streams import CudaStreams
from rpcompile.runtime.streams import Iteration
from tests import training
from tests.fake_cuda import MEMORY, Driver
from tests.test_async_mode import Simulated, same_weights
from tests.test_cuda_streams import CudaEngine, _host_memory_is_overwritten_when_it_is_freed
from tests.test_overlap import compiled_step, make_pair, start_again

__all__ = ["_host_memory_is_overwritten_when_it_is_freed"]  # a fixture


@contextmanager
def on_cuda(driver: Driver, kind: type[CudaStreams] = CudaStreams) -> Iterator[tuple[Any, ...]]:
    pair, optimizer, simulated = make_pair()
    with pair.compiled as compiled:
        engine = CudaEngine(compiled, driver, kind)
        compiled._training = replace(compiled._training, engine=engine)
        yield pair, optimizer, simulated, engine


def two_at_once(
    driver: Driver, pair: training.Pair, optimizer: torch.optim.Optimizer, simulated: Simulated
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Two iterations, all of which has been enqueued before the device does anything."""
    pair.compiled.wait()
    driver.stuck = True
    first = len(simulated.versions) - 1
    found = [compiled_step(pair, optimizer, simulated, first)]
    batch = pair.batch_of(first + 1)
    loss = pair.compiled.forward_backward(**batch)
    engine = pair.compiled._training.engine
    wait_until(lambda: all(not place[0]._thread._tasks.qsize() for place in engine._places))
    time.sleep(0.02)  # the last task was taken from its queue
    driver.stuck = False
    found.append((loss, simulated.forward_backward(first, batch)))
    pair.compiled.step(optimizer)
    optimizer.zero_grad()
    simulated.step()
    return found


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("seed", range(3))
def test_any_order_that_the_events_allow_gives_the_same_bits(seed: int) -> None:
    driver = Driver(seed, gpus=2, eager=0.1 * seed)
    with on_cuda(driver) as (pair, optimizer, simulated, engine):
        found = [compiled_step(pair, optimizer, simulated, 0)]
        for _ in range(2):
            found += two_at_once(driver, pair, optimizer, simulated)
        found += [compiled_step(pair, optimizer, simulated, iteration) for iteration in range(5, 9)]
        assert all(torch.equal(mine, theirs) for mine, theirs in found)
        assert same_weights(pair.model, simulated.versions[-1])
        pair.compiled.wait()
        assert driver.idle
        assert engine._flights == []


def test_times_of_iterations_in_flight_are_those_of_the_last_that_ended() -> None:
    driver = Driver(0, gpus=2)
    with on_cuda(driver) as (pair, optimizer, simulated, engine):
        compiled_step(pair, optimizer, simulated, 0)
        engine.record_times = True
        two_at_once(driver, pair, optimizer, simulated)
        pair.compiled.wait()
        assert engine.times.keys() == {a.id for a in pair.compiled.plan.schedule.actions()}


# ------------------------------------------------------------------- memory


class Counting(CudaStreams):
    """Notes how many jobs' weights are on the device, or held for it, when one more arrives."""

    most: Counter[int]

    def enqueue(self, iteration: Iteration, stream: str, instruction: str, task: Any) -> None:
        super().enqueue(iteration, stream, instruction, task)
        if "P@" in instruction:
            alive: dict[int, set[object]] = defaultdict(set)
            for worker in self.engine._workers:
                for name in list(worker._store):
                    if ":weights." in name:
                        alive[id(worker._streams)].add((id(worker), buffers.parse(name).job))
            held = sum(any(tensors for tensors in one.tensors) for one in self._held["weights"])
            self.most[self._gpu] = max(self.most[self._gpu], len(alive[id(self)]) + held)

    engine: Any = None


def most_weights(kind: type[CudaStreams] = Counting) -> int:
    """Jobs whose weights a GPU had memory for at once, while two iterations were enqueued."""
    driver = Driver(0, gpus=2)
    Counting.most = Counter()
    with on_cuda(driver, kind) as (pair, optimizer, simulated, engine):
        Counting.engine = engine
        compiled_step(pair, optimizer, simulated, 0)
        two_at_once(driver, pair, optimizer, simulated)
        two_at_once(driver, pair, optimizer, simulated)
        pair.compiled.wait()
    return max(Counting.most.values())


def test_a_gpu_has_memory_for_the_weights_of_two_jobs_however_far_threads_are_ahead() -> None:
    assert most_weights() == 2


def test_without_waits_for_the_iteration_before_it_would_take_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "_behind", lambda _: {})
    assert most_weights() > 2


def test_memory_and_events_stay_flat() -> None:
    driver = Driver(1, gpus=2, eager=0.2)
    gc.collect()  # what tests before this one left is not its own
    with on_cuda(driver) as (pair, optimizer, _, engine):
        found = []
        for iteration in range(14):
            pair.compiled.forward_backward(**pair.batch)
            pair.compiled.step(optimizer)
            optimizer.zero_grad()
            if iteration in (7, 13):
                pair.compiled.wait()
                driver.advance()
                places = [place[0] for place in engine._places]
                kept = sum(len(held) for place in places for held in place._held.values())
                found.append((MEMORY.nbytes, kept, sum(len(place._spare) for place in places)))
        assert found[0][:2] == found[1][:2]
        assert found[0][1] == 0
        assert found[1][2] < 4 * sum(1 for _ in pair.compiled.plan.schedule.actions())


# ------------------------------------------------------------------- failures


def test_runs_with_random_faults_are_right_or_fail_cleanly() -> None:
    driver = Driver(1, gpus=2, eager=0.2)
    outcomes = Counter[bool]()
    with on_cuda(driver) as (pair, optimizer, simulated, engine):
        count = sum(1 for _ in pair.compiled.plan.schedule.actions())
        for seed in range(8):
            choices = random.Random(seed)
            left = [choices.randrange(24 * count)]

            def hook(_: str, choices: random.Random = choices, left: list[int] = left) -> None:
                left[0] -= 1
                if left[0] == 0:
                    raise choices.choice([MemoryError, torch.OutOfMemoryError])("injected")

            engine.before_instruction = hook
            failed: list[str] = []
            try:
                found = [compiled_step(pair, optimizer, simulated, iteration) for iteration in range(4)]
                pair.compiled.wait()
                assert all(torch.equal(mine, theirs) for mine, theirs in found)
            except ExecutionError as error:
                failed.append(str(error))
            engine.before_instruction = None
            assert all("injected" in text for text in failed)
            outcomes[bool(failed)] += 1
            assert driver.idle
            assert engine._flights == []
            assert all(worker.stored_bytes() == 0 for worker in engine._workers)
            assert any(same_weights(pair.model, version) for version in simulated.versions)
            start_again(pair, optimizer, simulated)
        assert min(outcomes.values()) > 1, outcomes
