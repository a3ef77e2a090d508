"""The streams of a CUDA device, without one: order of enqueuing, when memory goes, failures."""

from __future__ import annotations

import copy
import gc
import inspect
import random
import sys
import weakref
from collections import Counter
from collections.abc import Collection, Iterator
from concurrent.futures import Future
from dataclasses import replace
from types import ModuleType
from typing import Any

import networkx as nx
import pytest
import torch

import rpcompile
from rpcompile.errors import ExecutionError, WorkerTimeout
from rpcompile.ir import ActionId, Op, Stream
from rpcompile.ordering import ActionGraph, HappensBefore
from rpcompile.runtime import cuda_streams
from rpcompile.runtime.cuda_streams import CudaStreams
from rpcompile.runtime.engine import Engine, RuntimeOptions
from rpcompile.runtime.streams import Cancelled, Iteration, Place
from rpcompile.runtime.weight_arenas import WeightArenas
from rpcompile.runtime.worker import LANES
from tests import models
from tests.fake_cuda import MEMORY, Driver, Event

CPU = torch.device("cpu")
OPTIONS = {"gpus": 3, "microbatches": 4, "solver_time_s": 0.5, "gpu": models.SLOW_GPU, "effort": None}
Wait = tuple[int, str, str]
"""A GPU, its stream that waits, and the event."""


class CudaEngine(Engine):
    """An engine with CUDA's streams over the fake driver.

    Args:
        compiled: What to run.
        driver: The device; one for each GPU of the program.
        kind: The class of the streams.
        timeout_s: For the watchdog.
    """

    def __init__(
        self,
        compiled: rpcompile.Compiled,
        driver: Driver,
        kind: type[CudaStreams] = CudaStreams,
        timeout_s: float = 20,
    ) -> None:
        self._driver, self._kind = driver, kind
        options, arenas = RuntimeOptions(timeout_s=timeout_s), WeightArenas(adopt=True)
        super().__init__(compiled.program, compiled.plan.chain, options, arenas)

    def _make_streams(self) -> list[Any]:
        made = [self._kind(index, CPU, LANES, self._driver) for index in range(len(self._devices))]
        for index, streams in enumerate(made):
            for name, stream in streams._streams.items():
                stream.name = (index, str(name))
        return made


@pytest.fixture
def streams() -> Iterator[CudaStreams]:
    made = CudaStreams(0, CPU, ("h2d", "compute", "d2h"), Driver())
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _host_memory_is_overwritten_when_it_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("host_slots", "weight_arenas"):
        monkeypatch.setattr(f"rpcompile.runtime.{module}.allocate", MEMORY.host)


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


def equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


@pytest.fixture(scope="module")
def small() -> Iterator[tuple[models.Case, rpcompile.Compiled, list[torch.Tensor]]]:
    """A model on two GPUs, with four jobs each, and what one iteration gives on CPU workers."""
    case = models.build(lambda: models.mlp(*[16] * 7, 5))
    options = {**OPTIONS, "gpus": 2, "microbatches": 2}
    with rpcompile.compile(case.model, example_inputs=case.batch, **options) as compiled:
        yield case, compiled, run(case, compiled, compiled._training.engine)


# ------------------------------------------------------------------- results


@pytest.mark.parametrize(("family", "seeds"), [("mlp", 6), ("qwen3-lora", 2), ("unet-batchnorm", 2)])
def test_any_order_that_the_events_allow_gives_the_same_bits(family: str, seeds: int) -> None:
    """And no wait for an unrecorded event, no deadlock of the enqueuing threads, no wait of the host."""
    case = models.make(family)
    compiled = rpcompile.compile(case.model, example_inputs=case.batch, **OPTIONS)
    expected = run(case, compiled, compiled._training.engine)
    ids = {action.id for action in compiled.plan.schedule.actions()}
    for seed in range(seeds):
        driver = Driver(seed, gpus=3, eager=0.1 * seed)
        engine = CudaEngine(compiled, driver)
        for timed in (False, True) if seed == 0 else (bool(seed % 2),):
            engine.record_times = timed
            assert equal(run(case, compiled, engine), expected)
            assert driver.idle
            assert engine.times.keys() == (ids if timed else set())
        engine.close()
    compiled.close()


