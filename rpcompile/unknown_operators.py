"""How much of a model's price rests on operators that no FLOP formula is known for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import sympy

from rpcompile.roofline import Work, node_seconds
from rpcompile.sizes import symbol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rpcompile.ir import CostedGraph, Hardware

WORTH_A_WARNING = 0.01
"""Share of the estimated time above which a plan should not be believed without a look."""


@dataclass(frozen=True)
class UnknownShare:
    """One operator that is priced by its bytes only.

    Attributes:
        operator: Its name, e.g. "aten.cdist.default".
        calls: Number of its nodes.
        byte_share: Its share of the bytes that all nodes move, forward and backward.
        time_share: Its share of the estimated time of all nodes, forward and backward: a lower
            bound, since its FLOPs are counted as none.
    """

    operator: str
    calls: int
    byte_share: float
    time_share: float

    def __str__(self) -> str:
        return (
            f"{self.operator} ({self.calls} calls, {self.byte_share:.1%} of the bytes, "
            f"{self.time_share:.1%} of the time)"
        )


def unknown_shares(
    costed: CostedGraph, bindings: Mapping[str, int], hardware: Hardware
) -> tuple[UnknownShare, ...]:
    """The operators of `costed.unknown`, the largest share of the time first.

    Args:
        costed: The priced graph.
        bindings: Symbol name -> size of one microbatch.
        hardware: The GPU that the time is estimated for.
    """
    if not costed.unknown:
        return ()
    sizes = {symbol(name): sympy.Integer(size) for name, size in bindings.items()}

    def number(expression: sympy.Expr) -> float:
        return float(sympy.Float(expression.xreplace(sizes)))

    targets = {node.name: str(node.target) for node in costed.capture.graph_module.graph.nodes}
    total_bytes = total_s = 0.0
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in costed.unknown}
    for name, cost in costed.costs.items():
        forward = number(cost.read_bytes) + number(cost.write_bytes)
        backward = number(cost.backward_read_bytes) + number(cost.backward_write_bytes)
        seconds = node_seconds(Work(cost.op_class, number(cost.forward_flops), forward), hardware)
        flops = number(cost.backward_flops)
        seconds += node_seconds(Work(cost.op_class, flops, backward, backward=True), hardware)
        total_bytes, total_s = total_bytes + forward + backward, total_s + seconds
        if cost.source == "bytes only":
            found[targets[name]].append((forward + backward, seconds))
    shares = [
        UnknownShare(
            name,
            len(calls),
            sum(nbytes for nbytes, _ in calls) / total_bytes if total_bytes else 0.0,
            sum(seconds for _, seconds in calls) / total_s if total_s else 0.0,
        )
        for name, calls in found.items()
    ]
    return tuple(sorted(shares, key=lambda share: -share.time_share))
