"""On a CUDA device: results, that the host never waits, memory, overlap. Skipped without one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import rpcompile
from rpcompile.errors import ExecutionError
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
