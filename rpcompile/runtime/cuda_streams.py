"""The streams of a logical GPU on a CUDA device."""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rpcompile.runtime.streams import POLL_S, Cancelled, Iteration, StreamThread

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rpcompile.runtime.stage_runner import Tensors
    from rpcompile.runtime.streams import Place

Clock = dict["Place", int]
"""For each stream, how many of its instructions are over."""


@dataclass(frozen=True)
class _Mark:
    """A recorded event, and what is over when it has happened."""

    event: Any
    clock: Clock


@dataclass(frozen=True)
class _Held:
    """Tensors freed by an instruction of another stream than the one that allocated them."""

    freed_by: Place
    position: int
    tensors: Sequence[Tensors]


@dataclass(frozen=True)
class _Step:
    """What is yet to be enqueued, once `event` (if any) has been recorded."""

    instruction: str
    enqueue: Callable[[], object]
    event: str | None = None


class CudaStreams:
    """Enqueues on CUDA streams, from one thread a logical GPU, which never waits for the device.

    A task runs at once and puts its kernels and copies into its stream. An event is waited for twice: on the
    host until it has been recorded (CUDA takes a wait for an event that has not been for no wait at all, and
    knows nothing of the host's own work), and by the stream until it has happened. What comes behind a wait
    on its stream is kept back meanwhile; the other streams go on.

    The caching allocator lets a stream use memory again that this stream allocated, at once. So what another
    stream frees is held until the allocating stream has been made to wait for that; the vector clocks that
    events carry say when. The peak then follows from the schedule, unlike with `record_stream`, where
    it depends on how far the thread is ahead of the device.

    Args:
        gpu: Index of the logical GPU.
        device: The CUDA device; several logical GPUs may share one.
        names: Names of the streams.
        driver: `torch.cuda`, or what stands in for it in tests: Stream, Event, stream and set_device.
    """

    def __init__(
        self, gpu: int, device: torch.device, names: Sequence[str], driver: Any = torch.cuda
    ) -> None:
        self.device = device
        self._gpu = gpu
        self._driver = driver
        self._streams = {name: driver.Stream(device=device) for name in names}
        self._clocks: dict[str, Clock] = {name: {(gpu, name): 0} for name in names}
        self._held: dict[str, list[_Held]] = defaultdict(list)
        # Per stream, the instructions that are not known to be over: name, start (if timed) and end.
        self._pending: dict[str, deque[tuple[str, Any, Any]]] = {name: deque() for name in names}
        self._spare: list[Any] = []
        self._started: tuple[float, Any] | None = None
        self._steps: dict[str, deque[_Step]] = {name: deque() for name in names}
        self._begun: set[str] = set()  # the streams whose first step has been announced
        self._thread = StreamThread(f"rpcompile-gpu{gpu}", (gpu, "dispatch"))

    def start(self, iteration: Iteration, dispatch: Callable[[], object]) -> None:
        def run() -> None:
            # The thread's own: torch would otherwise go back and forth to device 0 around each instruction.
            self._driver.set_device(self.device)
            if iteration.times is not None:
                self._started = time.perf_counter(), self._timestamp(next(iter(self._streams)))
            try:
                dispatch()
                while any(self._steps.values()):
                    self._sleep(iteration)
                    self._enqueue_steps(iteration)
            finally:
                self._begun.clear()
                for steps in self._steps.values():
                    steps.clear()

        self._thread.put(iteration, f"gpu{self._gpu}", run)

    def enqueue(
        self, iteration: Iteration, stream: str, instruction: str, task: Callable[[], object]
    ) -> None:
        def enqueue() -> None:
            self._clocks[stream][self._gpu, stream] += 1
            timed = iteration.times is not None
            begin = self._timestamp(stream) if timed else None
            with self._driver.stream(self._streams[stream]):
                task()
            end = self._timestamp(stream) if timed else self._event(stream)
            self._pending[stream].append((instruction, begin, end))

        self._put(iteration, stream, _Step(instruction, enqueue))

    def wait(self, iteration: Iteration, stream: str, event: str) -> None:
        step = _Step(f"wait {event}", lambda: self._enqueue_wait(iteration, stream, event), event)
        self._put(iteration, stream, step)

    def record(self, iteration: Iteration, stream: str, event: str) -> None:
        def enqueue() -> None:
            # One that others may still wait for is not taken from the spare ones.
            recorded = self._driver.Event()
            recorded.record(self._streams[stream])
            iteration.record(event, _Mark(recorded, dict(self._clocks[stream])))

        self._put(iteration, stream, _Step(f"record {event}", enqueue))

    def release(self, stream: str, made_by: str, tensors: Sequence[Tensors]) -> None:
        if stream != made_by:
            freed_by = self._gpu, stream
            self._held[made_by].append(_Held(freed_by, self._clocks[stream][freed_by], tensors))

    def drain(self, iteration: Iteration) -> list[threading.Event]:
        return [self._thread.drain(iteration, lambda: self._settle(iteration))]

    def close(self) -> None:
        self._thread.close()

    def _enqueue_wait(self, iteration: Iteration, stream: str, event: str) -> None:
        mark: _Mark | None = iteration.wait(event)
        if mark is None:
            return  # of the host: it has happened
        self._streams[stream].wait_event(mark.event)
        clock = self._clocks[stream]
        for place, position in mark.clock.items():
            clock[place] = max(position, clock.get(place, 0))
        self._held[stream] = [
            held for held in self._held[stream] if clock.get(held.freed_by, 0) < held.position
        ]

    def _put(self, iteration: Iteration, stream: str, step: _Step) -> None:
        self._steps[stream].append(step)
        self._enqueue_steps(iteration)

    def _enqueue_steps(self, iteration: Iteration) -> None:
        """Enqueues, stream by stream, all that no unrecorded event keeps back.

        Raises:
            Cancelled: The iteration ended early, or a step failed and has ended it.
        """
        moved = True
        while moved:
            moved = False
            for stream, steps in self._steps.items():
                while steps and self._enqueued(iteration, stream, steps[0]):
                    steps.popleft()
                    moved = True

    def _enqueued(self, iteration: Iteration, stream: str, step: _Step) -> bool:
        """Enqueues a step, unless it has to wait; its failure ends the iteration under its name."""
        place = self._gpu, stream
        try:
            if iteration.cancelled:
                raise Cancelled
            if stream not in self._begun:
                iteration.begin(place, step.instruction)
                self._begun.add(stream)
            if step.event is not None and not iteration.recorded(step.event):
                return False
            step.enqueue()
            iteration.end(place)
            self._begun.remove(stream)
        except Cancelled:
            raise
        except BaseException as error:  # it belongs to the caller, who waits on another thread
            iteration.fail(step.instruction, self._gpu, error)
            raise Cancelled from error
        return True

    def _sleep(self, iteration: Iteration) -> None:
        """Until a stream can go on.

        Raises:
            Cancelled: The iteration ended early.
        """
        waker = threading.Event()
        for steps in self._steps.values():
            if steps and steps[0].event is not None:
                iteration.wake(steps[0].event, waker)
        waker.wait()
        if iteration.cancelled:
            raise Cancelled

    def _settle(self, iteration: Iteration) -> None:
        """Waits, without blocking the device, until it has done everything; then memory may go."""
        try:
            for name in self._streams:
                self._pending[name].append(("", None, self._event(name)))
            while any(self._pending.values()):
                for name, pending in self._pending.items():
                    self._advance(iteration, name, pending)
                time.sleep(POLL_S)
        except Exception as error:
            # A kernel that failed is reported here, whichever it was.
            iteration.fail(f"gpu{self._gpu}", self._gpu, error)
        for name, clock in self._clocks.items():
            clock.clear()
            clock[self._gpu, name] = 0
            self._pending[name].clear()
        self._held.clear()
        self._started = None

    def _advance(self, iteration: Iteration, name: str, pending: deque[tuple[str, Any, Any]]) -> None:
        """Takes note of instructions that have come to their end, and of the one that runs now."""
        place = self._gpu, name
        if self._started is not None and not self._started[1].query():
            return  # times are counted from there
        while pending and pending[0][2].query():
            instruction, begin, end = pending.popleft()
            iteration.running.pop(place, None)
            iteration.progress_s = time.perf_counter()
            if begin is not None:
                assert self._started is not None
                assert iteration.times is not None
                zero, first = self._started
                iteration.times[instruction] = (
                    zero + first.elapsed_time(begin) / 1e3,
                    zero + first.elapsed_time(end) / 1e3,
                )
            else:
                self._spare.append(end)
        if pending and place not in iteration.running:
            iteration.running[place] = pending[0][0] or "end", time.perf_counter()

    def _event(self, stream: str) -> Any:
        event = self._spare.pop() if self._spare else self._driver.Event()
        event.record(self._streams[stream])
        return event

    def _timestamp(self, stream: str) -> Any:
        event = self._driver.Event(enable_timing=True)
        event.record(self._streams[stream])
        return event
