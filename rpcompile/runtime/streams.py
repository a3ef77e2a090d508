"""Queues that run tasks in order, and the events between them; on CPU, as threads."""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

_POLL_S = 0.1


class Cancelled(Exception):
    """Unwinds a task whose iteration has ended early."""


@dataclass
class Failure:
    """The first exception of an iteration, and the instruction that raised it."""

    instruction: str
    gpu: int
    error: BaseException


@dataclass
class Iteration:
    """What all streams share while one program runs once.

    Attributes:
        host: Host buffers by name.
        before_instruction: Called by a stream with the instruction's text before it runs.
        updates: Segment -> events of the host's work on its weights, which uploads wait for.
    """

    host: dict[str, Any]
    before_instruction: Callable[[str], None] | None = None
    updates: dict[int, tuple[str, ...]] = field(default_factory=dict)
    failure: Failure | None = None
    _events: dict[str, threading.Event] = field(default_factory=dict)
    _cancelled: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def record(self, event: str) -> None:
        """Everything that waits for `event` may go on."""
        self._event(event).set()

    def wait(self, event: str) -> None:
        """Blocks the calling stream until `event` is recorded.

        Raises:
            Cancelled: The iteration ended early.
        """
        happened = self._event(event)
        while not happened.wait(_POLL_S):
            if self.cancelled:
                raise Cancelled

    def fail(self, instruction: str, gpu: int, error: BaseException) -> None:
        """Keeps the first failure and cancels what has not begun."""
        with self._lock:
            if self.failure is None and not isinstance(error, Cancelled):
                self.failure = Failure(instruction, gpu, error)
        self.cancel()

    def cancel(self) -> None:
        """Streams skip the tasks they still have."""
        self._cancelled.set()

    def _event(self, name: str) -> threading.Event:
        with self._lock:
            return self._events.setdefault(name, threading.Event())


class StreamThread:
    """Runs tasks one after another on a thread of its own."""

    def __init__(self, name: str, gpu: int) -> None:
        self._gpu = gpu
        self._tasks: queue.SimpleQueue[tuple[Iteration, str, Callable[[], None]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, iteration: Iteration, instruction: str, task: Callable[[], None]) -> None:
        """Queues a task; it is skipped if the iteration is cancelled before it begins."""
        self._tasks.put((iteration, instruction, task))

    def drain(self, iteration: Iteration) -> threading.Event:
        """An event that happens when all tasks queued so far are over, cancelled or not."""
        drained = _Drained()
        self._tasks.put((iteration, "", drained))
        return drained.event

    def close(self) -> None:
        """Ends the thread after the tasks it has."""
        self._tasks.put(None)

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        while (entry := self._tasks.get()) is not None:
            iteration, instruction, task = entry
            if isinstance(task, _Drained):
                task()
            elif not iteration.cancelled:
                try:
                    if iteration.before_instruction is not None:
                        iteration.before_instruction(instruction)
                    task()
                except BaseException as error:  # it belongs to the caller, who waits on another thread
                    iteration.fail(instruction, self._gpu, error)
            # Keep no tensor alive while waiting for the next task.
            del entry, iteration, task


class _Drained:
    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self) -> None:
        self.event.set()
