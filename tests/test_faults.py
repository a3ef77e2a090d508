"""Failures of workers: what the caller is told, and that nothing but the iteration is lost."""

from __future__ import annotations

import _thread
import copy
import gc
import random
import re
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import rpcompile
from rpcompile.errors import ExecutionError, NonFinite, WorkerTimeout
from rpcompile.ir import Op
from tests import models

if TYPE_CHECKING:
    from collections.abc import Callable

OPTIONS = {"gpus": 2, "microbatches": 4, "solver_time_s": 0.5, "gpu": models.SLOW_GPU, "effort": None}


def compile_mlp(**options: Any) -> tuple[rpcompile.Compiled, models.Case]:
    case = models.make("mlp")
    return rpcompile.compile(case.model, example_inputs=case.batch, **{**OPTIONS, **options}), case


def gradients(case: models.Case) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in case.model.parameters()]


def workers() -> int:
    return sum(thread.name.startswith("rpcompile") for thread in threading.enumerate())


def hooked(compiled: rpcompile.Compiled, hook: Any) -> None:
    compiled._training.engine.before_instruction = hook


def check_recovery(compiled: rpcompile.Compiled, case: models.Case, expected: Any) -> None:
    """The next call works, and nothing is left of the failed one."""
    hooked(compiled, None)
    assert all(parameter.grad is None for parameter in case.model.parameters())
    loss, wanted = expected
    assert compiled.forward_backward(**case.batch) == loss
    assert all(torch.equal(a, b) for a, b in zip(gradients(case), wanted, strict=True))
    case.model.zero_grad()


def reference(compiled: rpcompile.Compiled, case: models.Case) -> Any:
    loss = compiled.forward_backward(**case.batch)
    found = loss, gradients(case)
    case.model.zero_grad()
    return found


# --------------------------------------------------------------------- exceptions


class Fragile(nn.Module):
    """Looks up one row a sample in each of four layers; an index beyond the table fails in that layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.tables = nn.ModuleList(nn.Embedding(5, 8) for _ in range(4))

    def forward(self, x: torch.Tensor, rows: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        for number, (layer, table) in enumerate(zip(self.layers, self.tables, strict=True)):
            x = layer(x).relu() + table(rows[:, number])
        return nn.functional.cross_entropy(x, target)


@pytest.fixture(scope="module")
def fragile() -> tuple[rpcompile.Compiled, models.Case, Any]:
    torch.manual_seed(0)
    model = Fragile()
    batch = {
        "x": torch.randn(8, 8),
        "rows": torch.randint(0, 5, (8, 4)),
        "target": torch.randint(0, 8, (8,)),
    }
    case = models.Case(model, batch)
    compiled = rpcompile.compile(model, example_inputs=batch, **OPTIONS)
    return compiled, case, reference(compiled, case)


@pytest.mark.parametrize("microbatch", range(4))
@pytest.mark.parametrize("layer", range(4))
def test_exception_in_a_module_names_stage_microbatch_gpu_and_module(
    fragile: tuple[rpcompile.Compiled, models.Case, Any], layer: int, microbatch: int
) -> None:
    compiled, case, expected = fragile
    rows = case.batch["rows"].clone()
    rows[2 * microbatch, layer] = 99
    pattern = (
        rf"of stage \d+, microbatch {microbatch}\) failed on GPU [01] in .*, at tables\.{layer} \(.*embedding"
    )
    with pytest.raises(ExecutionError, match=pattern) as caught:
        compiled.forward_backward(**{**case.batch, "rows": rows})
    assert isinstance(caught.value.__cause__, IndexError)
    check_recovery(compiled, case, expected)


@pytest.mark.parametrize("microbatch", range(4))
def test_exception_in_the_loss_names_the_microbatch(
    fragile: tuple[rpcompile.Compiled, models.Case, Any], microbatch: int
) -> None:
    compiled, case, expected = fragile
    target = case.batch["target"].clone()
    target[2 * microbatch + 1] = 99
    with pytest.raises(ExecutionError, match=rf"FB{microbatch} .*, at the model itself \(.*cross_entropy"):
        compiled.forward_backward(**{**case.batch, "target": target})
    check_recovery(compiled, case, expected)


def test_out_of_memory_in_any_instruction() -> None:
    compiled, case = compile_mlp()
    expected = reference(compiled, case)
    ids = {action.op: action.id for action in compiled.plan.schedule.actions()}
    assert {Op.PREFETCH, Op.LOAD, Op.RECEIVE, Op.FORWARD, Op.BACKWARD, Op.FUSED, Op.HANDOFF} < ids.keys()
    for op, action in ids.items():

        def fail(instruction: str, action: str = action) -> None:
            if instruction == action:
                raise torch.OutOfMemoryError("simulated")

        hooked(compiled, fail)
        with pytest.raises(
            ExecutionError,
            match=rf"{action} \({op.name.lower()} .*OutOfMemoryError: simulated\. Use more mic",
        ):
            compiled.forward_backward(**case.batch)
        check_recovery(compiled, case, expected)
    compiled.close()


# --------------------------------------------------------------------- watchdog, interrupt


def test_a_worker_that_stops_answering_is_named_with_those_that_wait_for_it() -> None:
    compiled, case = compile_mlp(timeout_s=0.4)
    expected = reference(compiled, case)
    before = workers()
    go_on = threading.Event()
    stuck = next(
        action
        for action in compiled.plan.schedule.actions()
        if action.gpu == 1 and action.op is Op.HANDOFF and action.records
    )

    def hang(instruction: str) -> None:
        if instruction == stuck.id:
            go_on.wait(20)

    hooked(compiled, hang)
    with pytest.raises(WorkerTimeout) as caught:
        compiled.forward_backward(**case.batch)
    text = str(caught.value)
    assert "no instruction came to its end for 0." in text
    assert f"(timeout_s=0.4). gpu1 d2h has been running {stuck.id} for 0." in text
    assert re.search(
        rf"gpu0 h2d has been waiting for \d\.\d s for {stuck.records[0]} from {stuck.id} \(gpu1 d2h\)", text
    )
    check_recovery(compiled, case, expected)
    go_on.set()
    deadline = time.monotonic() + 5
    while workers() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert workers() == before
    check_recovery(compiled, case, expected)
    compiled.close()


@pytest.mark.parametrize("at", ["0F0", "FB2", "B3", "G@"])
def test_interrupt_in_the_middle_stops_cleanly(at: str) -> None:
    compiled, case = compile_mlp()
    expected = reference(compiled, case)
    interrupted: list[str] = []

    def interrupt(instruction: str) -> None:
        if at in instruction and not interrupted:
            interrupted.append(instruction)
            _thread.interrupt_main()
            time.sleep(0.05)

    hooked(compiled, interrupt)
    with pytest.raises(KeyboardInterrupt):
        compiled.forward_backward(**case.batch)
    check_recovery(compiled, case, expected)
    compiled.close()


# --------------------------------------------------------------------- numbers that are not finite


class Spiky(nn.Module):
    """exp overflows forward for large inputs; sqrt has an infinite derivative at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.grow, self.root, self.last = (nn.Linear(4, 4) for _ in range(4))
        self.exp, self.sqrt = Exp(), Sqrt()

    def forward(self, x: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        x = self.grow(self.exp(self.first(x)))
        x = self.root(self.sqrt(x.abs() * zero))
        return self.last(x).square().mean()


class Exp(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.exp()


class Sqrt(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sqrt()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x": 1e4},
            r"microbatch 2\) failed on GPU [01] in .*: the first result that is not finite is that of exp ",
        ),
        (
            {"zero": 0.0},
            r"microbatch 2\).*: the first gradient that is not finite comes from the backward of sqrt ",
        ),
        ({"x": float("nan")}, r"microbatch 2\).*is not finite is that of x, which came in so"),
    ],
)
def test_detect_nan_names_the_first_module(change: dict[str, float], message: str) -> None:
    torch.manual_seed(0)
    model = Spiky()
    batch = {"x": torch.rand(8, 4), "zero": torch.ones(8, 4)}
    with rpcompile.compile(model, example_inputs=batch, detect_nan=True, **OPTIONS) as compiled:
        case = models.Case(model, batch)
        expected = reference(compiled, case)
        for name, value in change.items():
            bad = batch[name].clone()
            bad[4] = value
            with pytest.raises(NonFinite, match=message):
                compiled.forward_backward(**{**batch, name: bad})
        check_recovery(compiled, case, expected)


