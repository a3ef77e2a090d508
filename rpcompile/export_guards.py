"""What keeps torch.export from losing a backward silently, and from failing obscurely."""

from __future__ import annotations

import inspect
import logging
import traceback
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

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
    autograd.Function is refused. (Export sees through checkpoints that are not reentrant.)
    """
    original = torch.autograd.Function.apply

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or cls.__module__.startswith("torch."):
            return original.__func__(cls, *args, **kwargs)
        raise UnsupportedModel(
            f"{type(model).__name__} calls the autograd.Function {cls.__qualname__}, whose backward export "
            f"would replace by that of its forward{_place(traceback.extract_stack())}\n  Write it with "
            f"differentiable operators, or as a torch.library.custom_op with register_autograd."
        )

    class Call:
        @staticmethod
        def apply(function: Any, preserve: bool, *args: Any) -> Any:
            return function(*args)

    with (
        patch.object(torch.autograd.Function, "apply", classmethod(apply)),
        patch.object(torch.utils.checkpoint, "CheckpointFunction", Call),
    ):
        yield


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
