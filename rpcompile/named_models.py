"""Models by name, without weights: built-in examples, Hugging Face configurations, factories.

The built-in ones are `rpcompile/data/models.json`: the sizes of published checkpoints' `config.json`.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import json
import sys
import warnings
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rpcompile.errors import InvalidArgument

if TYPE_CHECKING:
    import torch
    from torch import nn

DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class NamedModel:
    """A module on the meta device, and its example inputs where a factory gave some."""

    module: nn.Module
    example_inputs: Any = None


def names() -> tuple[str, ...]:
    """The built-in names, e.g. "qwen3-1.7b"."""
    return tuple(_built_in())


def check(name: str) -> None:
    """Finds out cheaply, without importing torch, whether `build` has something to go by.

    Raises:
        InvalidArgument: `name` is no file, built-in name or module:factory; suggests near names.
    """
    if name.lower() in _built_in() or Path(name).exists() or _factory_parts(name) is not None:
        return
    near = difflib.get_close_matches(name.lower(), names(), n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"built-in names are {', '.join(names())}"
    raise InvalidArgument(f"model {name!r} is no file, no built-in name and no module:factory; {hint}")


def build(name: str, dtype: str | None = None, lora: int | None = None) -> NamedModel:
    """Builds a model on the meta device, in training mode.

    Args:
        name: A built-in name; the folder or `config.json` of a Hugging Face model, whose weights are not
            read; or `package.module:factory` or `path.py:factory`, a function without arguments
            that returns an `nn.Module`, or the module and its example inputs of one batch.
        dtype: "bfloat16", "float16" or "float32"; by default what the configuration says, else bfloat16.
            A factory's module keeps its own by default.
        lora: Rank of LoRA adapters to put on every linear layer but the head; the rest is then frozen.

    Raises:
        InvalidArgument: Nothing is found under the name, or it cannot be built; says why.
    """
    check(name)
    if dtype is not None and dtype not in DTYPES:
        raise InvalidArgument(f"dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    parts = None if name.lower() in _built_in() or Path(name).exists() else _factory_parts(name)
    found = _from_factory(*parts) if parts else NamedModel(_from_config(_configuration(name), name))
    model = found.module if dtype is None else found.module.to(_dtype(dtype))
    model = model if lora is None else with_lora(model, lora)
    return NamedModel(model.train(), found.example_inputs)


@functools.cache
def _built_in() -> dict[str, dict[str, Any]]:
    return json.loads(resources.files("rpcompile").joinpath("data/models.json").read_text(encoding="utf-8"))


# ------------------------------------------------------------------- configurations


def _configuration(name: str) -> dict[str, Any]:
    if name.lower() in _built_in():
        return _built_in()[name.lower()]
    path = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidArgument(f"model {name}: {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"model {name}: {path} is no JSON: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("model_type"), str):
        raise InvalidArgument(
            f'model {name}: {path} has no "model_type"; give the config.json of a Hugging Face model'
        )
    return found


def _from_config(found: dict[str, Any], name: str) -> nn.Module:
    import torch

    transformers = _import("transformers")
    known = transformers.CONFIG_MAPPING
    kind = found["model_type"]
    if kind not in known:
        near = difflib.get_close_matches(kind, list(known), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "a newer transformers may know it"
        raise InvalidArgument(
            f"model {name}: transformers {transformers.__version__} has no model_type {kind!r}; {hint}"
        )
    dtype = str(found.get("dtype") or found.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    try:
        config = known[kind].from_dict(found)
        # Experts in a loop over those that were hit cannot be captured: their sizes depend on the data.
        if hasattr(config, "num_experts") or hasattr(config, "num_local_experts"):
            config._experts_implementation = "grouped_mm"
        architecture = (found.get("architectures") or [None])[0]
        with torch.device("meta"):
            if architecture is None:
                model = transformers.AutoModelForCausalLM.from_config(config)
            else:
                model = getattr(transformers, architecture)(config)
        return model.to(_dtype(dtype))
    except Exception as error:
        # Whatever a configuration's wrong values set off; transformers has no class of its own for it.
        raise InvalidArgument(
            f"model {name}: transformers cannot build it: {type(error).__name__}: {error}"
        ) from error


def _dtype(name: str) -> torch.dtype:
    import torch

    if name not in DTYPES:
        raise InvalidArgument(f"dtype {name!r}; choose one of {', '.join(DTYPES)}")
    return getattr(torch, name)


def with_lora(model: nn.Module, rank: int) -> nn.Module:
    """A Hugging Face model under LoRA on every linear layer but the head; alpha is twice the rank.

    Raises:
        InvalidArgument: The model is no Hugging Face model, or peft is not installed.
    """
    import torch

    peft = _import("peft")
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    device = next(model.parameters()).device
    try:
        with torch.device(device), warnings.catch_warnings():
            # peft asks transformers for a property under its old name.
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
            return peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    except Exception as error:
        raise InvalidArgument(
            f"LoRA of rank {rank} cannot be added to {type(model).__name__}: {error}"
        ) from error


# ------------------------------------------------------------------- factories


def _factory_parts(name: str) -> tuple[str, str] | None:
    module, separator, factory = name.rpartition(":")
    return (module, factory) if separator and module and factory.isidentifier() else None


def _from_factory(module: str, factory: str) -> NamedModel:
    import torch
    from torch import nn

    where = f"{module}:{factory}"
    try:
        function = getattr(_module(module), factory, None)
        if not callable(function):
            raise InvalidArgument(f"model {where}: {module} has no function {factory!r}")
        with torch.device("meta"):
            made = function()
    except InvalidArgument:
        raise
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise InvalidArgument(f"model {where}: {type(error).__name__}: {error}") from error
    model, example = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise InvalidArgument(
            f"model {where} returns a {type(model).__name__}; it must return an nn.Module, or one and its "
            "example inputs"
        )
    return NamedModel(model, example)


def _module(name: str) -> Any:
    if not name.endswith(".py"):
        return importlib.import_module(name)
    path = Path(name)
    if not path.is_file():
        raise InvalidArgument(f"model file {name} does not exist")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses and pickling look their module up
    spec.loader.exec_module(module)
    return module


def _import(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise InvalidArgument(f"{package} is needed for this: pip install {package}") from error
