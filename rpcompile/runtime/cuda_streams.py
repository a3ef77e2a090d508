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
class _Pending:
    """An instruction that is not known to be over; its start, and when the times of its iteration began."""

    iteration: Iteration
    instruction: str
    end: Any
    begin: Any
    started: tuple[float, Any] | None


@dataclass(frozen=True)
class _Step:
    """What is yet to be enqueued, once `event` (if any) has been recorded, by `of` if given."""

    instruction: str
    enqueue: Callable[[], object]
    event: str | None = None
    of: Iteration | None = None


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
        self._pending: dict[str, deque[_Pending]] = {name: deque() for name in names}
        self._spare: list[Any] = []
        self._started: tuple[float, Any] | None = None
        self._steps: dict[str, deque[_Step]] = {name: deque() for name in names}
        self._begun: set[str] = set()  # the streams whose first step has been announced
        self._lock = threading.Lock()  # of what is held, which both threads let go of
        self._thread = StreamThread(f"rpcompile-gpu{gpu}", (gpu, "dispatch"))
        # Looks on while the first one enqueues the next iteration.
        self._watcher = StreamThread(f"rpcompile-gpu{gpu}-watcher", (gpu, "watcher"))

    def start(self, iteration: Iteration, dispatch: Callable[[], object]) -> None:
        def run() -> None:
            # The thread's own: torch would otherwise go back and forth to device 0 around each instruction.
            self._driver.set_device(self.device)
            self._started = None
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
            self._pending[stream].append(_Pending(iteration, instruction, end, begin, self._started))

        self._put(iteration, stream, _Step(instruction, enqueue))

    def wait(self, iteration: Iteration, stream: str, event: str, of: Iteration | None = None) -> None:
        owner = of or iteration
        step = _Step(f"wait {event}", lambda: self._enqueue_wait(owner, stream, event), event, of)
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
            with self._lock:
                self._held[made_by].append(_Held(freed_by, self._clocks[stream][freed_by], tensors))

    def drain(self, iteration: Iteration) -> list[threading.Event]:
        over = threading.Event()
        self._thread.drain(iteration, lambda: self._finish(iteration, over))
        return [over]

    def close(self) -> None:
        # Behind what the first thread still hands to the second.
        self._thread.drain(Iteration({}), self._watcher.close)
        self._thread.close()

    def _enqueue_wait(self, iteration: Iteration, stream: str, event: str) -> None:
        mark: _Mark | None = iteration.wait(event)
        if mark is None:
            return  # of the host: it has happened
        self._streams[stream].wait_event(mark.event)
        clock = self._clocks[stream]
        for place, position in mark.clock.items():
            clock[place] = max(position, clock.get(place, 0))
        with self._lock:
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
            if step.event is not None and not (owner := step.of or iteration).recorded(step.event):
                if owner.cancelled:
                    raise Cancelled
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
                if (of := steps[0].of) is not None:
                    of.wake(steps[0].event, waker)
        waker.wait()
        if iteration.cancelled:
            raise Cancelled

    def _finish(self, iteration: Iteration, over: threading.Event) -> None:
        """Everything has been enqueued; `over` happens when the device has done it."""
        try:
            for name in self._streams:
                self._pending[name].append(_Pending(iteration, "", self._event(name), None, self._started))
        except Exception as error:
            iteration.fail(f"gpu{self._gpu}", self._gpu, error)
        ends = {(self._gpu, name): clock[self._gpu, name] for name, clock in self._clocks.items()}

        def settle() -> None:
            try:
                self._settle(iteration, ends)
            finally:
                over.set()

        self._watcher.drain(iteration, settle)

    def _settle(self, iteration: Iteration, ends: Clock) -> None:
        """Waits, without blocking the device, until it has done the iteration; then its memory may go."""

        def mine(pending: deque[_Pending]) -> bool:
            return bool(pending) and pending[0].iteration is iteration

        try:
            while left := [name for name, pending in self._pending.items() if mine(pending)]:
                for name in left:
                    self._advance(iteration, name, self._pending[name])
                time.sleep(POLL_S)
        except Exception as error:
            # A kernel that failed is reported here, whichever it was.
            iteration.fail(f"gpu{self._gpu}", self._gpu, error)
        for pending in self._pending.values():
            while mine(pending):
                pending.popleft()
        with self._lock:
            for name, found in self._held.items():
                self._held[name] = [held for held in found if held.position > ends[held.freed_by]]

    def _advance(self, iteration: Iteration, name: str, pending: deque[_Pending]) -> None:
        """Takes note of instructions that have come to their end, and of the one that runs now.

        Not of those of the iteration behind, which notes itself what is enqueued now.
        """
        place = self._gpu, name
        while pending and pending[0].iteration is iteration and _is_over(pending[0]):
            over = pending.popleft()
            iteration.running.pop(place, None)
            iteration.progress_s = time.perf_counter()
            if over.begin is not None:
                assert over.started is not None
                assert iteration.times is not None
                zero, first = over.started
                iteration.times[over.instruction] = (
                    zero + first.elapsed_time(over.begin) / 1e3,
                    zero + first.elapsed_time(over.end) / 1e3,
                )
            else:
                self._spare.append(over.end)
        if pending and pending[0].iteration is iteration and place not in iteration.running:
            iteration.running[place] = pending[0].instruction or "end", time.perf_counter()

    def _event(self, stream: str) -> Any:
        event = self._spare.pop() if self._spare else self._driver.Event()
        event.record(self._streams[stream])
        return event

    def _timestamp(self, stream: str) -> Any:
        event = self._driver.Event(enable_timing=True)
        event.record(self._streams[stream])
        return event


def _is_over(pending: _Pending) -> bool:
    # Times are counted from where the iteration began.
    return (pending.started is None or pending.started[1].query()) and pending.end.query()
