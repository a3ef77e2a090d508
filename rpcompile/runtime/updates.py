"""Optimizer steps that are queued segment by segment, while the next iteration starts behind them."""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from concurrent.futures import Future
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from rpcompile.errors import ExecutionError
from rpcompile.exporting import EXPORT_LOCK
from rpcompile.runtime.host_queue import HostQueue
from rpcompile.runtime.interrupts import uninterrupted
from rpcompile.runtime.optimizer_subsets import Member, SubsetStepper, is_separable
from rpcompile.runtime.read_guard import ReadGuard, unguarded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import nn
    from torch.optim import Optimizer

# Kinds of work on the host queue, most urgent first: all that an asynchronous iteration reads is copied
# before the first update; an update and the cast or copy behind it go segment by segment.
_IN_ORDER, PUBLISH, UPDATE, FINISH = 0, 1, 2, 3


class Updates:
    """Everything about a model's weights that is queued on the host.

    Args:
        segments: Names of the segments, for messages.
    """

    def __init__(self, segments: Sequence[str]) -> None:
        self._segments = segments
        self.queue = HostQueue("rpcompile-host")
        self.guard = ReadGuard(self.wait)
        self._lock = threading.RLock()
        self._futures: list[Future[None]] = []
        self._clipped: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._separable: weakref.WeakKeyDictionary[Optimizer, tuple[str, bool]] = weakref.WeakKeyDictionary()
        self._last_step: Future[None] | None = None
        self._epoch = 0  # what is queued in one comes before what is queued in the next
        # What was handed out before it was there, by turns, and what it comes from.
        self._results = tuple(ReadGuard(partial(self._wait_for, turn)) for turn in range(2))
        self._makers: list[list[Future[None]]] = [[], []]
        self.skipping = False
        """Whether tasks are passed over: an iteration failed in flight and the caller has not been told."""
        self._untold: list[tuple[ReadGuard, list[Any]]] = []  # what stays guarded until then
        self.forgotten: Callable[[], None] = lambda: None
        """Called when the caller is about to be told, and nothing is in flight any more."""
        self.turn = 0
        """Which of two turns the last iteration has."""
        self.pending: dict[int, Future[None]] = {}
        """Segment -> its last update, which may be over."""

    def step(
        self,
        optimizer: Optimizer,
        owners: Mapping[int, int],
        before: Callable[[], None] = lambda: None,
        after: Callable[[], None] = lambda: None,
    ) -> None:
        """Queues one step of `optimizer`, or takes it at once where it cannot be divided.

        Args:
            optimizer: The user's.
            owners: id of a parameter -> the first segment that reads it.
            before: Called when the previous steps of these parameters are over and this one has not begun.
            after: Called when this one has been queued or is over. Nothing interrupts a step from the one to
                the other, but one that is taken at once.

        Raises:
            ExecutionError: An earlier update failed.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.raise_failed()
        if any(map(self.guard.is_held, (optimizer, *parameters))) and self._last_step is not None:
            self._last_step.exception()  # iterations in flight go on
            self.raise_failed()
        if not (all(map(self.guard.can_hold, parameters)) and self._is_separable(optimizer)):
            self.wait()
            before()
            self.wait()
            optimizer.step()
            after()
            return
        hooks = (_global_optimizer_pre_hooks, optimizer._optimizer_step_pre_hooks)
        _run_hooks(optimizer, chain.from_iterable(found.values() for found in hooks))
        with uninterrupted():
            before()
            self._queue_step(optimizer, owners)
            after()
        if hasattr(optimizer.step, "_wrapped_by_lr_sched"):
            optimizer._opt_called = True  # type: ignore[attr-defined]
        hooks = (optimizer._optimizer_step_post_hooks, _global_optimizer_post_hooks)
        _run_hooks(optimizer, chain.from_iterable(found.values() for found in hooks))

    def clip_grad_norm_(
        self, parameters: Iterable[nn.Parameter], max_norm: float, norm_type: float, error_if_nonfinite: bool
    ) -> torch.Tensor:
        """As `torch.nn.utils.clip_grad_norm_`; gradients are scaled when they are next used.

        Returns:
            The total norm before clipping, a scalar.
        """
        with unguarded():
            gradients = [grad for p in parameters if (grad := p.grad) is not None]
        in_flight = any(map(self.guard.is_held, gradients))
        clipped = any(id(gradient) in self._clipped for gradient in gradients)
        if in_flight and self._epoch and not clipped and not error_if_nonfinite:
            with uninterrupted():
                return self._clip_later(gradients, max_norm, norm_type)
        if in_flight:
            self.wait()
        norm = torch.nn.utils.get_total_norm(gradients, norm_type, error_if_nonfinite)
        with uninterrupted():
            self._clip(gradients, _scale(norm, max_norm))
        return norm

    def is_clipped(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Whether a gradient is still to be scaled."""
        with self._lock, unguarded():
            return bool(self._clipped) and any(id(p.grad) in self._clipped for p in parameters)

    def put(self, kind: int, segment: int, task: Callable[[], None]) -> Future[None]:
        """Queues other work on the host; `wait` waits for it too."""
        future = self.queue.put((self._epoch, kind, segment), task)
        with self._lock:
            self._futures.append(future)
        return future

    def put_in_order(self, turn: int, task: Callable[[], None], makes: torch.Tensor) -> Future[None]:
        """Queues work behind all that is queued.

        Args:
            turn: 0 or 1; whoever reads what one made does not wait for the other.
            task: The work; passed over if an iteration has failed.
            makes: A tensor that it gives its value. Reading it waits.
        """
        guard = self._results[turn]
        guard.hold([makes])

        def run() -> None:
            try:
                task()
            finally:
                self.release([makes], guard)

        self._epoch += 1
        future = self.put(_IN_ORDER, 0, run)
        self._makers[turn] = [*(one for one in self._makers[turn] if not one.done()), future]
        return future

    def release(self, items: list[Any], guard: ReadGuard | None = None) -> None:
        """Lets go of what a task has held; where an iteration failed, once the caller has been told."""
        if self.skipping:
            self._untold.append((guard or self.guard, items))
        else:
            (guard or self.guard).release(items)

    def wait(self) -> None:
        """Returns when nothing is in flight and every gradient is as the user was told.

        Raises:
            ExecutionError: An update failed.
        """
        with self._lock:
            for future in self._futures:
                future.exception()
            if self.skipping:
                self.raise_failed()
            with uninterrupted(), torch.no_grad(), unguarded():
                for gradient, scale in self._clipped.values():
                    gradient.mul_(scale)
                self.guard.release([gradient for gradient, _ in self._clipped.values()])
                self._clipped.clear()
            self.pending.clear()
            self.raise_failed()

    def raise_failed(self) -> None:
        """Raises the first failure of what is over.

        Raises:
            ExecutionError: Once for each step that failed.
        """
        if self.skipping:
            for future in self._futures:
                future.exception()  # what was queued behind the failure is passed over
        with uninterrupted():
            over: list[Future[None]] = []
            going: list[Future[None]] = []
            with self._lock:
                for future in self._futures:
                    (over if future.done() else going).append(future)
                self._futures = going
            errors = [error for future in over if (error := future.exception()) is not None]
            if errors:
                if self.skipping:
                    self._forget_all()
                self.forget(errors[0])
                raise errors[0]

    def forget(self, error: BaseException) -> None:
        """A failure that the user has been told of; the next call works with the weights as they are."""
        with self._lock:
            self._futures = [f for f in self._futures if not (f.done() and f.exception() is error)]
            self.pending = {
                s: f for s, f in self.pending.items() if not (f.done() and f.exception() is error)
            }

    def close(self) -> None:
        """Waits, then ends the thread."""
        try:
            self.wait()
        finally:
            self.queue.close()

    # ------------------------------------------------------------------- helpers

    def _wait_for(self, turn: int) -> None:
        if any(future.exception() is not None for future in self._makers[turn]):
            self.raise_failed()

    def _forget_all(self) -> None:
        """An iteration failed in flight, and what was queued behind it has been passed over."""
        with self._lock:
            self._futures.clear()
            self.pending.clear()
            self.guard.release([gradient for gradient, _ in self._clipped.values()])
            self._clipped.clear()
            self._makers = [[], []]
        self.forgotten()
        self.skipping = False
        while self._untold:
            guard, items = self._untold.pop()
            guard.release(items)

    def _clip(self, gradients: list[torch.Tensor], scale: torch.Tensor) -> None:
        with self._lock:
            self._clipped.update({id(gradient): (gradient, scale) for gradient in gradients})
        self.guard.hold(gradients)

    def _clip_later(self, gradients: list[torch.Tensor], max_norm: float, norm_type: float) -> torch.Tensor:
        """Gradients are still in flight; the norm that is returned is there when they are."""
        norm, scale = torch.full((), torch.nan), torch.ones(())

        def measure() -> None:
            if not self.skipping:
                norm.data = torch.nn.utils.get_total_norm(gradients, norm_type)
                scale.data = _scale(norm, max_norm)

        self.put_in_order(self.turn, measure, norm)
        self._clip(gradients, scale)
        return norm

    def _is_separable(self, optimizer: Optimizer) -> bool:
        # Schedulers change numbers in every step; what matters is which are zero.
        choices = [
            {name: v for name, v in group.items() if isinstance(v, bool | str | None) or not v}
            for group in optimizer.param_groups
        ]
        key = repr(choices)
        known, separable = self._separable.get(optimizer, ("", False))
        if known != key:
            separable = is_separable(optimizer)
            self._separable[optimizer] = (key, separable)
        return separable

    def _queue_step(self, optimizer: Optimizer, owners: Mapping[int, int]) -> None:
        units = self._units(optimizer, owners)
        stepper, state = SubsetStepper(optimizer), optimizer.state
        failed = threading.Event()
        for segment, members in sorted(units.items()):
            held = [member.parameter for member in members]
            with unguarded():
                held += [grad for member in members if (grad := member.parameter.grad) is not None]
            known = chain.from_iterable(_tensors(state.get(member.parameter)) for member in members)
            held += list(known)
            self.guard.hold(held)
            task = self._unit(stepper, segment, members, held, failed)
            self.guard.release(m.values.grad for m in members if m.scale is not None)  # held since clipped
            self.pending[segment] = self.put(UPDATE, segment, task)
        self.guard.hold_optimizer(optimizer)

        def finish() -> None:
            stepper.finish()
            self.release([optimizer])

        self._last_step = self.put(FINISH, 0, finish)

    def _units(self, optimizer: Optimizer, owners: Mapping[int, int]) -> dict[int, list[Member]]:
        units: dict[int, list[Member]] = defaultdict(list)
        for index, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                with unguarded():
                    gradient = parameter.grad
                if gradient is not None:
                    with self._lock:
                        _, scale = self._clipped.pop(id(gradient), (None, None))
                    # What belongs to no segment (another model's parameter) comes last.
                    segment = owners.get(id(parameter), len(self._segments))
                    units[segment].append(Member.of(index, parameter, gradient, scale))
        return units

    def _unit(
        self,
        stepper: SubsetStepper,
        segment: int,
        members: list[Member],
        held: list[torch.Tensor],
        failed: threading.Event,
    ) -> Callable[[], None]:
        where = self._segments[segment] if segment < len(self._segments) else "parameters of no segment"

        def update() -> None:
            try:
                if not failed.is_set() and not self.skipping:
                    with EXPORT_LOCK:
                        stepper.step(members)
            except BaseException as error:
                failed.set()
                raise ExecutionError(
                    f"the optimizer's update of {where} failed: {type(error).__name__}: {error}. Segments "
                    f"before it are updated, it may be in part, those behind it are not; load a checkpoint"
                ) from error
            finally:
                self.release(held)

        return update


def _scale(norm: torch.Tensor, max_norm: float) -> torch.Tensor:
    return torch.clamp(float(max_norm) / (norm + 1e-6), max=1.0)


def _run_hooks(optimizer: Optimizer, hooks: Iterable[Any]) -> None:
    # As torch calls them: with the positional and keyword arguments of `step`.
    for hook in list(hooks):
        hook(optimizer, (optimizer,), {})


def _tensors(state: object) -> list[torch.Tensor]:
    values = state.values() if isinstance(state, dict) else ()
    return [value for value in values if isinstance(value, torch.Tensor)]