class Listening(CudaStreams):
    """Streams some of whose waits are left out, and which note what comes after what."""

    ignored: Collection[Wait] = ()
    counts: Counter[Place]
    recorded: dict[str, tuple[Place, int]]
    waits: dict[Wait, tuple[Place, int]]

    def enqueue(self, iteration: Iteration, stream: str, instruction: str, task: Any) -> None:
        if ActionId.parse(instruction).op is not Op.FREE:  # of which the device knows nothing
            self.counts[self._gpu, str(stream)] += 1
        super().enqueue(iteration, stream, instruction, task)

    def wait(self, iteration: Iteration, stream: str, event: str) -> None:
        place = self._gpu, str(stream)
        self.waits[*place, event] = place, self.counts[place] + 1
        super().wait(iteration, stream, event)

    def _enqueue_wait(self, iteration: Iteration, stream: str, event: str) -> None:
        self._streams[stream].deaf = (self._gpu, str(stream), event) in self.ignored
        super()._enqueue_wait(iteration, stream, event)
        self._streams[stream].deaf = False

    def record(self, iteration: Iteration, stream: str, event: str) -> None:
        place = self._gpu, str(stream)
        self.recorded[event] = place, self.counts[place]
        super().record(iteration, stream, event)

    @classmethod
    def implied(cls) -> set[Wait]:
        """The waits that others and the order of each stream imply."""
        graph = nx.MultiDiGraph()
        for place, count in cls.counts.items():
            nx.add_path(graph, [(place, index) for index in range(count + 2)])
        for wait, node in cls.waits.items():
            graph.add_edge(cls.recorded[wait[2]], node, wait)
        found: set[Wait] = set()
        for wait, node in cls.waits.items():
            graph.remove_edge(cls.recorded[wait[2]], node, wait)
            if nx.has_path(graph, cls.recorded[wait[2]], node):
                found.add(wait)
            graph.add_edge(cls.recorded[wait[2]], node, wait)
        return found


def survives(
    small: tuple[models.Case, rpcompile.Compiled, list[torch.Tensor]],
    driver: Driver,
    kind: type[CudaStreams],
) -> bool:
    case, compiled, expected = small
    engine = CudaEngine(compiled, driver, kind)
    try:
        return equal(run(case, compiled, engine), expected) and driver.idle
    except (ExecutionError, AssertionError):
        return False
    finally:
        engine.close()


def test_without_any_one_wait_of_a_stream_results_are_wrong(
    small: tuple[models.Case, rpcompile.Compiled, list[torch.Tensor]],
) -> None:
    """The waiting stream goes first and the awaited one last. Uploads, downloads, compute, memory: all."""
    Listening.counts, Listening.recorded, Listening.waits, Listening.ignored = Counter(), {}, {}, ()
    assert survives(small, Driver(0, gpus=2), Listening)
    waits = list(Listening.waits)
    assert {stream for _, stream, _ in waits} == set(map(str, LANES))
    implied = Listening.implied()
    needed = [wait for wait in waits if wait not in implied]
    assert len(needed) > len(waits) / 2
    for gpu, stream, event in needed:
        Listening.ignored = {(gpu, stream, event)}
        driver = Driver(1, gpus=2, first=(gpu, stream), last=Listening.recorded[event][0])
        assert not survives(small, driver, Listening), (gpu, stream, event)


MUTANTS = {
    "no wait": ("self._streams[stream].wait_event(mark.event)", "pass"),
    "recorded elsewhere": (
        "recorded.record(self._streams[stream])",
        'recorded.record(self._streams["d2h"])',
    ),
    "work elsewhere": (
        "with self._driver.stream(self._streams[stream]):",
        'with self._driver.stream(self._streams["compute"]):',
    ),
    "freed at once": ("if stream != made_by:", "if False:"),
    "freed at any wait": ("clock.get(held.freed_by, 0) < held.position", "False"),
    "freed an instruction early": ("self._clocks[stream][freed_by], tensors", "0, tensors"),
    "instructions not counted": ("self._clocks[stream][self._gpu, stream] += 1", "pass"),
    "clocks go on in marks": (
        "_Mark(recorded, dict(self._clocks[stream]))",
        "_Mark(recorded, self._clocks[stream])",
    ),
    "not awaited": ("while any(self._pending.values()):", "while False:"),
    "ends too early": ("while pending and pending[0][2].query():", "while pending:"),
}


