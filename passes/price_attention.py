"""SegmentChain -> SegmentChain: what it would take to offload each segment's attention outputs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import sympy

from rpcompile.attention_kernels import find_kernel, log_sum_exp_like
from rpcompile.device_kernels import Kernels
from rpcompile.graphs import argument, value_of
from rpcompile.ir import AttentionOutputs
from rpcompile.passes._segment_memory import LoneMemory, SegmentMemories
from rpcompile.passes.keep_attention import attention_call
from rpcompile.roofline import Work, node_seconds
from rpcompile.sizes import operator_name, symbol

if TYPE_CHECKING:
    from torch.fx import Node

    from rpcompile.ir import CostedGraph, Segment, SegmentChain

ATTENTION = "aten.scaled_dot_product_attention"
_MASK = 3  # the argument's position


@dataclass(frozen=True)
class PriceAttention:
    """Fills in `Segment.attention`; nothing is offloaded by it.

    Bytes are those of the outputs and log-sum-exps, seconds those of the attention's forward, memory is
    found by running the stages that offload and load them. It depends on `Segment.tiles` and
    `Segment.head_groups`, which come first.

    Attributes:
        costed: The graph that the chain was bound from.
        kernels: Of which device the memory is; as in `BindChain`.
    """

    name: ClassVar[str] = "price-attention"
    costed: CostedGraph
    kernels: Kernels | None = None

    def run(self, chain: SegmentChain) -> SegmentChain:
        """The chain with `attention` of every segment that has an attention node with a backward."""
        kernels = self.kernels or Kernels("cpu" if chain.hardware.name == "cpu" else "cuda")
        pricer = _Pricer(self.costed, chain, kernels)
        segments = enumerate(chain.segments)
        return replace(
            chain, segments=tuple(replace(segment, attention=pricer.of(i)) for i, segment in segments)
        )


class _Pricer:
    def __init__(self, costed: CostedGraph, chain: SegmentChain, kernels: Kernels) -> None:
        self._costed, self._chain, self._kernels = costed, chain, kernels
        self._pieces = SegmentMemories(costed.capture, chain.bindings, kernels)
        self._peak = self._pieces.peak
        self._sizes = {symbol(name): sympy.Integer(size) for name, size in chain.bindings.items()}
        self._known: dict[object, LoneMemory] = {}

    def of(self, index: int) -> AttentionOutputs | None:
        segment = self._chain.segments[index]
        nodes = [node for name in segment.nodes if self._is_attention(node := self._peak.nodes[name])]
        if not nodes or not segment.needs_backward or index == len(self._chain.segments) - 1:
            return None  # the last segment is never recomputed
        reasons = {node: self._refusal(node) for node in nodes}
        kept = [node for node in nodes if reasons[node] is None]
        found = AttentionOutputs(
            nodes=tuple(node.name for node in kept),
            nbytes=sum(map(self._nbytes, kept)),
            forward_s=min(segment.forward_s, sum(map(self._forward_s, kept), 0.0)),
            saved_bytes=segment.saved_bytes,
            peak_bytes=segment.peak_bytes,
            forward_peak_bytes=segment.forward_peak_bytes,
            refused=tuple(dict.fromkeys(reason for reason in reasons.values() if reason is not None)),
        )
        if not kept:
            return found
        memory = self._memory(index, replace(segment, attention=found, offloads=True))
        return replace(
            found,
            saved_bytes=memory.saved_bytes,
            peak_bytes=memory.peak_bytes,
            forward_peak_bytes=memory.forward_peak_bytes,
        )

    def _is_attention(self, node: Node) -> bool:
        return operator_name(node) == ATTENTION and node.name in self._costed.capture.requires_grad

    def _refusal(self, node: Node) -> str | None:
        """Why an attention node is recomputed in any case."""
        mask = argument(node, _MASK)
        if mask is not None and mask.name in self._costed.capture.requires_grad:
            return "its mask has a gradient, which fused kernels do not make"
        kernel = find_kernel(self._kernels.kind, attention_call(node))
        return kernel if isinstance(kernel, str) else None

    def _nbytes(self, node: Node) -> int:
        kernel, output = find_kernel(self._kernels.kind, attention_call(node)), value_of(node)
        log_sum_exp = log_sum_exp_like(kernel, output)
        sizes = (self._peak.shape(tensor) for tensor in (output, log_sum_exp))
        items = zip(sizes, (output, log_sum_exp), strict=True)
        return sum(math.prod(shape) * tensor.element_size() for shape, tensor in items)

    def _forward_s(self, node: Node) -> float:
        cost = self._costed.costs[node.name]
        flops, nbytes = cost.forward_flops, cost.read_bytes + cost.write_bytes
        numbers = [float(sympy.Float(number.xreplace(self._sizes))) for number in (flops, nbytes)]
        return node_seconds(Work(cost.op_class, numbers[0], numbers[1]), self._chain.hardware)

    def _memory(self, index: int, segment: Segment) -> LoneMemory:
        key = self._peak.key(self._pieces.piece(index, index)), segment.tiles, segment.head_groups
        if key not in self._known:
            segments = list(self._chain.segments)
            segments[index] = segment
            chain = replace(self._chain, segments=tuple(segments))
            self._known[key] = self._pieces.alone(chain, index)
        return self._known[key]
