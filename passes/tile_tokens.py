"""StageGraph -> StageGraph: token-wise regions become single calls that run in chunks of tokens.

Before -> after, one layer at four chunks (q, k, v and the block's output are all that is ever whole)::

    norm linear linear linear rotate attention linear add norm linear silu mul linear add
    tiled_0(4 chunks)                attention tiled_1(4 chunks)

`rpcompile/token_rules.py` proves which operators are token-wise; `rpcompile/runtime/tiling.py` runs regions.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from torch.fx import Graph, GraphModule, Node

from rpcompile.ir import StageKind
from rpcompile.passes._token_regions import TokenRegion, find_regions
from rpcompile.sizes import arguments
from rpcompile.tiling import TiledRegion, count_valid

if TYPE_CHECKING:
    from collections.abc import Callable

    from rpcompile.ir import SegmentChain, StageGraph

_MEAN, _SUM = 1, 2  # of a loss, by torch's numbers for its reductions


@dataclass(frozen=True)
class TileTokens:
    """Divides the tokens of a stage's regions as its segments say (`Segment.tiles`).

    Attributes:
        chain: The segments.
        torch_names: Symbol name -> torch's name for it in the graph's metadata, e.g. {"sequence": "s70"}.
    """

    chain: SegmentChain
    torch_names: Mapping[str, str]

    name: ClassVar[str] = "tile-tokens"

    def run(self, stage: StageGraph) -> StageGraph:
        """Rewrite the graph; a stage with nothing to tile comes back as it was."""
        segments, kind = stage.stage.segments, stage.stage.kind
        if all(self._tiles(segment) == 1 for segment in segments):
            return stage
        segment_of = {name: index for index in segments for name in self.chain.segments[index].nodes}
        regions = [
            region
            for region in find_regions(stage.graph_module.graph, self.torch_names, segment_of)
            if self._tiles(region.segment) > 1 and (region.loss is None or _ends_in_loss(region, kind))
        ]
        if not regions:
            return stage
        rewriter = _Rewriter(stage.graph_module, kind, regions, self._tiles)
        return replace(stage, graph_module=rewriter.run())

    def _tiles(self, segment: int) -> int:
        return self.chain.segments[segment].tiles


class _Rewriter:
    """Copies a stage's graph with one call in place of each region."""

    def __init__(
        self,
        module: GraphModule,
        kind: StageKind,
        regions: list[TokenRegion],
        tiles: Callable[[int], int],
    ) -> None:
        self._module, self._kind, self._tiles = module, kind, tiles
        self._root = GraphModule(module, Graph())
        self._regions = {region.last: region for region in regions}
        self._inside = {node for region in regions for node in (*region.members, region.last)}
        self._graph = Graph()
        self._copies: dict[Node, Node] = {}

    def run(self) -> GraphModule:
        for node in self._module.graph.nodes:
            if node in self._regions:
                self._call(self._regions[node])
            elif node not in self._inside:
                self._copy(node)
        return GraphModule(self._root, self._graph)

    def _copy(self, node: Node) -> Node:
        """The node's copy outside of the regions; views that a region keeps to itself are made again."""
        if node not in self._copies:
            for arg in node.all_input_nodes:
                self._copy(arg)
            self._copies[node] = self._graph.node_copy(node, lambda arg: self._copies[arg])
        return self._copies[node]

    def _call(self, region: TokenRegion) -> None:
        name = f"tiled_{len(self._root._modules)}"
        self._root.add_module(name, self._tiled(region))
        valid = [] if region.loss is None else self._valid_tokens(region.loss)
        call = self._graph.call_module(name, (*map(self._copy, region.inputs), *valid))
        outputs = [region.loss] if region.loss else list(region.outputs)
        for index, node in enumerate(outputs):
            item = self._graph.create_node("call_function", operator.getitem, (call, index), name=node.name)
            item.meta = dict(node.meta)
            self._copies[node] = item

    def _tiled(self, region: TokenRegion) -> TiledRegion:
        graph, takes_sequence = Graph(), False
        copies: dict[Node, Node] = {node: graph.placeholder(node.name) for node in region.inputs}
        dims = list(region.inputs.values())
        valid = None
        if region.loss is not None and _is_mean(region.loss):
            valid, dims = graph.placeholder("valid_tokens"), [*dims, None]
        sequence = graph.placeholder("tokens")
        for node in sorted({*region.copies, *region.members}):
            for arg in node.all_input_nodes:
                if arg not in copies:  # the number of tokens, which nothing else can be
                    copies[arg], takes_sequence = sequence, True
            copies[node] = graph.node_copy(node, lambda arg: copies[arg])
            if node.target is torch.ops.aten.view.default:
                copies[node].target = torch.ops.aten.reshape.default  # chunks are not contiguous
        if region.loss is not None:
            graph.output((_partial_loss(graph, region.loss, copies, valid),))
        else:
            graph.output(tuple(copies[node] for node in region.outputs))
        if not takes_sequence:
            graph.erase_node(sequence)
        return TiledRegion(
            GraphModule(self._module, graph),
            dims,
            [None] if region.loss else list(region.outputs.values()),
            self._tiles(region.segment),
            takes_sequence=takes_sequence,
            needs_output=self._kind is not StageKind.B or not _only_returned(region),
        )

    def _valid_tokens(self, loss: Node) -> list[Node]:
        """How many tokens a mean is over."""
        if not _is_mean(loss):
            return []
        bound = arguments(loss)
        target, ignored = self._copy(cast("Node", bound["target"])), cast("int", bound["ignore_index"])
        return [self._graph.call_function(count_valid, (target, ignored))]


def _partial_loss(graph: Graph, loss: Node, copies: dict[Node, Node], valid: Node | None) -> Node:
    """One chunk's share of the loss: its sum, over the number of all valid tokens if the loss is a mean."""
    bound = {**arguments(loss), "reduction": _SUM}
    given = [copies[value] if isinstance(value, Node) else value for value in bound.values()]
    total = graph.call_function(loss.target, tuple(given))  # pyright: ignore[reportArgumentType]
    return total if valid is None else graph.call_function(torch.ops.aten.div.Tensor, (total, valid))


def _is_mean(loss: Node) -> bool:
    return arguments(loss)["reduction"] == _MEAN


def _ends_in_loss(region: TokenRegion, kind: StageKind) -> bool:
    """Whether nothing but the loss leaves it: logits that somebody asked for are made whole."""
    return kind is StageKind.FB and not region.outputs


def _only_returned(region: TokenRegion) -> bool:
    inside = {*region.members}
    users = {user for node in region.members for user in node.users} - inside
    return all(user.op == "output" for user in users)
