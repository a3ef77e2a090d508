"""Stands in for `torch.cuda` under `CudaStreams`: streams and events without a device.

Everything is done at once, so results are right; what is checked is the order that a device would know of.
A wait for an event that has not been recorded does nothing on CUDA, and is an error here.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


class Event:
    """Happens when it is recorded, unless the device is stuck."""

    stuck = False

    def __init__(self, enable_timing: bool = False) -> None:
        self.timing = enable_timing
        self.recorded = False

    def record(self, stream: Stream) -> None:
        self.recorded = True

    def query(self) -> bool:
        return self.recorded and not Event.stuck

    def elapsed_time(self, other: Event) -> float:
        assert self.timing
        assert other.timing
        return 1.0


class Stream:
    """Remembers what it was made to wait for."""

    current: Stream | None = None

    def __init__(self, device: Any) -> None:
        self.device = device
        self.waits: list[Event] = []

    def wait_event(self, event: Event) -> None:
        assert event.recorded, "CUDA would not wait for an event that has not been recorded"
        self.waits.append(event)


@contextmanager
def stream(chosen: Stream) -> Iterator[None]:
    before, Stream.current = Stream.current, chosen
    try:
        yield
    finally:
        Stream.current = before
