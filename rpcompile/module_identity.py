"""When two modules do the same: a description that is equal only for modules whose forwards are.

Two blocks with equal descriptions have the same classes in the same places, the same attributes,
the same shapes, dtypes and flags of parameters and buffers with the same sharing among them, and
no hooks. What cannot be compared (foreign objects, functions, tensors that are not registered) is
described by its identity, so it must be one object that both refer to.
"""

from __future__ import annotations

import enum
import functools
import types
from collections import OrderedDict, defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules import module as _module

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

    from torch import nn

# Attributes that number a layer. They may differ, provided that nothing reads them: see `WatchedIndex`.
INDEX_ATTRIBUTES = frozenset(
    {"layer_idx", "layer_id", "layer_index", "layer_number", "layer_num", "block_idx", "block_id"}
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Described otherwise, or of no effect on a forward.
_SKIPPED = frozenset(
    {
        *_HOOKS,
        "_parameters",
        "_buffers",
        "_modules",
        "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called",
        "_forward_pre_hooks_with_kwargs",
        "_state_dict_hooks",
        "_state_dict_pre_hooks",
        "_load_state_dict_pre_hooks",
        "_load_state_dict_post_hooks",
    }
)
_SCALARS = (str, bytes, torch.dtype, torch.device, torch.layout, torch.memory_format, range, slice, type(...))
_LARGEST = 20_000


class Indescribable(Exception):
    """The thing cannot be compared with another one."""


def describe_module(root: nn.Module) -> Hashable:
    """A value that is equal for two modules only if their forwards are the same function.

    Layer numbers (`INDEX_ATTRIBUTES`) are left out.

    Args:
        root: The module, with everything below it.

    Raises:
        Indescribable: It has hooks, or refers to too many objects to compare.
    """
    return _Describer(root).modules()


def describe_tensor(tensor: torch.Tensor) -> Hashable:
    """Type, sizes, strides, dtype, device and whether it requires a gradient; sizes may be symbolic."""
    if tensor.layout is not torch.strided:
        raise Indescribable(f"a tensor of layout {tensor.layout}")
    sizes = (*tensor.shape, *tensor.stride(), tensor.storage_offset())
    return (
        type(tensor),
        tuple(size if isinstance(size, int) else size.node.expr for size in sizes),
        tensor.dtype,
        tensor.device,
        tensor.requires_grad,
    )


def own_tensors(root: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers below `root` under every name they have there."""
    return {
        **dict(root.named_parameters(remove_duplicate=False)),
        **dict(root.named_buffers(remove_duplicate=False)),
    }


def is_index(name: str, value: object) -> bool:
    """Whether an attribute is a layer's number."""
    return name in INDEX_ATTRIBUTES and type(value) is int


class _Describer:
    """Numbers modules, tensors and objects in the order met, so that sharing is part of the description."""

    def __init__(self, root: nn.Module) -> None:
        self._modules = list(root.modules())
        self._numbers = {id(module): index for index, module in enumerate(self._modules)}
        self._tensors: dict[int, int] = {}
        self._objects: dict[int, int] = {}
        self._count = 0

    def modules(self) -> Hashable:
        if _module._has_any_global_hook():
            raise Indescribable("hooks on all modules")
        return tuple(self._module(module) for module in self._modules)

    def _module(self, module: nn.Module) -> Hashable:
        members = vars(module)
        if any(members.get(hooks) for hooks in _HOOKS):
            raise Indescribable(f"hooks on {type(module).__name__}")
        attributes = tuple(
            (name, None if is_index(name, value) else self._value(value))
            for name, value in members.items()
            if name not in _SKIPPED
        )
        tensors = tuple(
            (name, None if tensor is None else self._registered(tensor))
            for registry in ("_parameters", "_buffers")
            for name, tensor in members[registry].items()
        )
        children = tuple(
            (name, None if child is None else self._numbers[id(child)])
            for name, child in members["_modules"].items()
        )
        return (type(module), attributes, tensors, children)

    def _registered(self, tensor: torch.Tensor) -> Hashable:
        number = self._tensors.setdefault(id(tensor), len(self._tensors))
        return (number, describe_tensor(tensor))

    def _value(self, value: Any) -> Hashable:
        self._count += 1
        if self._count > _LARGEST:
            raise Indescribable("it refers to too many objects")
        if value is None or isinstance(value, bool | int | float | complex | enum.Enum):
            return (type(value), repr(value))
        if isinstance(value, _SCALARS):
            return (type(value), str(value))
        if id(value) in self._numbers:
            return ("module", self._numbers[id(value)])
        if id(value) in self._objects:
            return ("again", self._objects[id(value)])
        if isinstance(value, torch.Tensor) and id(value) in self._tensors:
            return ("tensor", self._tensors[id(value)])
        self._objects[id(value)] = len(self._objects)
        return (type(value), *self._members(value))

    def _members(self, value: Any) -> Iterator[Hashable]:
        kind = type(value)
        if kind in (list, tuple, torch.Size):
            yield tuple(self._value(item) for item in value)
        elif kind in (dict, OrderedDict, defaultdict):
            yield tuple((self._value(key), self._value(item)) for key, item in value.items())
        elif kind in (set, frozenset):
            yield frozenset(self._value(item) for item in value)
        elif kind is types.MethodType:
            yield from (id(value.__func__), self._value(value.__self__))
        elif kind is functools.partial:
            yield from (self._value(value.func), self._value(value.args), self._value(value.keywords))
        else:
            yield id(value)
            # One object that all share may still be changed between their calls.
            if not isinstance(value, type | types.FunctionType | types.ModuleType | torch.nn.Module):
                members = getattr(value, "__dict__", None)
                yield self._value(members) if type(members) is dict else None


class WatchedIndex:
    """Stands in for a layer's number and notices whether anything computes with it."""

    def __init__(self, value: int) -> None:
        self._watched_value = value
        self._watched_used = False

    @property
    def __class__(self) -> type:  # type: ignore[override]
        return int


def was_used(index: WatchedIndex) -> bool:
    """Whether the number was compared, converted, formatted, hashed or computed with."""
    return vars(index)["_watched_used"]


def _watch(name: str) -> Any:
    def method(self: WatchedIndex, *args: Any) -> Any:
        members = vars(self)
        members["_watched_used"] = True
        return getattr(members["_watched_value"], name)(*args)

    return method


for _name in dir(int):
    if callable(getattr(int, _name)) and _name not in (
        "__class__",
        "__new__",
        "__init__",
        "__getattribute__",
        "__setattr__",
        "__delattr__",
        "__init_subclass__",
        "__subclasshook__",
    ):
        setattr(WatchedIndex, _name, _watch(_name))
