"""Makes whoever reads a tensor or an optimizer wait for the updates that are still in flight.

While guarded, a tensor's class is a subclass whose `__torch_function__` waits, and an optimizer's a
subclass whose `state` waits. Afterwards every object has its own class back, so that nothing is
slower, or of an unexpected type, while nothing is in flight.

Not guarded are other tensors over the same memory that were made before (`parameter.data`, views), and what
torch reads without asking the class: `torch.tensor(x)`, and x as a number, as in `torch.full((), x)`.
"""

from __future__ import annotations

import copy
import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rpcompile.runtime.interrupts import uninterrupted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

# What needs no wait: it tells nothing of a tensor's content. Assigning `.grad` replaces a gradient that
# its update holds already; reading it gives a tensor that is guarded itself.
_ATTRIBUTES = ("grad", "requires_grad", "shape", "dtype", "device", "is_leaf", "layout", "ndim", "is_meta")
_WITHOUT_CONTENT = {
    *(getattr(torch.Tensor, name).__get__ for name in _ATTRIBUTES),
    torch.Tensor.grad.__set__,  # type: ignore[attr-defined]
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.numel,
    torch.Tensor.is_floating_point,
    torch.Tensor.is_complex,
}
_PLAIN = (torch.Tensor, nn.Parameter)

unguarded = torch._C.DisableTorchFunctionSubclass
"""Context in which this thread reads guarded tensors without waiting."""


class ReadGuard:
    """What is guarded at the moment. Any thread may add and release.

    Args:
        wait: Called by a read; returns when all that is guarded has been released.
    """

    def __init__(self, wait: Callable[[], None]) -> None:
        self._wait = wait
        self._lock = threading.Lock()
        self._held: dict[int, tuple[Any, type, int]] = {}  # with how often it is held
        self._guards: dict[type, type] = {own: _tensor_guard(own, wait) for own in _PLAIN}

    def can_hold(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is plain (or guarded); a guard would hide what another class does."""
        return type(tensor) in _PLAIN or self.is_held(tensor)

    def hold(self, tensors: Iterable[torch.Tensor]) -> None:
        """Guards plain tensors and parameters, until each has been released as often."""
        with uninterrupted(), self._lock:
            for tensor in tensors:
                if id(tensor) in self._held or type(tensor) in _PLAIN:
                    self._switch(tensor)

    def hold_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Guards an optimizer's state; its parameter groups stay open to LR schedulers."""
        with uninterrupted(), self._lock:
            if id(optimizer) not in self._held:
                own = type(optimizer)
                self._guards.setdefault(own, _optimizer_guard(own, self._wait))
            self._switch(optimizer)

    def is_held(self, item: object) -> bool:
        """Whether a tensor or optimizer is guarded now."""
        with self._lock:  # not between being let go and having its own class back
            return id(item) in self._held

    def release(self, items: Iterable[object]) -> None:
        """Gives items their own class back, those that nobody else holds."""
        with uninterrupted(), self._lock:
            for item in items:
                found, own, count = self._held.pop(id(item), (None, object, 0))
                if count > 1:
                    self._held[id(item)] = (found, own, count - 1)
                elif found is not None:
                    found.__class__ = own

    def _switch(self, item: Any) -> None:
        _, own, count = self._held.get(id(item), (item, type(item), 0))
        self._held[id(item)] = (item, own, count + 1)
        if not count:
            item.__class__ = self._guards[own]


def _tensor_guard(own: type, wait: Callable[[], None]) -> type:
    def torch_function(
        _: type, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function not in _WITHOUT_CONTENT:
            wait()
        with unguarded():
            return function(*args, **(kwargs or {}))

    def deepcopy(tensor: torch.Tensor, memo: dict[int, Any]) -> Any:
        wait()
        return copy.deepcopy(tensor, memo)

    body = {"__torch_function__": classmethod(torch_function), "__deepcopy__": deepcopy}
    return type(own)(own.__name__, (own,), body)


def _optimizer_guard(own: type, wait: Callable[[], None]) -> type:
    def get_state(optimizer: torch.optim.Optimizer) -> Any:
        wait()
        return optimizer.__dict__["state"]

    def set_state(optimizer: torch.optim.Optimizer, value: Any) -> None:
        wait()
        optimizer.__dict__["state"] = value

    def load_state_dict(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        wait()
        optimizer.load_state_dict(state_dict)

    def reduce(optimizer: torch.optim.Optimizer, protocol: Any) -> Any:
        wait()
        return optimizer.__reduce_ex__(protocol)

    body = {
        "state": property(get_state, set_state),
        "load_state_dict": load_state_dict,
        "__reduce_ex__": reduce,
    }
    return type(own.__name__, (own,), body)
