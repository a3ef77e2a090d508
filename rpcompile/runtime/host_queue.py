"""The host's queue: optimizer updates and casts, on one thread, most urgent first."""

from __future__ import annotations

import heapq
import itertools
import threading
import weakref
from concurrent.futures import Future
from typing import TYPE_CHECKING

from rpcompile.runtime.process_end import end_with_process
from rpcompile.runtime.read_guard import unguarded

if TYPE_CHECKING:
    from collections.abc import Callable

_Task = tuple[tuple[int, ...], int, "Callable[[], None]", "Future[None]"]


class HostQueue:
    """Runs tasks on a thread of its own: the lowest priority first, equal ones in the order they came.

    The thread begins with the first task and ends with `close`, or when the queue is collected.
    """

    def __init__(self, name: str) -> None:
        self._numbers = itertools.count()
        self._shared = _Shared(name)
        self.close = weakref.finalize(self, self._shared.close)

    def put(self, priority: tuple[int, ...], task: Callable[[], None]) -> Future[None]:
        """Queues a task.

        Args:
            priority: E.g. what kind of work it is, then the segment that it is for.
            task: Runs on the queue's thread.

        Returns:
            A future that is done when the task is over, with the exception it raised if it raised one.
        """
        future: Future[None] = Future()
        with self._shared.changed:
            heapq.heappush(self._shared.tasks, (priority, next(self._numbers), task, future))
            self._shared.changed.notify()
            self._shared.start()
        return future


class _Shared:
    """What the thread sees: not the queue itself, which could otherwise never be collected."""

    def __init__(self, name: str) -> None:
        self.tasks: list[_Task] = []
        self.changed = threading.Condition()
        self._closed = False
        self._name = name
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begins to serve; to be called with `changed` held."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
            end_with_process(self)

    def _run(self) -> None:
        with unguarded():  # this thread makes what others wait for
            self._serve()

    def _serve(self) -> None:
        while True:
            with self.changed:
                while not self.tasks and not self._closed:
                    self.changed.wait()
                if not self.tasks:
                    return
                _, _, task, future = heapq.heappop(self.tasks)
            failure: BaseException | None = None
            try:
                task()
            except BaseException as error:  # it belongs to whoever waits for the future
                failure = error
            # Whoever waits may use memory again that the task held; nor does the next wait keep it alive.
            del task
            if failure is None:
                future.set_result(None)
            else:
                future.set_exception(failure)
            del future, failure

    def close(self) -> None:
        """The thread ends after the tasks it has."""
        with self.changed:
            self._closed = True
            self.changed.notify()

    stop = close

    def join(self, timeout_s: float) -> None:
        """Returns when the thread has ended, or after that long."""
        if self._thread is not None:
            self._thread.join(timeout_s)
