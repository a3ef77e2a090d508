"""A model with the loss of its outputs, as one module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rpcompile.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Callable

LABELS = "labels"
COUNT = "num_items_in_batch"


class ModelWithLoss(nn.Module):
    """Returns `(loss_fn(outputs, labels), outputs)`.

    Attributes:
        model: Gets all tensors but the labels: the keyword `labels`, or else the last position.
        loss_fn: A function or module. Where `num_items_in_batch` is among the keywords, it gets that too.
    """

    def __init__(self, model: nn.Module, loss_fn: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn
        self.training = model.training

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> tuple[torch.Tensor, Any]:
        if LABELS in kwargs:
            labels = kwargs.pop(LABELS)
        elif args:
            args, labels = args[:-1], args[-1]
        else:
            raise InvalidArgument(
                f"loss_fn needs labels, and the batch has {sorted(kwargs)}; pass the keyword {LABELS!r}, or "
                f"positional tensors whose last one is the labels"
            )
        counts = {COUNT: kwargs.pop(COUNT)} if COUNT in kwargs else {}
        outputs = self.model(*args, **kwargs)
        return self.loss_fn(outputs, labels, **counts), outputs
