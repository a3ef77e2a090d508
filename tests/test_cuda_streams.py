"""The streams of a CUDA device, without one: order of enqueuing, when memory goes, failures."""

from __future__ import annotations

import copy
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch

import rpcompile
from rpcompile.errors import ExecutionError, WorkerTimeout
from rpcompile.runtime.cuda_streams import CudaStreams
from rpcompile.runtime.engine import Engine, RuntimeOptions
from rpcompile.runtime.streams import Cancelled, Iteration
from rpcompile.runtime.worker import LANES
from tests import fake_cuda, models

CPU = torch.device("cpu")
OPTIONS = {"gpus": 3, "microbatches": 4, "solver_time_s": 0.5, "gpu": models.SLOW_GPU, "effort": None}


class CudaEngine(Engine):
    """An engine with CUDA's streams over the fake driver."""

    def _make_streams(self) -> list[Any]:
        return [CudaStreams(index, CPU, LANES, fake_cuda) for index in range(len(self._devices))]


@pytest.fixture
def streams() -> Any:
    made = CudaStreams(0, CPU, ("h2d", "compute", "d2h"), fake_cuda)
    yield made
    made.close()


def held(streams: CudaStreams, made_by: str, freed_by: str) -> weakref.ref[torch.Tensor]:
    """Frees a tensor and returns what tells whether it is gone."""
    tensor = torch.zeros(3)
    streams.release(freed_by, made_by, [{"t": tensor}])
    return weakref.ref(tensor)


def test_what_its_own_stream_frees_goes_at_once(streams: CudaStreams) -> None:
    assert held(streams, "compute", "compute")() is None


def test_what_another_stream_frees_stays_until_its_own_stream_waits_for_that(streams: CudaStreams) -> None:
    iteration = Iteration({})
    streams.record(iteration, "compute", "before")
    found: list[weakref.ref[torch.Tensor]] = []
    streams.enqueue(iteration, "compute", "0X0", lambda: found.append(held(streams, "h2d", "compute")))
    streams.record(iteration, "compute", "after")
    assert found[0]() is not None
    streams.wait(iteration, "h2d", "before")
    assert found[0]() is not None
    streams.wait(iteration, "d2h", "after")
    assert found[0]() is not None
    streams.wait(iteration, "h2d", "after")
    assert found[0]() is None


def test_a_wait_carries_over_what_the_recording_stream_waited_for(streams: CudaStreams) -> None:
    iteration = Iteration({})
    found: list[weakref.ref[torch.Tensor]] = []
    streams.enqueue(iteration, "compute", "0X0", lambda: found.append(held(streams, "h2d", "compute")))
    streams.record(iteration, "compute", "e1")
    streams.wait(iteration, "d2h", "e1")
    streams.record(iteration, "d2h", "e2")
    assert found[0]() is not None
    streams.wait(iteration, "h2d", "e2")
    assert found[0]() is None


def test_what_is_still_held_goes_when_the_device_is_done(streams: CudaStreams) -> None:
    iteration = Iteration({})
    found: list[weakref.ref[torch.Tensor]] = []
    streams.enqueue(iteration, "compute", "0X0", lambda: found.append(held(streams, "h2d", "compute")))
    assert found[0]() is not None
    assert streams.drain(iteration)[0].wait(5)
    assert found[0]() is None


