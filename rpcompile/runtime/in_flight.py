"""Iterations that the caller does not wait for: what they make is handed out before it is there."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import torch

from rpcompile.errors import ExecutionError
from rpcompile.runtime.interrupts import uninterrupted
from rpcompile.runtime.read_guard import unguarded

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping
    from concurrent.futures import Future

    from torch import nn

    from rpcompile.runtime.flight import Flight, Result
    from rpcompile.runtime.host_weights import HostWeights
    from rpcompile.runtime.updates import Updates


class InFlight:
    """Takes what iterations leave to the model, in the order in which they were started, on the host queue.

    Gradients are put into `.grad` when an iteration begins, guarded and without memory; they get it when the
    iteration is over, which is also when the step behind it begins. Which parameters get one is known from
    the first iteration, which is awaited.

    When an iteration fails, those behind it are cancelled and their steps passed over. The caller is told by
    the next call or read that waits for one of them; then nothing is in flight, and gradients that have not
    come are None again.

    Args:
        updates: The host queue, with the guard of what is on the way.
        weights: What iterations compute with.
    """

    def __init__(self, updates: Updates, weights: HostWeights) -> None:
        self._updates = updates
        self._weights = weights
        updates.forgotten = self._forget
        self._names: tuple[str, ...] | None = None
        self._landings: deque[Future[None]] = deque()
        self._empty: dict[int, tuple[nn.Parameter, torch.Tensor]] = {}  # gradients that have not come, by id
        self._calls = 0

    @property
    def ready(self) -> bool:
        """Whether it is known which parameters get a gradient."""
        return self._names is not None

    @property
    def last(self) -> Future[None] | None:
        """Done when what the last iteration left is in the model; None if nothing is in flight."""
        return next((landing for landing in reversed(self._landings) if not landing.done()), None)

    def note(self, result: Result) -> None:
        """Learns from an iteration that was awaited."""
        self._names = tuple(result.gradients)
        self._calls += 1

    def make_room(self, capacity: int) -> None:
        """Returns when less than `capacity` iterations are in flight.

        Raises:
            ExecutionError: One failed.
        """
        while len(self._landings) >= capacity:
            self._landings[0].exception()
            self._landings.popleft()
        self._updates.raise_failed()

    def add(
        self,
        flight: Flight,
        parameters: Mapping[str, nn.Parameter],
        buffers: Mapping[str, torch.Tensor],
        read: Iterable[torch.Tensor],
        loss_of: Callable[[Result], torch.Tensor],
    ) -> torch.Tensor:
        """Hands out what an iteration will make.

        Args:
            flight: The iteration, just started.
            parameters: The model's, by name; those of `note` get a gradient.
            buffers: The model's, by name, of which it may change some.
            read: What it reads of the model's own memory, and nobody may change meanwhile.
            loss_of: Puts the loss together.

        Returns:
            The loss, a guarded scalar; NaN, should the iteration have failed once the caller has been told.
        """
        loss = torch.full((), torch.nan)
        number = self._calls
        known = set(self._empty)
        targets: dict[str, torch.Tensor] = {}
        held = [*buffers.values(), *read]

        def land() -> None:
            try:
                if self._updates.skipping:
                    flight.cancel()
                result = flight.result()
                self._fill(targets, result)
                for name, value in result.states.items():
                    buffers[name].copy_(value)
                loss.data = loss_of(result)
            except BaseException as error:
                self._updates.skipping = True
                raise _told_later(error, number) from error
            finally:
                self._updates.release(held)

        try:
            targets.update(self._targets(parameters))
            held += targets.values()
            self._updates.guard.hold(held)
            self._calls += 1
            self._updates.turn = 1 - self._updates.turn
            landing = self._updates.put_in_order(self._updates.turn, torch.no_grad()(land), loss)
        except BaseException:
            self._take_back(self._empty.keys() - known)
            self._updates.guard.release(held)
            raise
        self._landings.append(landing)
        return loss

    def _forget(self) -> None:
        """Takes gradients back that have not come and will not; nothing is in flight."""
        self._take_back(set(self._empty))
        self._landings.clear()
        self._weights.restart()

    def _take_back(self, found: Collection[int]) -> None:
        with uninterrupted(), unguarded():
            for number in found:
                parameter, empty = self._empty.pop(number)
                if parameter.grad is empty:
                    parameter.grad = None

    def _targets(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
        """What each gradient is added to: `.grad`, or a tensor put there that has a shape and no memory."""
        found: dict[str, torch.Tensor] = {}
        with unguarded():
            for name in self._names or ():
                parameter = parameters[name]
                if not parameter.requires_grad:
                    continue  # it has been frozen
                if parameter.grad is None:
                    shape = parameter.shape
                    empty = torch.empty_strided(shape, (0,) * len(shape), dtype=parameter.dtype)
                    self._empty[id(empty)] = parameter, empty
                    parameter.grad = empty
                assert parameter.grad is not None
                found[name] = parameter.grad
        return found

    def _fill(self, targets: Mapping[str, torch.Tensor], result: Result) -> None:
        for name, target in targets.items():
            gradient = result.gradients[name]
            if self._empty.pop(id(target), None) is None:
                target.add_(gradient)
            else:
                target.data = gradient


def _told_later(error: BaseException, number: int) -> ExecutionError:
    """The failure of an iteration whose call has returned."""
    known = isinstance(error, ExecutionError)
    kind, reason = (
        (type(error), str(error)) if known else (ExecutionError, f"{type(error).__name__}: {error}.")
    )
    return kind(
        f"forward_backward call {number} (counted from 0), which had returned, failed: {reason} Later calls "
        f"and their steps are cancelled; weights and optimizer are as of the last update before."
    )
