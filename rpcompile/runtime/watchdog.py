"""Waits for workers, and says who waits for whom when they stop answering."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rpcompile.errors import WorkerTimeout
from rpcompile.ir import Stream

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterable

    from rpcompile.ir import Action, Schedule
    from rpcompile.runtime.streams import Iteration

_POLL_S = 1.0


def await_all(
    events: Iterable[threading.Event],
    iteration: Iteration,
    schedule: Schedule,
    timeout_s: float,
    shift: int = 0,
) -> None:
    """Blocks until all events have happened.

    Args:
        events: E.g. the workers' drains.
        iteration: What the workers run.
        schedule: The schedule that it is a run of.
        timeout_s: How long no instruction may come to its end.
        shift: GPUs by which the iteration is shifted against the schedule.

    Raises:
        WorkerTimeout: Nothing has happened for that long.
    """
    for event in events:
        while not event.wait(min(_POLL_S, timeout_s / 4)):
            idle_s = time.perf_counter() - iteration.progress_s
            if idle_s > timeout_s:
                raise WorkerTimeout(
                    f"no instruction came to its end for {idle_s:.1f} s (timeout_s={timeout_s:g}). "
                    f"{report(iteration, schedule, shift)}. Pass a larger timeout_s to rpcompile.compile if "
                    f"an instruction may take that long. Weights, gradients and buffers are as they were "
                    f"before this call; what is stuck is left behind, and the next call uses new workers."
                )


def report(iteration: Iteration, schedule: Schedule, shift: int = 0) -> str:
    """What every stream is doing, since when; first those that run, then those that wait, and for whom."""
    recorders = {event: action for action in schedule.actions() for event in action.records}
    now = time.perf_counter()

    def place(action: Action) -> str:
        return f"{action.id} ({_name((action.gpu + shift) % schedule.gpus, action.stream.value)})"

    busy: list[str] = []
    waiting: list[str] = []
    for (gpu, stream), (instruction, since) in sorted(iteration.running.copy().items()):
        where, for_s = _name(gpu, stream), f"for {now - since:.1f} s"
        event = instruction.removeprefix("wait ")
        if event == instruction:
            busy.append(f"{where} has been running {instruction} {for_s}")
        elif event in recorders:
            source = recorders[event]
            waiting.append(f"{where} has been waiting {for_s} for {event} from {place(source)}")
        else:
            waiting.append(f"{where} has been waiting {for_s} for {event}")
    return "; ".join([*busy, *waiting]) or "No stream is running anything"


def _name(gpu: int, stream: str) -> str:
    return "the host" if stream == Stream.HOST else f"gpu{gpu} {stream}"
