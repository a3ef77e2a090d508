"""Runs a Program: microbatches in, losses and gradients out, all or nothing.

Iterations of an asynchronous plan may follow one another without a pause: `start` enqueues one behind the one
before it. Each has workers (with their stores), host memory and events of its own; they share the streams.
"""

from __future__ import annotations

import errno
import threading
import time
import traceback
import weakref
from collections import deque
from concurrent.futures import wait
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from rpcompile import buffers
from rpcompile.errors import ExecutionError, NonFinite, WorkerTimeout
from rpcompile.event_loop import chain_events
from rpcompile.ir import ActionId, Op, Stream
from rpcompile.runtime import blame
from rpcompile.runtime.compiled_stages import CompiledStages
from rpcompile.runtime.cuda_streams import CudaStreams
from rpcompile.runtime.flight import Bay, Flight, Result
from rpcompile.runtime.host_slots import HostSlots
from rpcompile.runtime.host_sums import HostSums
from rpcompile.runtime.interrupts import uninterrupted
from rpcompile.runtime.stage_runner import Microbatch, StageRunner
from rpcompile.runtime.streams import CpuStreams, Failure, Iteration, Streams
from rpcompile.runtime.watchdog import await_all
from rpcompile.runtime.weight_arenas import WeightArenas
from rpcompile.runtime.worker import LANES, Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from concurrent.futures import Future

    from rpcompile.ir import Program, Schedule, SegmentChain
    from rpcompile.runtime.stage_runner import Tensors

_UPDATED = "updated.s"
"""Begins the name of the event that the host's work on a segment's weights is over."""


@dataclass(frozen=True)
class RuntimeOptions:
    """How a program is run; `rpcompile.compile` says what each means.

    Attributes:
        devices: One device a GPU; None for CPU workers.
        pin: "auto" or "off".
        timeout_s: How long no instruction may come to its end.
        detect_nan: Whether results and gradients are checked.
        compile_stages: Whether stages go through `torch.compile`.
        gradient_dtype: What gradients are cast to before jobs' are summed; None: as they come.
    """

    devices: tuple[torch.device, ...] | None = None
    pin: str = "auto"
    timeout_s: float = 600.0
    detect_nan: bool = False
    compile_stages: bool = False
    gradient_dtype: torch.dtype | None = None

    @property
    def cuda(self) -> bool:
        return any(device.type == "cuda" for device in self.devices or ())


