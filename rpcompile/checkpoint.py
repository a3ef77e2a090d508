"""Checkpoints: everything that training depends on, in files without pickle, replaced in one step.

    <folder>/checkpoint.json          which of the folders below is valid, and every value but tensors
    <folder>/<version>/model.safetensors, optimizer.safetensors, ...

A new version is written beside the old one and synchronised to disk; then `checkpoint.json` is
replaced, and the old version is deleted. Whatever ends the process, one whole checkpoint is there.

Values in the JSON stand as they are, but for what JSON does not have: `{"tensor": name}` stands in
the part's safetensors file; `{"tuple": [...]}`, `{"dict": [[key, value], ...]}`,
`{"counter": [[key, count], ...]}` and `{"float": "inf"}` say what they are.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import uuid
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rpcompile.errors import CheckpointError
from rpcompile.files import write_in_one_step

if TYPE_CHECKING:
    from collections.abc import Mapping

VERSION = 1
_FORMAT = "rpcompile.checkpoint"
_INDEX = "checkpoint.json"


class Stateful(Protocol):
    """A model, optimizer, scheduler or gradient scaler."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


def save(folder: str | os.PathLike[str], parts: Mapping[str, Stateful]) -> None:
    """Writes a checkpoint of `parts` and of torch's random generator.

    Raises:
        CheckpointError: It cannot be written; what was there before still is.
    """
    target = Path(folder)
    version = target / uuid.uuid4().hex
    index: dict[str, Any] = {"format": _FORMAT, "version": VERSION, "folder": version.name, "parts": {}}
    try:
        version.mkdir(parents=True)
        for name, part in parts.items():
            file = _TensorFile(version / f"{name}.safetensors")
            index["parts"][name] = {"class": _class(part), "state": _encode(part.state_dict(), file, name)}
            file.write()
        file = _TensorFile(version / "random.safetensors")
        index["random"] = _encode(torch.get_rng_state(), file, "torch")
        file.write()
        _synchronise(version)
        write_in_one_step(target / _INDEX, json.dumps(index))
        _synchronise(target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(version, ignore_errors=True)
        raise CheckpointError(
            f"{target}: cannot write the checkpoint: {error}. What was there before is as it was; free space "
            f"or choose another folder"
        ) from error
    except BaseException:
        shutil.rmtree(version, ignore_errors=True)
        raise
    for other in target.iterdir():
        if other.is_dir() and other != version and _is_version(other):
            shutil.rmtree(other, ignore_errors=True)


def load(folder: str | os.PathLike[str], parts: Mapping[str, Stateful]) -> None:
    """Loads what `save` wrote into `parts`, all of them or, if something does not fit, none.

    Raises:
        CheckpointError: It is missing or damaged, or is of something else.
    """
    source = Path(folder)
    index = _read_index(source)
    states: dict[str, Any] = {}
    try:
        saved = index["parts"]
        for name, part in parts.items():
            if name not in saved:
                raise CheckpointError(
                    f"{source}: the checkpoint has no {name}, only {sorted(saved)}; load it without {name}"
                )
            _check_class(source, name, saved[name]["class"], part)
            tensors = load_file(source / index["folder"] / f"{name}.safetensors")
            states[name] = _decode(saved[name]["state"], tensors)
            if isinstance(part, torch.nn.Module):
                _check_model(source, states[name], part)
            if isinstance(part, torch.optim.Optimizer):
                _check_groups(source, states[name], part)
        random = _decode(index["random"], load_file(source / index["folder"] / "random.safetensors"))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{source}: the checkpoint is damaged: {type(error).__name__}: {error}; use an older one"
        ) from error
    for name, part in parts.items():
        part.load_state_dict(states[name])
    torch.set_rng_state(random)


# ------------------------------------------------------------------- files


