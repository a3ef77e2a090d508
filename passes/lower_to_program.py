"""Schedule -> Program: one torch.fx graph a GPU and one for the host, a node an instruction, record, wait."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from rpcompile.ir import Action, Capture, Op, Partition, Program, Schedule, SegmentChain, Stream
from rpcompile.ordering import ActionGraph
from rpcompile.passes.extract_stages import ExtractStages
from rpcompile.simulate import simulate

METHODS = {
    Op.PREFETCH: "prefetch",
    Op.LOAD: "load",
    Op.RECEIVE: "receive",
    Op.FORWARD: "forward",
    Op.RECOMPUTE: "recompute",
    Op.BACKWARD: "backward",
    Op.FUSED: "fused",
    Op.HANDOFF: "handoff",
    Op.OFFLOAD: "offload",
    Op.GRADIENT: "gradient",
    Op.SUM: "sum",
    Op.FREE: "free",
}


@dataclass(frozen=True)
class LowerToProgram:
    """Writes each GPU's part of a schedule as a graph that calls its worker, `gpu`; the host's calls `host`.

    The instructions of a GPU's streams are interleaved in the order in which they are predicted to
    start; only the order within a stream and the events bind. Of UPDATEs only the waits are left: the
    caller's optimizer does them, and no other queue of the same iteration waits for one.

    Before -> after::

        2F0 waits e7 records e9    ->  gpu.wait("compute", "e7")
                                       gpu.forward("2F0", stage=2, microbatch=0, reads=..., writes=...)
                                       gpu.record("compute", "e9")

    Options:
        outputs: Training gives all outputs that the fused stage makes, not the loss alone.
    """

    capture: Capture
    chain: SegmentChain
    partition: Partition
    outputs: bool = False
    name = "lower-to-program"

    def run(self, schedule: Schedule) -> Program:
        """Returns the program; the schedule must have its events (`insert-event-waits`)."""
        extract = ExtractStages(self.capture, self.chain, self.outputs)
        weights, states = extract.segment_tensors()
        timeline = simulate(schedule)
        merged: list[list[Action]] = [[] for _ in range(schedule.gpus)]
        # Where starts are equal, causes come first: a worker that enqueues must meet them in that order.
        graph = ActionGraph.from_events(schedule)
        ordered = [graph.actions[number] for number in graph.execution_order().tolist()]
        ordered.sort(key=lambda action: timeline.start_s[action.id])
        host = [action for action in ordered if action.stream is Stream.HOST]
        for action in ordered:
            if action.stream is not Stream.HOST:
                merged[action.gpu].append(action)
        return Program(
            graphs=tuple(_lower(actions, "gpu") for actions in merged),
            stages=extract.run(self.partition),
            weights=weights,
            states=states,
            capture=self.capture,
            schedule=schedule,
            host=_lower(host, "host") if any(action.op is Op.SUM for action in host) else None,
        )


def _lower(actions: list[Action], name: str) -> GraphModule:
    graph = Graph()
    worker = graph.placeholder(name)
    for action in actions:
        for event in action.waits:
            graph.call_method("wait", (worker, action.stream.value, event))
        if action.op is Op.UPDATE:
            continue  # what it waits for, what comes behind it need not wait for once more
        graph.call_method(METHODS[action.op], (worker, action.id), _arguments(action))
        for event in action.records:
            graph.call_method("record", (worker, action.stream.value, event))
    graph.output(None)
    return GraphModule(torch.nn.Module(), graph)


def _arguments(action: Action) -> dict[str, Any]:
    if action.op is Op.FREE:
        return {"stream": action.stream.value, "buffers": action.frees}
    arguments: dict[str, Any] = {"stage": action.stage}
    if action.microbatch is not None:
        arguments["microbatch"] = action.microbatch
    return {**arguments, "reads": action.reads, "writes": action.writes}


def instructions(graph: GraphModule) -> list[Node]:
    """The instruction nodes of one GPU's graph, in order."""
    return [node for node in graph.graph.nodes if node.op == "call_method"]
