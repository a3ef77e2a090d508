"""When two modules do the same: a description that is equal only for modules whose forwards are.

Two blocks with equal descriptions have the same classes in the same places, the same attributes,
the same shapes, dtypes and flags of parameters and buffers with the same sharing among them, and
no hooks. What cannot be compared (foreign objects, functions, tensors that are not registered) is
described by its identity, so it must be one object that both refer to. An attribute that holds the
block's own number or path may differ; whoever relies on the description has to see to it that the
forward does not read it (`noticed_reads`).
"""

from __future__ import annotations

import enum
import functools
import types
from collections import OrderedDict, defaultdict
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch.nn.modules import module as _module

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

    from torch import nn

# Attributes that number a layer. They may differ, provided that nothing reads them.
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


@dataclass(frozen=True)
class Description:
    """What decides on a module's forward.

    Attributes:
        value: Equal for two modules only if their forwards are the same function, provided that
            neither reads its `unread` attributes.
        unread: (module, attribute) pairs that hold the module's own number or path.
    """

    value: Hashable
    unread: tuple[tuple[nn.Module, str], ...]


def describe_module(root: nn.Module, path: str) -> Description:
    """Describes a module with everything below it.

    Args:
        root: The module.
        path: Its qualified name, e.g. "model.layers.3".

    Raises:
        Indescribable: It has hooks, or refers to too many objects to compare.
    """
    describer = _Describer(root, path)
    return Description(describer.modules(), tuple(describer.unread))


class _ReadWatch:
    """Data descriptor that stands before an attribute of some modules of a class and notices reads."""

    def __init__(self, kind: type, name: str, modules: list[nn.Module], read: list[str]) -> None:
        self._name, self._read = name, read
        self._members = {id(vars(module)) for module in modules}
        # Blocks lie within blocks; what is read there is read by all of them.
        self._outer = vars(kind).get(name)

    def __get__(self, module: nn.Module | None, kind: type | None = None) -> Any:
        if module is None or self._name not in vars(module):
            raise AttributeError(self._name)
        if self._outer is not None:
            self._outer.__get__(module, kind)
        if id(vars(module)) in self._members:
            self._read.append(self._name)
        return vars(module)[self._name]

    def __set__(self, module: nn.Module, value: Any) -> None:
        vars(module)[self._name] = value


@contextmanager
def noticed_reads(unread: tuple[tuple[nn.Module, str], ...]) -> Iterator[list[str]]:
    """While it is open, the names of the given attributes are appended to the list when they are read."""
    read: list[str] = []
    groups: dict[tuple[type, str], list[nn.Module]] = {}
    for module, name in unread:
        groups.setdefault((type(module), name), []).append(module)
    with ExitStack() as stack:
        for (kind, name), modules in groups.items():
            watch = _ReadWatch(kind, name, modules, read)
            stack.enter_context(patch.object(kind, name, watch, create=True))
        yield read


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


class _Describer:
    """Numbers modules, tensors and objects in the order met, so that sharing is part of the description."""

    def __init__(self, root: nn.Module, path: str) -> None:
        named = list(root.named_modules())
        self._modules = [module for _, module in named]
        self._numbers = {id(module): index for index, module in enumerate(self._modules)}
        self._paths = [f"{path}.{name}" if name else path for name, _ in named]
        self._shortest = len(path.rpartition(".")[0]) + 1
        self.unread: list[tuple[nn.Module, str]] = []
        self._path = ""
        self._holds_path = False
        self._tensors: dict[int, int] = {}
        self._objects: dict[int, int] = {}
        self._count = 0

    def modules(self) -> Hashable:
        if _module._has_any_global_hook():
            raise Indescribable("hooks on all modules")
        return tuple(
            self._module(module, path) for module, path in zip(self._modules, self._paths, strict=True)
        )

    def _module(self, module: nn.Module, path: str) -> Hashable:
        self._path = path
        members = vars(module)
        if any(members.get(hooks) for hooks in _HOOKS):
            raise Indescribable(f"hooks on {type(module).__name__}")
        attributes = tuple(
            (name, self._attribute(module, name, value))
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

    def _attribute(self, module: nn.Module, name: str, value: Any) -> Hashable:
        self._holds_path = name in INDEX_ATTRIBUTES and type(value) is int
        described = None if self._holds_path else self._value(value)
        if self._holds_path:
            if hasattr(type(module), name):
                raise Indescribable(f"{name} of {type(module).__name__} is an attribute of the class, too")
            self.unread.append((module, name))
        return described

    def _is_own_path(self, text: str) -> bool:
        # Long enough to hold the block's number; the model may be part of a larger one by now.
        ending = self._path[self._shortest :]
        return text.endswith(ending) and f".{self._path}".endswith(f".{text}")

    def _registered(self, tensor: torch.Tensor) -> Hashable:
        number = self._tensors.setdefault(id(tensor), len(self._tensors))
        return (number, describe_tensor(tensor))

    def _value(self, value: Any) -> Hashable:
        self._count += 1
        if self._count > _LARGEST:
            raise Indescribable("it refers to too many objects")
        if value is None or isinstance(value, bool | int | float | complex | enum.Enum):
            return (type(value), repr(value))
        if isinstance(value, str) and self._is_own_path(value):
            self._holds_path = True
            return "own path"
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
