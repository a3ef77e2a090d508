"""Runs one stage's graph on one microbatch: forward, backward with recompute, or both at once."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rpcompile.random_streams import microbatch_seed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rpcompile.ir import StageGraph

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Microbatch:
    """What a stage needs to know of a microbatch besides its tensors.

    Attributes:
        seed: Seed of its random streams.
        sizes: Symbol -> size.
        loss_scale: Gradient of the whole loss with respect to this microbatch's loss.
    """

    seed: int
    sizes: Mapping[str, int]
    loss_scale: float


class StageRunner:
    """Calls a StageGraph. Holds no tensors, so any number of threads may use it."""

    def __init__(self, graph: StageGraph, loss: str) -> None:
        self.graph = graph
        self._loss = loss

    def forward(
        self, weights: Sequence[Tensors], inputs: Tensors, values: Tensors, microbatch: Microbatch
    ) -> Tensors:
        """Runs the graph without autograd; buffers that it changes are changed in `weights`.

        Args:
            weights: Parameters and buffers by qualified name, one dict a segment; no name stands twice.
            inputs: User inputs by name.
            values: Incoming boundary values by node name.

        Returns:
            The graph's outputs by node name.
        """
        with torch.no_grad():
            return self._call(_merged(weights), inputs, values, microbatch, keep_state=True)

    def backward(
        self,
        weights: Sequence[Tensors],
        inputs: Tensors,
        values: Tensors,
        gradients: Tensors,
        microbatch: Microbatch,
    ) -> Tensors:
        """Recomputes the forward, then back-propagates `gradients` of the outgoing boundary.

        Weight gradients accumulate in `.grad` of the tensors in `weights`.

        Returns:
            Gradients of the incoming boundary by node name; values no gradient reached are left out.
        """
        named, leaves, incoming = self._prepare(weights, values)
        with torch.enable_grad():
            outputs = self._call(named, inputs, incoming, microbatch, keep_state=False)
        wanted = [name for name in self.graph.gradients_in if name in gradients]
        roots = [name for name in wanted if outputs[name].requires_grad]
        return self._propagate(
            [outputs[name] for name in roots], [gradients[name] for name in roots], leaves, incoming
        )

    def fused(
        self, weights: Sequence[Tensors], inputs: Tensors, values: Tensors, microbatch: Microbatch
    ) -> tuple[Tensors, Tensors]:
        """Forward, loss and backward at once; returns the detached outputs and as `backward` does."""
        named, leaves, incoming = self._prepare(weights, values)
        with torch.enable_grad():
            outputs = self._call(named, inputs, incoming, microbatch, keep_state=True)
        loss = outputs[self._loss]
        outputs = {name: value.detach() for name, value in outputs.items()}
        seed = torch.full_like(loss, microbatch.loss_scale)
        return outputs, self._propagate([loss], [seed], leaves, incoming)

    def weight_gradients(self, weights: Sequence[Tensors]) -> list[Tensors]:
        """What has accumulated, one dict a segment."""
        return [
            {
                name: grad
                for name, tensor in segment.items()
                if name in self.graph.trainable and (grad := tensor.grad) is not None
            }
            for segment in weights
        ]

    def _prepare(
        self, weights: Sequence[Tensors], values: Tensors
    ) -> tuple[Tensors, list[torch.Tensor], Tensors]:
        named = _merged(weights)
        leaves = [
            named[name].requires_grad_(True) for name in self.graph.parameters if name in self.graph.trainable
        ]
        incoming = {name: values[name].detach() for name in self.graph.values}
        leaves += [incoming[name].requires_grad_(True) for name in self.graph.gradients_out]
        return named, leaves, incoming

    def _propagate(
        self,
        roots: list[torch.Tensor],
        gradients: list[torch.Tensor],
        leaves: list[torch.Tensor],
        incoming: Tensors,
    ) -> Tensors:
        if roots and leaves:
            torch.autograd.backward(roots, gradients, inputs=leaves)
        return {name: grad for name in self.graph.gradients_out if (grad := incoming[name].grad) is not None}

    def _call(
        self, weights: Tensors, inputs: Tensors, values: Tensors, microbatch: Microbatch, keep_state: bool
    ) -> Tensors:
        graph = self.graph
        buffers = [
            weights[name] if keep_state or name not in graph.mutated else weights[name].clone()
            for name in graph.buffers
        ]
        arguments: tuple[Any, ...] = (
            *(weights[name] for name in graph.parameters),
            *buffers,
            *(inputs[name] for name in graph.inputs),
            *(microbatch.sizes[name] for name in graph.sizes),
            *(values[name] for name in graph.values),
        )
        autocast = nullcontext()
        if graph.autocast is not None:
            device = next((item.device.type for item in arguments if isinstance(item, torch.Tensor)), "cpu")
            # The cache would keep casts of weights that the next job overwrites.
            autocast = torch.autocast(device, graph.autocast, cache_enabled=False)
        with microbatch_seed(microbatch.seed), autocast:
            outputs = graph.graph_module(*arguments)
        return dict(zip(graph.outputs, outputs, strict=True))


def _merged(weights: Sequence[Tensors]) -> Tensors:
    return {name: tensor for segment in weights for name, tensor in segment.items()}
