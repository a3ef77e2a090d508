"""What keeps torch.export from losing a backward silently, and from failing obscurely."""

from __future__ import annotations

import inspect
import logging
import random
import threading
import traceback
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import torch
import torch.utils.checkpoint

from rpcompile.errors import CaptureError, UnsupportedModel
from rpcompile.huggingface import remedy_for

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from types import TracebackType

    from torch import nn

_NOT_THE_MODELS = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "<")


@contextmanager
def plain_autograd(model: nn.Module) -> Iterator[None]:
    """Keeps out what export would trace by its forward alone, dropping the backward it defines.

    Reentrant checkpoints become plain calls, since stages recompute anyway; any other
    autograd.Function is refused, and so are hooks on gradients. (Export sees through checkpoints
    that are not reentrant.)

    Raises:
        UnsupportedModel: At once for hooks that the model has, and inside for what its forward does.
    """
    refuse_hooks(model)
    original = torch.autograd.Function.apply
    register_hook = torch.Tensor.register_hook
    tracer = threading.get_ident()

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or cls.__module__.startswith("torch."):
            return original.__func__(cls, *args, **kwargs)
        raise UnsupportedModel(
            f"{type(model).__name__} calls the autograd.Function {cls.__qualname__}, whose backward export "
            f"would replace by that of its forward{_place(traceback.extract_stack())}\n  Write it with "
            f"differentiable operators, or as a torch.library.custom_op with register_autograd."
        )

    def register(tensor: torch.Tensor, hook: Any) -> Any:
        if threading.get_ident() != tracer:  # stages that run meanwhile
            return register_hook(tensor, hook)
        raise UnsupportedModel(
            f"{type(model).__name__} calls Tensor.register_hook in its forward; a graph has no hooks, so it "
            f"would not be called{_place(traceback.extract_stack())}\n  Write what it does to the gradient "
            f"as a torch.library.custom_op with register_autograd, or take it out."
        )

    class Call:
        @staticmethod
        def apply(function: Any, preserve: bool, *args: Any) -> Any:
            return function(*args)

    with (
        patch.object(torch.autograd.Function, "apply", classmethod(apply)),
        patch.object(torch.utils.checkpoint, "CheckpointFunction", Call),
        patch.object(torch.Tensor, "register_hook", register),
    ):
        yield


def refuse_hooks(model: nn.Module) -> None:
    """Refuses hooks on gradients, which stages would not call.

    Raises:
        UnsupportedModel: A module or a parameter has one.
    """
    for path, module in model.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            raise UnsupportedModel(
                f"{_module(model, path)} has a backward hook, which would not be called: stages run "
                f"operators, not modules. Remove it by the remove() of what its registration returned"
            )
    for path, parameter in model.named_parameters():
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise UnsupportedModel(
                f"parameter {path!r} of {type(model).__name__} has a gradient hook, which would not be "
                f"called: stages compute with copies. Remove it; .grad may be changed before the step"
            )


def _module(model: nn.Module, path: str) -> str:
    return f"module {path!r} of {type(model).__name__}" if path else type(model).__name__


@contextmanager
def no_host_random(model: nn.Module) -> Iterator[None]:
    """Refuses a forward that draws numbers outside of torch: the graph would keep those of its capture.

    Raises:
        UnsupportedModel: At the end, if Python's or NumPy's generator was drawn from.
    """
    before = _host_random()
    yield
    for name, state in _host_random().items():
        if state != before[name]:
            raise UnsupportedModel(
                f"{type(model).__name__} draws from {name} in its forward (a skipped layer, a random mask); "
                f"the graph would repeat what was drawn while it was captured in every step. Draw with torch "
                f"operators (torch.rand), or switch it off: in transformers by layerdrop=0 and "
                f"apply_spec_augment=False in the config"
            )


def _host_random() -> dict[str, object]:
    legacy = np.random.get_state()
    return {"Python's random": random.getstate(), "numpy.random": (legacy[1].tobytes(), *legacy[2:])}  # type: ignore[index,union-attr]


@contextmanager
def no_tracebacks() -> Iterator[None]:
    """Keeps torch from writing the traceback of an operator that fails; it is in the error, too."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    with patch.object(logger, "disabled", True):
        yield


def capture_error(
    model: nn.Module, error: Exception, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> CaptureError:
    """The error to raise for what torch.export raised: operator, place in the model's code, remedy.

    Args:
        model: What was to be captured.
        error: What torch.export raised.
        args: The example's positional inputs.
        kwargs: Its inputs by keyword.
    """
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    operator = _operator(error.__traceback__)
    at = f"\n  in operator {operator}" if operator else ""
    return CaptureError(
        f"{type(model).__name__} cannot be captured by torch.export: {type(error).__name__}: {first}{at}"
        f"{_place(traceback.extract_tb(error.__traceback__))}\n"
        f"  {_misfit(model, args, kwargs) or remedy_for(model, _code(error)) or _remedy(str(error))}"
    )


def _misfit(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """What is wrong with the inputs' names or number; "" if nothing is."""
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        names = ", ".join([*(f"input {index}" for index in range(len(args))), *kwargs])
        return (
            f"The example inputs are {names}, but forward takes {signature}: {error}. Give example inputs "
            "as forward takes them."
        )
    return ""


def _place(frames: Iterable[traceback.FrameSummary]) -> str:
    """The last line of the caller's or the model's code."""
    outside = [frame for frame in frames if not frame.filename.startswith(_NOT_THE_MODELS)]
    if not outside:
        return ""
    last = outside[-1]
    return f"\n  at {last.filename}:{last.lineno} in {last.name}: {last.line}"


def _code(error: Exception) -> str:
    """The error's text with the source lines it passed through."""
    lines = (frame.line or "" for frame in traceback.extract_tb(error.__traceback__))
    return "\n".join([str(error), *lines])


def _operator(trace: TracebackType | None) -> str:
    """The operator that was being called, else the last one whose result is a number; "" if none."""
    called = made = ""
    while trace is not None:
        for value in trace.tb_frame.f_locals.values():
            if isinstance(value, torch._ops.OpOverload):
                called = str(value)
            elif isinstance(value, torch.fx.Tracer):
                kinds = (torch.SymInt, torch.SymFloat, torch.SymBool)
                numbers = [n for n in value.graph.nodes if isinstance(n.meta.get("val"), kinds)]
                made = str(numbers[-1].target) if numbers else made
        trace = trace.tb_next
    return called or made


def _remedy(text: str) -> str:
    if "fake tensor in the exported program constant" in text:
        return (
            "The forward takes the .data of a tensor (weight.data.clamp_(), tensor.data = ...), which no "
            "graph shows. Use the tensor itself, under torch.no_grad() or detached, or move that code out of "
            "forward."
        )
    if any(hint in text for hint in ("data-dependent", "DataDependent", "Unbacked", ".item()")):
        return (
            "The forward branches on tensor values. Make the branch independent of data (torch.where, "
            "a flag on the module), or move that code out of forward."
        )
    return (
        "If the module runs on these inputs, make that line traceable: no branches on tensor values, no "
        "numpy or .item(), no Python side effects; torch.export.export(model, args, strict=False) alone "
        "shows the full report."
    )