def mutated(old: str, new: str) -> type[CudaStreams]:
    """The class with one piece of its source replaced."""
    source = inspect.getsource(cuda_streams)
    assert source.count(old) == 1, old
    module = ModuleType("mutated_cuda_streams")
    sys.modules[module.__name__] = module  # dataclasses look it up
    exec(compile(source.replace(old, new), "mutated_cuda_streams", "exec"), module.__dict__)
    return module.__dict__["CudaStreams"]


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_protocol_is_noticed(
    small: tuple[models.Case, rpcompile.Compiled, list[torch.Tensor]], name: str
) -> None:
    kind = mutated(*MUTANTS[name])
    assert not all(survives(small, Driver(seed, gpus=2), kind) for seed in range(24))


# ------------------------------------------------------------------- memory


def test_memory_held_for_other_streams_stays_within_the_predicted_peak() -> None:
    """What a device allocator would have allocated, however far the threads are ahead of the device."""
    case = models.make("qwen3-tied")
    compiled = rpcompile.compile(case.model, example_inputs=case.batch, **OPTIONS)
    engine = CudaEngine(compiled, Driver(gpus=3))
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


# ------------------------------------------------------------------- failures


def test_failures_reach_the_caller_and_the_next_call_works(
    small: tuple[models.Case, rpcompile.Compiled, list[torch.Tensor]],
) -> None:
    case, compiled, expected = small
    driver = Driver(gpus=2)
    engine = CudaEngine(compiled, driver)
    for action in ("0F0", "B1", "H1", "P@1", "wait e3"):

        def fail(instruction: str, action: str = action) -> None:
            if action in instruction:
                raise MemoryError("injected")

        engine.before_instruction = fail
        with pytest.raises(ExecutionError, match="MemoryError: injected"):
            run(case, compiled, engine)
        assert driver.idle
        engine.before_instruction = None
        assert equal(run(case, compiled, engine), expected)
    engine.close()


