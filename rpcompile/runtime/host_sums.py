"""The host's part of a program: gradients of the jobs that share a stage are added as they land."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rpcompile.ir import Stream

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Sequence

    import torch
    from torch.fx import GraphModule

    from rpcompile.runtime.host_slots import HostSlots
    from rpcompile.runtime.stage_runner import Tensors
    from rpcompile.runtime.streams import Iteration, Streams


class HostSums:
    """Runs the host's graph: SUMs, in the schedule's order, beside what the GPUs do.

    A sum goes into the memory of the first job's gradients or, in another dtype, into memory that is kept
    from iteration to iteration as well. What has been added is let go of.

    Args:
        graph: Calls `wait`, `sum` and `record`.
        streams: Run what is enqueued on the one stream there is, `Stream.HOST`.
        slots: Memory for sums.
        dtype: What gradients are summed in; None for their own.
    """

    def __init__(
        self, graph: GraphModule, streams: Streams, slots: HostSlots, dtype: torch.dtype | None
    ) -> None:
        self._graph = graph
        self._streams = streams
        self._slots = slots
        self._dtype = dtype
        self._iteration: Iteration | None = None

    def start(self, iteration: Iteration) -> None:
        """Begins to run the graph."""
        self._iteration = iteration
        self._streams.start(iteration, lambda: self._graph.forward(self))

    def drain(self) -> list[threading.Event]:
        """Events that happen when everything enqueued so far is over, cancelled or not."""
        return [] if self._iteration is None else self._streams.drain(self._iteration)

    def clear(self) -> None:
        """Lets go of the iteration; to be called when it has drained."""
        self._iteration = None

    # ------------------------------------------------------------- called by the program

    def wait(self, stream: str, event: str) -> None:
        self._streams.wait(self._now, stream, event)

    def record(self, stream: str, event: str) -> None:
        self._streams.record(self._now, stream, event)

    def sum(self, action: str, reads: Sequence[str], writes: Sequence[str], **_: Any) -> None:
        self._streams.enqueue(self._now, Stream.HOST, action, self._adding(self._now.host, reads, *writes))

    # ------------------------------------------------------------- helpers

    @property
    def _now(self) -> Iteration:
        assert self._iteration is not None
        return self._iteration

    def _adding(self, host: dict[str, Tensors], reads: Sequence[str], total: str) -> Callable[[], None]:
        def task() -> None:
            sums = host[total] = self._widened(total, host[total])
            for part in reads[1:]:
                for name, gradient in host.pop(part).items():
                    if name in sums:
                        sums[name].add_(gradient)
                    else:  # no gradient has reached it in the jobs before
                        sums[name] = gradient if self._dtype is None else gradient.to(self._dtype)

        return task

    def _widened(self, buffer: str, gradients: Tensors) -> Tensors:
        """The same in the dtype of sums."""
        dtype = self._dtype
        narrow = {
            name: gradient for name, gradient in gradients.items() if dtype not in (None, gradient.dtype)
        }
        wide = self._slots.empty_like(buffer, narrow, dtype) if narrow else {}
        for name, gradient in wide.items():
            gradient.copy_(narrow[name])
        return {name: wide.get(name, gradient) for name, gradient in gradients.items()}
