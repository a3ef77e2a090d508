"""Keeps Ctrl-C out of what must happen as a whole or not at all."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType


class Interrupt:
    """A signal handler that remembers an interrupt for the one before it."""

    def __init__(self, handler: Callable[[int, FrameType | None], object] | None = None) -> None:
        self._handler = handler
        self._came: tuple[int, FrameType | None] | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self._came = number, frame

    def raise_if_it_came(self) -> None:
        """Raises it within the block, which can still be undone."""
        came, self._came = self._came, None
        if came is not None and self._handler is not None:
            self._handler(*came)


@contextmanager
def uninterrupted() -> Iterator[Interrupt]:
    """An interrupt that comes within the block is raised at its end. Nothing in it may wait for long.

    Python raises interrupts in the main thread only; in others there is nothing to do.
    """
    before = signal.getsignal(signal.SIGINT)
    in_main = threading.current_thread() is threading.main_thread()
    if isinstance(before, Interrupt) or not in_main or not callable(before):
        yield before if isinstance(before, Interrupt) and in_main else Interrupt()
        return
    interrupt = Interrupt(before)
    try:
        signal.signal(signal.SIGINT, interrupt)
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)
        interrupt.raise_if_it_came()
