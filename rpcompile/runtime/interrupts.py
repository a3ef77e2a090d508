"""Keeps Ctrl-C out of what must happen as a whole or not at all."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType


class _Deferred:
    """A handler that remembers."""

    def __init__(self) -> None:
        self.came: tuple[int, FrameType | None] | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.came = number, frame


@contextmanager
def uninterrupted() -> Iterator[None]:
    """An interrupt that comes within the block is raised at its end. Nothing in it may wait for long.

    Python raises interrupts in the main thread only; in others there is nothing to do.
    """
    before = signal.getsignal(signal.SIGINT)
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or not callable(before) or isinstance(before, _Deferred):
        yield
        return
    deferred = _Deferred()
    try:
        signal.signal(signal.SIGINT, deferred)
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if deferred.came is not None:
            before(*deferred.came)
