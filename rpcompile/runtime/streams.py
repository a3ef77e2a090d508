"""What streams share while a program runs once, and the streams of a CPU worker: a thread each."""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from rpcompile.runtime.process_end import end_with_process
from rpcompile.runtime.read_guard import unguarded

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from rpcompile.runtime.stage_runner import Tensors

POLL_S = 0.0002
"""Seconds after which a device is asked again how far it is."""
Place = tuple[int, str]
"""A GPU's index and the name of a stream."""


class Cancelled(Exception):
    """Unwinds a task whose iteration has ended early."""


@dataclass(frozen=True)
class Failure:
    """The first exception of an iteration, and the instruction that raised it."""

    instruction: str
    gpu: int
    error: BaseException


class Iteration:
    """One run of a program: host buffers, events, and what every stream is doing.

    Attributes:
        host: Host buffers by name.
        before_instruction: Called by a stream with the instruction's text before it runs.
        updates: Segment -> events of the host's work on its weights, which uploads wait for.
        failure: The first exception, None so far.
        cancelled: Whether streams skip the tasks they still have.
        before: The iteration that is still in flight in front of this one, if any.
        behind: Upload -> what must be over of `before` first.
        marked: What the iteration behind this one waits for.
        running: What each stream is doing, and since when (`time.perf_counter`).
        progress_s: When an instruction last came to its end.
        times: Start and end of each action by id, in the same clock; None unless asked for.
    """

    def __init__(
        self,
        host: dict[str, Any],
        before_instruction: Callable[[str], None] | None = None,
        record_times: bool = False,
    ) -> None:
        self.host = host
        self.before_instruction = before_instruction
        self.updates: dict[int, tuple[str, ...]] = {}
        self.failure: Failure | None = None
        self.cancelled = False
        self.before: Iteration | None = None
        self.behind: Mapping[str, Sequence[str]] = {}
        self.marked: Collection[str] = ()
        self.running: dict[Place, tuple[str, float]] = {}
        self.progress_s = time.perf_counter()
        self.times: dict[str, tuple[float, float]] | None = {} if record_times else None
        self._recorded: dict[str, Any] = {}
        self._wakers: dict[str, list[threading.Event]] = {}
        self._lock = threading.Lock()

    def begin(self, place: Place, instruction: str) -> None:
        """Notes what a stream is about to do.

        Raises:
            Cancelled: The iteration ended early.
        """
        if self.cancelled:
            raise Cancelled
        self.running[place] = instruction, time.perf_counter()
        if self.before_instruction is not None:
            self.before_instruction(instruction)

    def end(self, place: Place) -> None:
        """Notes that a stream's instruction is over."""
        instruction, since = self.running.pop(place)
        self.progress_s = time.perf_counter()
        if self.times is not None:
            self.times[instruction] = since, self.progress_s

    def record(self, event: str, mark: object = None) -> None:
        """Everything that waits for `event` may go on; each gets `mark`."""
        with self._lock:
            self._recorded[event] = mark
            wakers = self._wakers.pop(event, [])
        for waker in wakers:
            waker.set()

    def wait(self, event: str) -> Any:
        """Blocks the calling thread until `event` is recorded, and returns its mark.

        Raises:
            Cancelled: The iteration ended early.
        """
        waker = threading.Event()
        self.wake(event, waker)
        waker.wait()
        if self.cancelled:
            raise Cancelled
        return self._recorded[event]

    def wait_until_over(self, event: str) -> None:
        """As `wait`, and on until the device, if one has recorded the event, has come to it.

        Raises:
            Cancelled: The iteration ended early.
        """
        mark = self.wait(event)
        while mark is not None and not mark.event.query():
            if self.cancelled:
                raise Cancelled
            time.sleep(POLL_S)

    def wake(self, event: str, waker: threading.Event) -> None:
        """Sets `waker` as soon as `event` is recorded or the iteration has ended early."""
        with self._lock:
            if not self.cancelled and event not in self._recorded:
                self._wakers.setdefault(event, []).append(waker)
                return
        waker.set()

    def recorded(self, event: str) -> bool:
        return event in self._recorded

    def fail(self, instruction: str, gpu: int, error: BaseException) -> None:
        """Keeps the first failure and cancels what has not begun."""
        with self._lock:
            if self.failure is None and not isinstance(error, Cancelled):
                self.failure = Failure(instruction, gpu, error)
        self.cancel()

    def cancel(self) -> None:
        """Streams skip the tasks they still have, and wait no longer."""
        with self._lock:
            self.cancelled = True
            wakers = [waker for found in self._wakers.values() for waker in found]
            self._wakers.clear()
        for waker in wakers:
            waker.set()


class Streams(Protocol):
    """The streams of one logical GPU: queues that run in order, independently but for events.

    `CpuStreams` runs tasks on threads; `rpcompile.runtime.cuda_streams.CudaStreams` runs a task at once,
    which puts the task's kernels and copies into a CUDA stream.
    """

    device: torch.device

    def start(self, iteration: Iteration, dispatch: Callable[[], object]) -> None:
        """Calls `dispatch`, which enqueues the iteration's tasks; may return before it has."""

    def enqueue(
        self, iteration: Iteration, stream: str, instruction: str, task: Callable[[], object]
    ) -> None:
        """Puts a task behind the others of a stream; it is skipped if the iteration is cancelled."""

    def wait(self, iteration: Iteration, stream: str, event: str, of: Iteration | None = None) -> None:
        """What comes behind on `stream` runs once `event` has happened, `of` another iteration if given."""

    def record(self, iteration: Iteration, stream: str, event: str) -> None:
        """`event` happens when everything before it on `stream` is over."""

    def release(self, stream: str, made_by: str, tensors: Sequence[Tensors]) -> None:
        """Gives memory back.

        Args:
            stream: The stream whose position says when.
            made_by: The stream that allocated the tensors.
            tensors: The last references to them.
        """

    def drain(self, iteration: Iteration) -> list[threading.Event]:
        """Events that happen when all that was enqueued so far is over, cancelled or not."""
        ...

    def close(self) -> None:
        """Ends the threads after the tasks they have."""


