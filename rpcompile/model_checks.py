"""What a compiled program would pass over in silence: changes of the model behind it, hooks, another mode."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import nn

from rpcompile.errors import BatchError, InvalidArgument, PlanMismatch, UnsupportedModel
from rpcompile.runtime.read_guard import unguarded

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from rpcompile.ir import Capture

_BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")
_GRADIENT_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def check_gradients(model: nn.Module) -> None:
    """That gradients are what a program makes: dense, and seen by nobody on their way.

    Raises:
        UnsupportedModel: A module or parameter has a hook on its gradient, or a table has sparse ones.
    """
    for name, module in model.named_modules():
        if any(getattr(module, hooks, None) for hooks in _BACKWARD_HOOKS):
            raise UnsupportedModel(
                f"{name or type(model).__name__} has a backward hook, which would not be called: stages have "
                f"no modules; remove it"
            )
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            raise UnsupportedModel(f"{name} makes sparse gradients; create it with sparse=False")
    with unguarded():
        for name, parameter in model.named_parameters():
            if any(getattr(parameter, hooks, None) for hooks in _GRADIENT_HOOKS):
                raise UnsupportedModel(
                    f"{name} has a hook on its gradient, which would not be called: gradients are summed "
                    f"over microbatches on the GPUs; remove the hook and change .grad behind forward_backward"
                )


def check_tensors(tensors: Mapping[str, torch.Tensor], capture: Capture, cast: bool) -> None:
    """That the model's tensors are those that were captured.

    Args:
        tensors: By qualified name.
        capture: The graph.
        cast: Whether trainable ones are cast before use.

    Raises:
        UnsupportedModel: They are on the meta device.
        PlanMismatch: One is gone, or has another shape or dtype, or requires a gradient that is not made.
    """
    absent = [name for name, tensor in tensors.items() if tensor.device.type == "meta"]
    if absent:
        raise UnsupportedModel(
            f"{capture.model_name} has no weights to run with ({absent[0]} is on the meta "
            f"device); its plan can be inspected, or load weights first"
        )
    again = "when the model was compiled; call rpcompile.compile again"
    with unguarded():
        for spec in (*capture.parameters, *capture.buffers):
            tensor = tensors.get(spec.name)
            if tensor is None:
                raise PlanMismatch(f"{spec.name} is gone, and was part of {capture.model_name} {again}")
            if tuple(tensor.shape) != spec.shape:
                raise PlanMismatch(
                    f"{spec.name} has shape {tuple(tensor.shape)}, and had {spec.shape} {again}"
                )
            dtype = str(tensor.dtype).removeprefix("torch.")
            if dtype != spec.dtype and not (cast and spec.trainable):
                raise PlanMismatch(f"{spec.name} is {dtype}, and was {spec.dtype} {again}")


def check_trainable(model: nn.Module, capture: Capture) -> None:
    """That whoever requires a gradient gets one. (Who requires none any more gets none.)

    Raises:
        PlanMismatch: A parameter did not when the model was compiled.
    """
    frozen = {name for spec in capture.parameters if not spec.trainable for name in spec.aliases}
    with unguarded():
        found = [name for name, p in model.named_parameters() if p.requires_grad and name in frozen]
    if found:
        raise PlanMismatch(
            f"{found[0]}{f' and {len(found) - 1} others' if found[1:] else ''} requires a gradient, and did "
            f"not when the model was compiled; call rpcompile.compile again"
        )


def check_inputs(batch: Mapping[str, torch.Tensor]) -> None:
    """That nobody waits for gradients of inputs.

    Raises:
        BatchError: One requires a gradient.
    """
    for name, value in batch.items():
        if value.requires_grad:
            raise BatchError(
                f"input {name!r} requires a gradient, and inputs get none; pass it detached, or make what it "
                f"comes from part of the model"
            )


def check_autocast(capture: Capture) -> None:
    """That stages run under the autocast that is on; another one than at compile time would be ignored.

    Raises:
        InvalidArgument: They do not.
    """
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) != capture.autocast:
            raise InvalidArgument(
                f"called under autocast to {torch.get_autocast_dtype(device)}, but compiled under "
                f"{capture.autocast or 'none'}; call rpcompile.compile under the autocast that you train with"
            )


def modes(model: nn.Module) -> dict[str, bool]:
    """Name of each module -> whether it is in training mode."""
    return {name: module.training for name, module in model.named_modules()}


def warn_of_another_mode(model: nn.Module, captured: Mapping[str, bool]) -> None:
    """Warns if a module is not in the mode that it was captured in, and computes in."""
    names: Iterable[str] = (n for n, mode in modes(model).items() if captured.get(n, mode) != mode)
    if (name := next(iter(names), None)) is not None:
        then, now = ("training", "eval") if captured[name] else ("eval", "training")
        whole = type(model).__name__
        warnings.warn(
            f"{f'{name} of ' if name else ''}{whole} is in {now} mode, but trains as it was compiled, in "
            f"{then} mode (dropout, batch norm); call .train() or .eval() before rpcompile.compile",
            RuntimeWarning,
            stacklevel=4,  # the caller of forward_backward
        )