def test_without_detect_nan_numbers_are_what_they_are() -> None:
    compiled, case = compile_mlp()
    case.batch["x"][0] = float("nan")
    assert compiled.forward_backward(**case.batch).isnan()
    compiled.close()


# --------------------------------------------------------------------- soak


def live_bytes() -> int:
    gc.collect()
    tensors = [found for found in gc.get_objects() if type(found) in (torch.Tensor, nn.Parameter)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def one_fault_and_delays(choices: random.Random, instructions: int) -> Callable[[str], None]:
    """A hook that raises before one of the next `instructions`, and delays one in fifty by up to 1 ms."""
    left = choices.randrange(instructions)

    def hook(_: str) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise choices.choice([MemoryError, torch.OutOfMemoryError, ValueError])("injected")
        if choices.random() < 0.02:
            time.sleep(choices.random() * 1e-3)

    return hook


def test_200_runs_with_random_delays_and_faults_are_right_or_fail_cleanly_and_leave_nothing() -> None:
    compiled, case = compile_mlp()
    expected = reference(compiled, case)
    state = copy.deepcopy(case.model.state_dict())
    threads, memory, outcomes = workers(), None, {True: 0, False: 0}
    count = sum(1 for _ in compiled.plan.schedule.actions())
    for seed in range(200):
        hooked(compiled, one_fault_and_delays(random.Random(seed), 6 * count))
        failed: list[ExecutionError] = []
        try:
            loss = compiled.forward_backward(**case.batch)
        except ExecutionError as error:
            failed.append(error)
        if failed:
            assert "injected" in str(failed[0])
            assert all(parameter.grad is None for parameter in case.model.parameters())
        else:
            assert loss == expected[0]
            assert all(torch.equal(a, b) for a, b in zip(gradients(case), expected[1], strict=True))
        outcomes[not failed] += 1
        failed.clear()
        case.model.zero_grad()
        if seed == 20:
            memory = live_bytes()
    assert min(outcomes.values()) > 20, outcomes
    assert all(torch.equal(value, state[name]) for name, value in case.model.state_dict().items())
    assert workers() == threads
    assert live_bytes() == memory
    for worker in compiled._training.engine._workers:
        assert worker.stored_bytes() == 0
        assert worker._iteration is None
    compiled.close()
