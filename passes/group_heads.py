"""StageGraph -> StageGraph: attention whose backward takes its heads group by group.

`rpcompile/head_groups.py` runs it. Before -> after, in a segment with eight groups::

    scaled_dot_product_attention(q, k, v, None, 0.0, True, enable_gqa=True)
    attention_by_groups(q, k, v, None, True, None, True, 8, True)

and where its output is kept::

    from_kept(q, k, v, None, True, None, output, log_sum_exp)
    from_kept(q, k, v, None, True, None, output, log_sum_exp, 8, True)
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch.fx import Graph, GraphModule, Node

from rpcompile.attention import from_kept
from rpcompile.graphs import aliased_arguments, argument, is_tensor, mutated_arguments
from rpcompile.head_groups import attention_by_groups
from rpcompile.ir import StageKind
from rpcompile.sizes import arguments, operator_name, tensors

if TYPE_CHECKING:
    from rpcompile.ir import SegmentChain, StageGraph

_SDPA = torch.ops.aten.scaled_dot_product_attention.default
_MASK = 3  # the argument's position
# Their results are memory of their own that their backwards do not read.
_KEEP_NO_RESULT = frozenset(
    f"aten.{name}" for name in ("linear", "addmm", "matmul", "mm", "bmm", "add", "sub", "mul", "cat", "clone")
)


@dataclass(frozen=True)
class GroupHeads:
    """Divides the heads of a stage's attention as its segments say (`Segment.head_groups`).

    Attributes:
        chain: The segments.
        requires_grad: Names of nodes whose value carries a gradient: a mask must not.
    """

    chain: SegmentChain
    requires_grad: frozenset[str]

    name: ClassVar[str] = "group-heads"

    def run(self, stage: StageGraph) -> StageGraph:
        """Rewrite the graph; a stage with nothing to divide comes back as it was."""
        segments = self.chain.segments
        groups_of = {
            name: segments[index].head_groups
            for index in stage.stage.segments
            for name in segments[index].nodes
            if segments[index].head_groups > 1
        }
        nodes = stage.graph_module.graph.nodes
        found = {
            node: groups
            for node in nodes
            if (groups := _divisor(node, groups_of.get(node.name, 1), self.requires_grad)) > 1
        }
        if not found or stage.stage.kind is StageKind.F:
            return stage
        memory = _Memory(list(nodes))
        graph = Graph()
        copies: dict[Node, Node] = {}
        for node in nodes:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            if node in found:
                _divide(copies[node], (found[node], memory.is_free_after(node)))
        return replace(stage, graph_module=GraphModule(stage.graph_module, graph))


def _divide(attention: Node, how: tuple[int, bool]) -> None:
    """Gives it groups, and whether gradients may take the memory of q, k and v."""
    if attention.target is from_kept:
        attention.args = (*attention.args, *how)
        return
    bound = arguments(attention)
    names = ("query", "key", "value", "attn_mask", "is_causal", "scale", "enable_gqa")
    attention.target = attention_by_groups
    attention.args, attention.kwargs = (*(bound[name] for name in names), *how), {}  # type: ignore[assignment]


def key_heads(node: Node, requires_grad: frozenset[str]) -> int:
    """How many heads the keys of an attention that can be divided have; 1 for any other node."""
    if node.target not in (_SDPA, from_kept):
        return 1
    key, mask = argument(node, 1), argument(node, _MASK)
    assert isinstance(key, Node)
    heads = tensors(key)[0].shape[1] if tensors(key)[0].dim() == 4 else 1
    learned = isinstance(mask, Node) and mask.name in requires_grad
    dropout = node.target is _SDPA and arguments(node)["dropout_p"]
    return heads if isinstance(heads, int) and not learned and not dropout else 1


def _divisor(node: Node, groups: int, requires_grad: frozenset[str]) -> int:
    """The most groups, `groups` at most, of equally many heads."""
    heads = key_heads(node, requires_grad) if groups > 1 else 1
    return max(count for count in range(1, min(groups, heads) + 1) if heads % count == 0)


class _Memory:
    """Who reads whose memory in a graph."""

    def __init__(self, nodes: list[Node]) -> None:
        self._aliases: dict[Node, set[Node]] = {}
        for node in nodes:
            if node.op != "output":
                self._aliases.setdefault(_owner(node), set()).add(node)

    def is_free_after(self, attention: Node) -> bool:
        """Whether q, k and v each have memory that nobody but the attention reads."""
        owners = {_owner(argument(attention, index)) for index in range(3)}
        return len(owners) == 3 and all(self._is_only_read_by(owner, attention) for owner in owners)

    def _is_only_read_by(self, owner: Node, attention: Node) -> bool:
        if not _is_tiled(owner) and operator_name(owner) not in _KEEP_NO_RESULT:
            return False
        same = self._aliases[owner]
        readers = {user for node in same for user in node.users if is_tensor(user) or user.op == "output"}
        return readers <= {*same, attention} and not any(mutated_arguments(user) for user in readers)


def _owner(node: Node) -> Node:
    """The node that made the memory that this one's value lies in."""
    while not _is_tiled(node) and (sources := aliased_arguments(node)):
        node = sources[0]
    return node


def _is_tiled(node: Node) -> bool:
    """Whether it is one of the results of a tiled region, which have memory of their own each."""
    source = node.args[0] if node.target is operator.getitem else None
    return isinstance(source, Node) and source.op == "call_module"
