"""Finds the token-wise regions of a graph: runs of operators between two barriers.

A region takes tensors whose tokens can be sliced, or that have none, and returns tensors whose tokens can
be put side by side. Views that merge tokens with something else at its edges are made on both sides.
"""

from __future__ import annotations

import operator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch.fx import Node

from rpcompile.graphs import AliasSets, mutated_arguments
from rpcompile.sizes import arguments, is_view, operator_name, tensors
from rpcompile.token_axis import Axes, Barrier, Role, TokenAxis
from rpcompile.token_rules import TokenRules

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.fx import Graph

# Without a product in it a region is not worth a loop.
_PRODUCTS = frozenset(f"aten.{name}" for name in ("linear", "matmul", "mm", "bmm", "addmm", "_grouped_mm"))
_LOSS = "aten.cross_entropy_loss"
_MEAN, _SUM = 1, 2
_GETITEM = operator.getitem
TOKEN_SYMBOLS = ("sequence", "target_sequence")
"""The sizes that count tokens: those of a text, and those that a decoder makes of another's."""


@dataclass
class TokenRegion:
    """Nodes that run together in chunks.

    Attributes:
        members: In graph order.
        segment: The segment that they are of.
        symbol: The size that counts the tokens.
        loss: The cross entropy at its end, if it has one; not among `members`.
        copies: Views and sizes from elsewhere that the region makes for itself, in graph order.
        inputs: What it is given: node -> dimension of its tokens, None where it has none.
        outputs: Members that others read -> dimension of their tokens.
    """

    members: list[Node]
    segment: int
    symbol: str
    loss: Node | None = None
    copies: list[Node] = field(default_factory=list[Node])
    inputs: dict[Node, int | None] = field(default_factory=dict["Node", "int | None"])
    outputs: dict[Node, int] = field(default_factory=dict["Node", int])

    @property
    def last(self) -> Node:
        return self.members[-1] if self.loss is None else self.loss


def find_regions(
    graph: Graph, torch_names: Mapping[str, str], segment_of: Mapping[str, int]
) -> list[TokenRegion]:
    """The regions that can be tiled, in the order in which they end. Each lies in one segment.

    Args:
        graph: Of one stage.
        torch_names: Symbol name -> torch's name for it in the graph's metadata; there are no regions
            without one of `TOKEN_SYMBOLS`.
        segment_of: Segment of each node, by name; nodes without one may be in any region.
    """
    nodes = list(graph.nodes)
    changed = _changed_memory(nodes)
    found: list[TokenRegion] = []
    for symbol in TOKEN_SYMBOLS:
        if symbol in torch_names:
            taken = {node for region in found for node in (*region.members, region.last)}
            found += _regions_along(
                symbol, nodes, TokenRules(torch_names, symbol), segment_of, changed, taken
            )
    return sorted(found, key=lambda region: region.last)


def _regions_along(
    symbol: str,
    nodes: list[Node],
    rules: TokenRules,
    segment_of: Mapping[str, int],
    changed: list[set[Node]],
    barriers: set[Node],
) -> list[TokenRegion]:
    """Those whose tokens one symbol counts, without `barriers`, to which it adds."""
    while True:
        scan = _Scan(symbol, rules, barriers)
        regions = [region for region in scan.regions(nodes, segment_of) if _is_worth_it(region)]
        refused = {node for region in regions for node in scan.close(region, changed)}
        if not refused:
            return regions
        barriers |= refused


def is_pulled_in(node: Node) -> bool:
    """Whether a node is cheap enough to be made on both sides of a region's edge.

    Counting up to a number of tokens starts anew in each chunk. Only sorting rows may rely on that, which
    is the only one that may read such a node: any other has its tokens sliced.
    """
    if node.op != "call_function":
        return False
    return is_view(node) or not tensors(node) or operator_name(node) == "aten.arange"


def _changed_memory(nodes: list[Node]) -> list[set[Node]]:
    """For each piece of memory that something changes in place: all that make, change or read it."""
    aliases = AliasSets(nodes)
    users: dict[Node, set[Node]] = {
        aliases.root(arg): set() for node in nodes for arg in mutated_arguments(node)
    }
    for node in nodes:
        for root in map(aliases.root, (node, *node.all_input_nodes)):
            if root in users:
                users[root].add(node)
    return list(users.values())


def _is_worth_it(region: TokenRegion) -> bool:
    return any(operator_name(node) in _PRODUCTS for node in region.members)