def test_out_of_memory_in_any_operator_leaves_nothing_running(
    small: tuple[models.Case, rpcompile.Compiled, list[torch.Tensor]],
) -> None:
    """Also in the middle of an instruction, part of which has been enqueued."""
    case, compiled, expected = small
    driver = Driver(gpus=2)
    engine = CudaEngine(compiled, driver)
    driver.operators_left = most = 10**6
    run(case, compiled, engine)
    count = most - driver.operators_left
    for operators in range(0, count, count // 12):
        driver.operators_left = operators
        with pytest.raises(ExecutionError, match=r"OutOfMemoryError: simulated\. Use more microbatches"):
            run(case, compiled, engine)
        assert driver.idle
        assert equal(run(case, compiled, engine), expected)
    engine.close()


def test_a_device_that_hangs_is_reported(
    small: tuple[models.Case, rpcompile.Compiled, list[torch.Tensor]],
) -> None:
    case, compiled, expected = small
    driver = Driver(gpus=2)
    engine = CudaEngine(compiled, driver, timeout_s=0.4)
    driver.stuck = True
    with pytest.raises(WorkerTimeout, match=r"gpu0 compute has been running 0F0 for 0\.\d s"):
        run(case, compiled, engine)
    driver.stuck = False
    assert equal(run(case, compiled, engine), expected)
    engine.close()


def test_a_lost_context_is_said_to_be_lost(
    small: tuple[models.Case, rpcompile.Compiled, list[torch.Tensor]],
) -> None:
    case, compiled, _ = small
    driver = Driver(gpus=2)
    engine = CudaEngine(compiled, driver)
    driver.broken = torch.AcceleratorError("CUDA error: device-side assert triggered")
    with pytest.raises(
        ExecutionError,
        match=r"AcceleratorError: CUDA error: device-side assert triggered\. This process cannot use its "
        r"GPUs any more.*save_checkpoint",
    ):
        run(case, compiled, engine)
    engine.close()


def test_40_runs_with_random_orders_and_faults_are_right_or_fail_cleanly_and_leave_nothing(
    small: tuple[models.Case, rpcompile.Compiled, list[torch.Tensor]],
) -> None:
    case, compiled, expected = small
    driver = Driver(1, gpus=2, eager=0.2)
    engine = CudaEngine(compiled, driver)
    count = 3 * sum(1 for _ in compiled.plan.schedule.actions())
    outcomes, events, nbytes = Counter[bool](), [], []
    for seed in range(40):
        choices = random.Random(seed)
        left = [choices.randrange(2 * count)]

        def hook(_: str, choices: random.Random = choices, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise choices.choice([MemoryError, torch.OutOfMemoryError, ValueError])("injected")

        engine.before_instruction = hook
        failed: str | None = None
        try:
            assert equal(run(case, compiled, engine), expected)
        except ExecutionError as error:
            failed = str(error)
        assert failed is None or "injected" in failed
        outcomes[failed is None] += 1
        assert driver.idle
        assert all(p.grad is None for p in case.model.parameters())
        for worker in engine._workers:
            assert worker.stored_bytes() == 0
        if seed in (20, 39):
            gc.collect()
            events.append(sum(type(found) is Event for found in gc.get_objects()))
            driver.advance()
            nbytes.append(MEMORY.nbytes)
    assert min(outcomes.values()) > 8, outcomes
    assert events[0] == events[1] > 0
    assert nbytes[0] == nbytes[1]
    engine.close()


# ------------------------------------------------------------------- training


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_steps_that_overlap_the_next_iteration_do_not_reach_its_uploads(mode: str) -> None:
    """Weights are rewritten on the host while the device is behind."""
    found: list[list[torch.Tensor]] = []
    for seed in (None, 0, 1):
        case = models.make("mlp")
        options = {**OPTIONS, "gpus": 2, "microbatches": 2, "mode": mode}
        with rpcompile.compile(case.model, example_inputs=case.batch, **options) as compiled:
            if seed is not None:
                engine = CudaEngine(compiled, Driver(seed, gpus=2, eager=0.3 * seed))
                compiled._training = replace(compiled._training, engine=engine)
            optimizer = torch.optim.AdamW(compiled.parameters(), lr=0.1)
            losses = []
            for _ in range(4):
                losses.append(compiled.forward_backward(**case.batch))
                compiled.step(optimizer)
                optimizer.zero_grad()
            found.append([*losses, *(parameter.detach().clone() for parameter in case.model.parameters())])
    assert equal(found[1], found[0])
    assert equal(found[2], found[0])


class Pending(CudaEngine):
    """An engine whose next run has to wait for work of the host."""

    pending: dict[int, Future[None]] | None = None

    def run(self, tensors: Any, inputs: Any, microbatches: Any, pending: Any = None) -> Any:
        return super().run(tensors, inputs, microbatches, self.pending)


def test_an_update_that_is_late_keeps_back_only_what_needs_its_weights(
    small: tuple[models.Case, rpcompile.Compiled, list[torch.Tensor]],
) -> None:
    """While one is held back, all that does not come behind an upload of its segment is enqueued."""
    case, compiled, expected = small
    engine = Pending(compiled, Driver(gpus=2), timeout_s=5)
    run(case, compiled, engine)  # weights move into their arenas, and are not copied again
    order = HappensBefore(ActionGraph.from_events(compiled.plan.schedule))
    computed: list[int] = []
    for segment in range(len(compiled.program.weights)):
        uploads = [n for n, a in enumerate(order.graph.actions) if f"host:weights.s{segment}" in a.reads]
        free = [
            action
            for number, action in enumerate(order.graph.actions)
            if not any(upload == number or order.before(upload, number) for upload in uploads)
        ]
        held: Future[None] = Future()
        left = {action.id for action in free}

        def hook(instruction: str, left: set[str] = left, held: Future[None] = held) -> None:
            left.discard(instruction)
            if not left and not held.done():
                held.set_result(None)

        engine.before_instruction, engine.pending = hook, {segment: held}
        assert equal(run(case, compiled, engine), expected)
        computed.append(len({action.stage for action in free if action.stream is Stream.COMPUTE}))
    assert computed[0] == 0
    assert computed == sorted(computed)
    assert computed[-1] >= 2
    engine.close()
