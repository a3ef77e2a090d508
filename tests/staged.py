"""Runs a model stage by stage without a schedule: the shortest way through the capture passes."""

from __future__ import annotations

import copy
import random
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rpcompile.ir import Capture, Hardware, Partition, Segment, SegmentChain, Stage, StageKind
from rpcompile.passes.canonicalize_graph import CanonicalizeGraph
from rpcompile.passes.capture_graph import CaptureGraph, ExampleInputs
from rpcompile.passes.extract_stages import ExtractStages
from rpcompile.passes.find_cuts import FindCuts
from rpcompile.random_streams import stream_seed
from rpcompile.runtime import batches
from rpcompile.runtime.stage_runner import Microbatch, StageRunner
from tests import models, reference

if TYPE_CHECKING:
    from collections.abc import Callable

    from rpcompile.ir import StageGraph
    from tests.models import Case


def capture(
    model: torch.nn.Module,
    batch: dict[str, torch.Tensor],
    microbatches: int = 4,
    find_cuts: FindCuts | None = None,
) -> Capture:
    example = {name: models.part(name, value, microbatches, 0) for name, value in batch.items()}
    raw = CaptureGraph(ExampleInputs.of(example)).run(model)
    return (find_cuts or FindCuts()).run(CanonicalizeGraph().run(raw))


def free_chain(captured: Capture) -> SegmentChain:
    """The captured segments with no prices."""
    bounds = [0, *(cut.position for cut in captured.cuts), len(captured.order)]
    names = [*(cut.name for cut in captured.cuts), captured.last_name]
    trainable = {spec.placeholder for spec in captured.parameters if spec.trainable}
    nodes = {node.name: node for node in captured.graph_module.graph.nodes}
    segments: list[Segment] = []
    flows = False
    for index, name in enumerate(names):
        mine = captured.order[bounds[index] : bounds[index + 1]]
        read = {arg.name for node in mine for arg in nodes[node].all_input_nodes}
        flows = flows or bool(read & trainable)
        cut = captured.cuts[index] if index < len(captured.cuts) else None
        segments.append(
            Segment(
                name=name,
                nodes=mine,
                parameters=tuple(s.name for s in captured.parameters if s.placeholder in read),
                inputs=(),
                boundary=cut.values if cut else (),
                boundary_gradients=cut.gradients if cut else (),
                forward_s=0.0,
                backward_s=0.0,
                forward_flops=0.0,
                backward_flops=0.0,
                weight_bytes=1,
                gradient_bytes=1,
                state_bytes=0,
                input_bytes=0,
                boundary_bytes=0,
                boundary_gradient_bytes=0,
                saved_bytes=0,
                peak_bytes=0,
                needs_backward=flows,
                source="estimated",
            )
        )
    hardware = Hardware("none", 0, 0, 1.0, 1.0, 1.0, 1.0, 0.0, {})
    return SegmentChain(tuple(segments), dict(captured.example_sizes), hardware)


def partition(
    first_backward: int, segments: int, tail: int, forward: set[int], backward: set[int]
) -> Partition:
    """Stages cut behind the given segments, forward and backward, with the fused tail from `tail` on."""
    stages: list[Stage] = []

    def add(kind: StageKind, first: int, last: int) -> None:
        stages.append(Stage(len(stages), kind, first, last))

    def runs(low: int, cuts: set[int]) -> list[tuple[int, int]]:
        ends = [index for index in range(low, tail) if index in cuts or index == tail - 1]
        return list(zip([low, *(end + 1 for end in ends[:-1])], ends, strict=False))

    for first, last in runs(0, forward) if tail else []:
        add(StageKind.F, first, last)
    add(StageKind.FB, tail, segments - 1)
    for first, last in reversed(runs(first_backward, backward)) if first_backward < tail else []:
        add(StageKind.B, first, last)
    return Partition(tuple(stages), 0, 0.0, 0.0, "GIVEN", 0.0, "by hand")


