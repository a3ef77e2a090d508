"""One GPU's worker: the methods that a Program's graph calls, each of which only enqueues."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from rpcompile import buffers
from rpcompile.ir import Stream
from rpcompile.runtime.weight_arenas import copy_in_chunks

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Sequence

    from rpcompile.ir import Program
    from rpcompile.runtime.host_slots import HostSlots
    from rpcompile.runtime.stage_runner import Microbatch, StageRunner, Tape, Tensors
    from rpcompile.runtime.streams import Iteration, Streams
    from rpcompile.runtime.weight_arenas import WeightArenas

LANES = tuple(stream.value for stream in Stream if stream is not Stream.HOST)
"""The streams of a worker."""


class Worker:
    """A logical GPU: streams, and a store of its own, to and from which data is copied.

    Args:
        index: The GPU's index in the program.
        program: What to run.
        runners: Runs each stage, on the streams' device.
        streams: Run what is enqueued: on threads (`CpuStreams`) or on a CUDA device.
        slots: Host memory for what is copied down.
        arenas: How weights are copied up.
    """

    def __init__(
        self,
        index: int,
        program: Program,
        runners: Sequence[StageRunner],
        streams: Streams,
        slots: HostSlots,
        arenas: WeightArenas,
    ) -> None:
        self.index = index
        self.runners = runners
        self._graph = program.graphs[index]
        self._weights = program.weights
        self._states = program.states
        self._streams = streams
        self._slots = slots
        self._arenas = arenas
        self._store: dict[str, Tensors] = {}
        # A backward takes its tape along, so that autograd lets go of activations as it has used them.
        self._tapes: dict[str, Tape] = {}
        self._received: set[str] = set()  # the buffers of the store that h2d allocated
        self._iteration: Iteration | None = None
        self._microbatches: Sequence[Microbatch] = ()

    @property
    def place(self) -> tuple[Streams, Sequence[StageRunner]]:
        """The streams that it runs on, and what runs stages there; may be changed between iterations."""
        return self._streams, self.runners

    @place.setter
    def place(self, place: tuple[Streams, Sequence[StageRunner]]) -> None:
        self._streams, self.runners = place

    def start(self, iteration: Iteration, microbatches: Sequence[Microbatch]) -> None:
        """Begins to run the GPU's graph."""
        self._iteration = iteration
        self._microbatches = microbatches
        self._streams.start(iteration, lambda: self._graph.forward(self))

    def drain(self) -> list[threading.Event]:
        """Events that happen when everything enqueued so far is over, cancelled or not."""
        return [] if self._iteration is None else self._streams.drain(self._iteration)

    def clear(self) -> None:
        """Drops what an iteration left behind; to be called when it has drained."""
        self._store.clear()
        self._tapes.clear()
        self._received.clear()
        self._iteration = None

    def stored_bytes(self) -> int:
        """Bytes of the tensors on the GPU, those that operators hold while they run aside."""
        return sum(tensor.nbytes for made in self._store.values() for tensor in made.values())

    # ------------------------------------------------------------- called by the program

    def wait(self, stream: str, event: str) -> None:
        self._streams.wait(self._now, stream, event)

    def record(self, stream: str, event: str) -> None:
        self._streams.record(self._now, stream, event)

    def prefetch(
        self, action: str, stage: int, reads: Sequence[str], writes: Sequence[str], **_: Any
    ) -> None:
        def task() -> None:
            for source, target in zip(reads, writes, strict=True):
                tensors: Tensors = self._space(source)[source]
                moved = {name: tensors[name] for name in self._what_moves(target, stage, tensors)}
                self._store[target] = self._arenas.upload(moved, self._streams.device)

        for source in reads:
            for event in self._now.updates.get(buffers.segment_of(source), ()):
                self._streams.wait(self._now, Stream.WEIGHTS, event)
        if (before := self._now.before) is not None:
            for event in self._now.behind.get(action, ()):
                self._streams.wait(self._now, Stream.WEIGHTS, event, before)
        self._enqueue(Stream.WEIGHTS, action, task)

    def load(self, action: str, **arguments: Any) -> None:
        self._upload(action, **arguments)

    def receive(self, action: str, **arguments: Any) -> None:
        self._upload(action, **arguments)

    def handoff(self, action: str, **arguments: Any) -> None:
        self._download(Stream.D2H, action, **arguments)

    def offload(self, action: str, **arguments: Any) -> None:
        self._download(Stream.D2H, action, **arguments)

    def gradient(self, action: str, **arguments: Any) -> None:
        self._download(Stream.GRADIENTS, action, **arguments)

    def free(self, action: str, stream: str, buffers: Sequence[str]) -> None:
        def task() -> None:
            for name in buffers:
                self._free(name, stream)

        self._enqueue(stream, action, task)
        if action in self._now.marked:
            self._streams.record(self._now, stream, action)

    def forward(
        self, action: str, stage: int, microbatch: int, reads: Sequence[str], writes: Sequence[str]
    ) -> None:
        def task() -> None:
            runner = self.runners[stage]
            weights, inputs, values, _ = self._gather(reads)
            outputs = runner.forward(weights, inputs, values, self._microbatches[microbatch])
            outputs = _own(outputs, [*weights, inputs, values])
            for name in writes:
                kind = buffers.parse(name).kind
                if kind == "x":
                    self._store[name] = _pick(outputs, runner.graph.emits[buffers.segment_of(name)])
                elif kind == "kept":
                    self._store[name] = _pick(outputs, runner.graph.keeps[buffers.segment_of(name)])
                elif kind == "loss":
                    self._store[name] = outputs

        self._enqueue(Stream.COMPUTE, action, task)

    def recompute(
        self, action: str, stage: int, microbatch: int, reads: Sequence[str], writes: Sequence[str]
    ) -> None:
        def task() -> None:
            weights, inputs, values, _ = self._gather(reads)
            (tape,) = writes
            self._tapes[tape] = self.runners[stage].recompute(
                weights, inputs, values, self._microbatches[microbatch]
            )

        self._enqueue(Stream.COMPUTE, action, task)

    def backward(
        self, action: str, stage: int, microbatch: int, reads: Sequence[str], writes: Sequence[str]
    ) -> None:
        def task() -> None:
            weights, _, _, gradients = self._gather(reads)
            runner = self.runners[stage]
            (tape,) = (name for name in reads if buffers.parse(name).kind == "tape")
            result = runner.backward(self._tapes.pop(tape), gradients)
            self._keep_gradients(runner, reads, writes, weights, _own(result, [gradients]))

        self._enqueue(Stream.COMPUTE, action, task)

    def fused(
        self, action: str, stage: int, microbatch: int, reads: Sequence[str], writes: Sequence[str]
    ) -> None:
        def task() -> None:
            weights, inputs, values, _ = self._gather(reads)
            runner = self.runners[stage]
            outputs, result = runner.fused(weights, inputs, values, self._microbatches[microbatch])
            self._store[buffers.loss(buffers.gpu(self.index), microbatch)] = outputs
            self._keep_gradients(runner, reads, writes, weights, result)

        self._enqueue(Stream.COMPUTE, action, task)

    # ------------------------------------------------------------- helpers

    @property
    def _now(self) -> Iteration:
        assert self._iteration is not None
        return self._iteration

    def _enqueue(self, stream: str, action: str, task: Callable[[], None]) -> None:
        self._streams.enqueue(self._now, stream, action, task)

    def _space(self, buffer: str) -> dict[str, Any]:
        return self._now.host if buffers.space_of(buffer) == buffers.HOST else self._store

    def _upload(self, action: str, stage: int, reads: Sequence[str], writes: Sequence[str], **_: Any) -> None:
        def task() -> None:
            for source, target in zip(reads, writes, strict=True):
                tensors: Tensors = self._space(source)[source]
                made: Tensors = {}
                for name in self._what_moves(target, stage, tensors):
                    tensor = tensors[name].detach()
                    empty = torch.empty_like(tensor, device=self._streams.device)
                    made[name] = empty.copy_(tensor, non_blocking=True)
                self._store[target] = made
                self._received.add(target)

        self._enqueue(Stream.H2D, action, task)

    def _download(
        self, stream: str, action: str, stage: int, reads: Sequence[str], writes: Sequence[str], **_: Any
    ) -> None:
        def task() -> None:
            for source, target in zip(reads, writes, strict=True):
                tensors: Tensors = self._space(source)[source]
                moved = {name: tensors[name].detach() for name in self._what_moves(target, stage, tensors)}
                made = self._slots.empty_like(target, moved)
                for name, tensor in moved.items():
                    if stream is Stream.GRADIENTS:
                        copy_in_chunks(made[name], tensor)
                    else:
                        made[name].copy_(tensor, non_blocking=True)
                self._space(target)[target] = made

        self._enqueue(stream, action, task)

    def _free(self, name: str, stream: str) -> None:
        if buffers.parse(name).kind == "tape":
            return  # its backward took it
        tensors = self._space(name).pop(name)
        if buffers.space_of(name) == buffers.HOST:
            return
        kind = buffers.parse(name).kind
        made_by: str = Stream.COMPUTE
        if kind == "weights":
            made_by = Stream.WEIGHTS
            for tensor in tensors.values():
                # Gradients have a buffer, and an end, of their own.
                tensor.grad = None
        elif name in self._received:
            self._received.remove(name)
            made_by = Stream.H2D
        self._streams.release(stream, made_by, [tensors])

    def _what_moves(self, target: str, stage: int, tensors: Tensors) -> Sequence[str]:
        """The names of the tensors that a copy into `target` takes along."""
        runner, kind = self.runners[stage], buffers.parse(target).kind
        if kind == "inputs":
            return runner.graph.inputs
        if kind == "state":
            return self._states[buffers.segment_of(target)]
        if kind == "weights":
            # A tensor that several segments of a stage read comes with the first.
            earlier = range(runner.graph.stage.first, buffers.segment_of(target))
            there = {name for segment in earlier for name in self._weights[segment]}
            return [name for name in tensors if name not in there]
        return list(tensors)

    def _gather(self, reads: Sequence[str]) -> tuple[list[Tensors], Tensors, Tensors, Tensors]:
        weights: list[Tensors] = []
        merged: dict[str, Tensors] = {"inputs": {}, "x": {}, "dx": {}}
        for name in reads:
            kind = buffers.parse(name).kind
            if kind == "weights":
                weights.append(self._store[name])
            elif kind in merged:
                merged[kind].update(self._store[name])
            elif kind == "kept":
                merged["x"].update(self._store[name])
        return weights, merged["inputs"], merged["x"], merged["dx"]

    def _keep_gradients(
        self,
        runner: StageRunner,
        reads: Sequence[str],
        writes: Sequence[str],
        weights: list[Tensors],
        incoming: Tensors,
    ) -> None:
        order = [buffers.segment_of(name) for name in reads if buffers.parse(name).kind == "weights"]
        accumulated = dict(zip(order, runner.weight_gradients(weights), strict=True))
        for name in writes:
            kind = buffers.parse(name).kind
            if kind == "gradients":
                self._store[name] = accumulated[buffers.segment_of(name)]
            elif kind == "dx":
                self._store[name] = incoming


def _pick(tensors: Tensors, names: Sequence[str]) -> dict[str, torch.Tensor]:
    return {name: tensors[name] for name in names}


def _own(made: Tensors, given: Sequence[Tensors]) -> Tensors:
    """What a stage made, in memory of its own: what it only passed on is freed at another time."""
    storages = {tensor.untyped_storage()._cdata for tensors in given for tensor in tensors.values()}
    return {
        name: tensor.clone() if tensor.untyped_storage()._cdata in storages else tensor
        for name, tensor in made.items()
    }
