"""Runs one stage's graph on one microbatch: forward, recompute and then backward, or both at once."""

from __future__ import annotations

import copy
import functools
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.fx import GraphModule
from torch.fx.node import map_aggregate

from rpcompile.errors import NonFinite
from rpcompile.graphs import AUTOCAST
from rpcompile.random_streams import microbatch_seed
from rpcompile.runtime import blame
from rpcompile.tiling import expected_loss_gradient

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from rpcompile.ir import StageGraph
    from rpcompile.runtime.compiled_stages import CompiledStages

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


@dataclass(frozen=True)
class Tape:
    """What a recompute leaves for its backward; dropping it frees the activations.

    Attributes:
        roots: Where gradients of the outgoing boundary come in, by node name. Edges, not tensors: what the
            graph returned need not outlive the forward.
        leaves: The tensors that get a gradient.
        incoming: The incoming boundary values, cut off from what made them.
        arguments: What the graph was called with.
        microbatch: The microbatch.
    """

    roots: dict[str, GradientEdge]
    leaves: list[torch.Tensor]
    incoming: Tensors
    arguments: tuple[Any, ...]
    microbatch: Microbatch


class StageRunner:
    """Calls a StageGraph. Holds no tensors, so any number of threads may use it.

    Args:
        graph: The stage.
        loss: Name of the node that is the loss.
        device: Where it runs and the graph's own tensors are made; None for where it was captured.
        detect_nan: Check results and gradients, which on a GPU waits for them.
        compiled: Runs the graph through `torch.compile`.
    """

    def __init__(
        self,
        graph: StageGraph,
        loss: str,
        device: torch.device | None = None,
        detect_nan: bool = False,
        compiled: CompiledStages | None = None,
    ) -> None:
        self.graph = graph
        if device is not None:
            self.graph = replace(graph, graph_module=on_device(copy.deepcopy(graph.graph_module), device))
        self._loss = loss
        self._detect_nan = detect_nan
        self._device = device
        self._compiled = None if compiled is None else compiled.of(self.graph.graph_module)

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
        arguments = self._arguments(_merged(weights), inputs, values, microbatch, keep_state=True)
        with torch.no_grad(), self._compiling("forward", microbatch):
            return self._call(arguments, microbatch, self._detect_nan)

    def recompute(
        self, weights: Sequence[Tensors], inputs: Tensors, values: Tensors, microbatch: Microbatch
    ) -> Tape:
        """Runs the graph again, under autograd; buffers that it changes stay as they are.

        Args:
            weights, inputs, values, microbatch: As for `forward`.
        """
        named, leaves, incoming = self._prepare(weights, values)
        arguments = self._arguments(named, inputs, incoming, microbatch, keep_state=False)
        with torch.enable_grad(), self._compiling("recompute", microbatch):
            outputs = self._call(arguments, microbatch)
            made = {name: outputs[name] for name in self.graph.gradients_in}
            roots = {name: get_gradient_edge(value) for name, value in made.items() if value.requires_grad}
        return Tape(roots, leaves, incoming, arguments, microbatch)

    def backward(self, tape: Tape, gradients: Tensors) -> Tensors:
        """Back-propagates `gradients` of the outgoing boundary, by node name.

        Weight gradients accumulate in `.grad` of the tensors that `recompute` was given.

        Returns:
            Gradients of the incoming boundary by node name; values no gradient reached are left out.
        """
        seeds = {name: gradients[name] for name in tape.roots if name in gradients}
        with torch.enable_grad(), self._compiling("backward", tape.microbatch):
            return self._propagate(tape, seeds)

    def fused(
        self, weights: Sequence[Tensors], inputs: Tensors, values: Tensors, microbatch: Microbatch
    ) -> tuple[Tensors, Tensors]:
        """Forward, loss and backward at once; returns the detached outputs and as `backward` does."""
        named, leaves, incoming = self._prepare(weights, values)
        arguments = self._arguments(named, inputs, incoming, microbatch, keep_state=True)
        with torch.enable_grad(), self._compiling("fused", microbatch):
            with expected_loss_gradient(microbatch.loss_scale):
                outputs = self._call(arguments, microbatch, self._detect_nan)
            roots = {self._loss: get_gradient_edge(outputs[self._loss])}
            outputs = {name: value.detach() for name, value in outputs.items()}
            seeds = {self._loss: torch.full_like(outputs[self._loss], microbatch.loss_scale)}
            return outputs, self._propagate(Tape(roots, leaves, incoming, arguments, microbatch), seeds)

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

    def _propagate(self, tape: Tape, seeds: Tensors) -> Tensors:
        leaves, incoming = tape.leaves, tape.incoming
        passed: Tensors = {}
        for name in self.graph.gradients_out:
            incoming[name].register_hook(
                functools.partial(_keep_layout, passed, name, incoming[name].stride())
            )
        if seeds and leaves:
            roots = [tape.roots[name] for name in seeds]
            torch.autograd.backward(roots, list(seeds.values()), inputs=leaves)
        if self._detect_nan:
            made = {str(number): leaf.grad for number, leaf in enumerate(leaves) if leaf.grad is not None}
            if not blame.all_finite(made):
                for leaf in leaves:
                    leaf.grad = None
                run = blame.KeepGradients(self.graph.graph_module)
                with self._setting(tape.microbatch):
                    run.run(*tape.arguments)
                where = blame.first_nonfinite_gradient(run, seeds)
                raise NonFinite(f"the first gradient that is not finite comes from {where}")
        found = ((name, passed.get(name, incoming[name].grad)) for name in self.graph.gradients_out)
        return {name: gradient for name, gradient in found if gradient is not None}

    def _arguments(
        self, weights: Tensors, inputs: Tensors, values: Tensors, microbatch: Microbatch, keep_state: bool
    ) -> tuple[Any, ...]:
        graph = self.graph
        buffers = [
            weights[name] if keep_state or name not in graph.mutated else weights[name].clone()
            for name in graph.buffers
        ]
        return (
            *(weights[name] for name in graph.parameters),
            *buffers,
            *(inputs[name] for name in graph.inputs),
            *(microbatch.sizes[name] for name in graph.sizes),
            *(values[name] for name in graph.values),
        )

    def _compiling(self, kind: str, microbatch: Microbatch) -> AbstractContextManager[None]:
        """Around a pass, which runs alone if it compiles the graph."""
        if self._compiled is None:
            return nullcontext()
        return self._compiled.warming((kind, tuple(microbatch.sizes.items())))

    @contextmanager
    def _setting(self, microbatch: Microbatch) -> Iterator[None]:
        """Seed and autocast of a forward."""
        autocast = nullcontext()
        if self.graph.autocast is not None:
            # The cache would keep casts of weights that the next job overwrites.
            device = "cpu" if self._device is None else self._device.type
            autocast = torch.autocast(device, self.graph.autocast, cache_enabled=False)
        with microbatch_seed(microbatch.seed), autocast:
            yield

    def _call(self, arguments: tuple[Any, ...], microbatch: Microbatch, check: bool = False) -> Tensors:
        # Not GraphModule.__call__, which drops the traceback that names a failing node.
        run = self.graph.graph_module.forward if self._compiled is None else self._compiled.call
        with self._setting(microbatch):
            outputs = dict(zip(self.graph.outputs, run(*arguments), strict=True))
            # The log-sum-exp of a row that attends to nothing is infinite.
            kept = {name for names in self.graph.keeps.values() for name in names}
            if check and not blame.all_finite({n: v for n, v in outputs.items() if n not in kept}):
                where = blame.first_nonfinite(self.graph.graph_module, arguments)
                raise NonFinite(f"the first result that is not finite is that of {where}")
        return outputs


def on_device(module: GraphModule, device: torch.device) -> GraphModule:
    """Changes a graph so that the tensors it makes itself are on `device`, not where it was captured."""

    def moved(argument: Any) -> Any:
        return device if isinstance(argument, torch.device) else argument

    for part in module.modules():
        if isinstance(part, GraphModule):
            for node in part.graph.nodes:
                node.args = map_aggregate(node.args, moved)  # type: ignore[assignment]
                node.kwargs = map_aggregate(node.kwargs, moved)  # type: ignore[assignment]
                if node.target is AUTOCAST and node.args[0] == "cpu":
                    # A model turns off autocast on the device of its inputs: where it was captured.
                    node.update_arg(0, device.type)
            part.recompile()
    return module


def _keep_layout(passed: Tensors, name: str, stride: tuple[int, ...], gradient: torch.Tensor) -> None:
    """Keeps a gradient whose layout `.grad` would change to the value's: kernels would round it otherwise."""
    if gradient.stride() != stride:
        passed[name] = gradient


def _merged(weights: Sequence[Tensors]) -> Tensors:
    return {name: tensor for segment in weights for name, tensor in segment.items()}