@dataclass
class Handoffs:
    """Copies what crosses a cut, as workers do, and notices what loses its place in a larger tensor."""

    repacked: bool = False

    def __call__(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self.repacked |= any(copies[name].stride() != tensor.stride() for name, tensor in tensors.items())
        return copies


def forward_backward(
    model: torch.nn.Module,
    captured: Capture,
    chain: SegmentChain,
    stages: Partition,
    batch: dict[str, torch.Tensor],
    microbatches: int,
    seed: int,
    sent: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None,
    look: Callable[[StageGraph], object] = lambda graph: None,
) -> torch.Tensor:
    """Loss; gradients are left in `.grad`, changed buffers in the model. `look` is shown every stage."""
    sent = sent or Handoffs()
    extract = ExtractStages(captured, chain)
    weights, _ = extract.segment_tensors()
    host = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
        **captured.constants,
    }
    parts = batches.split_batch(captured, batches.named_batch(captured, (), batch), microbatches)
    facts = [
        Microbatch(stream_seed(seed, i), batches.microbatch_sizes(captured, part), 1 / microbatches)
        for i, part in enumerate(parts)
    ]
    saved: list[dict[int, dict[str, torch.Tensor]]] = [{} for _ in parts]
    incoming: list[dict[str, torch.Tensor]] = [{} for _ in parts]
    total = torch.zeros(())
    for graph in extract.run(stages):
        look(graph)
        runner = StageRunner(graph, captured.outputs[0])
        stage = graph.stage
        names = list(dict.fromkeys(name for segment in stage.segments for name in weights[segment]))
        copies = [{name: host[name].detach().clone() for name in names}]
        for index, part in enumerate(parts):
            values = saved[index].get(stage.first - 1, {})
            if stage.kind is StageKind.F:
                outputs = runner.forward(copies, part, values, facts[index])
                for segment, names in graph.emits.items():
                    saved[index][segment] = sent({name: outputs[name] for name in names})
            elif stage.kind is StageKind.FB:
                outputs, gradients = runner.fused(copies, part, values, facts[index])
                incoming[index] = sent(gradients)
                total += outputs[captured.outputs[0]] / microbatches
            else:
                tape = runner.recompute(copies, part, values, facts[index])
                gradients = runner.backward(tape, incoming[index])
                incoming[index] = sent(gradients)
        for gradients in runner.weight_gradients(copies):
            for name, gradient in gradients.items():
                tensor = host[name]
                tensor.grad = gradient if tensor.grad is None else tensor.grad + gradient
        if stage.kind is not StageKind.B:
            for segment in copies:
                for name in graph.mutated & segment.keys():
                    host[name].copy_(segment[name])
    return total


def check_parity(
    case: Case,
    partitions: int,
    context: Callable[[], AbstractContextManager[object]] = nullcontext,
    find_cuts: FindCuts | None = None,
) -> Capture:
    """Asserts that loss, gradients and buffers equal plain PyTorch's for random partitions.

    Args:
        case: A model, which is left without gradients, and its batch.
        partitions: How many partitions are drawn.
        context: What the plain forward and the capture run under, e.g. autocast.
        find_cuts: Where the graph may be divided; as rpcompile does by default.

    Returns:
        The capture.
    """
    plain = copy.deepcopy(case.model)
    torch.manual_seed(11)
    expected = reference.forward_backward(plain, case.batch, 4, random=True, context=context)
    with context():
        captured = capture(case.model, case.batch, find_cuts=find_cuts)
    chain = free_chain(captured)
    shared = _shared(chain, plain)
    choices = random.Random(0)
    count = len(chain.segments)
    for _ in range(partitions):
        tail = choices.randrange(count > 1, count)
        cuts = [set(choices.sample(range(count), choices.randrange(count))) for _ in range(2)]
        stages = partition(chain.first_backward, count, tail, *cuts)
        model = copy.deepcopy(case.model)
        torch.manual_seed(11)
        sent, seed = Handoffs(), reference.draw_seed()
        loss = forward_backward(model, captured, chain, stages, case.batch, 4, seed, sent)
        _check(loss, expected, sent.repacked, "loss")
        _compare(model, plain, shared, sent.repacked)
    return captured


def _shared(chain: SegmentChain, model: torch.nn.Module) -> set[str]:
    """Names of the parameters that several segments read."""
    reads = Counter(name for segment in chain.segments for name in set(segment.parameters))
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {name for group in groups.values() if sum(reads[name] for name in group) > 1 for name in group}


def _compare(model: torch.nn.Module, plain: torch.nn.Module, shared: set[str], repacked: bool) -> None:
    for (name, mine), (_, theirs) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        if theirs.grad is None:
            assert mine.grad is None, name
        else:
            assert mine.grad is not None, name
            # The uses of a shared weight lie in different stages. Plain PyTorch adds their gradients
            # microbatch by microbatch, stages add them once at the end: another order of the same sum.
            _check(mine.grad, theirs.grad, repacked or name in shared, name)
    for (name, mine), (_, theirs) in zip(model.named_buffers(), plain.named_buffers(), strict=True):
        _check(mine, theirs, repacked, name)


def _check(mine: torch.Tensor, theirs: torch.Tensor, rounded: bool, name: str) -> None:
    """`rounded`: the sum is made in another order, or matrix kernels read another memory layout."""
    if rounded:
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6, msg=lambda text: f"{name}: {text}")
    else:
        assert torch.equal(mine, theirs), name
