"""Asynchronous iterations in flight: they overlap, change nothing by it, and failures undo what is behind."""

from __future__ import annotations

import _thread
import copy
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn, optim

import rpcompile
from rpcompile import buffers
from rpcompile.errors import ExecutionError, WorkerTimeout
from rpcompile.ir import Op
from rpcompile.plan import Plan
from rpcompile.runtime.streams import Iteration
from tests import models, training
from tests.test_async_mode import NormScaled, Simulated, same_weights
from tests.test_faults import live_bytes, one_fault_and_delays, workers

_plans: dict[str, Plan] = {}


def make_pair(dtype: torch.dtype | None = None, name: str = "adamw", **options: Any) -> tuple[Any, ...]:
    """A model that needs five stages on two GPUs, shifted by one from iteration to iteration."""
    case = models.build(lambda: models.mlp(*[16] * 7, 5))
    kinds: dict[str, Any] = {
        "adamw": lambda p: optim.AdamW(p, lr=0.05, fused=True),
        "sgd": lambda p: optim.SGD(p, lr=0.1, momentum=0.9),
        "not separable": NormScaled,
    }
    plain = copy.deepcopy(case.model)
    simulated = Simulated(plain, kinds[name](plain.parameters()), dtype)
    small = replace(models.SLOW_GPU, usable_bytes=20_000 if dtype is None else 10_000)
    given: dict[str, Any] = {"gpus": 2, "microbatches": 4, "gpu": small, "effort": None, "solver_time_s": 0.3}
    given |= {"mode": "async", "compute_dtype": dtype, "plan": _plans.get(str(dtype)), **options}
    compiled = rpcompile.compile(case.model, example_inputs=case.batch, **given)
    _plans[str(dtype)] = compiled.plan
    assert len(compiled.plan.schedule.jobs) > 4
    assert compiled.plan.schedule.rotate
    return training.Pair(compiled, plain, case.batch), kinds[name](compiled.parameters()), simulated


@contextmanager
def begun(hook: Callable[[int, str], object], compiled: rpcompile.Compiled) -> Iterator[None]:
    """Calls `hook` with the number of the iteration (since now) and each instruction that begins."""
    engine, numbers = compiled._training.engine, dict[int, int]()
    original, kept = Iteration.begin, list[Iteration]()

    def begin(self: Iteration, place: Any, instruction: str) -> None:
        if id(self) not in numbers:
            kept.append(self)
            numbers[id(self)] = len(numbers)
        self.before_instruction = lambda text: hook(numbers[id(self)], text)
        original(self, place, instruction)

    assert engine.before_instruction is None
    Iteration.begin = begin  # type: ignore[method-assign]
    try:
        yield
    finally:
        Iteration.begin = original  # type: ignore[method-assign]


def last_backward(compiled: rpcompile.Compiled, op: Op = Op.BACKWARD) -> str:
    """An action of the end of an iteration."""
    found = [action.id for action in compiled.plan.schedule.actions() if action.op is op]
    return max(found, key=compiled.plan.simulate().start_s.__getitem__)


def warm(pair: training.Pair, optimizer: optim.Optimizer, simulated: Simulated) -> None:
    """The first iteration, which is awaited."""
    compiled_step(pair, optimizer, simulated, 0)
    pair.compiled.wait()


