"""An iteration that has been started, and what it leaves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    from rpcompile.runtime.host_slots import HostSlots
    from rpcompile.runtime.host_sums import HostSums
    from rpcompile.runtime.stage_runner import Tensors
    from rpcompile.runtime.streams import Iteration
    from rpcompile.runtime.worker import Worker


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


@dataclass(frozen=True)
class Bay:
    """What each of the iterations in flight has for itself, and one after another uses."""

    workers: list[Worker]
    slots: HostSlots
    hosts: list[HostSums]

    def drain(self) -> list[threading.Event]:
        """Events that happen when everything enqueued so far is over, cancelled or not."""
        return [event for one in (*self.workers, *self.hosts) for event in one.drain()]

    def clear(self) -> None:
        """Drops what an iteration left behind; to be called when it has drained."""
        for one in (*self.workers, *self.hosts):
            one.clear()


@dataclass(eq=False)
class Flight:
    """An iteration that `Engine.start` has enqueued.

    Attributes:
        bay: What it uses.
        iteration: Its events and host buffers.
        microbatches: How many it has.
        shift: GPUs by which it is shifted against the schedule.
        finish: The engine's, behind `result`.
        cancel_from: The engine's, behind `cancel`.
        drains: Happen when all that was enqueued of it is over.
        lost: It was enqueued on streams that have been given up.
    """

    bay: Bay
    iteration: Iteration
    microbatches: int
    shift: int
    finish: Callable[[Flight], Result]
    cancel_from: Callable[[Flight], None]
    drains: list[threading.Event] = field(default_factory=list)
    lost: bool = False

    def result(self) -> Result:
        """Waits for its end; to be called once.

        Raises:
            ExecutionError: An instruction failed, or it was cancelled.
            WorkerTimeout: No instruction came to its end for `timeout_s`; those that were started behind it
                are cancelled.
        """
        return self.finish(self)

    def cancel(self) -> None:
        """Skips what has not begun of it and of those that were started behind it."""
        self.cancel_from(self)
