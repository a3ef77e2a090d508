"""SUMs on the host: the same bits as sums at the end, under any order, on CUDA, and after failures."""

from __future__ import annotations

import _thread
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import rpcompile
from rpcompile import buffers
from rpcompile.errors import ExecutionError, WorkerTimeout
from rpcompile.ir import Op, Program, Schedule, Stream
from rpcompile.passes.insert_event_waits import InsertEventWaits
from rpcompile.passes.lower_to_program import LowerToProgram
from rpcompile.plan import Plan
from rpcompile.runtime.engine import Engine, RuntimeOptions
from rpcompile.runtime.host_sums import HostSums
from rpcompile.runtime.streams import CpuStreams, Iteration
from rpcompile.simulate import measured
from rpcompile.trace import write_trace
from rpcompile.variations import lay_out
from tests import models
from tests.dispatches import of_steps
from tests.fake_cuda import MEMORY, Driver
from tests.fake_streams import FakeEngine, FakeStreams, Machine
from tests.test_cuda_streams import CudaEngine

OPTIONS = {"gpus": 2, "microbatches": 4, "solver_time_s": 0.3, "gpu": models.SLOW_GPU, "effort": None}


class Shared:
    """A model each of whose stages has three jobs, compiled with SUMs, and what it gives without them."""

    def __init__(self, tied: bool = False, **options: Any) -> None:
        self.case = models.build(lambda: models.mlp(*[16] * 5, 5))
        if tied:
            layers = self.case.model.get_submodule("layers")
            layers.get_submodule("3").weight = layers.get_submodule("0").weight
        self.options = {**OPTIONS, **options}
        with rpcompile.compile(self.case.model, example_inputs=self.case.batch, **self.options) as first:
            plan = first.plan
        stages = range(len(plan.partition.stages))
        steps = [((stage + m % 3) % 2, stage, m, m % 3) for stage in stages for m in range(4)]
        schedule = lay_out(plan.chain, plan.partition, of_steps("shared", 2, 4, steps), "sync")
        self.plan = replace(plan, schedule=schedule)
        self.plan.verify()
        self.compiled = self.compile()
        self.sums = [action for action in schedule.actions() if action.op is Op.SUM]
        self.expected = self.run(self.engine(without_sums(self.plan)))

    def compile(self, **options: Any) -> rpcompile.Compiled:
        found = {key: value for key, value in self.options.items() if key not in ("gpu", "effort")}
        return rpcompile.compile(
            self.case.model, example_inputs=self.case.batch, plan=self.plan, **{**found, **options}
        )

    def engine(self, plan: Plan) -> Engine:
        return Engine(self.program(plan), plan.chain, self.compiled._training.engine._options)

    def program(self, plan: Plan) -> Program:
        capture = self.compiled.program.capture
        return LowerToProgram(capture, plan.chain, plan.partition).run(plan.schedule)

    def run(self, engine: Engine) -> list[torch.Tensor]:
        """Loss and gradients of one iteration."""
        training = self.compiled._training
        self.compiled._training = replace(training, engine=engine)
        torch.manual_seed(3)
        try:
            loss = self.compiled.forward_backward(**self.case.batch)
            found = [p.grad.clone() for p in self.case.model.parameters() if p.grad is not None]
            return [loss, *found]
        finally:
            self.case.model.zero_grad()
            self.compiled._training = training

    def survives(self, engine: Engine) -> bool:
        try:
            return equal(self.run(engine), self.expected)
        except (ExecutionError, AssertionError):
            return False
        finally:
            engine.close()


def equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


def without_sums(plan: Plan) -> Plan:
    """The engine then adds what is left in the order of jobs, when the iteration is over."""
    queues = tuple(queue for queue in plan.schedule.queues if queue.stream is not Stream.HOST)
    return replace(plan, schedule=InsertEventWaits().run(replace(plan.schedule, queues=queues)))


@pytest.fixture(scope="module")
def shared() -> Iterator[Shared]:
    found = Shared()
    yield found
    found.compiled.close()


# ------------------------------------------------------------------- results


def test_the_program_has_the_sums_and_prints_them(shared: Shared) -> None:
    text = str(shared.compiled.program)
    host = text[text.index("def host(host):") :]
    assert [line.strip().split("'")[1] for line in host.splitlines() if "host.sum(" in line] == [
        action.id for action in shared.sums
    ]
    assert len(shared.sums) >= 4
    assert "def host" not in str(shared.program(without_sums(shared.plan)))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_sums_of_the_schedule_are_those_in_the_order_of_jobs_bit_for_bit(dtype: torch.dtype | None) -> None:
    """Whatever the delays. With a compute dtype, 16-bit gradients are summed in float32."""
    shared = Shared(compute_dtype=dtype)
    assert shared.sums
    engine = shared.compiled._training.engine
    for seed in range(4):
        choices = random.Random(seed)
        engine.before_instruction = lambda _, c=choices: time.sleep(c.choice((0, 0, 0, 0.002)))
        found = shared.run(engine)
        assert equal(found, shared.expected)
        assert all(tensor.dtype == torch.float32 for tensor in found)
    shared.compiled.close()


