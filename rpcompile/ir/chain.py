"""Segments of a model, priced for one microbatch on one GPU or a box of several kinds."""

from __future__ import annotations

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Hardware:
    """One GPU and its link to the host.

    Attributes:
        name: Catalogue name, e.g. "rtx4090".
        memory_bytes: Device memory.
        usable_bytes: What of it a plan may use.
        flops_per_s: Dense matrix throughput for the training dtype.
        memory_bytes_per_s: Device memory bandwidth.
        h2d_bytes_per_s: Host to device, one way.
        d2h_bytes_per_s: Device to host, one way.
        latency_s: Fixed time of one transfer.
        sources: Field -> "measured: ...", "calibrated: ...", "quoted: ..." or "assumed: ...".
        efficiency: Share of a peak that kernels reach, 1 where it is missing. Of `flops_per_s`: "matmul",
            "matmul_backward" (weights and gradients are read in slower layouts), "matmul_sustained"
            (products alone, without pauses), "attention". Of
            `memory_bytes_per_s`: "memory". See `rpcompile/roofline.py`.
    """

    name: str
    memory_bytes: int
    usable_bytes: int
    flops_per_s: float
    memory_bytes_per_s: float
    h2d_bytes_per_s: float
    d2h_bytes_per_s: float
    latency_s: float
    sources: dict[str, str]
    efficiency: dict[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True)
class AttentionOutputs:
    """What it takes to offload a segment's attention outputs, with log-sum-exps, and not to recompute them.

    Attributes:
        nodes: The attention nodes that can be kept; a profile's chain has no nodes.
        nbytes: Their outputs and log-sum-exps, of one microbatch.
        forward_s: Seconds of their forward, which the recompute saves.
        saved_bytes: As the segment's, in a backward stage that loads them; they themselves are not counted.
        peak_bytes: The same of the segment's `peak_bytes`.
        forward_peak_bytes: The same of the segment's, in a forward stage that offloads them.
        refused: Why the segment's other attention nodes are recomputed in any case, one reason a kind.
    """

    nodes: tuple[str, ...]
    nbytes: int
    forward_s: float
    saved_bytes: int
    peak_bytes: int
    forward_peak_bytes: int
    refused: tuple[str, ...] = ()


@dataclass(frozen=True)
class Segment:
    """The graph between two neighbouring cuts; the smallest piece that a stage can be made of.

    All times and sizes are for one microbatch.

    Attributes:
        name: E.g. "model.layers.3.mlp".
        nodes: The graph nodes, in order.
        parameters: Qualified names of the parameters it reads.
        inputs: Names of the user inputs it reads, also through rematerialised nodes.
        boundary: Values that cross the cut behind this segment; empty for the last one.
        boundary_gradients: The members of `boundary` that carry a gradient back.
        forward_s: Forward time, with or without autograd.
        backward_s: Backward time without recompute; 0 where no gradient flows.
        forward_flops: Forward FLOPs.
        backward_flops: Backward FLOPs without recompute.
        weight_bytes: Parameters and buffers to upload.
        gradient_bytes: Gradients of its trainable parameters.
        state_bytes: Buffers that its forward changes (BatchNorm statistics).
        input_bytes: The user inputs it reads.
        boundary_bytes: The tensors of `boundary`.
        boundary_gradient_bytes: Their gradients.
        saved_bytes: What autograd holds of its forward for its backward, besides values that came in.
        peak_bytes: Most that its recompute and backward need at once on top of `saved_bytes` and of what has
            buffers of its own: weights, inputs, values and gradients that come in and go out. Its recompute
            may follow that of other segments, whose results have none.
        needs_backward: Whether a backward passes through it at all.
        source: "estimated", "measured" or "given".
        chunks: Into how many equal chunks of tokens it may be divided at most.
        tiles: In how many chunks of tokens its token-wise regions run; 1: at once.
        head_groups: In how many groups of heads its attention runs backward; 1: at once.
        forward_peak_bytes: As `peak_bytes`, of a forward without autograd; below 0 where some of what goes
            out is what came in.
        saved_input_bytes: Values that came in and that its backward is the first of all to hold.
        rematerialised_bytes: Results of rematerialised nodes that it reads; the segments of a stage share
            them.
        reruns: Whether its backward runs all of its forward itself, tile by tile: where it is the last of a
            backward stage, the recompute leaves it out.
        attention: What offloading its attention outputs takes; None where it has no attention node with a
            backward.
        offloads: Whether a forward stage offloads them and a backward stage loads them.
    """

    name: str
    nodes: tuple[str, ...]
    parameters: tuple[str, ...]
    inputs: tuple[str, ...]
    boundary: tuple[str, ...]
    boundary_gradients: tuple[str, ...]
    forward_s: float
    backward_s: float
    forward_flops: float
    backward_flops: float
    weight_bytes: int
    gradient_bytes: int
    state_bytes: int
    input_bytes: int
    boundary_bytes: int
    boundary_gradient_bytes: int
    saved_bytes: int
    peak_bytes: int
    needs_backward: bool
    source: str
    chunks: int = 1
    tiles: int = 1
    forward_peak_bytes: int = 0
    saved_input_bytes: int = 0
    rematerialised_bytes: int = 0
    reruns: bool = False
    attention: AttentionOutputs | None = None
    offloads: bool = False
    head_groups: int = 1

    def timed(self, forward_s: float, backward_s: float, source: str) -> Segment:
        """With other seconds; its attention takes the same part of the forward as before."""
        attention = self.attention
        if attention is not None and self.forward_s:
            attention = replace(attention, forward_s=attention.forward_s * forward_s / self.forward_s)
        return replace(self, forward_s=forward_s, backward_s=backward_s, source=source, attention=attention)

    @property
    def kept(self) -> AttentionOutputs | None:
        """What is offloaded of its attention; None where all of it is recomputed."""
        return self.attention if self.offloads else None

    @property
    def kept_bytes(self) -> int:
        """Bytes that are offloaded in the forward and loaded for the backward, of one microbatch."""
        return self.kept.nbytes if self.kept else 0

    @property
    def recompute_s(self) -> float:
        """Forward time in a backward stage."""
        return self.forward_s - (self.kept.forward_s if self.kept else 0.0)


