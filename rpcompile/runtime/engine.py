"""Runs a Program once: microbatches in, losses and gradients out, all or nothing."""

from __future__ import annotations

import errno
import traceback
import weakref
from concurrent.futures import wait
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from rpcompile import buffers
from rpcompile.errors import ExecutionError, NonFinite, WorkerTimeout
from rpcompile.ir import ActionId, Op, Stream
from rpcompile.runtime import blame
from rpcompile.runtime.compiled_stages import CompiledStages
from rpcompile.runtime.cuda_streams import CudaStreams
from rpcompile.runtime.host_slots import HostSlots
from rpcompile.runtime.host_sums import HostSums
from rpcompile.runtime.stage_runner import Microbatch, StageRunner
from rpcompile.runtime.streams import CpuStreams, Failure, Iteration, Streams
from rpcompile.runtime.watchdog import await_all
from rpcompile.runtime.weight_arenas import WeightArenas
from rpcompile.runtime.worker import LANES, Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from concurrent.futures import Future

    from rpcompile.ir import Program, SegmentChain
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


@dataclass(frozen=True)
class Result:
    """What one iteration leaves on the host.

    Attributes:
        outputs: Per microbatch, outputs by node name.
        gradients: Parameter name -> gradient, summed over jobs in job order; where SUMs have done that, one
            segment after another, a tied weight's segments are added after that.
        states: Buffer name -> its value after the forward.
    """

    outputs: tuple[Tensors, ...]
    gradients: Tensors
    states: Tensors


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
        self._slots: HostSlots
        self._workers: list[Worker] = []
        self._hosts: list[HostSums] = []  # one, if the program has instructions for it
        self._make_workers()
        self.before_instruction: Callable[[str], None] | None = None
        self.record_times = False
        self.times: dict[str, tuple[float, float]] = {}
        self.close = weakref.finalize(self, _close, self._workers, self._hosts)

    def run(
        self,
        tensors: Mapping[str, torch.Tensor],
        inputs: Sequence[Tensors],
        microbatches: Sequence[Microbatch],
        pending: Mapping[int, Future[None]] | None = None,
    ) -> Result:
        """Runs every GPU's graph to its end.

        Args:
            tensors: The model's parameters and buffers by qualified name, on the host. They are read only.
            inputs: User inputs of each microbatch by name.
            microbatches: Seed, sizes and loss scale of each microbatch.
            pending: Segment -> work on the host that must be over before tensors that this segment is the
                first to read are uploaded.

        Raises:
            ExecutionError: An instruction failed. Nothing of the model has changed.
            WorkerTimeout: No instruction came to its end for `timeout_s`.
        """
        if pending and not self._arenas.follow(self._program.weights, tensors):
            wait(pending.values())  # what is about to be copied must be there
        self._arenas.refresh(self._program.weights, tensors)
        self._slots.begin([tuple(microbatch.sizes.items()) for microbatch in microbatches])
        host: dict[str, Any] = {
            buffers.weights(buffers.HOST, segment): {name: tensors[name] for name in names}
            for segment, names in enumerate(self._program.weights)
        }
        for index, microbatch in enumerate(inputs):
            host[buffers.inputs(buffers.HOST, index)] = self._staged(microbatch)
        iteration = Iteration(host, self.before_instruction, self.record_times)
        self._await_host(pending or {}, iteration)
        try:
            for worker in self._workers:
                worker.start(iteration, microbatches)
            for sums in self._hosts:
                sums.start(iteration)
            self._await(iteration)
        except BaseException:
            iteration.cancel()
            self._come_to_rest(iteration)
            raise
        for worker in (*self._workers, *self._hosts):
            worker.clear()
        self._rotate()
        if iteration.failure is not None:
            host.clear()  # frames that the error's traceback keeps may keep the iteration
            if iteration.failure.instruction.startswith(_UPDATED):
                raise iteration.failure.error
            raise self._error(iteration.failure) from iteration.failure.error
        times = iteration.times or {}
        self.times = {a.id: times[a.id] for a in self._program.schedule.actions() if a.id in times}
        return self._result(host, len(inputs))

    def _rotate(self) -> None:
        """Where the schedule rotates, the next iteration runs shifted by that many GPUs."""
        gpus, rotate = len(self._workers), self._program.schedule.rotate
        self._shift = (self._shift + rotate) % gpus
        places = [worker.place for worker in self._workers]
        for number, worker in enumerate(self._workers):
            worker.place = places[(number + rotate) % gpus]

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

    def _await(self, iteration: Iteration) -> None:
        drains = [event for worker in (*self._workers, *self._hosts) for event in worker.drain()]
        await_all(drains, iteration, self._program.schedule, self._options.timeout_s, self._shift)

    def _come_to_rest(self, iteration: Iteration) -> None:
        """Waits for what runs; leaves behind what does not end, with the memory it may write to."""
        try:
            self._await(iteration)
        except BaseException as error:
            _close(self._workers, self._hosts)
            self._make_workers()
            if not isinstance(error, WorkerTimeout):
                raise
        else:
            for worker in (*self._workers, *self._hosts):
                worker.clear()

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

    def _make_workers(self) -> None:
        names = self._program.schedule.buffers
        self._shift = 0
        self._slots = HostSlots(names, pin=self._options.cuda)
        self._workers[:] = [
            Worker(index, self._program, self._runners[device], streams, self._slots, self._arenas)
            for index, (device, streams) in enumerate(zip(self._devices, self._make_streams(), strict=True))
        ]
        graph, dtype = self._program.host, self._options.gradient_dtype
        self._hosts[:] = (
            [] if graph is None else [HostSums(graph, self._make_host_streams(), self._slots, dtype)]
        )

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
        graph = self._workers[failure.gpu].runners[action.stage].graph
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


def _close(workers: list[Worker], hosts: list[HostSums]) -> None:
    for worker in (*workers, *hosts):
        worker.close()
