"""Small modules, and captures of them made with plain torch.export, without rpcompile's own passes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.fx import Node

from rpcompile.ir import Capture, Cut, InputSpec, TensorSpec
from rpcompile.passes.estimate_costs import EstimateCosts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from rpcompile.ir import CostedGraph, NodeCost

HIGHEST = 64
BATCH = {"x": {0: "batch"}}


def capture_of(
    model: torch.nn.Module,
    inputs: Mapping[str, torch.Tensor],
    sizes: Mapping[str, Mapping[int, str]] | None = None,
    cuts: Iterable[str] = (),
    rematerialised: Iterable[str] = (),
    mutations: Mapping[str, str] | None = None,
    lowest: int | None = None,
) -> Capture:
    """`sizes` names the dynamic dimensions of inputs, `lowest` is their least size; `cuts` names the nodes
    that end segments."""
    sizes = sizes or {}
    dims = {
        name: torch.export.Dim(name, min=lowest, max=HIGHEST)
        for dims in sizes.values()
        for name in dims.values()
    }
    shapes = {key: {d: dims[name] for d, name in sizes.get(key, {}).items()} for key in inputs}
    exported = torch.export.export(model, (), dict(inputs), dynamic_shapes=shapes, strict=False)
    module = exported.graph_module
    nodes = list(module.graph.nodes)
    by_name = {node.name: node for node in nodes}
    module.meta["symbols"] = {
        name: str(by_name[key].meta["val"].shape[d])
        for key, named in sizes.items()
        for d, name in named.items()
    }
    parameters = _specs(exported.graph_signature.inputs_to_parameters, by_name, model)
    buffers = _specs(exported.graph_signature.inputs_to_buffers, by_name, model)
    gradients = {spec.placeholder for spec in parameters if spec.trainable}
    order = []
    for node in nodes:
        if node.op == "call_function" and "_assert" not in node.name:
            if _is_float(node) and any(source.name in gradients for source in node.all_input_nodes):
                gradients.add(node.name)
            if node.name not in set(rematerialised):
                order.append(node.name)
    capture = Capture(
        graph_module=module,
        model_name=type(model).__name__,
        parameters=parameters,
        buffers=buffers,
        constants={},
        inputs=tuple(InputSpec(key, key, tuple(v.shape), str(v.dtype), 0) for key, v in inputs.items()),
        outputs=tuple(node.name for node in nodes[-1].args[0]),
        symbols=dict.fromkeys(dims, (1, HIGHEST)),
        example_sizes={},
        tied=tuple(spec.aliases for spec in parameters if len(spec.aliases) > 1),
        mutations=mutations or {},
        fingerprint="",
        order=tuple(order),
        rematerialised=frozenset(rematerialised),
        requires_grad=frozenset(gradients),
        last_name="last",
    )
    return replace(capture, cuts=tuple(cut_behind(capture, name) for name in cuts))


def _specs(
    names: Mapping[str, str], nodes: Mapping[str, Node], model: torch.nn.Module
) -> tuple[TensorSpec, ...]:
    every: dict[int, tuple[str, ...]] = {}
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    for name, tensor in tensors:
        every[id(tensor)] = (*every.get(id(tensor), ()), name)
    aliases = {name: every[id(tensor)] for name, tensor in tensors}
    specs = []
    for placeholder, name in names.items():
        value = nodes[placeholder].meta["val"]
        shape, nbytes = tuple(value.shape), value.numel() * value.element_size()
        group = aliases[name]
        specs.append(
            TensorSpec(placeholder, group[0], group, shape, str(value.dtype), nbytes, value.requires_grad)
        )
    return tuple(specs)


def _is_float(node: Node) -> bool:
    value: Any = node.meta["val"]
    values = value if isinstance(value, tuple | list) else (value,)
    return any(isinstance(item, torch.Tensor) and item.is_floating_point() for item in values)


def cut_behind(capture: Capture, last: str) -> Cut:
    """The cut behind the node called `last`."""
    nodes = {node.name: node for node in capture.graph_module.graph.nodes}
    position = capture.order.index(last) + 1
    later = {nodes[name] for name in capture.order[position:]}
    values = [name for name in capture.order[:position] if later & set(nodes[name].users)]
    return Cut(position, last, tuple(values), tuple(name for name in values if name in capture.requires_grad))


class Function(nn.Module):
    """A function of x and of trainable (or frozen) tensors w0, w1, ..."""

    def __init__(
        self, body: Callable[..., torch.Tensor], *shapes: tuple[int, ...], frozen: tuple[int, ...] = ()
    ):
        super().__init__()
        self.body = body
        self.weights = nn.ParameterList([torch.randn(shape) for shape in shapes])
        for index in frozen:
            self.weights[index].requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x, *self.weights)


class Chain(nn.Sequential):
    """nn.Sequential whose input is called x."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


def conv_net() -> nn.Module:
    return Chain(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, stride=2, bias=False),
        nn.ConvTranspose2d(4, 5, 2, stride=2),
        nn.GroupNorm(5, 5),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(180, 3),
    )


def costs_of(model: nn.Module, x: torch.Tensor, sizes: dict[str, dict[int, str]]) -> CostedGraph:
    return EstimateCosts().run(capture_of(model, {"x": x}, sizes))


def node_cost(
    body: Callable[..., torch.Tensor],
    x: torch.Tensor,
    *shapes: tuple[int, ...],
    frozen: tuple[int, ...] = (),
    sizes: dict[str, dict[int, str]] = BATCH,
) -> dict[str, NodeCost]:
    """Costs by node of a function of x, whose first dimension is `batch`."""
    return dict(costs_of(Function(body, *shapes, frozen=frozen), x, sizes).costs)
