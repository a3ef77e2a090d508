"""StageGraph -> StageGraph: attention outputs leave a forward stage and are given to the backward stage.

Before -> after, in a forward stage::

    attn = sdpa(q, k, v)      three = with_log_sum_exp(q, k, v); attn = three[0]; return ..., *three[1:]

and in the backward stage of the same segment::

    attn = sdpa(q, k, v)      attn = from_kept(q, k, v, attn_output, attn_log_sum_exp)

`rpcompile/attention.py` has the two functions. A fused stage recomputes nothing and stays as it is.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

from torch.fx import Graph, GraphModule, Node, map_arg

from rpcompile.attention import from_kept, with_log_sum_exp
from rpcompile.attention_kernels import Call, find_kernel, log_sum_exp_like
from rpcompile.graphs import value_of
from rpcompile.ir import StageKind
from rpcompile.sizes import arguments

if TYPE_CHECKING:
    import torch

    from rpcompile.ir import SegmentChain, StageGraph


@dataclass(frozen=True)
class KeepAttention:
    """Rewrites the attention nodes of the segments that offload them (`Segment.offloads`)."""

    chain: SegmentChain

    name: ClassVar[str] = "keep-attention"

    def run(self, stage: StageGraph) -> StageGraph:
        """Adds outputs to a forward stage, values to a backward stage; others come back as they were."""
        segments = ((index, self.chain.segments[index]) for index in stage.stage.segments)
        nodes = {
            i: segment.attention.nodes for i, segment in segments if segment.offloads and segment.attention
        }
        if not nodes or stage.stage.kind is StageKind.FB:
            return stage
        keeps = {index: tuple(name for node in nodes[index] for name in _kept(node)) for index in nodes}
        kept = tuple(name for names in keeps.values() for name in names)
        rewriter = _Rewriter(stage, {name for names in nodes.values() for name in names}, self._device)
        module = rewriter.run()
        if stage.stage.kind is StageKind.F:
            return replace(stage, graph_module=module, outputs=(*stage.outputs, *kept), keeps=keeps)
        return replace(stage, graph_module=module, values=(*stage.values, *kept), keeps=keeps)

    @property
    def _device(self) -> str:
        return "cpu" if self.chain.hardware.name == "cpu" else "cuda"


def attention_call(node: Node) -> Call:
    """What decides which kernel can run an attention node."""
    bound = arguments(node)
    query, key, value = (value_of(cast("Node", bound[name])) for name in ("query", "key", "value"))
    mask = None if bound["attn_mask"] is None else value_of(cast("Node", bound["attn_mask"]))
    return Call(query, key, value, mask, float(cast("float", bound["dropout_p"])), value_of(node).dtype)


def _kept(node: str) -> tuple[str, str]:
    """Names of an attention node's output and log-sum-exp as kept values."""
    return f"{node}_output", f"{node}_log_sum_exp"


class _Rewriter:
    """Copies a stage's graph with other calls in place of some attention nodes."""

    def __init__(self, stage: StageGraph, names: set[str], device: str) -> None:
        self._stage, self._names, self._device = stage, names, device
        self._graph = Graph()
        self._copies: dict[Node, Node] = {}
        self._emitted: list[Node] = []

    def run(self) -> GraphModule:
        module = self._stage.graph_module
        nodes = list(module.graph.nodes)
        forward = self._stage.stage.kind is StageKind.F
        attentions = [node for node in nodes if node.name in self._names]
        given: dict[Node, tuple[Node, Node]] = {}
        for node in nodes:
            if node.op != "placeholder" and not forward and not given:
                given = {attention: self._placeholders(attention) for attention in attentions}
            if node.op == "output":
                self._graph.output((*self._read(node.args[0]), *self._emitted))
            elif node.name in self._names:
                self._copies[node] = self._emit(node) if forward else self._take(node, *given[node])
            else:
                self._copies[node] = self._graph.node_copy(node, lambda arg: self._copies[arg])
        return GraphModule(module, self._graph)

    def _emit(self, node: Node) -> Node:
        """The output, made together with the log-sum-exp; both leave."""
        values = value_of(node), *self._kept_values(node)
        arguments = (*self._operands(node), value_of(node).dtype)
        three = self._call(with_log_sum_exp, arguments, f"{node.name}_and_kept", node, values)
        items = [
            self._call(operator.getitem, (three, index), name, node, values[index])
            for index, name in enumerate((node.name, *_kept(node.name)))
        ]
        self._emitted += items[1:]
        return items[0]

    def _placeholders(self, node: Node) -> tuple[Node, Node]:
        made = [self._graph.placeholder(name) for name in _kept(node.name)]
        for placeholder, value in zip(made, self._kept_values(node), strict=True):
            placeholder.meta["val"] = value
        return made[0], made[1]

    def _take(self, node: Node, output: Node, log_sum_exp: Node) -> Node:
        arguments = (*self._operands(node), output, log_sum_exp)
        return self._call(from_kept, arguments, node.name, node, value_of(node))

    def _operands(self, node: Node) -> tuple[Any, ...]:
        """query, key, value, attn_mask, is_causal and scale."""
        bound = arguments(node)
        wanted = ("query", "key", "value", "attn_mask", "is_causal", "scale")
        return tuple(self._read(bound[name]) for name in wanted)

    def _read(self, argument: Any) -> Any:
        return map_arg(argument, self._copies.__getitem__)

    def _call(self, function: Any, arguments: tuple[Any, ...], name: str, like: Node, value: object) -> Node:
        made = self._graph.create_node("call_function", function, arguments, name=name)
        made.meta = {**like.meta, "val": value}
        return made

    def _kept_values(self, node: Node) -> tuple[torch.Tensor, torch.Tensor]:
        kernel, output = find_kernel(self._device, attention_call(node)), value_of(node)
        return output.transpose(1, 2), log_sum_exp_like(kernel, output)
