"""How many seconds more a segment takes when its tokens run in chunks."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import sympy

from rpcompile.roofline import Work, node_seconds
from rpcompile.sizes import symbol

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from rpcompile.ir import CostedGraph, NodeCost, SegmentChain
    from rpcompile.passes._token_regions import TokenRegion

_FP32 = 4


class TileCost(NamedTuple):
    """What chunks cost a segment more.

    Attributes:
        forward_s: Seconds of its forward.
        backward_s: Seconds of its backward.
        reruns: As `ir.Segment.reruns`.
    """

    forward_s: float
    backward_s: float
    reruns: bool


NOTHING = TileCost(0.0, 0.0, reruns=False)
"""What one chunk costs more."""


class TileCosts:
    """Prices chunks by the roofline that prices segments (`rpcompile/roofline.py`).

    Args:
        costed: The graph, with its costs.
        chain: Its segments, untiled.
    """

    def __init__(self, costed: CostedGraph, chain: SegmentChain) -> None:
        self._costs, self._chain = costed.costs, chain
        self._weights = {spec.placeholder: spec for spec in costed.capture.parameters if spec.trainable}
        self._known: dict[tuple[sympy.Expr, int], float] = {}

    def of(self, index: int, regions: list[TokenRegion], tiles: int) -> TileCost:
        """What one segment takes more at so many chunks.

        Each operator of a region at the tokens of a chunk, so many times, less what it takes at once:
        a chunk that is too short to hide the reading of weights takes longer. A weight's gradient is
        added, in float32, to those of the chunks before. Where anything with products is left outside of
        the regions (attention), the backward runs them once more.
        """
        if tiles == 1:
            return NOTHING
        forward = backward = again = 0.0
        for region in regions:
            names = [node.name for node in (*region.members, *([region.loss] if region.loss else []))]
            chunks = self._seconds(names, region.symbol, tiles)
            whole = self._seconds(names, region.symbol, 1)
            forward += chunks[0] - whole[0]
            backward += chunks[1] - whole[1] + tiles * self._sum_s(region)
            again += chunks[0]
        if self._has_more(index, regions):
            return TileCost(forward, backward + again, reruns=False)
        return TileCost(forward, backward, reruns=True)

    def _seconds(self, names: Iterable[str], counted: str, tiles: int) -> tuple[float, float]:
        bindings = {**self._chain.bindings, counted: max(1, self._chain.bindings[counted] // tiles)}
        values = {symbol(name): sympy.Integer(size) for name, size in bindings.items()}
        works = [self._works(self._costs[name], values, bindings[counted]) for name in names]
        hardware = self._chain.hardware
        forward, backward = (sum(node_seconds(pair[side], hardware) for pair in works) for side in (0, 1))
        return tiles * forward, tiles * backward

    def _works(
        self, cost: NodeCost, values: Mapping[sympy.Symbol, sympy.Integer], key: int
    ) -> tuple[Work, Work]:
        def number(expression: sympy.Expr) -> float:
            if (expression, key) not in self._known:
                self._known[expression, key] = float(sympy.Float(expression.xreplace(values)))
            return self._known[expression, key]

        nbytes = number(cost.read_bytes) + number(cost.write_bytes)
        back = number(cost.backward_read_bytes) + number(cost.backward_write_bytes)
        return (
            Work(cost.op_class, number(cost.forward_flops), nbytes),
            Work(cost.op_class, number(cost.backward_flops), back, backward=True),
        )

    def _sum_s(self, region: TokenRegion) -> float:
        """Adding one chunk's weight gradients: one is read, the sum is read and written."""
        nbytes = 0.0
        for node in region.inputs:
            if (spec := self._weights.get(node.name)) is not None:
                numbers = spec.nbytes // node.meta["val"].element_size()
                nbytes += spec.nbytes + 2 * _FP32 * numbers
        hardware = self._chain.hardware
        return nbytes / (hardware.memory_bytes_per_s * hardware.efficiency.get("memory", 1.0))

    def _has_more(self, index: int, regions: list[TokenRegion]) -> bool:
        inside = {node.name for region in regions for node in (*region.members, region.last)}
        outside = set(self._chain.segments[index].nodes) - inside
        return any(self._costs[name].op_class in ("matmul", "attention") for name in outside)