def test_memory_is_kept_from_iteration_to_iteration() -> None:
    """Also that of float32 sums; a gradient that the user keeps is never written to again."""
    shared = Shared(compute_dtype=torch.bfloat16)
    slots = shared.compiled._training.engine._bays[0].slots
    parameters = list(shared.case.model.parameters())
    sizes: list[int] = []
    places: list[set[int]] = []
    for _ in range(6):
        shared.compiled.forward_backward(**shared.case.batch)
        sizes.append(slots.nbytes)
        places.append({p.grad.data_ptr() for p in parameters if p.grad is not None})
        shared.case.model.zero_grad()
    assert sizes[1:] == sizes[:1] * 5
    summed = {buffer for action in shared.sums for buffer in action.writes}
    assert len(places[0] & places[-1]) >= len(summed)
    shared.compiled.forward_backward(**shared.case.batch)
    kept = [p.grad for p in parameters if p.grad is not None]
    copies = [grad.clone() for grad in kept]
    shared.case.model.zero_grad()
    shared.case.batch["x"].mul_(2)
    shared.compiled.forward_backward(**shared.case.batch)
    assert equal(kept, copies)
    shared.compiled.close()


def test_what_has_been_added_is_let_go_of(shared: Shared) -> None:
    engine, found = shared.engine(shared.plan), dict[str, Any]()
    result = engine._result

    def look(host: dict[str, Any], microbatches: int) -> Any:
        found.update(host)
        return result(host, microbatches)

    engine._result = look  # type: ignore[method-assign]
    shared.run(engine)
    engine.close()
    added = {buffer for action in shared.sums for buffer in action.reads[1:]}
    assert added
    assert not added & found.keys()
    assert {buffer for action in shared.sums for buffer in action.writes} <= found.keys()


def test_a_tied_weight_is_summed_segment_by_segment() -> None:
    """Without SUMs its gradients are added job by job, whichever segment they are of: another order."""
    shared, found = Shared(tied=True), dict[str, Any]()
    engine = shared.engine(without_sums(shared.plan))
    result = engine._result

    def look(host: dict[str, Any], microbatches: int) -> Any:
        found.update({name: dict(made) for name, made in host.items() if ":gradients." in name})
        return result(host, microbatches)

    engine._result = look  # type: ignore[method-assign]
    shared.run(engine)
    by_segment: dict[int, torch.Tensor] = {}
    for buffer in sorted(found, key=lambda name: buffers.parse(name).job or 0):
        if (part := found[buffer].get("layers.0.weight")) is not None:
            segment = buffers.segment_of(buffer)
            by_segment[segment] = by_segment[segment] + part if segment in by_segment else part
    last, first = by_segment.values()  # the backward comes to the last use first
    name = [name for name, _ in shared.case.model.named_parameters()].index("layers.0.weight")
    assert torch.equal(shared.run(shared.compiled._training.engine)[1 + name], last + first)
    engine.close()
    shared.compiled.close()


def test_a_parameter_that_no_gradient_reached_in_the_first_job() -> None:
    graph = torch.fx.symbolic_trace(lambda x: x)
    for dtype in (None, torch.float32):
        streams = CpuStreams(0, (Stream.HOST,))
        sums = HostSums(graph, streams, None, dtype)  # type: ignore[arg-type]
        one = torch.ones(2, dtype=dtype)
        host = {"a": {"w": one.clone()}, "b": {"w": one.clone(), "v": 3 * one}}
        sums._adding(host, ("a", "b"), "a")()
        assert {name: value.tolist() for name, value in host["a"].items()} == {"w": [2, 2], "v": [3, 3]}
        assert host.keys() == {"a"}
        streams.close()


# ------------------------------------------------------------------- order


class HostedEngine(FakeEngine):
    """The host's stream is one of the machine's, too."""

    def _make_host_streams(self) -> Any:
        return FakeStreams(-1, self._machine, (Stream.HOST,))


def hosted(shared: Shared, machine: Machine) -> FakeEngine:
    return HostedEngine(shared.compiled, machine)


@pytest.mark.parametrize("seed", range(8))
def test_any_order_gives_the_same_bits(shared: Shared, seed: int) -> None:
    assert shared.survives(hosted(shared, Machine(seed)))


def test_without_any_one_wait_of_a_sum_results_are_wrong(shared: Shared) -> None:
    waits = [event for action in shared.sums for event in action.waits]
    assert len(waits) >= 4
    for event in waits:
        machines = (Machine(seed, {(-1, event)}) for seed in range(30))
        assert any(not shared.survives(hosted(shared, machine)) for machine in machines), event


