"""The worker under every order that events allow: bit-equal results, and a missing event is noticed."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

import rpcompile
from rpcompile import buffers
from rpcompile.errors import ExecutionError
from rpcompile.ir import Schedule
from rpcompile.memory_bound import gpu_memory_bounds
from tests import models
from tests.fake_streams import FakeEngine, Machine

OPTIONS = {"gpus": 3, "microbatches": 4, "solver_time_s": 0.5, "gpu": models.SLOW_GPU, "effort": None}


def gradients(case: models.Case, compiled: rpcompile.Compiled, machine: Machine | None) -> list[torch.Tensor]:
    """Loss, gradients and buffers of one iteration from the same start."""
    training = compiled._training
    if machine is not None:
        compiled._training = replace(training, engine=FakeEngine(compiled, machine))
    start = copy.deepcopy(case.model.state_dict())
    torch.manual_seed(3)
    try:
        loss = compiled.forward_backward(**case.batch)
        buffers_after = [value.clone() for value in case.model.buffers()]
        return [
            loss,
            *(p.grad.clone() for p in case.model.parameters() if p.grad is not None),
            *buffers_after,
        ]
    finally:
        case.model.zero_grad()
        case.model.load_state_dict(start)
        compiled._training = training


@pytest.fixture(scope="module", params=["mlp", "qwen3-tied", "unet-batchnorm"])
def trained(request: pytest.FixtureRequest) -> tuple[models.Case, rpcompile.Compiled, list[torch.Tensor]]:
    case = models.make(request.param)
    compiled = rpcompile.compile(case.model, example_inputs=case.batch, devices=["cpu"] * 3, **OPTIONS)
    return case, compiled, gradients(case, compiled, None)


@pytest.mark.parametrize("seed", range(12))
def test_any_order_gives_the_same_bits(
    trained: tuple[models.Case, rpcompile.Compiled, list[torch.Tensor]], seed: int
) -> None:
    case, compiled, expected = trained
    found = gradients(case, compiled, Machine(seed))
    assert len(found) == len(expected)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


def data_waits(schedule: Schedule) -> list[tuple[int, str]]:
    """(GPU, event) of the waits for an action that made what the waiting one reads."""
    recorders = {event: action for action in schedule.actions() for event in action.records}
    return [
        (action.gpu, event)
        for action in schedule.actions()
        for event in action.waits
        if set(recorders[event].writes) & set(action.reads)
    ]


def test_a_missing_event_is_noticed_in_some_order() -> None:
    case = models.make("mlp")
    compiled = rpcompile.compile(case.model, example_inputs=case.batch, devices=["cpu"] * 3, **OPTIONS)
    expected = gradients(case, compiled, None)
    waits = data_waits(compiled.plan.schedule)
    assert len(waits) >= 12
    for wait in waits[:: len(waits) // 12]:
        assert any(not survives(case, compiled, expected, Machine(seed, {wait})) for seed in range(20)), wait


def survives(
    case: models.Case, compiled: rpcompile.Compiled, expected: list[torch.Tensor], machine: Machine
) -> bool:
    try:
        found = gradients(case, compiled, machine)
    except ExecutionError:
        return False
    return all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


def test_memory_is_what_the_schedule_says_after_every_instruction() -> None:
    """Bytes in each GPU's store against the sizes of the buffers written and not yet freed.

    Of a tape, which is as large as autograd may need, that it is there from its recompute to its backward.
    """
    case = models.make("unet-batchnorm")
    compiled = rpcompile.compile(case.model, example_inputs=case.batch, devices=["cpu"] * 3, **OPTIONS)
    actions = {action.id: action for action in compiled.plan.schedule.actions()}
    sizes = compiled.plan.schedule.buffers
    for seed in range(4):
        machine = Machine(seed)
        engine = FakeEngine(compiled, machine)
        alive: set[str] = set()
        tapes: set[str] = set()
        peaks = [0] * 3

        def compare(
            machine: Machine = machine,
            engine: FakeEngine = engine,
            alive: set[str] = alive,
            tapes: set[str] = tapes,
            peaks: list[int] = peaks,
        ) -> None:
            action = actions.get(machine.done[-1])
            if action is None:
                return
            alive |= {name for name in action.writes if ":tape." not in name}
            alive -= set(action.frees)
            tapes |= {name for name in action.writes if ":tape." in name}
            tapes -= set(action.reads)
            assert tapes == {name for worker in engine._workers for name in worker._tapes}
            for worker in engine._workers:
                expected = sum(sizes[b] for b in alive if buffers.space_of(b) == f"gpu{worker.index}")
                assert worker.stored_bytes() == expected, (action.id, worker.index)
                peaks[worker.index] = max(peaks[worker.index], expected)

        machine.after_task = compare
        training = compiled._training
        compiled._training = replace(training, engine=engine)
        compiled.forward_backward(**case.batch)
        compiled._training = training
        assert not any(buffers.space_of(buffer) != buffers.HOST for buffer in alive)
        bounds = gpu_memory_bounds(compiled.plan.schedule)
        assert all(0 < peak <= bound for peak, bound in zip(peaks, bounds, strict=True))