def test_a_failing_task_fails_the_iteration_under_its_own_name(streams: CudaStreams) -> None:
    iteration = Iteration({})
    with pytest.raises(Cancelled):
        streams.enqueue(iteration, "compute", "0F0", lambda: 1 // 0)
    assert iteration.failure is not None
    assert iteration.failure.instruction == "0F0"
    with pytest.raises(Cancelled):
        streams.enqueue(iteration, "compute", "0F1", lambda: None)


def run(case: models.Case, compiled: rpcompile.Compiled, engine: Engine) -> list[torch.Tensor]:
    training, start = compiled._training, copy.deepcopy(case.model.state_dict())
    compiled._training = replace(training, engine=engine)
    torch.manual_seed(3)
    try:
        loss = compiled.forward_backward(**case.batch)
        state = [value.clone() for value in case.model.buffers()]
        return [loss, *(p.grad.clone() for p in case.model.parameters() if p.grad is not None), *state]
    finally:
        case.model.zero_grad()
        case.model.load_state_dict(start)
        compiled._training = training


@pytest.mark.parametrize("family", ["mlp", "qwen3-lora", "unet-batchnorm"])
def test_programs_enqueue_in_an_order_that_cuda_can_run(family: str) -> None:
    """No wait for an unrecorded event, no deadlock of the enqueuing threads, the right result."""
    case = models.make(family)
    compiled = rpcompile.compile(case.model, example_inputs=case.batch, **OPTIONS)
    expected = run(case, compiled, compiled._training.engine)
    engine = CudaEngine(compiled.program, compiled.plan.chain, RuntimeOptions(timeout_s=20))
    engine.record_times = True
    for _ in range(3):
        found = run(case, compiled, engine)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
    assert engine.times.keys() == {action.id for action in compiled.plan.schedule.actions()}
    engine.close()
    compiled.close()


def test_memory_held_for_other_streams_stays_within_the_predicted_peak() -> None:
    """What a device allocator would have allocated, however far the threads are ahead of the device."""
    case = models.make("qwen3-tied")
    compiled = rpcompile.compile(case.model, example_inputs=case.batch, **OPTIONS)
    engine = CudaEngine(compiled.program, compiled.plan.chain)
    peaks = [0] * 3

    def measure(_: str) -> None:
        for worker in engine._workers:
            streams = worker._streams
            assert isinstance(streams, CudaStreams)
            kept = [held for found in list(streams._held.values()) for held in found]
            nbytes = sum(t.nbytes for held in kept for made in held.tensors for t in made.values())
            peaks[worker.index] = max(peaks[worker.index], nbytes + worker.stored_bytes())

    engine.before_instruction = measure
    stored = [worker.stored_bytes for worker in engine._workers]
    for worker, nbytes in zip(engine._workers, stored, strict=True):
        worker.stored_bytes = lambda n=nbytes: _retry(n)  # type: ignore[method-assign]
    run(case, compiled, engine)
    for peak, predicted in zip(peaks, compiled.plan.prediction.gpu_peak_bytes, strict=True):
        assert 0 < peak <= predicted
    engine.close()
    compiled.close()


def _retry(measure: Any) -> int:
    while True:
        try:
            return measure()
        except RuntimeError:  # another GPU's store changed while it was summed up
            continue


def test_failures_reach_the_caller_and_the_next_call_works() -> None:
    case = models.make("mlp")
    compiled = rpcompile.compile(case.model, example_inputs=case.batch, **OPTIONS)
    expected = run(case, compiled, compiled._training.engine)
    engine = CudaEngine(compiled.program, compiled.plan.chain, RuntimeOptions(timeout_s=20))
    for action in ("0F0", "B2", "H1", "P@1", "wait e3"):

        def fail(instruction: str, action: str = action) -> None:
            if action in instruction:
                raise MemoryError("injected")

        engine.before_instruction = fail
        with pytest.raises(ExecutionError, match="MemoryError: injected"):
            run(case, compiled, engine)
        engine.before_instruction = None
        found = run(case, compiled, engine)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
    engine.close()
    compiled.close()


def test_a_device_that_hangs_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    case = models.make("mlp")
    compiled = rpcompile.compile(case.model, example_inputs=case.batch, **OPTIONS)
    expected = run(case, compiled, compiled._training.engine)
    engine = CudaEngine(compiled.program, compiled.plan.chain, RuntimeOptions(timeout_s=0.4))
    monkeypatch.setattr(fake_cuda.Event, "stuck", True)
    with pytest.raises(WorkerTimeout, match=r"gpu0 compute has been running 0F0 for 0\.\d s"):
        run(case, compiled, engine)
    monkeypatch.setattr(fake_cuda.Event, "stuck", False)
    found = run(case, compiled, engine)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
    engine.close()
    compiled.close()
