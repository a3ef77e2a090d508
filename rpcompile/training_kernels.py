"""Runs an operator without autograd as it runs with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from rpcompile.random_streams import seeded

if TYPE_CHECKING:
    from collections.abc import Callable


def as_in_training(
    operator: Callable[..., Any], wanted: tuple[int, ...], stream: int | None, *args: Any, **kwargs: Any
) -> Any:
    """Calls an operator whose kernel depends on which of its arguments want a gradient.

    Args:
        operator: The operator.
        wanted: Which tensors do, by their place among the leaves of `(args, kwargs)`.
        stream: Number of the stream that a random operator draws from, see `rpcompile/random_streams.py`.

    Returns:
        Its results, detached: what it saved for a backward is gone.
    """
    leaves, form = pytree.tree_flatten((args, kwargs))
    with torch.enable_grad():
        for index in wanted:
            leaves[index] = leaves[index].detach().requires_grad_()
        args, kwargs = pytree.tree_unflatten(leaves, form)
        results = operator(*args, **kwargs) if stream is None else seeded(operator, stream, *args, **kwargs)
    return pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, results)
