"""The captured graph of a model, and what its nodes cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    import sympy  # pyright: ignore[reportMissingTypeStubs]
    import torch


@dataclass(frozen=True)
class TensorSpec:
    """A parameter or buffer of the model, as the captured graph sees it.

    Attributes:
        placeholder: Name of the graph placeholder that stands for it.
        name: Canonical qualified name in the model (the first alias).
        aliases: Every qualified name under which the model holds the same tensor.
        shape: Sizes.
        dtype: Text form, e.g. "float32".
        nbytes: Size in bytes.
        trainable: `requires_grad` at capture time; False for buffers.
    """

    placeholder: str
    name: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    trainable: bool


@dataclass(frozen=True)
class InputSpec:
    """A tensor that each call passes in.

    Attributes:
        placeholder: Name of the graph placeholder.
        name: Keyword (or position, as text) under which the caller passes it.
        shape: One entry a dimension: an int, or the name of a symbol.
        dtype: Text form, e.g. "int64".
        batch_dim: Dimension that microbatches split, None for inputs every microbatch sees whole.
    """

    placeholder: str
    name: str
    shape: tuple[int | str, ...]
    dtype: str
    batch_dim: int | None


@dataclass(frozen=True)
class Cut:
    """A place between two nodes where the graph may be divided.

    Attributes:
        position: The cut lies behind this many of `Capture.order`'s nodes.
        name: What ends here, e.g. "model.layers.3.mlp".
        values: Names of the nodes whose values cross the cut, in graph order.
        gradients: The members of `values` that carry a gradient back.
    """

    position: int
    name: str
    values: tuple[str, ...]
    gradients: tuple[str, ...]


@dataclass(frozen=True)
class Capture:
    """A model's training graph, with what is needed to run pieces of it.

    Attributes:
        graph_module: The graph. Placeholders: parameters, buffers, constants, inputs; it returns
            the loss first. The one mutable member: passes copy it before they change it.
        model_name: Class name of the model.
        parameters: Parameters that the graph reads.
        buffers: Buffers that the graph reads, with tensor constants.
        constants: Tensor constants by placeholder name.
        inputs: What a caller passes.
        outputs: Names of the nodes returned, loss first.
        symbols: Symbol name -> (smallest, largest) size, e.g. {"batch": (1, 65536)}.
        example_sizes: Symbol name -> size in the example inputs.
        tied: Groups of parameter names that are one tensor.
        mutations: Qualified buffer name -> node whose value it takes after the forward,
            or the in-place operator's node.
        order: Nodes to execute, in order; rematerialised ones are left out.
        rematerialised: Cheap nodes that every stage computes again instead of receiving.
        requires_grad: Nodes whose value carries a gradient.
        random: Nodes that draw random numbers, in order; the position is the stream's number.
        cuts: Places where the graph may be divided, in order.
        last_name: Name of the segment behind the last cut.
        fingerprint: Hash of parameter names, shapes, dtypes and of the graph.
        output_spec: How `outputs` are put together for the caller (a pytree spec), or None.
        autocast: Dtype of the autocast that the graph was captured and runs under, or None.
        notices: What the user should know of the capture, e.g. that a size is fixed.
    """

    graph_module: torch.fx.GraphModule
    model_name: str
    parameters: tuple[TensorSpec, ...]
    buffers: tuple[TensorSpec, ...]
    constants: Mapping[str, torch.Tensor]
    inputs: tuple[InputSpec, ...]
    outputs: tuple[str, ...]
    symbols: Mapping[str, tuple[int, int]]
    example_sizes: Mapping[str, int]
    tied: tuple[tuple[str, ...], ...]
    mutations: Mapping[str, str]
    fingerprint: str
    order: tuple[str, ...] = ()
    rematerialised: frozenset[str] = frozenset()
    requires_grad: frozenset[str] = frozenset()
    random: tuple[str, ...] = ()
    cuts: tuple[Cut, ...] = ()
    last_name: str = ""
    output_spec: object = None
    autocast: torch.dtype | None = None
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class NodeCost:
    """What one node costs for one microbatch; expressions in the capture's symbols.

    Attributes:
        op_class: "matmul", "attention", "convolution", "elementwise", "reduction", "gather" or "view".
        forward_flops: Floating point operations of the forward (a multiply-add counts 2).
        backward_flops: The same for the backward, without recompute; 0 where no gradient flows.
        read_bytes: Bytes the forward reads.
        write_bytes: Bytes the forward writes.
        backward_read_bytes: Bytes the backward reads.
        backward_write_bytes: Bytes the backward writes.
        saved_bytes: Bytes kept for the backward by torch's derivative formulas: what a report says of one
            node. A segment's need is found by running it, see `rpcompile/peak_memory.py`.
        source: Where the formula is from; "bytes only" for an operator without one.
        saved: The nodes whose memory `saved_bytes` counts whole (others may keep them too); what
            remains is the operator's own.
    """

    op_class: str
    forward_flops: sympy.Expr
    backward_flops: sympy.Expr
    read_bytes: sympy.Expr
    write_bytes: sympy.Expr
    backward_read_bytes: sympy.Expr
    backward_write_bytes: sympy.Expr
    saved_bytes: sympy.Expr
    source: str
    saved: tuple[str, ...] = ()


@dataclass(frozen=True)
class CostedGraph:
    """A capture with the cost of each of its nodes, and the operators no formula is known for."""

    capture: Capture
    costs: Mapping[str, NodeCost]
    unknown: tuple[str, ...]
