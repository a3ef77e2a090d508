"""The memory that a stage really takes, from the allocator's reports, beside what is predicted for it."""

from __future__ import annotations

import gc
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from rpcompile.ir import Hardware, Partition, Stage, StageKind
from rpcompile.passes.bind_chain import BindChain
from rpcompile.passes.choose_tiles import ChooseTiles
from rpcompile.passes.estimate_costs import EstimateCosts
from rpcompile.passes.extract_stages import ExtractStages
from rpcompile.passes.find_stage_memory import FindStageMemory
from rpcompile.passes.price_attention import PriceAttention
from rpcompile.runtime import batches
from rpcompile.runtime.stage_runner import Microbatch, StageRunner, Tensors
from rpcompile.stage_bytes import Workspaces, kept_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rpcompile.ir import Capture, SegmentChain, StageGraph
    from tests.models import Case


def hardware(device: str) -> Hardware:
    """Whatever is fast does not matter here; the name decides whose kernels count."""
    return Hardware(device, 2**34, 2**34, 1e12, 1e11, 1e10, 1e10, 0.0, {})


def offload_all(chain: SegmentChain) -> SegmentChain:
    """The chain with every attention output offloaded that can be."""
    segments = (replace(s, offloads=bool(s.attention and s.attention.nodes)) for s in chain.segments)
    return replace(chain, segments=tuple(segments))


class Measured:
    """One model on one microbatch: runs any stage of it and compares.

    Args:
        case: Model and batch; the batch is one microbatch.
        captured: Its graph.
        device: "cpu" or "cuda".
        tiles: Chunks of every token-wise region.
        offload: Whether attention outputs are offloaded.
        head_groups: Groups of heads of every attention.
    """

    def __init__(
        self,
        case: Case,
        captured: Capture,
        device: str = "cpu",
        tiles: int = 1,
        offload: bool = False,
        head_groups: int = 1,
    ) -> None:
        self.captured, self.device = captured, torch.device(device)
        sizes = dict(captured.example_sizes)
        costed = EstimateCosts().run(captured)
        self.chain: SegmentChain = BindChain(sizes, hardware(device)).run(costed)
        self.chain = ChooseTiles(costed, tiles, head_groups).run(self.chain)
        if offload:
            self.chain = offload_all(PriceAttention(costed).run(self.chain))
        self.workspaces = Workspaces(self.chain)
        model = case.model.to(device)
        self._host = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
            **captured.constants,
        }
        (part,) = batches.split_batch(captured, batches.named_batch(captured, (), case.batch), 1)
        self._part = {name: tensor.to(device) for name, tensor in part.items()}
        self._facts = Microbatch(1, batches.microbatch_sizes(captured, part), 1.0)
        self._values = self._forward_values()

    def predicted_bytes(self, stage: Stage) -> int:
        """Everything but weights, gradients and what the caller gives, as the plan has it."""
        return self._with_results(stage, self.workspaces.planned(self.found(stage)[0]))

    def found(self, *stages: Stage) -> tuple[Stage, ...]:
        """The stages, with what they need."""
        return FindStageMemory(self.captured, self.chain).run(_only(*stages)).stages

    def bound_bytes(self, stage: Stage) -> int:
        """The same as the partition counts it."""
        return self._with_results(stage, self.workspaces.of(stage))

    def _with_results(self, stage: Stage, nbytes: int) -> int:
        segments = self.chain.segments
        if stage.kind is StageKind.F:
            return nbytes + segments[stage.last].boundary_bytes + self._kept_bytes(stage)
        return nbytes + (segments[stage.first - 1].boundary_gradient_bytes if stage.first else 0)

    def given_bytes(self, stage: Stage) -> int:
        """Weights, gradients, inputs, and the values and gradients that come in."""
        segments = [self.chain.segments[index] for index in stage.segments]
        nbytes = sum(segment.weight_bytes + segment.input_bytes for segment in segments)
        nbytes += self.chain.segments[stage.first - 1].boundary_bytes if stage.first else 0
        if stage.kind is not StageKind.F:
            nbytes += sum(segment.gradient_bytes for segment in segments)
        nbytes += self._kept_bytes(stage) if stage.kind is StageKind.B else 0
        return nbytes + (segments[-1].boundary_gradient_bytes if stage.kind is StageKind.B else 0)

    def _kept_bytes(self, stage: Stage) -> int:
        return sum(kept_bytes(self.chain, stage).values())

    def measured_bytes(self, stage: Stage) -> int:
        """The same as `predicted_bytes`, measured on a microbatch that is not the first."""
        (graph,) = self._extract(stage)
        runner, weights = self._runner(graph), self._weights(graph)
        for name in graph.trainable:
            weights[0][name].requires_grad_(True).grad = torch.zeros_like(weights[0][name])
        values = {name: self._values[name].clone() for name in graph.values}
        gradients = {name: torch.randn_like(self._values[name]) for name in graph.gradients_in}

        def run() -> object:
            if stage.kind is StageKind.F:
                return runner.forward(weights, self._part, values, self._facts)
            if stage.kind is StageKind.FB:
                return runner.fused(weights, self._part, values, self._facts)
            return runner.backward(runner.recompute(weights, self._part, values, self._facts), gradients)

        return (cuda_peak if self.device.type == "cuda" else cpu_peak)(run)

    def _extract(self, *stages: Stage) -> tuple[StageGraph, ...]:
        return ExtractStages(self.captured, self.chain).run(_only(*stages))

    def _runner(self, graph: StageGraph) -> StageRunner:
        return StageRunner(
            graph, self.captured.outputs[0], None if self.device.type == "cpu" else self.device
        )

    def _weights(self, graph: StageGraph) -> list[Tensors]:
        names = (*graph.parameters, *graph.buffers)
        return [{name: self._host[name].detach().to(self.device, copy=True) for name in names}]

    def _forward_values(self) -> Tensors:
        values: Tensors = {}
        # Not of the last segment, whose results nobody reads.
        stages = [Stage(i, StageKind.F, i, i) for i in range(len(self.chain.segments) - 1)]
        for graph in self._extract(*stages):
            given = {name: values[name] for name in graph.values}
            values |= self._runner(graph).forward(self._weights(graph), self._part, given, self._facts)
        return values


def _only(*stages: Stage) -> Partition:
    return Partition(stages, 0, 0.0, 0.0, "GIVEN", 0.0, "")


def cpu_peak(run: Callable[[], object]) -> int:
    """Most bytes that the CPU's allocator had given out at once, by what it reports to the profiler."""
    run()  # what is allocated once for all does not count
    with no_collections(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    live = peak = 0
    for _, nbytes in changes:
        live += nbytes
        peak = max(peak, live)
    return peak


@contextmanager
def no_collections() -> Iterator[None]:
    """No garbage from before is freed meanwhile; looking for it takes longer than most stages."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def cuda_peak(run: Callable[[], object]) -> int:
    """The same for CUDA's caching allocator; not with cuDNN's attention, which consumer cards do not run."""
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        run()
        gc.collect()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before


@contextmanager
def without_onednn() -> Iterator[None]:
    """Convolutions by torch's own kernels, whose workspaces are known."""
    before = torch.backends.mkldnn.enabled  # pyright: ignore[reportAttributeAccessIssue]
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)
