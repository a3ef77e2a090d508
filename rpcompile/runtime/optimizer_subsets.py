"""Steps of one torch.optim optimizer over some of its parameters at a time.

The result is that of one `optimizer.step()`, bit for bit, where `is_separable` says so: each subset
is stepped by a stand-in of the same class with the hyperparameters and scalar attributes as they
were at the beginning, on the same state tensors.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import SGD, Optimizer

from rpcompile.runtime.read_guard import unguarded

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_SHARED = ("param_groups", "state", "step")
_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
_BASE_ATTRIBUTES = frozenset(SGD([torch.zeros(1)]).__dict__)


@dataclass(frozen=True)
class Member:
    """One parameter to be stepped.

    Attributes:
        group: Index of its parameter group.
        parameter: The optimizer's own key.
        values: A plain tensor over the parameter's memory, `.grad` being the gradient to apply.
        scale: What the gradient is to be multiplied by first, in place (clipping), or None.
    """

    group: int
    parameter: torch.Tensor
    values: torch.Tensor
    scale: torch.Tensor | None = None

    @staticmethod
    def of(
        group: int, parameter: torch.Tensor, gradient: torch.Tensor, scale: torch.Tensor | None = None
    ) -> Member:
        with unguarded():
            values = parameter.detach().requires_grad_()
            values.grad = gradient
        return Member(group, parameter, values, scale)


class SubsetStepper:
    """One step of an optimizer, taken subset by subset; then `finish`. Made when the step begins."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._class = type(optimizer)
        self._step = plain_step(optimizer)
        self._state = optimizer.state
        self._attributes = {name: v for name, v in optimizer.__dict__.items() if name not in _SHARED}
        self._groups = [
            {name: _kept(value) for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups
        ]
        self._written: list[tuple[dict[str, Any], str, Any]] = []

    def step(self, members: Sequence[Member]) -> None:
        """Updates the members' parameters and state in place."""
        shadow: Any = object.__new__(self._class)
        shadow.__dict__.update(self._attributes)
        shadow.state = defaultdict(dict)
        groups: dict[int, dict[str, Any]] = {}
        for member in members:
            if member.scale is not None:
                assert member.values.grad is not None
                with torch.no_grad():
                    member.values.grad.mul_(member.scale)
            if state := self._state.get(member.parameter):
                shadow.state[member.values] = state
            group = groups.setdefault(member.group, {"params": [], **self._groups[member.group]})
            group["params"].append(member.values)
        shadow.param_groups = list(groups.values())
        self._step(shadow)
        for member in members:
            made = shadow.state.get(member.values)
            if made and member.parameter is not member.values:
                self._state[member.parameter] = made
        own = self._optimizer
        self._note(shadow.__dict__, self._attributes, own.__dict__, _SHARED)
        for (index, _), group in zip(groups.items(), shadow.param_groups, strict=True):
            self._note(group, self._groups[index], own.param_groups[index], ("params",))

    def finish(self) -> None:
        """Gives the optimizer the scalars that its step changed."""
        for target, name, value in self._written:
            target[name] = value

    def _note(
        self, after: dict[str, Any], before: dict[str, Any], target: dict[str, Any], leave: tuple[str, ...]
    ) -> None:
        for name, value in after.items():
            if name not in leave and value is not before.get(name):
                self._written.append((target, name, value))


def plain_step(optimizer: Optimizer) -> Callable[[Optimizer], object]:
    """The class's `step` without what torch wraps around it to run hooks."""
    step: Any = type(optimizer).step
    return step.__wrapped__ if getattr(step, "hooked", False) else step


def _kept(value: Any) -> Any:
    # LR schedulers fill a learning rate that is a tensor in place.
    return value.clone() if isinstance(value, torch.Tensor) else copy.copy(value)


# ------------------------------------------------------------------- which optimizers


def is_separable(optimizer: Optimizer) -> bool:
    """Whether stepping parameters one by one gives what stepping them all at once does.

    Two steps are taken both ways on small made-up parameters, under the optimizer's own hyperparameters.
    """
    extra = {name: v for name, v in optimizer.__dict__.items() if name not in _BASE_ATTRIBUTES}
    override = extra.pop("step", None)
    if override is not None and not hasattr(override, "_wrapped_by_lr_sched"):
        return False
    if not all(_is_scalar(value) for value in extra.values()) or optimizer.defaults.get("differentiable"):
        return False
    own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if any(id(key) not in own for key in optimizer.state):
        return False
    with torch.random.fork_rng(devices=()):
        try:
            whole, parts = _toy(optimizer), _toy(optimizer)
            for seed in range(2):
                _step_whole(whole, seed)
                _step_in_parts(parts, seed)
            return _same(whole.__dict__, parts.__dict__, leave=("state",)) and all(
                _same(whole.state.get(one, {}), parts.state.get(other, {}))
                for mine, theirs in zip(whole.param_groups, parts.param_groups, strict=True)
                for one, other in zip(mine["params"], theirs["params"], strict=True)
            )
        except Exception:  # whatever it is, the whole step is the user's own to see it
            return False


def _toy(optimizer: Optimizer) -> Optimizer:
    """The optimizer over at most two small parameters a group, without state or hooks."""
    toy: Any = object.__new__(type(optimizer))
    toy.__dict__.update({name: value for name, value in optimizer.__dict__.items() if name not in _SHARED})
    toy.__dict__.update({name: {} for name in _HOOKS})
    generator = torch.Generator().manual_seed(0)
    toy.state = defaultdict(dict)
    toy.param_groups = [
        {
            **{name: _kept(value) for name, value in group.items()},
            "params": [_small(parameter, generator) for parameter in group["params"][:2]],
        }
        for group in optimizer.param_groups
    ]
    return toy


def _small(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    with unguarded():
        shape = [min(size, 3) for size in like.shape]
        return torch.randn(shape, generator=generator).to(like.dtype).requires_grad_()


def _gradients(toy: Optimizer, seed: int) -> list[Member]:
    generator = torch.Generator().manual_seed(1 + seed)
    return [
        Member.of(index, parameter, torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
        for index, group in enumerate(toy.param_groups)
        for parameter in group["params"]
    ]


def _step_whole(toy: Optimizer, seed: int) -> None:
    for member in _gradients(toy, seed):
        member.parameter.grad = member.values.grad
    plain_step(toy)(toy)


def _step_in_parts(toy: Optimizer, seed: int) -> None:
    stepper = SubsetStepper(toy)
    for member in reversed(_gradients(toy, seed)):
        stepper.step([member])
    stepper.finish()


def _is_scalar(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.ndim == 0
    return callable(value) or isinstance(value, int | float | str | None)


def _same(one: Any, other: Any, leave: tuple[str, ...] = ()) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        keys = one.keys() - leave
        return keys == other.keys() - leave and all(_same(one[key], other[key]) for key in keys)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)