class CpuStreams:
    """The streams of a virtual GPU: one thread each.

    Args:
        gpu: Index of the GPU.
        names: Names of the streams.
        operator_threads: Threads of one operator (torch's intra-op threads) in each stream; None for
            torch's setting.
    """

    device = torch.device("cpu")

    def __init__(self, gpu: int, names: Sequence[str], operator_threads: int | None = None) -> None:
        self._gpu = gpu
        self._threads = {
            name: StreamThread(f"rpcompile-gpu{gpu}-{name}", (gpu, name), operator_threads) for name in names
        }

    def start(self, iteration: Iteration, dispatch: Callable[[], object]) -> None:
        try:
            dispatch()
        except Exception as error:
            iteration.fail(f"gpu{self._gpu}", self._gpu, error)

    def enqueue(
        self, iteration: Iteration, stream: str, instruction: str, task: Callable[[], object]
    ) -> None:
        self._threads[stream].put(iteration, instruction, task)

    def wait(self, iteration: Iteration, stream: str, event: str, of: Iteration | None = None) -> None:
        owner = of or iteration
        self._threads[stream].put(iteration, f"wait {event}", lambda: owner.wait_until_over(event))

    def record(self, iteration: Iteration, stream: str, event: str) -> None:
        self._threads[stream].put(iteration, f"record {event}", lambda: iteration.record(event))

    def release(self, stream: str, made_by: str, tensors: Sequence[Tensors]) -> None:
        """Nothing to do: the task that frees runs when its turn comes, and memory knows no streams."""

    def drain(self, iteration: Iteration) -> list[threading.Event]:
        return [thread.drain(iteration) for thread in self._threads.values()]

    def close(self) -> None:
        for thread in self._threads.values():
            thread.close()


class StreamThread:
    """Runs tasks one after another on a thread of its own."""

    def __init__(self, name: str, place: Place, operator_threads: int | None = None) -> None:
        self._place = place
        self._tasks: queue.SimpleQueue[tuple[Iteration, str, Callable[[], object]] | None] = (
            queue.SimpleQueue()
        )
        self._iteration: Iteration | None = None  # of the task that runs
        self._stopping = False
        self._thread = threading.Thread(target=self._run, args=(operator_threads,), name=name, daemon=True)
        self._thread.start()
        end_with_process(self)

    def put(self, iteration: Iteration, instruction: str, task: Callable[[], object]) -> None:
        """Queues a task; it is skipped if the iteration is cancelled before it begins."""
        self._tasks.put((iteration, instruction, task))

    def drain(self, iteration: Iteration, settle: Callable[[], object] = lambda: None) -> threading.Event:
        """An event that happens when all tasks queued so far are over, cancelled or not, and `settle` too."""
        drained = _Drained(settle)
        self._tasks.put((iteration, "", drained))
        return drained.event

    def close(self) -> None:
        """Ends the thread after the tasks it has."""
        self._tasks.put(None)

    def stop(self) -> None:
        """Ends the thread after the instruction that runs; iterations in flight are cancelled."""
        self._stopping = True
        if (iteration := self._iteration) is not None:
            iteration.cancel()
        self.close()

    def join(self, timeout_s: float | None = None) -> None:
        """Returns when the thread has ended, or after that long."""
        self._thread.join(timeout_s)

    def _run(self, operator_threads: int | None) -> None:
        with unguarded():  # what it reads has been waited for
            self._serve(operator_threads)

    def _serve(self, operator_threads: int | None) -> None:
        if operator_threads is not None:
            _set_operator_threads(operator_threads)
        while (entry := self._tasks.get()) is not None:
            iteration, instruction, task = entry
            self._iteration = iteration
            if self._stopping:
                iteration.cancel()
            if isinstance(task, _Drained):
                task()
            elif not iteration.cancelled:
                try:
                    iteration.begin(self._place, instruction)
                    task()
                    iteration.end(self._place)
                except BaseException as error:  # it belongs to the caller, who waits on another thread
                    iteration.fail(instruction, self._place[0], error)
            # Keep no tensor alive while waiting for the next task.
            self._iteration = None
            del entry, iteration, task


class _Drained:
    def __init__(self, settle: Callable[[], object]) -> None:
        self._settle = settle
        self.event = threading.Event()

    def __call__(self) -> None:
        try:
            self._settle()
        finally:
            self.event.set()


_setting_threads = threading.Lock()


def _set_operator_threads(count: int) -> None:
    """Sets torch's intra-op threads for the calling thread alone.

    `torch.set_num_threads` sets the calling thread's number and the one that threads started later begin
    with; a second thread puts the latter back.
    """
    with _setting_threads:
        default = torch.get_num_threads()
        torch.set_num_threads(count)
        restore = threading.Thread(target=torch.set_num_threads, args=(default,))
        restore.start()
        restore.join()
