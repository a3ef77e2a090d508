"""On a CUDA device: results, that the host never waits, memory, overlap. Skipped without one."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn

import rpcompile
from rpcompile.errors import ExecutionError, NonFinite
from rpcompile.runtime.host_slots import allocate
from rpcompile.simulate import measured
from tests import models, reference

pytestmark = pytest.mark.gpu
GPUS = 4
OPTIONS: dict[str, Any] = {
    "gpus": GPUS,
    "microbatches": 4,
    "solver_time_s": 0.5,
    "gpu": models.SLOW_GPU,
    "devices": ["cuda:0"] * GPUS,
    "effort": None,
}


@pytest.fixture(autouse=True)
def _convolutions_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """With TensorFloat-32, sums in another order differ by more than they should here."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@contextmanager
def host_never_waits() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("family", ["mlp", "qwen3-tied", "bert-padded", "unet-batchnorm"])
def test_four_logical_gpus_on_one_device_equal_plain_pytorch_there(family: str) -> None:
    case = models.make(family)
    plain = copy.deepcopy(case.model).cuda()
    batch = {name: value.cuda() for name, value in case.batch.items()}
    with rpcompile.compile(case.model, example_inputs=case.batch, **OPTIONS) as compiled:
        random = bool(compiled.program.capture.random)
        compiled.forward_backward(**case.batch)  # kernels are loaded and buffers updated once
        case.model.zero_grad()
        case.model.load_state_dict(plain.state_dict())
        torch.manual_seed(3)
        with host_never_waits():
            loss = compiled.forward_backward(**case.batch)
        torch.manual_seed(3)
        expected = reference.forward_backward(plain, batch, 4, random)
    torch.testing.assert_close(loss, expected.cpu(), rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(case.model.parameters(), plain.parameters(), strict=True):
        # Atomics in some CUDA kernels add in any order.
        torch.testing.assert_close(mine.grad, theirs.grad.cpu(), rtol=1e-4, atol=1e-5)


def big_mlp() -> models.Case:
    torch.manual_seed(0)
    return models.mlp(*[4096] * 9, 16)


def test_memory_peak_is_near_the_prediction_and_comes_back() -> None:
    case = big_mlp()
    with rpcompile.compile(
        case.model, example_inputs=case.batch, **{**OPTIONS, "gpus": 1, "devices": ["cuda:0"]}
    ) as compiled:
        compiled.forward_backward(**case.batch)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        compiled.forward_backward(**case.batch)
        peak = torch.cuda.max_memory_allocated() - before
        assert torch.cuda.memory_allocated() == before
        predicted = compiled.plan.prediction.gpu_peak_bytes[0]
        assert 0.8 * predicted <= peak <= 1.05 * predicted


def test_copies_run_beside_compute() -> None:
    case = big_mlp()
    with rpcompile.compile(case.model, example_inputs=case.batch, **OPTIONS) as compiled:
        engine = compiled._training.engine
        compiled.forward_backward(**case.batch)
        engine.record_times = True
        compiled.forward_backward(**case.batch)
        timeline = measured(compiled.plan.schedule, engine.times)
        assert sum(timeline.busy_s.values()) > timeline.makespan_s


def test_out_of_memory_is_an_ordinary_error_and_the_next_call_works() -> None:
    case = models.make("mlp")
    with rpcompile.compile(case.model, example_inputs=case.batch, **OPTIONS) as compiled:
        expected = compiled.forward_backward(**case.batch)
        engine = compiled._training.engine

        def fill(instruction: str) -> None:
            if instruction.endswith("F1"):
                torch.empty(1 << 50, dtype=torch.uint8, device="cuda")

        engine.before_instruction = fill
        with pytest.raises(ExecutionError, match=r"OutOfMemoryError.*Use more microbatches"):
            compiled.forward_backward(**case.batch)
        engine.before_instruction = None
        assert compiled.forward_backward(**case.batch) == expected


# ------------------------------------------------------------------- steps, host memory


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_overlapped_steps_equal_those_of_cpu_workers_and_the_host_never_waits(mode: str) -> None:
    found: list[list[torch.Tensor]] = []
    for devices in (["cpu"] * GPUS, ["cuda:0"] * GPUS):
        case = models.make("mlp")
        options = {**OPTIONS, "devices": devices, "mode": mode}
        with rpcompile.compile(case.model, example_inputs=case.batch, **options) as compiled:
            optimizer = torch.optim.SGD(compiled.parameters(), lr=0.01)
            for step in range(4):
                with host_never_waits() if step > 1 else nullcontext():
                    compiled.forward_backward(**case.batch)
                compiled.clip_grad_norm_(1.0)
                compiled.step(optimizer)
                optimizer.zero_grad()
        found.append([parameter.detach().clone() for parameter in case.model.parameters()])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_registered_memory_is_pinned_and_copied_without_a_wait() -> None:
    for _ in range(50):  # the next one may get the same address
        flat = allocate(10_000_001, pin=True)
        assert flat.is_pinned()
        with host_never_waits():
            there = flat.to("cuda", non_blocking=True)
            flat.copy_(there, non_blocking=True)
        torch.cuda.synchronize()


def test_a_fork_does_not_separate_the_device_from_the_weights() -> None:
    """As a data loader's workers do; the parent writes weights while they live."""
    losses: list[list[torch.Tensor]] = []
    for forks in (False, True):
        case = models.make("mlp")
        with rpcompile.compile(case.model, example_inputs=case.batch, **OPTIONS) as compiled:
            optimizer = torch.optim.SGD(compiled.parameters(), lr=0.1)
            losses.append([compiled.forward_backward(**case.batch)])
            read, write = os.pipe()
            child = os.fork() if forks else None
            if child == 0:
                os.close(write)
                os.read(read, 1)
                os._exit(0)
            for _ in range(2):
                compiled.step(optimizer)
                optimizer.zero_grad()
                losses[-1].append(compiled.forward_backward(**case.batch))
            os.close(read)
            os.close(write)
            if child is not None:
                os.waitpid(child, 0)
    assert losses[0] == losses[1]


class Noisy(nn.Module):
    """Draws random numbers by an operator without tensors, whose device it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x) * torch.rand(16, device=x.device)
        return x.square().mean()


def test_recompute_draws_the_same_numbers() -> None:
    torch.manual_seed(0)
    model, batch = Noisy(), {"x": torch.randn(8, 16)}
    gradients: list[list[torch.Tensor]] = []
    for gpus in (1, 4):  # other stages, so that others are recomputed
        options = {**OPTIONS, "gpus": gpus, "devices": ["cuda:0"] * gpus}
        with rpcompile.compile(model, example_inputs=batch, **options) as compiled:
            torch.manual_seed(3)
            compiled.forward_backward(**batch)
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        model.zero_grad()
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_inputs_that_are_views_are_copied_without_a_wait() -> None:
    case = models.make("bert-padded")
    batch = {**case.batch, "attention_mask": case.batch["attention_mask"][:1].expand(8, -1)}
    plain = {name: value.contiguous() for name, value in batch.items()}
    with rpcompile.compile(case.model, example_inputs=plain, **OPTIONS) as compiled:
        torch.manual_seed(3)
        expected = compiled.forward_backward(**plain)
        torch.manual_seed(3)
        with host_never_waits():
            found = compiled.forward_backward(**batch)
    assert found == expected


def test_no_bytes_are_left_by_many_iterations_and_the_allocator_never_starts_over() -> None:
    case = models.make("unet-batchnorm")
    with rpcompile.compile(case.model, example_inputs=case.batch, **OPTIONS) as compiled:
        found: list[tuple[int, int]] = []
        for _ in range(20):
            compiled.forward_backward(**case.batch)
            case.model.zero_grad()
            found.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
        assert len(set(found[3:])) == 1
        assert torch.cuda.memory_stats()["num_alloc_retries"] == 0


def test_compiled_stages_equal_plain_ones_within_rounding() -> None:
    case = models.make("mlp")
    losses: list[torch.Tensor] = []
    for compile_stages in (False, True):
        options = {**OPTIONS, "compile_stages": compile_stages}
        with rpcompile.compile(case.model, example_inputs=case.batch, **options) as compiled:
            losses.append(compiled.forward_backward(**case.batch))
            case.model.zero_grad()
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------- failures


def test_a_number_that_is_not_finite_is_named() -> None:
    case = models.make("mlp")
    case.batch["x"][0] = float("nan")
    with (
        rpcompile.compile(case.model, example_inputs=case.batch, detect_nan=True, **OPTIONS) as compiled,
        pytest.raises(NonFinite, match=r"microbatch 0\).*x, which came in so"),
    ):
        compiled.forward_backward(**case.batch)


def test_after_a_device_side_assert_the_weights_can_be_saved(tmp_path: Any) -> None:
    script = f"""
        import torch, rpcompile
        from torch import nn

        class Table(nn.Module):
            def __init__(self):
                super().__init__()
                self.table, self.last = nn.Embedding(4, 8), nn.Linear(8, 8)

            def forward(self, x):
                return self.last(self.table(x)).square().mean()

        model, good = Table(), {{"x": torch.zeros(4, 3, dtype=torch.long)}}
        compiled = rpcompile.compile(model, 1, example_inputs=good, microbatches=2, devices=["cuda:0"])
        compiled.forward_backward(**good)
        try:
            compiled.forward_backward(x=torch.full((4, 3), 9))
        except rpcompile.RpcompileError as error:
            assert "cannot use its GPUs any more" in str(error), error
        else:
            raise AssertionError("no error")
        compiled.save_checkpoint({str(tmp_path)!r})
        """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "checkpoint.json").exists()
