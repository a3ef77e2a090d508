"""How long a piece of work takes on a GPU: roofline with achieved shares of the peaks.

A node takes max(FLOPs / throughput reached, bytes / bandwidth reached); a segment takes the sum over
its nodes, but no less than its matrix products take at the rate that they reach without pauses. (LM
heads are published to run slower than layers at every width; a power limit would explain it.) Shares are
in `Hardware.efficiency`; one that is missing counts as 1.

Ignored: launch times (a microbatch worth dispatching keeps the queue full), caches, fusion, the sizes
and layouts of matrices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rpcompile.ir import Hardware

SHARES = ("matmul", "matmul_backward", "matmul_sustained", "attention", "memory")
"""The keys of `Hardware.efficiency`: see there."""


class Work(NamedTuple):
    """One direction of one node.

    Attributes:
        op_class: See `NodeCost.op_class`.
        flops: Floating point operations.
        nbytes: Bytes read and written.
        backward: Whether it is the backward of the node.
    """

    op_class: str
    flops: float
    nbytes: float
    backward: bool = False


def node_seconds(work: Work, hardware: Hardware) -> float:
    """Time of one node in a mix of kernels, where the power limit does not bind."""
    share = "matmul_backward" if work.backward else "matmul"  # convolutions run as matrix products
    if work.op_class == "attention":
        share = "attention"
    compute_s = work.flops / (hardware.flops_per_s * hardware.efficiency.get(share, 1.0))
    memory_s = work.nbytes / (hardware.memory_bytes_per_s * hardware.efficiency.get("memory", 1.0))
    return max(compute_s, memory_s)


def seconds(works: Iterable[Work], hardware: Hardware) -> float:
    """Time of nodes that run one after another."""
    works = tuple(works)
    products = sum(work.flops for work in works if work.op_class != "attention")
    sustained = hardware.flops_per_s * hardware.efficiency.get("matmul_sustained", 1.0)
    return max(sum(node_seconds(work, hardware) for work in works), products / sustained)