def test_a_schedule_with_updates_keeps_their_waits(shared: Shared) -> None:
    """An UPDATE is left out of the program; the SUM behind it need not wait for the same once more."""
    first, second = shared.sums[:2]
    update = replace(first, id="0U@0.0", op=Op.UPDATE, waits=second.waits, records=())
    actions = (first, update, replace(second, waits=()))

    def edited(schedule: Schedule) -> Schedule:
        host = next(queue for queue in schedule.queues if queue.stream is Stream.HOST)
        queues = [
            replace(host, actions=(*actions, *host.actions[2:])) if q is host else q for q in schedule.queues
        ]
        return replace(schedule, queues=tuple(queues))

    program = shared.program(replace(shared.plan, schedule=edited(shared.plan.schedule)))
    assert program.host is not None
    text = program.host.code
    assert all(f"'{event}'" in text for event in second.waits)
    assert "0U@" not in text


# ------------------------------------------------------------------- CUDA


@pytest.fixture
def late_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("host_slots", "weight_arenas"):
        monkeypatch.setattr(f"rpcompile.runtime.{module}.allocate", MEMORY.host)


@pytest.mark.usefixtures("late_memory")
def test_on_cuda_a_sum_waits_until_the_device_has_copied(
    shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(3):
        engine = CudaEngine(shared.compiled, Driver(seed, gpus=2, eager=0.1 * seed))
        engine.record_times = bool(seed)
        assert shared.survives(engine)
        assert not seed or engine.times.keys() == {a.id for a in shared.plan.schedule.actions()}
    monkeypatch.setattr(Iteration, "wait_until_over", Iteration.wait)
    assert not all(shared.survives(CudaEngine(shared.compiled, Driver(seed, gpus=2))) for seed in range(4))


# ------------------------------------------------------------------- times, failures


def test_times_are_recorded_and_are_in_the_measured_trace(shared: Shared, tmp_path: Path) -> None:
    engine = shared.engine(shared.plan)
    engine.record_times = True
    assert equal(shared.run(engine), shared.expected)
    engine.close()
    schedule = shared.plan.schedule
    for action in schedule.actions():
        if action.op is Op.GRADIENT and (sums := [s for s in shared.sums if action.writes[0] in s.reads]):
            assert engine.times[sums[0].id][0] >= engine.times[action.id][1]
    write_trace(schedule, measured(schedule, engine.times), tmp_path / "trace.json", label="measured")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    host = next(e["pid"] for e in events if e["ph"] == "M" and e["args"].get("name") == "Host (measured)")
    assert [e["name"] for e in events if e["pid"] == host and e["ph"] == "X"] == [s.id for s in shared.sums]


def hooked(shared: Shared, hook: Callable[[str], None], timeout_s: float = 20) -> Engine:
    engine = shared.engine(shared.plan)
    engine._options = RuntimeOptions(timeout_s=timeout_s)
    engine.before_instruction = hook
    return engine


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (ValueError("bad"), ""),
        (
            MemoryError("bad"),
            r" The host's memory is full: free some, or let no GPUs share .* \(effort=None\)\.",
        ),
    ],
)
def test_a_failure_names_the_sum_and_the_next_call_works(
    shared: Shared, error: Exception, advice: str
) -> None:
    for action in shared.sums:

        def fail(instruction: str, action: Any = action) -> None:
            if instruction == action.id:
                raise error

        engine = hooked(shared, fail)
        segment = shared.plan.chain.segments[int(action.id.rpartition(".")[2])].name
        message = (
            rf"^{action.id} \(sum of stage {action.stage}'s gradients\) failed on the host in {segment}: "
            rf"{type(error).__name__}: bad\.{advice} Weights, gradients and buffers are as they were"
        )
        with pytest.raises(ExecutionError, match=message):
            shared.run(engine)
        assert all(parameter.grad is None for parameter in shared.case.model.parameters())
        engine.before_instruction = None
        assert shared.survives(engine)


def test_an_interrupt_in_a_sum_stops_cleanly(shared: Shared) -> None:
    interrupted: list[str] = []

    def interrupt(instruction: str) -> None:
        if instruction == shared.sums[0].id and not interrupted:
            interrupted.append(instruction)
            _thread.interrupt_main()
            time.sleep(0.05)

    engine = hooked(shared, interrupt)
    with pytest.raises(KeyboardInterrupt):
        shared.run(engine)
    assert shared.survives(engine)


def test_a_sum_that_hangs_is_reported_and_left_behind(shared: Shared) -> None:
    go_on = threading.Event()
    last = shared.sums[-1]

    def hang(instruction: str) -> None:
        if instruction == last.id and not go_on.is_set():
            go_on.wait(20)

    engine = hooked(shared, hang, timeout_s=0.4)
    with pytest.raises(WorkerTimeout, match=rf"the host has been running {last.id} for 0\.\d s"):
        shared.run(engine)
    go_on.set()
    assert shared.survives(engine)
