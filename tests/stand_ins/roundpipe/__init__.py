"""Stands in for the package `roundpipe` 0.1.1, which cannot be imported without a GPU.

It has what `benchmarks/gpu_loops.py` uses, under the same names and signatures, and computes plainly.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn


class RoundPipeRunConfig:
    def __init__(self, requires_grad: bool | None = None, num_microbatch: int | None = None) -> None:
        self.num_microbatch = num_microbatch


class RoundPipe(nn.Module):
    def __init__(
        self,
        model: nn.Module,
        optim_dtype: torch.dtype | None = None,
        name: str | None = None,
        model_run_config: RoundPipeRunConfig | None = None,
        pin_model: str = "alloc",
    ) -> None:
        super().__init__()
        assert isinstance(model, nn.Sequential)
        assert model_run_config is not None
        self.layers = list(model)
        self.microbatches = model_run_config.num_microbatch
        event = SimpleNamespace(wait=lambda: True, synchronize=lambda: None)
        self.layer_attrs = [
            SimpleNamespace(grad_download_started=event, grad_downloaded=event) for _ in self.layers
        ]
        for layer in self.layers:
            for parameter in layer.parameters():
                found = getattr(
                    parameter, "roundpipe_param_attr", SimpleNamespace(grad_cpu={}, grad_buffer={})
                )
                found.grad_cpu[id(layer)] = found.grad_buffer[id(layer)] = None
                parameter.roundpipe_param_attr = found

    def forward_backward(
        self,
        input_args: tuple[Any, ...] = (),
        input_kwargs: dict[str, Any] | None = None,
        label: Any = None,
        loss_fn: Callable[[Any, Any], torch.Tensor] = lambda outputs, labels: outputs,
    ) -> torch.Tensor:
        total = torch.zeros(())
        assert input_kwargs is not None
        for part in zip(*(value.chunk(self.microbatches) for value in input_kwargs.values()), strict=True):
            first, *others = self.layers
            value = first(*input_args, **dict(zip(input_kwargs, part, strict=True)))
            for layer in others:
                value = layer(value)
            loss = loss_fn(value, label)
            loss.backward()
            total = total + loss.detach()
        for layer in self.layers:
            for parameter in layer.parameters():
                attribute = parameter.roundpipe_param_attr  # type: ignore[attr-defined]
                assert attribute.grad_cpu[id(layer)] is None, "gradients of the run before are in the way"
                attribute.grad_cpu[id(layer)] = parameter.grad
        return total
