"""What GPUs run: the graph of each stage, and the instructions of each GPU."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from rpcompile.ir.graph import Capture
    from rpcompile.ir.partition import Stage
    from rpcompile.ir.schedule import Schedule


@dataclass(frozen=True)
class StageGraph:
    """The part of the captured graph that one stage runs.

    Attributes:
        stage: The stage.
        graph_module: Placeholders, in order: `parameters`, `buffers`, `inputs`, `values`, `sizes`.
            It returns the values named in `outputs` as a tuple.
        parameters: Qualified names of the parameters.
        trainable: The members of `parameters` that get a gradient from this stage.
        buffers: Qualified names of buffers and constants.
        mutated: The members of `buffers` that the graph changes in place.
        inputs: Names of user inputs.
        values: Boundary values that come in.
        gradients_out: The members of `values` whose gradient the stage passes back.
        sizes: Where each symbol's size is found: (input name, dimension).
        outputs: Names of the nodes returned.
        emits: Segment -> names of the values that cross the cut behind it.
        gradients_in: The members of the last cut's values whose gradient comes in.
        keeps: Segment -> names of its attention outputs and log-sum-exps that leave with `outputs` of a
            forward stage, and come in with `values` of a backward stage.
        autocast: Dtype of the autocast that the graph runs under, or None.
    """

    stage: Stage
    graph_module: torch.fx.GraphModule
    parameters: tuple[str, ...]
    trainable: frozenset[str]
    buffers: tuple[str, ...]
    mutated: frozenset[str]
    inputs: tuple[str, ...]
    values: tuple[str, ...]
    gradients_out: tuple[str, ...]
    sizes: tuple[str, ...]
    outputs: tuple[str, ...]
    emits: Mapping[int, tuple[str, ...]]
    gradients_in: tuple[str, ...]
    autocast: torch.dtype | None = None
    keeps: Mapping[int, tuple[str, ...]] = field(default_factory=dict[int, "tuple[str, ...]"])


@dataclass(frozen=True)
class Program:
    """One torch.fx graph per GPU, whose nodes are the schedule's instructions.

    Attributes:
        graphs: One GraphModule a GPU; it takes the GPU's worker as `gpu` and calls it once per
            instruction, record and wait.
        stages: What FORWARD, RECOMPUTE, BACKWARD and FUSED of each stage run, by stage index.
        weights: Segment -> qualified names of the parameters and buffers to upload for it.
        states: Segment -> the buffers among them that its forward changes.
        capture: The graph the stages were cut from.
        schedule: The schedule the instructions are from.
        host: The host's instructions (SUMs), of the same form; None if there are none.
    """

    graphs: tuple[torch.fx.GraphModule, ...]
    stages: tuple[StageGraph, ...]
    weights: tuple[tuple[str, ...], ...]
    states: tuple[tuple[str, ...], ...]
    capture: Capture
    schedule: Schedule
    host: torch.fx.GraphModule | None = None

    def __str__(self) -> str:
        """Readable Python, one function per GPU, and one for the host where it has instructions."""
        named = [(f"gpu{index}", "gpu", graph) for index, graph in enumerate(self.graphs)]
        named += [] if self.host is None else [("host", "host", self.host)]
        parts: list[str] = []
        for name, worker, graph in named:
            code = graph.code.strip().replace(f"def forward(self, {worker}):", f"def {name}({worker}):", 1)
            code = re.sub(rf"^( +)\w+ = ({worker}\..*?);  .*$", r"\1\2", code, flags=re.MULTILINE)
            parts.append(code.replace("    return None", "").rstrip())
        return "\n\n\n".join(parts) + "\n"
