"""The nouns of rpcompile: every type that passes hand to one another.

Data flows one way (see `rpcompile/api.py` for the line as code)::

    nn.Module -> Capture -> CostedGraph -> SegmentChain -> Partition -> Dispatch -> Schedule -> Program

All types are frozen. Units are suffixes: `_bytes`, `_s` (seconds), `_flops`, `_bytes_per_s`.
The text form of one action, e.g. `2F0`, is described at `ActionId`.
"""

from __future__ import annotations

from rpcompile.ir.chain import (
    AttentionOutputs,
    ClassCost,
    GpuKind,
    Hardware,
    Segment,
    SegmentChain,
    TiedWeight,
)
from rpcompile.ir.graph import (
    Capture,
    CostedGraph,
    Cut,
    InputSpec,
    NodeCost,
    TensorSpec,
)
from rpcompile.ir.partition import (
    Partition,
    Stage,
    StageKind,
)
from rpcompile.ir.program import (
    Program,
    StageGraph,
)
from rpcompile.ir.schedule import (
    COMPUTE_OPS,
    DOWN_STREAMS,
    UP_STREAMS,
    Action,
    ActionId,
    Dispatch,
    Job,
    Op,
    Queue,
    Schedule,
    Stream,
)

__all__ = [
    "COMPUTE_OPS",
    "DOWN_STREAMS",
    "UP_STREAMS",
    "Action",
    "ActionId",
    "AttentionOutputs",
    "Capture",
    "ClassCost",
    "CostedGraph",
    "Cut",
    "Dispatch",
    "GpuKind",
    "Hardware",
    "InputSpec",
    "Job",
    "NodeCost",
    "Op",
    "Partition",
    "Program",
    "Queue",
    "Schedule",
    "Segment",
    "SegmentChain",
    "Stage",
    "StageGraph",
    "StageKind",
    "Stream",
    "TensorSpec",
    "TiedWeight",
]