class Engine:
    """Workers for a program; may be run any number of times, by one caller at a time.

    Args:
        program: What to run.
        chain: The segments it was made of.
        options: How to run it.
        arenas: The model's weights in host memory, shared by all programs of one model.

    Attributes:
        before_instruction: Called by a stream with an instruction's text before it runs it.
        record_times: Whether the next run records when each action ran.
        times: Start and end of each action of the last run by id, if recorded (`time.perf_counter`).
        capacity: How many iterations may be in flight at once.
    """

    def __init__(
        self,
        program: Program,
        chain: SegmentChain,
        options: RuntimeOptions | None = None,
        arenas: WeightArenas | None = None,
    ) -> None:
        self._program = program
        self._chain = chain
        self._options = options = options or RuntimeOptions()
        pin = options.cuda and options.pin == "auto"
        self._arenas = arenas or WeightArenas(pin=pin, adopt=pin)
        self._readers = _readers(program.weights)
        self._devices = options.devices or (torch.device("cpu"),) * len(program.graphs)
        self._runners = self._make_runners()
        self._places: list[tuple[Streams, list[StageRunner]]] = []
        self._host_streams: list[Streams] = []  # one, if the program has instructions for the host
        self._bays: deque[Bay] = deque()
        self._flights: list[Flight] = []  # in the order in which they were started
        self._lock = threading.RLock()  # of the five above
        self.capacity = 2 if program.schedule.mode == "async" else 1
        self._behind = _behind(program.schedule) if self.capacity > 1 else {}
        self._marked = frozenset(event for events in self._behind.values() for event in events)
        self._make_workers()
        self.before_instruction: Callable[[str], None] | None = None
        self.record_times = False
        self.times: dict[str, tuple[float, float]] = {}
        self.close = weakref.finalize(self, _close, self._places, self._host_streams)

    def run(
        self,
        tensors: Mapping[str, torch.Tensor],
        inputs: Sequence[Tensors],
        microbatches: Sequence[Microbatch],
        pending: Mapping[int, Future[None]] | None = None,
    ) -> Result:
        """Runs every GPU's graph to its end: `start`, then its `result`."""
        return self.start(tensors, inputs, microbatches, pending).result()

    def start(
        self,
        tensors: Mapping[str, torch.Tensor],
        inputs: Sequence[Tensors],
        microbatches: Sequence[Microbatch],
        pending: Mapping[int, Future[None]] | None = None,
    ) -> Flight:
        """Enqueues every GPU's graph behind the iterations in flight, fewer than `capacity`.

        Args:
            tensors: The model's parameters and buffers by qualified name, on the host. They are read only,
                until the iteration is over.
            inputs: User inputs of each microbatch by name; also read until then.
            microbatches: Seed, sizes and loss scale of each microbatch.
            pending: Segment -> work on the host that must be over before tensors that this segment is the
                first to read are uploaded.

        Returns:
            What to wait for. Its `result` says what an instruction raised; nothing of the model has changed.
        """
        if pending and not self._arenas.follow(self._program.weights, tensors):
            wait(pending.values())  # what is about to be copied must be there
        self._arenas.refresh(self._program.weights, tensors)
        host: dict[str, Any] = {
            buffers.weights(buffers.HOST, segment): {name: tensors[name] for name in names}
            for segment, names in enumerate(self._program.weights)
        }
        for index, microbatch in enumerate(inputs):
            host[buffers.inputs(buffers.HOST, index)] = self._staged(microbatch)
        iteration = Iteration(host, self.before_instruction, self.record_times)
        if len(self._flights) >= self.capacity:  # its caller was interrupted before it could wait
            self._flights[-1].cancel()
            self._come_to_rest(self._flights[-1])
        with uninterrupted(), self._lock:
            bay = self._bays[0]
            flight = Flight(bay, iteration, len(inputs), self._shift, self._finish, self._cancel_from)
            bay.slots.begin([tuple(microbatch.sizes.items()) for microbatch in microbatches])
            if self._flights:
                iteration.before = self._flights[-1].iteration
            iteration.behind, iteration.marked = self._behind, self._marked
            self._await_host(pending or {}, iteration)
            self._flights.append(flight)
            try:
                self._dispatch(flight, microbatches)
            except BaseException:
                iteration.cancel()
                self._come_to_rest(flight)
                raise
        return flight

    def _dispatch(self, flight: Flight, microbatches: Sequence[Microbatch]) -> None:
        """Where the schedule rotates, each iteration runs shifted by that many GPUs."""
        gpus = len(self._places)
        for number, worker in enumerate(flight.bay.workers):
            worker.place = self._places[(number + flight.shift) % gpus]
        for worker in flight.bay.workers:
            worker.start(flight.iteration, microbatches)
        for sums in flight.bay.hosts:
            sums.start(flight.iteration)
        flight.drains = flight.bay.drain()
        self._bays.rotate(-1)
        self._shift = (self._shift + self._program.schedule.rotate) % gpus

    def _finish(self, flight: Flight) -> Result:
        iteration = flight.iteration
        iteration.progress_s = time.perf_counter()  # until now it may have stood behind another
        try:
            if not flight.lost:
                self._await(flight.drains, flight)
        except BaseException:
            self._cancel_from(flight)
            self._come_to_rest(flight)
            raise
        host = iteration.host
        self._leave(flight)
        if iteration.failure is not None:
            host.clear()  # frames that the error's traceback keeps may keep the iteration
            if iteration.failure.instruction.startswith(_UPDATED):
                raise iteration.failure.error
            raise self._error(iteration.failure) from iteration.failure.error
        if iteration.cancelled:
            raise ExecutionError("the iteration was cancelled")
        times = iteration.times or {}
        self.times = {a.id: times[a.id] for a in self._program.schedule.actions() if a.id in times}
        return self._result(host, flight.microbatches)

    def _cancel_from(self, flight: Flight) -> None:
        with self._lock:
            found = self._flights[self._flights.index(flight) :] if flight in self._flights else []
        for one in found:
            one.iteration.cancel()

    def _leave(self, flight: Flight) -> None:
        """It has come to rest: what it used is free for another one."""
        with uninterrupted(), self._lock:
            flight.bay.clear()
            # Futures that it waited for may know it for longer.
            flight.iteration.before = None
            flight.iteration.host = {}
            self._flights.remove(flight)

    def _await_host(self, pending: Mapping[int, Future[None]], iteration: Iteration) -> None:
        """Makes uploads wait for the host's work; its failure is the iteration's."""
        for segment, owners in self._readers.items():
            iteration.updates[segment] = tuple(f"{_UPDATED}{owner}" for owner in owners if owner in pending)

        def over(segment: int, future: Future[None]) -> None:
            event, error = f"{_UPDATED}{segment}", future.exception()
            if error is not None:
                iteration.fail(event, 0, error)
            else:
                iteration.record(event)

        for segment, future in pending.items():
            future.add_done_callback(partial(over, segment))

    def _await(self, drains: Sequence[threading.Event], flight: Flight) -> None:
        timeout_s = self._options.timeout_s
        await_all(drains, flight.iteration, self._program.schedule, timeout_s, flight.shift)

    def _come_to_rest(self, flight: Flight) -> None:
        """Waits for what runs; leaves behind what does not end, with the memory it may write to."""
        try:
            self._await(flight.bay.drain(), flight)
        except BaseException as error:
            with uninterrupted(), self._lock:
                for one in self._flights:
                    one.lost = True
                self._flights.remove(flight)
                _close(self._places, self._host_streams)
                self._make_workers()
            if not isinstance(error, WorkerTimeout):
                raise
        else:
            self._leave(flight)

    def _make_runners(self) -> dict[torch.device, list[StageRunner]]:
        """The stages on each device."""
        compiled = CompiledStages() if self._options.compile_stages else None
        loss = self._program.capture.outputs[0]
        return {
            device: [
                StageRunner(
                    stage,
                    loss,
                    None if device.type == "cpu" else device,
                    self._options.detect_nan,
                    compiled,
                )
                for stage in self._program.stages
            ]
            for device in dict.fromkeys(self._devices)
        }

    @property
    def _workers(self) -> list[Worker]:
        """Those of every iteration that may be in flight."""
        return [worker for bay in self._bays for worker in bay.workers]

    def _make_workers(self) -> None:
        streams = self._make_streams()
        runners = [self._runners[device] for device in self._devices]
        self._places[:] = zip(streams, runners, strict=True)
        self._host_streams[:] = [] if self._program.host is None else [self._make_host_streams()]
        self._shift = 0
        self._bays = deque(self._make_bay() for _ in range(self.capacity))

    def _make_bay(self) -> Bay:
        slots = HostSlots(self._program.schedule.buffers, pin=self._options.cuda)
        workers = [
            Worker(index, self._program, runners, streams, slots, self._arenas)
            for index, (streams, runners) in enumerate(self._places)
        ]
        graph, dtype = self._program.host, self._options.gradient_dtype
        hosts = [
            HostSums(graph, streams, slots, dtype) for streams in self._host_streams if graph is not None
        ]
        return Bay(workers, slots, hosts)

    def _make_streams(self) -> list[Streams]:
        return [
            CpuStreams(index, LANES, self._operator_threads())
            if device.type == "cpu"
            else CudaStreams(index, device, LANES)
            for index, device in enumerate(self._devices)
        ]

    def _make_host_streams(self) -> Streams:
        return CpuStreams(0, (Stream.HOST,), None if self._options.cuda else self._operator_threads())

    def _operator_threads(self) -> int:
        # Workers that each used every core would stand in one another's way. Said for one worker, too:
        # oneDNN's kernels in a new thread would use every core whatever `torch.set_num_threads` was told.
        return max(1, torch.get_num_threads() // len(self._devices))

    def _staged(self, inputs: Tensors) -> Tensors:
        """A caller's tensors where a CUDA device can copy them from without making the host wait."""
        if not self._options.cuda:
            return inputs
        return {name: _pinned(tensor) for name, tensor in inputs.items()}

    def _result(self, host: dict[str, Any], microbatches: int) -> Result:
        # What SUMs have left: one gradient a segment, in as many segments as share the parameter.
        gradients: Tensors = {}
        states: Tensors = {}
        dtype = self._options.gradient_dtype
        for job in self._program.schedule.jobs:
            for segment in range(len(self._program.weights)):
                for name, grad in host.get(buffers.gradients(buffers.HOST, segment, job.index), {}).items():
                    part = grad if dtype is None else grad.to(dtype)
                    gradients[name] = gradients[name] + part if name in gradients else part
                states.update(host.get(buffers.state(segment, job.index), {}))
        losses = [host[buffers.loss(buffers.HOST, index)] for index in range(microbatches)]
        return Result(tuple(losses), gradients, states)

    def _error(self, failure: Failure) -> ExecutionError:
        """What the caller is told; the failed stage's tensors are let go of."""
        error = failure.error
        kind = NonFinite if isinstance(error, NonFinite) else ExecutionError
        reason = str(error) if kind is NonFinite else f"{type(error).__name__}: {error}"
        try:
            action = ActionId.parse(failure.instruction)
        except Exception:
            traceback.clear_frames(error.__traceback__)
            return kind(f"{failure.instruction!r} failed on GPU {failure.gpu}: {reason}.{_advice(error)}")
        after = "Weights, gradients and buffers are as they were before this call."
        if action.op is Op.SUM and action.part is not None:
            traceback.clear_frames(error.__traceback__)
            return kind(
                f"{failure.instruction} (sum of stage {action.stage}'s gradients) failed on the host in "
                f"{self._chain.segments[action.part].name}: {reason}.{_advice_on_host(error)} {after}"
            )
        graph = self._places[failure.gpu][1][action.stage].graph
        node = blame.failing_node(error, graph.graph_module)
        traceback.clear_frames(error.__traceback__)
        first, last = (self._chain.segments[i].name for i in (graph.stage.first, graph.stage.last))
        where = first if first == last else f"{first} … {last}"
        where += f", at {blame.describe(node)}" if node is not None else ""
        microbatch = "" if action.microbatch is None else f", microbatch {action.microbatch}"
        return kind(
            f"{failure.instruction} ({action.op.name.lower()} of stage {action.stage}{microbatch}) failed on "
            f"GPU {failure.gpu} in {where}: {reason}.{_advice(error)} {after}"
        )


def _advice(error: BaseException) -> str:
    """What to change, where that is known; begins with a space."""
    if isinstance(error, torch.OutOfMemoryError):
        return " Use more microbatches (smaller ones), or plan for less memory (gpu=Hardware(...))."
    if isinstance(error, torch.AcceleratorError):
        return (
            " This process cannot use its GPUs any more; call save_checkpoint, which needs none, and go on "
            "in a new one. With CUDA_LAUNCH_BLOCKING=1 the instruction that failed is named."
        )
    return ""


def _advice_on_host(error: BaseException) -> str:
    """As `_advice`, for what the host does."""
    full = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if full or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return " The host's memory is full: free some, or let no GPUs share a stage (effort=None)."
    return ""


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in pinned memory without gaps or overlaps: anything else would be copied once more."""
    dense = tensor.stride() == torch.empty_like(tensor, device="meta").stride()
    return tensor if dense and tensor.is_pinned() else torch.empty_like(tensor, pin_memory=True).copy_(tensor)


def _readers(weights: Sequence[Sequence[str]]) -> dict[int, tuple[int, ...]]:
    """Segment -> the segments that were the first to read what it reads."""
    first: dict[str, int] = {}
    for segment, names in enumerate(weights):
        for name in names:
            first.setdefault(name, segment)
    return {segment: tuple(sorted({first[name] for name in names})) for segment, names in enumerate(weights)}


def _behind(schedule: Schedule) -> dict[str, tuple[str, ...]]:
    """Upload -> what must be over of the iteration before: a GPU holds the weights of two jobs at most."""
    events = chain_events(schedule, 2, "async", schedule.rotate)
    count = len(events.actions)
    found: dict[str, tuple[str, ...]] = {}
    for number, action in enumerate(events.actions):
        before = tuple(events.actions[s].id for s in events.edges.of(number + count) if s < count)
        if before:
            found[action.id] = before
    return found


def _close(places: list[tuple[Streams, list[StageRunner]]], host_streams: list[Streams]) -> None:
    for streams in (*(streams for streams, _ in places), *host_streams):
        streams.close()