class _TensorFile:
    """The tensors of one part, each memory once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tensors: dict[str, torch.Tensor] = {}
        self._names: dict[tuple[object, ...], str] = {}

    def add(self, tensor: torch.Tensor, name: str) -> str:
        """The name under which it is stored; that of an earlier one that is the same memory."""
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() == 0:
            key = (name,)
        if key not in self._names:
            self._names[key] = name
            self._tensors[name] = tensor.detach()
        return self._names[key]

    def write(self) -> None:
        """Writes them and waits until they are on disk."""
        seen: set[int] = set()
        for name, tensor in self._tensors.items():
            # safetensors takes no views of one another.
            storage = tensor.untyped_storage().data_ptr()
            self._tensors[name] = tensor.clone() if storage in seen else tensor.contiguous()
            seen.add(storage)
        save_file(self._tensors, self._path)
        _synchronise(self._path)


def _synchronise(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_version(path: Path) -> bool:
    return len(path.name) == 32 and all(letter in "0123456789abcdef" for letter in path.name)


def _read_index(source: Path) -> dict[str, Any]:
    try:
        index = json.loads((source / _INDEX).read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"{source}: there is no checkpoint: {error.strerror}: {_INDEX}; give the folder that "
            f"save_checkpoint was given"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source}: {_INDEX} is damaged: {error}; use an older checkpoint") from error
    if not isinstance(index, dict) or index.get("format") != _FORMAT:
        raise CheckpointError(f"{source}: {_INDEX} is not a checkpoint of rpcompile")
    if index.get("version") != VERSION:
        raise CheckpointError(
            f"{source}: the checkpoint's version is {index.get('version')!r}, this rpcompile reads {VERSION}"
        )
    if not isinstance(index.get("folder"), str) or not _is_version(Path(index["folder"])):
        raise CheckpointError(f"{source}: {_INDEX} is damaged: it names no folder; use an older checkpoint")
    return index


# ------------------------------------------------------------------- values


def _encode(value: Any, file: _TensorFile, path: str) -> Any:
    """Plain JSON for `value`, its tensors going to `file`."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, torch.Tensor):
        return {"tensor": file.add(value, path)}
    if isinstance(value, list | tuple):
        items = [_encode(item, file, f"{path}.{number}") for number, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, dict):
        items = [
            [_encode(key, file, path), _encode(item, file, f"{path}.{key}")] for key, item in value.items()
        ]
        return {"counter" if isinstance(value, Counter) else "dict": items}
    raise CheckpointError(
        f"{path} is a {type(value).__name__}, which a checkpoint cannot hold; keep it out of the "
        f"state_dict, or save it yourself"
    )


def _decode(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "float":
        return float(content)
    if kind == "tuple":
        return tuple(_decode(item, tensors) for item in content)
    items = {_decode(key, tensors): _decode(item, tensors) for key, item in content}
    return Counter(items) if kind == "counter" else items


# ------------------------------------------------------------------- what does not fit


def _class(part: object) -> str:
    return type(part).__name__


def _check_class(source: Path, name: str, saved: str, part: object) -> None:
    if isinstance(part, torch.nn.Module):
        return  # names and shapes tell more
    if saved != _class(part):
        raise CheckpointError(
            f"{source}: the checkpoint's {name} is {saved}, not {_class(part)}; make the same one, or load "
            f"the checkpoint without it"
        )


def _check_model(source: Path, state: dict[str, Any], model: torch.nn.Module) -> None:
    own = model.state_dict()
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(value.shape)}"
        for name, value in own.items()
        if isinstance(value, torch.Tensor) and name in state and state[name].shape != value.shape
    ]
    found = [
        f"{text} {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
        for text, names in (("it lacks", missing), ("it also has", unknown), ("it has", shapes))
        if names
    ]
    if found:
        raise CheckpointError(
            f"{source}: the checkpoint is of another model than {type(model).__name__}: {'; '.join(found)}"
        )


def _check_groups(source: Path, state: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    saved = [len(group["params"]) for group in state["param_groups"]]
    own = [len(group["params"]) for group in optimizer.param_groups]
    if saved != own:
        raise CheckpointError(
            f"{source}: the checkpoint's optimizer has groups of {saved} parameters, this one of {own}; make "
            f"it from the same parameters"
        )
