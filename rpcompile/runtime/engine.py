"""Runs a Program once: microbatches in, losses and gradients out, all or nothing."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from rpcompile import buffers
from rpcompile.errors import ExecutionError
from rpcompile.ir import ActionId
from rpcompile.runtime.stage_runner import Microbatch, StageRunner
from rpcompile.runtime.streams import Failure, Iteration
from rpcompile.runtime.worker import CpuWorker

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from concurrent.futures import Future

    from rpcompile.ir import Program, SegmentChain
    from rpcompile.runtime.stage_runner import Tensors


@dataclass(frozen=True)
class Result:
    """What one iteration leaves on the host.

    Attributes:
        outputs: Per microbatch, outputs by node name.
        gradients: Parameter name -> gradient, summed over jobs in job order.
        states: Buffer name -> its value after the forward.
    """

    outputs: tuple[Tensors, ...]
    gradients: Tensors
    states: Tensors


class Engine:
    """Workers for a program; may be run any number of times, by one caller at a time."""

    def __init__(
        self, program: Program, chain: SegmentChain, gradient_dtype: torch.dtype | None = None
    ) -> None:
        """`gradient_dtype`: what gradients are cast to before jobs' are summed; default: as they come."""
        self._program = program
        self._chain = chain
        self._gradient_dtype = gradient_dtype
        self._readers = _readers(program.weights)
        runners = [StageRunner(stage, program.capture.outputs[0]) for stage in program.stages]
        self._workers = [CpuWorker(index, program, runners) for index in range(len(program.graphs))]
        self.before_instruction: Callable[[str], None] | None = None
        self.close = weakref.finalize(self, _close, self._workers)

    def run(
        self,
        tensors: Mapping[str, torch.Tensor],
        inputs: Sequence[Tensors],
        microbatches: Sequence[Microbatch],
        pending: Mapping[int, Future[None]] | None = None,
    ) -> Result:
        """Runs every GPU's graph to its end.

        Args:
            tensors: The model's parameters and buffers by qualified name, on the host. They are read only.
            inputs: User inputs of each microbatch by name.
            microbatches: Seed, sizes and loss scale of each microbatch.
            pending: Segment -> work on the host that must be over before tensors that this segment is the
                first to read are uploaded.

        Raises:
            ExecutionError: An instruction failed. Nothing of the model has changed.
        """
        host: dict[str, Any] = {
            buffers.weights(buffers.HOST, segment): {name: tensors[name] for name in names}
            for segment, names in enumerate(self._program.weights)
        }
        for index, microbatch in enumerate(inputs):
            host[buffers.inputs(buffers.HOST, index)] = microbatch
        iteration = Iteration(host, self.before_instruction)
        self._await(pending or {}, iteration)
        try:
            for worker in self._workers:
                worker.start(iteration, microbatches)
            for worker in self._workers:
                worker.finish()
        except BaseException:
            iteration.cancel()
            for worker in self._workers:
                worker.finish()
            raise
        if iteration.failure is not None:
            if isinstance(iteration.failure.error, ExecutionError):
                raise iteration.failure.error
            raise self._error(iteration.failure) from iteration.failure.error
        return self._result(host, len(inputs))

    def _await(self, pending: Mapping[int, Future[None]], iteration: Iteration) -> None:
        """Makes uploads wait for the host's work; its failure is the iteration's."""
        for segment, owners in self._readers.items():
            iteration.updates[segment] = tuple(f"updated.s{owner}" for owner in owners if owner in pending)

        def over(segment: int, future: Future[None]) -> None:
            event, error = f"updated.s{segment}", future.exception()
            if error is not None:
                iteration.fail(event, 0, error)
            else:
                iteration.record(event)

        for segment, future in pending.items():
            future.add_done_callback(partial(over, segment))

    def _result(self, host: dict[str, Any], microbatches: int) -> Result:
        gradients: Tensors = {}
        states: Tensors = {}
        for job in self._program.schedule.jobs:
            for segment in range(len(self._program.weights)):
                for name, grad in host.get(buffers.gradients(buffers.HOST, segment, job.index), {}).items():
                    part = grad if self._gradient_dtype is None else grad.to(self._gradient_dtype)
                    gradients[name] = gradients[name] + part if name in gradients else part
                states.update(host.get(buffers.state(segment, job.index), {}))
        losses = [host[buffers.loss(buffers.HOST, index)] for index in range(microbatches)]
        return Result(tuple(losses), gradients, states)

    def _error(self, failure: Failure) -> ExecutionError:
        reason = f"{type(failure.error).__name__}: {failure.error}"
        try:
            action = ActionId.parse(failure.instruction)
        except Exception:
            return ExecutionError(f"{failure.instruction!r} failed on GPU {failure.gpu}: {reason}")
        stage = self._program.stages[action.stage].stage
        first, last = (self._chain.segments[index].name for index in (stage.first, stage.last))
        where = first if first == last else f"{first} … {last}"
        microbatch = "" if action.microbatch is None else f", microbatch {action.microbatch}"
        return ExecutionError(
            f"{failure.instruction} ({action.op.name.lower()} of stage {action.stage}{microbatch}) failed on "
            f"GPU {failure.gpu} in {where}: {reason}. Weights, gradients and buffers are as they were before "
            f"this call."
        )


def _readers(weights: Sequence[Sequence[str]]) -> dict[int, tuple[int, ...]]:
    """Segment -> the segments that were the first to read what it reads."""
    first: dict[str, int] = {}
    for segment, names in enumerate(weights):
        for name in names:
            first.setdefault(name, segment)
    return {segment: tuple(sorted({first[name] for name in names})) for segment, names in enumerate(weights)}


def _close(workers: list[CpuWorker]) -> None:
    for worker in workers:
        worker.close()