class _Scan:
    """One walk over a graph; `barriers` are taken for barriers whatever the rules say."""

    def __init__(self, symbol: str, rules: TokenRules, barriers: set[Node]) -> None:
        self._symbol, self._rules, self._barriers = symbol, rules, barriers
        self._known: dict[Node, Axes] = {}
        self._tokenwise: set[Node] = set()

    def regions(self, nodes: list[Node], segment_of: Mapping[str, int]) -> list[TokenRegion]:
        found: list[TokenRegion] = []
        current: list[Node] = []
        members: set[Node] = set()
        segment: int | None = None

        def end(loss: Node | None = None) -> None:
            if current and segment is not None:
                found.append(TokenRegion(list(current), segment, self._symbol, loss))
            current.clear()
            members.clear()

        for node in nodes:
            if node.op == "output" or not tensors(node):
                continue
            here = segment_of.get(node.name, segment)
            if here != segment and segment is not None:
                end()
            segment = here
            if self._is_tokenwise(node):
                # An item of a barrier's results is not worth a region of its own.
                if node.target is not _GETITEM or node.args[0] in members:
                    current.append(node)
                    members.add(node)
                continue
            if members.isdisjoint(node.all_input_nodes):
                continue
            end(node if self._is_loss(node) else None)
        end()
        return found

    def _is_tokenwise(self, node: Node) -> bool:
        """Also remembers where the node's tokens are."""
        try:
            if node.op != "call_function" or node in self._barriers or not self._has_tokens(node):
                raise Barrier
            self._known[node] = self._rules.result(node, self._known)
        except Barrier:
            with suppress(Barrier):  # if its place is unknown, whoever reads it is a barrier too
                self._known[node] = self._rules.source(node)
            return False
        self._tokenwise.add(node)
        return True

    def _has_tokens(self, node: Node) -> bool:
        return any(axis is not None for arg in node.all_input_nodes for axis in self._known.get(arg, ()))

    def _is_loss(self, node: Node) -> bool:
        if operator_name(node) != _LOSS or node in self._barriers:
            return False
        bound = arguments(node)
        logits, target = bound["self"], bound["target"]
        if not isinstance(logits, Node) or not isinstance(target, Node) or bound["weight"] is not None:
            return False
        axes = self._known.get(logits), self._known.get(target)
        # Classes lie in dimension 1 of (tokens, classes).
        return (
            bound["reduction"] in (_MEAN, _SUM)
            and axes[0] is not None
            and axes[0] == axes[1]
            and isinstance(axes[0][0], TokenAxis)
            and axes[0][0].dim == 0
            and tensors(logits)[0].dim() == 2
            and tensors(target)[0].dim() == 1
        )

    # ------------------------------------------------------------------ edges

    def close(self, region: TokenRegion, changed: list[set[Node]]) -> set[Node]:
        """Fills in what goes in and out; returns the members for which that cannot be done.

        Memory that is changed in place has to stay inside.
        """
        ordered = [*region.members, *([region.loss] if region.loss else [])]
        inside = set(ordered)
        copies: set[Node] = set()
        refused: set[Node] = set()
        for node in ordered:
            for arg in node.all_input_nodes:
                if arg not in inside and not self._bring_in(arg, region, inside, copies):
                    refused.add(node)
        region.copies = sorted(copies)
        for users in changed:
            if not users <= inside:
                refused |= users & inside
        for node in region.members:
            if any(user not in inside for user in node.users) and not self._bring_out(node, region, inside):
                refused.add(node)
        return refused

    def _bring_in(self, node: Node, region: TokenRegion, inside: set[Node], copies: set[Node]) -> bool:
        """Makes an outer value available inside, as an input or as a copy of a view of one."""
        if node in inside or node in copies:
            return True
        if not tensors(node):
            if not self._rules.counts_tokens(node):
                region.inputs[node] = None
                return True
            if node.op == "placeholder":
                return True  # the number of tokens itself
        elif node in self._known:
            axes = self._known[node]
            if len(axes) != 1 or isinstance(axes[0], Role):
                return False
            if axes[0] is None or axes[0].whole:
                region.inputs[node] = None if axes[0] is None else axes[0].dim
                return True
            if node not in self._tokenwise:
                return False
        if not is_pulled_in(node):
            return False
        if not all(self._bring_in(arg, region, inside, copies) for arg in node.all_input_nodes):
            return False
        copies.add(node)
        return True

    def _bring_out(self, node: Node, region: TokenRegion, inside: set[Node]) -> bool:
        """Makes a member available outside, as an output or as a view of one."""
        axes = self._known[node]
        if len(axes) == 1 and isinstance(axes[0], TokenAxis) and axes[0].whole:
            region.outputs[node] = axes[0].dim
            return True
        members = [arg for arg in node.all_input_nodes if arg in inside]
        return is_pulled_in(node) and all(self._bring_out(arg, region, inside) for arg in members)
