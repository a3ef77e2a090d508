"""Threads come to an end before the interpreter does.

A thread that is inside torch when the interpreter goes is unwound through C++ that does not allow it, and the
process aborts, after a script whose last line is a `step`, say.
"""

from __future__ import annotations

import atexit
import time
import weakref
from typing import Protocol

LONGEST_S = 60.0
"""How long the end of the process may wait for instructions and updates that have begun."""


class Ending(Protocol):
    """A thread, or what owns one."""

    def stop(self) -> None:
        """Asks it to come to its end."""

    def join(self, timeout_s: float) -> None:
        """Returns when it has ended, or after that long."""


_alive: weakref.WeakSet[Ending] = weakref.WeakSet()


def end_with_process(thread: Ending) -> None:
    """`thread` is stopped and awaited when the process ends, unless it has been collected."""
    _alive.add(thread)


@atexit.register
def _end_all() -> None:
    found = list(_alive)
    for thread in found:
        thread.stop()
    deadline = time.monotonic() + LONGEST_S
    for thread in found:
        thread.join(max(0.0, deadline - time.monotonic()))
