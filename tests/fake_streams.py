"""Streams without threads: queues whose tasks run later, in any order that the events allow.

What a real machine does rarely and by chance, this does at once and repeatably: one stream is far ahead of
all others, or far behind. Freed memory is overwritten with NaN.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from typing import TYPE_CHECKING, Any

import torch

from rpcompile.runtime.engine import Engine
from rpcompile.runtime.host_slots import _references
from rpcompile.runtime.worker import LANES

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from rpcompile import Compiled
    from rpcompile.runtime.stage_runner import Tensors
    from rpcompile.runtime.streams import Iteration

Place = tuple[int, str]


class Machine:
    """The queues of all GPUs.

    Args:
        seed: Chooses the order.
        ignored: (GPU, event) that the GPU's streams do not wait for.
    """

    def __init__(self, seed: int, ignored: Collection[tuple[int, str]] = ()) -> None:
        self.queues: dict[Place, deque[tuple[str, str, Callable[[], object]]]] = {}
        self.ignored = ignored
        self.done: list[str] = []
        self.after_task: Callable[[], object] = lambda: None
        self._choices = random.Random(seed)
        # Half of the seeds run the highest of fixed, random priorities, the others anything.
        self._priorities: dict[Place, float] = {}
        self._by_priority = bool(seed % 2)

    def run(self, iteration: Iteration) -> None:
        """Runs until all queues are empty, or nothing can go on."""
        while any(self.queues.values()):
            heads = {place: queue[0] for place, queue in self.queues.items() if queue}
            ready = [
                place
                for place, (kind, name, _) in heads.items()
                if kind != "wait" or iteration.recorded(name) or iteration.cancelled
            ]
            if not ready:
                iteration.fail("deadlock", 0, RuntimeError(f"nothing can go on: {heads}"))
                continue
            place = self._choose(ready)
            _, name, task = self.queues[place].popleft()
            if iteration.cancelled:
                continue
            try:
                iteration.begin(place, name)
                task()
                iteration.end(place)
            except Exception as error:
                iteration.fail(name, place[0], error)
            self.done.append(name)
            self.after_task()

    def _choose(self, ready: list[Place]) -> Place:
        if not self._by_priority:
            return self._choices.choice(ready)
        for place in ready:
            self._priorities.setdefault(place, self._choices.random())
        return max(ready, key=self._priorities.__getitem__)


class FakeStreams:
    """One GPU's streams on a `Machine`."""

    device = torch.device("cpu")

    def __init__(self, gpu: int, machine: Machine, lanes: Sequence[str] = LANES) -> None:
        self._gpu = gpu
        self._machine = machine
        for lane in lanes:
            machine.queues[gpu, lane] = deque()

    def start(self, iteration: Iteration, dispatch: Callable[[], object]) -> None:
        dispatch()

    def enqueue(self, iteration: Iteration, stream: str, instruction: str, task: Any) -> None:
        self._machine.queues[self._gpu, stream].append(("task", instruction, task))

    def wait(self, iteration: Iteration, stream: str, event: str) -> None:
        if (self._gpu, event) not in self._machine.ignored:
            self._machine.queues[self._gpu, stream].append(("wait", event, lambda: iteration.wait(event)))

    def record(self, iteration: Iteration, stream: str, event: str) -> None:
        self._machine.queues[self._gpu, stream].append(("record", event, lambda: iteration.record(event)))

    def release(self, stream: str, made_by: str, tensors: Sequence[Tensors]) -> None:
        for made in tensors:
            for tensor in made.values():
                if tensor.is_floating_point() and _references(tensor) == 1:
                    tensor.detach().fill_(torch.nan)

    def drain(self, iteration: Iteration) -> list[threading.Event]:
        self._machine.run(iteration)
        over = threading.Event()
        over.set()
        return [over]

    def close(self) -> None:
        pass


class FakeEngine(Engine):
    """An engine whose GPUs share a `Machine`."""

    def __init__(self, compiled: Compiled, machine: Machine) -> None:
        self._machine = machine
        super().__init__(compiled.program, compiled.plan.chain)

    def _make_streams(self) -> list[Any]:
        return [FakeStreams(index, self._machine) for index in range(len(self._devices))]