@dataclass(frozen=True)
class TiedWeight:
    """One tensor read by several segments: uploaded by each, counted once inside a stage."""

    name: str
    segments: tuple[int, ...]
    weight_bytes: int
    gradient_bytes: int


@dataclass(frozen=True)
class ClassCost:
    """What the operators of one class cost together, for one microbatch; see `NodeCost.op_class`."""

    name: str
    forward_flops: float
    backward_flops: float
    forward_bytes: float
    backward_bytes: float
    forward_s: float
    backward_s: float


@dataclass(frozen=True)
class GpuKind:
    """One kind of GPU in a box of several: what it is, and what the segments of a chain take on it.

    Attributes:
        hardware: The GPU and its link.
        forward_s: Forward time of each segment.
        backward_s: Backward time of each segment, without recompute.
    """

    hardware: Hardware
    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]


@dataclass(frozen=True)
class SegmentChain:
    """The segments of a model, priced for one microbatch size and one kind of GPU, or for several kinds.

    Attributes:
        segments: In order; their seconds are those on `hardware`.
        bindings: Symbol name -> size of one microbatch.
        hardware: The GPU; of several kinds the one with the least memory, in which segments have to fit.
        tied: Tensors that several segments read.
        op_classes: Estimates, also where the segments' seconds are measured; a profile has none.
        kinds: The kinds of GPUs where there are several, `hardware` among them; else none.
        kind_of: By GPU, its place in `kinds`; empty where all are alike.
    """

    segments: tuple[Segment, ...]
    bindings: dict[str, int]
    hardware: Hardware
    tied: tuple[TiedWeight, ...] = ()
    op_classes: tuple[ClassCost, ...] = ()
    kinds: tuple[GpuKind, ...] = ()
    kind_of: tuple[int, ...] = ()

    def hardware_of(self, gpu: int) -> Hardware:
        """What a GPU is."""
        return self.kinds[self.kind_of[gpu]].hardware if self.kinds else self.hardware

    def seconds_on(self, gpu: int, segment: int) -> tuple[float, float]:
        """Forward and backward seconds of one segment on one GPU."""
        if self.kinds:
            kind = self.kinds[self.kind_of[gpu]]
            return kind.forward_s[segment], kind.backward_s[segment]
        return self.segments[segment].forward_s, self.segments[segment].backward_s

    def recompute_s_on(self, gpu: int, segment: int) -> float:
        """Forward seconds of one segment in a backward stage on one GPU."""
        own, (forward_s, _) = self.segments[segment], self.seconds_on(gpu, segment)
        return forward_s * (own.recompute_s / own.forward_s) if own.kept and own.forward_s else forward_s

    @property
    def first_backward(self) -> int:
        """Index of the first segment that a backward passes through; len(segments) if none."""
        for index, segment in enumerate(self.segments):
            if segment.needs_backward:
                return index
        return len(self.segments)
