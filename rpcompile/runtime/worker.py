"""One GPU's worker: the methods that a Program's graph calls, each of which only enqueues."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from rpcompile import buffers
from rpcompile.ir import Stream
from rpcompile.runtime.streams import Iteration, StreamThread

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rpcompile.ir import Program
    from rpcompile.runtime.stage_runner import Microbatch, StageRunner, Tensors

_STREAMS = (Stream.COMPUTE, Stream.H2D, Stream.D2H)


class CpuWorker:
    """A virtual GPU: three stream threads and a store of its own, to and from which data is copied.

    Its graph runs on a thread of its own and only enqueues, as it would for CUDA streams.
    """

    def __init__(self, index: int, program: Program, runners: Sequence[StageRunner]) -> None:
        self.index = index
        self._graph = program.graphs[index]
        self._weights = program.weights
        self._states = program.states
        self._runners = runners
        self._store: dict[str, Tensors] = {}
        self._streams = {
            stream.value: StreamThread(f"rpcompile-gpu{index}-{stream.value}", index) for stream in _STREAMS
        }
        self._dispatch = StreamThread(f"rpcompile-gpu{index}", index)
        self._iteration = Iteration({})
        self._microbatches: Sequence[Microbatch] = ()

    def start(self, iteration: Iteration, microbatches: Sequence[Microbatch]) -> None:
        """Begins to run the GPU's graph; returns at once."""
        self._iteration = iteration
        self._microbatches = microbatches
        self._dispatch.put(iteration, f"gpu{self.index}", lambda: self._graph(self))

    def finish(self) -> None:
        """Blocks until every queue is empty, then drops what a failed iteration left behind."""
        iteration = self._iteration
        self._dispatch.drain(iteration).wait()
        for event in [stream.drain(iteration) for stream in self._streams.values()]:
            event.wait()
        self._store.clear()
        self._iteration = Iteration({})

    def close(self) -> None:
        """Ends the threads."""
        for stream in (self._dispatch, *self._streams.values()):
            stream.close()

    # ------------------------------------------------------------- called by the program

    def wait(self, stream: str, event: str) -> None:
        iteration = self._iteration
        self._streams[stream].put(iteration, f"wait {event}", lambda: iteration.wait(event))

    def record(self, stream: str, event: str) -> None:
        iteration = self._iteration
        self._streams[stream].put(iteration, f"record {event}", lambda: iteration.record(event))

    def prefetch(self, action: str, reads: Sequence[str], **arguments: Any) -> None:
        for name in reads:
            for event in self._iteration.updates.get(buffers.segment_of(name), ()):
                self.wait("h2d", event)
        self._copy("h2d", action, reads=reads, **arguments)

    def load(self, action: str, **arguments: Any) -> None:
        self._copy("h2d", action, **arguments)

    def receive(self, action: str, **arguments: Any) -> None:
        self._copy("h2d", action, **arguments)

    def handoff(self, action: str, **arguments: Any) -> None:
        self._copy("d2h", action, **arguments)

    def offload(self, action: str, **arguments: Any) -> None:
        self._copy("d2h", action, **arguments)

    def gradient(self, action: str, **arguments: Any) -> None:
        self._copy("d2h", action, **arguments)

    def free(self, action: str, stream: str, buffers: Sequence[str]) -> None:
        def task() -> None:
            for name in buffers:
                del self._space(name)[name]

        self._enqueue(stream, action, task)

    def forward(
        self, action: str, stage: int, microbatch: int, reads: Sequence[str], writes: Sequence[str]
    ) -> None:
        def task() -> None:
            runner = self._runners[stage]
            weights, inputs, values, _ = self._gather(reads)
            outputs = runner.forward(weights, inputs, values, self._microbatches[microbatch])
            for name in writes:
                kind = buffers.parse(name).kind
                if kind == "x":
                    self._store[name] = _pick(outputs, runner.graph.emits[buffers.segment_of(name)])
                elif kind == "loss":
                    self._store[name] = outputs

        self._enqueue("compute", action, task)

    def backward(
        self, action: str, stage: int, microbatch: int, reads: Sequence[str], writes: Sequence[str]
    ) -> None:
        def task() -> None:
            weights, inputs, values, gradients = self._gather(reads)
            runner = self._runners[stage]
            result = runner.backward(weights, inputs, values, gradients, self._microbatches[microbatch])
            self._keep_gradients(runner, reads, writes, weights, result)

        self._enqueue("compute", action, task)

    def fused(
        self, action: str, stage: int, microbatch: int, reads: Sequence[str], writes: Sequence[str]
    ) -> None:
        def task() -> None:
            weights, inputs, values, _ = self._gather(reads)
            runner = self._runners[stage]
            outputs, result = runner.fused(weights, inputs, values, self._microbatches[microbatch])
            self._store[buffers.loss(buffers.gpu(self.index), microbatch)] = outputs
            self._keep_gradients(runner, reads, writes, weights, result)

        self._enqueue("compute", action, task)

    # ------------------------------------------------------------- helpers

    def _enqueue(self, stream: str, action: str, task: Callable[[], None]) -> None:
        self._streams[stream].put(self._iteration, action, task)

    def _space(self, buffer: str) -> dict[str, Any]:
        return self._iteration.host if buffers.space_of(buffer) == buffers.HOST else self._store

    def _copy(
        self,
        stream: str,
        action: str,
        stage: int,
        reads: Sequence[str],
        writes: Sequence[str],
        microbatch: int | None = None,
    ) -> None:
        def task() -> None:
            for source, target in zip(reads, writes, strict=True):
                tensors: Tensors = self._space(source)[source]
                names = self._what_moves(target, stage, tensors)
                self._space(target)[target] = {name: tensors[name].detach().clone() for name in names}

        self._enqueue(stream, action, task)

    def _what_moves(self, target: str, stage: int, tensors: Tensors) -> Sequence[str]:
        """The names of the tensors that a copy into `target` takes along."""
        runner, kind = self._runners[stage], buffers.parse(target).kind
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