def compiled_step(
    pair: training.Pair, optimizer: optim.Optimizer, simulated: Simulated, iteration: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same iteration of both: forward, backward, step. The loss, which nobody has read, of either."""
    batch = pair.batch_of(iteration)
    loss = pair.compiled.forward_backward(**batch)
    expected = simulated.forward_backward(max(iteration - 1, 0), batch)
    pair.compiled.step(optimizer)
    optimizer.zero_grad()
    simulated.step()
    return loss, expected


# ------------------------------------------------------------------- results


@pytest.mark.parametrize(
    ("dtype", "name", "clip", "late"),
    [
        (None, "adamw", None, "stream"),
        (None, "sgd", 0.3, "instruction"),
        (torch.bfloat16, "adamw", 0.3, "stream"),
        (None, "not separable", None, "instruction"),
    ],
)
def test_iterations_in_flight_have_the_bits_of_delayed_updates(
    dtype: torch.dtype | None, name: str, clip: float | None, late: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a pause before each instruction, or in one iteration's and GPU's more than in others'."""
    pair, optimizer, simulated = make_pair(dtype, name)
    with pair.compiled as compiled:
        training.delay_host(monkeypatch, longest_s=0.01)
        choices, together = random.Random(name), Counter[int]()
        engine = compiled._training.engine

        def pause(_: str) -> None:
            together[len(engine._flights)] += 1
            slow = late == "instruction" or threading.current_thread().name.endswith("gpu1-compute")
            time.sleep(choices.choice((0, 0.0005, 0.001)) if slow else 0)

        engine.before_instruction = pause
        losses: list[tuple[torch.Tensor, torch.Tensor]] = []
        norms: list[tuple[torch.Tensor, torch.Tensor]] = []
        for iteration in range(8):
            batch = pair.batch_of(iteration)
            loss = compiled.forward_backward(**batch)
            losses.append((loss, simulated.forward_backward(max(iteration - 1, 0), batch)))
            if clip is not None:
                expected = nn.utils.get_total_norm([p.grad for p in simulated.model.parameters()])
                norms.append((compiled.clip_grad_norm_(clip), expected))
            compiled.step(optimizer)
            optimizer.zero_grad()
            simulated.step(clip)
        assert all(torch.equal(mine, theirs) for mine, theirs in (*losses, *norms))
        assert len({float(loss) for loss, _ in losses}) == 8
        assert same_weights(pair.model, simulated.versions[-1])
        # What cannot be divided reads all gradients.
        assert (together[2] > 0) == (name != "not separable")
        assert together[3] == 0


def test_an_instruction_runs_while_one_of_the_iteration_before_is_held_back() -> None:
    pair, optimizer, simulated = make_pair()
    with pair.compiled as compiled:
        warm(pair, optimizer, simulated)
        held, seen = last_backward(compiled), threading.Event()

        def hook(number: int, instruction: str) -> None:
            if number == 0 and instruction == held:
                assert seen.wait(20), "the next iteration waits for this one"
            if number == 1 and instruction in ("0F0", "0F1"):
                seen.set()

        with begun(hook, compiled):
            found = [compiled_step(pair, optimizer, simulated, iteration) for iteration in (1, 2, 3)]
            assert all(torch.equal(mine, theirs) for mine, theirs in found)
        assert same_weights(pair.model, simulated.versions[-1])


def test_reading_a_loss_does_not_wait_for_the_iteration_behind() -> None:
    pair, optimizer, simulated = make_pair()
    with pair.compiled as compiled:
        warm(pair, optimizer, simulated)
        read = threading.Event()

        def hook(number: int, instruction: str) -> None:
            if number == 1 and "FB" in instruction:
                assert read.wait(20), "it waits"

        with begun(hook, compiled):
            (loss, expected), (other, _) = (compiled_step(pair, optimizer, simulated, n) for n in (1, 2))
            assert torch.equal(loss, expected)
            assert type(loss) is torch.Tensor
            assert type(other) is not torch.Tensor
            assert other.shape == ()  # needs no wait
            read.set()
            assert float(other) > 0
            assert type(other) is torch.Tensor


def test_a_gradient_that_is_read_is_there() -> None:
    pair, optimizer, simulated = make_pair()
    with pair.compiled as compiled:
        warm(pair, optimizer, simulated)
        compiled.forward_backward(**pair.batch)
        simulated.forward_backward(0, pair.batch)
        for mine, theirs in zip(pair.model.parameters(), simulated.model.parameters(), strict=True):
            assert mine.grad is not None
            assert mine.grad.shape == mine.shape
            assert torch.equal(mine.grad, theirs.grad)
            assert mine.grad.is_contiguous()


def test_a_batch_may_be_changed_when_the_call_has_returned() -> None:
    pair, optimizer, simulated = make_pair()
    with pair.compiled as compiled:
        warm(pair, optimizer, simulated)
        go = threading.Event()
        with begun(lambda *_: go.wait(20), compiled):
            batch = {name: value.clone() for name, value in pair.batch.items()}
            loss = compiled.forward_backward(**batch)
            for value in batch.values():
                value.zero_()
            go.set()
            assert torch.equal(loss, simulated.forward_backward(0, pair.batch))


def test_accumulated_calls_in_flight_see_one_version() -> None:
    pair, optimizer, simulated = make_pair()
    found = []
    with pair.compiled as compiled:
        for iteration in range(4):
            for part in range(3):
                batch = pair.batch_of(3 * iteration + part)
                expected = simulated.forward_backward(max(iteration - 1, 0), batch)
                found.append((compiled.forward_backward(**batch), expected))
            compiled.clip_grad_norm_(0.5)
            compiled.step(optimizer)
            optimizer.zero_grad()
            simulated.step(0.5)
        assert all(torch.equal(mine, theirs) for mine, theirs in found)
        assert same_weights(pair.model, simulated.versions[-1])


def test_gradients_that_are_kept_are_added_to_behind_their_update() -> None:
    pair, optimizer, simulated = make_pair(name="sgd")
    simulated.optimizer.zero_grad = lambda: None  # type: ignore[method-assign]
    with pair.compiled as compiled:
        for iteration in range(4):
            batch = pair.batch_of(iteration)
            compiled.forward_backward(**batch)
            simulated.forward_backward(max(iteration - 1, 0), batch)
            compiled.step(optimizer)
            simulated.step()
        assert same_weights(pair.model, simulated.versions[-1])


def test_learning_rates_are_those_of_the_call_of_step() -> None:
    pair, optimizer, simulated = make_pair()
    schedulers = [optim.lr_scheduler.ExponentialLR(one, 0.5) for one in (optimizer, simulated.optimizer)]
    go = threading.Event()
    with pair.compiled as compiled, begun(lambda number, _: number < 4 or go.wait(20), compiled):
        for iteration in range(5):
            compiled_step(pair, optimizer, simulated, iteration)
            for scheduler in schedulers:
                scheduler.step()
        assert compiled._training.engine._flights  # no scheduler waits
        go.set()
        assert same_weights(pair.model, simulated.versions[-1])


@pytest.mark.parametrize("family", ["unet-batchnorm", "qwen3-lora"])
def test_buffers_that_change_and_weights_that_do_not_are_as_without_overlap(family: str) -> None:
    found = []
    for read in (True, False):
        case = models.build(lambda: models.make(family))
        options = {"gpus": 2, "microbatches": 4, "gpu": models.SLOW_GPU, "mode": "async", "effort": None}
        with rpcompile.compile(case.model, example_inputs=case.batch, **options) as compiled:
            optimizer = optim.SGD(compiled.parameters(), lr=0.1)
            for _ in range(4):
                loss = compiled.forward_backward(**case.batch)
                if read:
                    loss.item()
                compiled.step(optimizer)
                optimizer.zero_grad()
            found.append([value.clone() for value in case.model.state_dict().values()])
    assert all(map(torch.equal, *found))


# ------------------------------------------------------------------- what waits


@pytest.mark.parametrize("what", ["evaluation", "state_dict", "checkpoint", "outputs", "own step", "close"])
def test_whatever_needs_the_weights_as_they_are_waits(what: str, tmp_path: Any) -> None:
    pair, optimizer, simulated = make_pair()
    compiled = pair.compiled
    warm(pair, optimizer, simulated)
    engine = compiled._training.engine
    engine.before_instruction = lambda _: time.sleep(0.0005)
    losses = [compiled_step(pair, optimizer, simulated, iteration) for iteration in (1, 2)]
    assert len(engine._flights) > 0
    newest = simulated.versions[-1]
    if what == "evaluation":
        rows = [tuple(v.chunk(4)[i] for v in pair.batch.values()) for i in range(4)]
        expected = torch.stack([newest.eval()(*row) for row in rows]).mean()
        assert torch.equal(compiled(**pair.batch), expected.detach())
    elif what == "state_dict":
        assert all(map(torch.equal, compiled.state_dict().values(), newest.state_dict().values()))
    elif what == "checkpoint":
        compiled.save_checkpoint(tmp_path / "saved", optimizer)
        other, other_optimizer, _ = make_pair()
        other.compiled.load_checkpoint(tmp_path / "saved", other_optimizer)
        assert same_weights(other.model, newest)
        other.compiled.close()
    elif what == "outputs":
        batch = pair.batch_of(3)
        loss, _ = compiled.forward_backward(**batch, return_outputs=True)
        assert torch.equal(loss, simulated.forward_backward(2, batch))
    elif what == "own step":
        batch = pair.batch_of(3)
        compiled.forward_backward(**batch)
        simulated.forward_backward(2, batch)
        optimizer.step()
        simulated.step()
        assert same_weights(pair.model, simulated.versions[-1])
    compiled.close()
    assert engine._flights == []
    assert all(torch.equal(mine, theirs) for mine, theirs in losses)
    assert same_weights(pair.model, simulated.versions[-1])


# ------------------------------------------------------------------- memory


def test_a_gpu_holds_the_weights_of_two_jobs_and_memory_stays_flat() -> None:
    pair, optimizer, _ = make_pair()
    threads = workers()
    with pair.compiled as compiled:
        engine, most, sizes = compiled._training.engine, Counter[int](), list[tuple[int, int]]()

        def count(_: str) -> None:
            for place in range(2):
                jobs = {
                    (id(worker), buffers.parse(name).job)
                    for worker in engine._workers
                    if worker.place[0] is engine._places[place][0]
                    for name in list(worker._store)
                    if ":weights." in name
                }
                most[place] = max(most[place], len(jobs))

        engine.before_instruction = count
        for iteration in range(24):
            compiled.forward_backward(**pair.batch)
            compiled.step(optimizer)
            optimizer.zero_grad()
            if iteration in (10, 22):
                compiled.wait()
                slots = sum(bay.slots.nbytes for bay in engine._bays)
                assert all(worker.stored_bytes() == 0 for worker in engine._workers)
                sizes.append((live_bytes(), slots))
        assert sizes[0] == sizes[1]
        assert most == {0: 2, 1: 2}
    deadline = time.monotonic() + 5
    while workers() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert workers() <= threads


# ------------------------------------------------------------------- failures


def start_again(pair: training.Pair, optimizer: optim.Optimizer, simulated: Simulated) -> None:
    """Both go on from the same weights, which the user loads, and without state."""
    simulated.versions = simulated.versions[:1]
    for model in (pair.model, simulated.model):
        model.load_state_dict(simulated.versions[0].state_dict())
    optimizer.state.clear()
    simulated.optimizer.state.clear()
    simulated.optimizer.zero_grad()


def failing(number: int, text: str) -> Callable[[int, str], None]:
    def hook(iteration: int, instruction: str) -> None:
        if iteration == number and text in instruction:
            raise MemoryError("injected")

    return hook


def check_goes_on(pair: training.Pair, optimizer: optim.Optimizer, simulated: Simulated) -> None:
    """Nothing is left of what failed: two more iterations, the first with the weights as they are."""
    assert all(p.grad is None for p in pair.model.parameters())
    assert same_weights(pair.model, simulated.versions[-1])
    versions = simulated.versions
    simulated.versions = versions[-1:]
    found = [compiled_step(pair, optimizer, simulated, iteration) for iteration in range(3)]
    assert all(torch.equal(mine, theirs) for mine, theirs in found)
    assert same_weights(pair.model, simulated.versions[-1])
    assert pair.compiled._training.engine._flights == []


@pytest.mark.parametrize("at", ["0F0", "FB2", "B3", "P@", "last G"])
@pytest.mark.parametrize("told_by", ["loss", "next loss", "weight", "call", "step", "close"])
def test_a_failure_in_flight_is_named_and_undoes_what_is_behind_it(at: str, told_by: str) -> None:
    pair, optimizer, simulated = make_pair()
    compiled = pair.compiled
    warm(pair, optimizer, simulated)
    compiled_step(pair, optimizer, simulated, 1)
    compiled.wait()
    at = last_backward(compiled, Op.GRADIENT) if at == "last G" else at

    def go_on() -> None:
        losses.append(compiled.forward_backward(**pair.batch_of(2)))
        if told_by == "call":
            compiled.forward_backward(**pair.batch_of(3))
            compiled.forward_backward(**pair.batch_of(4))
        compiled.step(optimizer)
        optimizer.zero_grad()
        if told_by == "loss":
            losses[0].item()
        behind = compiled.forward_backward(**pair.batch_of(3))
        reads[told_by](behind)

    losses: list[torch.Tensor] = []
    reads: dict[str, Callable[[torch.Tensor], object]] = {
        "next loss": lambda loss: loss.item(),
        "weight": lambda _: next(compiled.parameters()).sum(),
        "step": lambda _: compiled.step(optimizer),
        "close": lambda _: compiled.close(),
    }
    with begun(failing(0, at), compiled), pytest.raises(ExecutionError) as caught:
        go_on()
    text = str(caught.value)
    assert text.startswith("forward_backward call 2 (counted from 0), which had returned, failed: ")
    assert at in text.split(" failed on GPU ")[0]
    assert "MemoryError: injected" in text
    assert text.endswith(
        "Later calls and their steps are cancelled; weights and optimizer are as of the last update before."
    )
    if told_by != "close":
        assert losses[0].isnan()
        check_goes_on(pair, optimizer, simulated)
        compiled.close()


def test_a_failure_of_the_second_leaves_the_first() -> None:
    pair, optimizer, simulated = make_pair()
    with pair.compiled as compiled:
        warm(pair, optimizer, simulated)
        with begun(failing(1, "FB0"), compiled):
            loss, expected = compiled_step(pair, optimizer, simulated, 1)
            with pytest.raises(ExecutionError, match=r"^forward_backward call 2 "):
                compiled.forward_backward(**pair.batch_of(2)).item()
            assert torch.equal(loss, expected)
        check_goes_on(pair, optimizer, simulated)


def test_optimizer_state_is_that_of_the_last_update() -> None:
    pair, optimizer, simulated = make_pair()
    with pair.compiled as compiled:
        warm(pair, optimizer, simulated)
        state = copy.deepcopy(optimizer.state_dict()["state"])
        with begun(failing(0, "B0"), compiled):
            compiled.forward_backward(**pair.batch)
            compiled.step(optimizer)
            with pytest.raises(ExecutionError, match="injected"):
                optimizer.state_dict()
        after = optimizer.state_dict()["state"]
        for number, values in state.items():
            assert all(torch.equal(value, after[number][name]) for name, value in values.items())


def test_a_worker_that_stops_answering_in_flight_is_named() -> None:
    pair, optimizer, simulated = make_pair(name="sgd", timeout_s=0.4)
    compiled = pair.compiled
    warm(pair, optimizer, simulated)
    before, go = workers(), threading.Event()
    held, engine, made = last_backward(compiled), compiled._training.engine, list[int]()
    make = engine._make_workers
    engine._make_workers = lambda: (made.append(1), make())[1]  # type: ignore[method-assign]

    def hook(number: int, instruction: str) -> None:
        if number == 0 and instruction == held:
            go.wait(20)

    with begun(hook, compiled):
        compiled.forward_backward(**pair.batch)
        compiled.step(optimizer)
        optimizer.zero_grad()
        with pytest.raises(WorkerTimeout, match=rf"call 1 .*compute has been running {held} for"):
            compiled.forward_backward(**pair.batch).item()
    assert len(made) == 1  # what is behind it is given up with it, and not waited for as long
    check_goes_on(pair, optimizer, simulated)
    go.set()
    compiled.close()
    deadline = time.monotonic() + 5
    while workers() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert workers() < before


def test_time_that_an_iteration_stands_behind_another_does_not_count() -> None:
    pair, optimizer, simulated = make_pair(timeout_s=0.4)
    with pair.compiled as compiled:
        warm(pair, optimizer, simulated)
        engine, behind = compiled._training.engine, threading.Event()

        def hook(number: int, _: str) -> None:
            if number == 0:
                behind.wait(20)
                time.sleep(0.02)
            elif number == 1 and len(engine._flights) > 1:
                while len(engine._flights) > 1:
                    time.sleep(0.01)
                time.sleep(0.15)

        with begun(hook, compiled):
            found = [compiled_step(pair, optimizer, simulated, 1)]
            batch = pair.batch_of(2)
            loss = compiled.forward_backward(**batch)
            behind.set()
            found.append((loss, simulated.forward_backward(1, batch)))
            assert all(torch.equal(mine, theirs) for mine, theirs in found)


@pytest.mark.parametrize("where", ["calling", "reading"])
def test_an_interrupt_leaves_a_model_that_goes_on(where: str) -> None:
    pair, optimizer, simulated = make_pair()
    with pair.compiled as compiled:
        warm(pair, optimizer, simulated)
        compiled.wait()
        engine, done, losses = compiled._training.engine, list[str](), list[torch.Tensor]()
        called = threading.Event()

        def hook(number: int, instruction: str) -> None:
            if not done and instruction == ("0F0" if where == "calling" else last):
                done.append(instruction)
                if where == "reading":
                    called.wait(20)
                _thread.interrupt_main()
                time.sleep(0.05)

        last = last_backward(compiled)
        dispatch = engine._dispatch
        if where == "calling":  # so that it comes while the call enqueues

            def slow(*arguments: Any) -> None:
                dispatch(*arguments)
                time.sleep(1)

            engine._dispatch = slow  # type: ignore[method-assign]
        with begun(hook, compiled):
            with pytest.raises(KeyboardInterrupt):  # noqa: PT012
                losses.append(compiled.forward_backward(**pair.batch_of(1)))
                called.set()
                losses[0].item()
            engine._dispatch = dispatch  # type: ignore[method-assign]
        if where == "calling":
            assert engine._flights == []
        else:  # it goes on
            assert torch.equal(losses[0], simulated.forward_backward(0, pair.batch_of(1)))
            compiled.step(optimizer)
            optimizer.zero_grad()
            simulated.step()
        found = [compiled_step(pair, optimizer, simulated, n) for n in range(2 - (where == "calling"), 4)]
        assert all(torch.equal(mine, theirs) for mine, theirs in found)
        assert same_weights(pair.model, simulated.versions[-1])


def test_60_runs_with_random_delays_and_faults_are_right_or_fail_cleanly_and_leave_nothing() -> None:
    pair, optimizer, simulated = make_pair(name="sgd")
    with pair.compiled as compiled:
        engine, outcomes, left_over = compiled._training.engine, Counter[bool](), list[tuple[int, int]]()
        count = 4 * sum(1 for _ in compiled.plan.schedule.actions())
        for seed in range(60):
            engine.before_instruction = one_fault_and_delays(random.Random(seed), 8 * count)
            failed: list[str] = []
            try:
                found = [compiled_step(pair, optimizer, simulated, iteration) for iteration in range(4)]
                compiled.wait()
                assert all(torch.equal(mine, theirs) for mine, theirs in found)
                assert same_weights(pair.model, simulated.versions[-1])
            except ExecutionError as error:
                failed.append(str(error))
            engine.before_instruction = None
            assert all("injected" in text for text in failed)
            outcomes[bool(failed)] += 1
            assert any(same_weights(pair.model, version) for version in simulated.versions)
            assert all(p.grad is None for p in pair.model.parameters())
            assert engine._flights == []
            assert all(worker.stored_bytes() == 0 for worker in engine._workers)
            start_again(pair, optimizer, simulated)
            if seed in (30, 59):
                for iteration in range(4):
                    compiled_step(pair, optimizer, simulated, iteration)
                start_again(pair, optimizer, simulated)
                left_over.append((live_bytes(), workers()))
        assert min(outcomes.values()) > 10, outcomes
        assert left_over[0] == left_over[1]
