"""The nouns of rpcompile: every type that passes hand to one another.

Data flows one way (see `rpcompile/api.py` for the line as code)::

    nn.Module -> Capture -> CostedGraph -> SegmentChain -> Partition -> Dispatch -> Schedule -> Program

All types are frozen. Units are suffixes: `_bytes`, `_s` (seconds), `_flops`, `_bytes_per_s`.
The text form of one action, e.g. `2F0`, is described at `ActionId`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from rpcompile.errors import ScheduleError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import sympy  # pyright: ignore[reportMissingTypeStubs]
    import torch

# --------------------------------------------------------------------------- capture


@dataclass(frozen=True)
class TensorSpec:
    """A parameter or buffer of the model, as the captured graph sees it.

    Attributes:
        placeholder: Name of the graph placeholder that stands for it.
        name: Canonical qualified name in the model (the first alias).
        aliases: Every qualified name under which the model holds the same tensor.
        shape: Sizes.
        dtype: Text form, e.g. "float32".
        nbytes: Size in bytes.
        trainable: `requires_grad` at capture time; False for buffers.
    """

    placeholder: str
    name: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    trainable: bool


@dataclass(frozen=True)
class InputSpec:
    """A tensor that each call passes in.

    Attributes:
        placeholder: Name of the graph placeholder.
        name: Keyword (or position, as text) under which the caller passes it.
        shape: One entry a dimension: an int, or the name of a symbol.
        dtype: Text form, e.g. "int64".
        batch_dim: Dimension that microbatches split, None for inputs every microbatch sees whole.
    """

    placeholder: str
    name: str
    shape: tuple[int | str, ...]
    dtype: str
    batch_dim: int | None


@dataclass(frozen=True)
class Cut:
    """A place between two nodes where the graph may be divided.

    Attributes:
        position: The cut lies behind this many of `Capture.order`'s nodes.
        name: What ends here, e.g. "model.layers.3.mlp".
        values: Names of the nodes whose values cross the cut, in graph order.
        gradients: The members of `values` that carry a gradient back.
    """

    position: int
    name: str
    values: tuple[str, ...]
    gradients: tuple[str, ...]


@dataclass(frozen=True)
class Capture:
    """A model's training graph, with what is needed to run pieces of it.

    Attributes:
        graph_module: The graph. Placeholders: parameters, buffers, constants, inputs; it returns
            the loss first. The one mutable member: passes copy it before they change it.
        model_name: Class name of the model.
        parameters: Parameters that the graph reads.
        buffers: Buffers that the graph reads, with tensor constants.
        constants: Tensor constants by placeholder name.
        inputs: What a caller passes.
        outputs: Names of the nodes returned, loss first.
        symbols: Symbol name -> (smallest, largest) size, e.g. {"batch": (1, 65536)}.
        example_sizes: Symbol name -> size in the example inputs.
        tied: Groups of parameter names that are one tensor.
        mutations: Qualified buffer name -> node whose value it takes after the forward,
            or the in-place operator's node.
        order: Nodes to execute, in order; rematerialised ones are left out.
        rematerialised: Cheap nodes that every stage computes again instead of receiving.
        requires_grad: Nodes whose value carries a gradient.
        random: Nodes that draw random numbers, in order; the position is the stream's number.
        cuts: Places where the graph may be divided, in order.
        last_name: Name of the segment behind the last cut.
        fingerprint: Hash of parameter names, shapes, dtypes and of the graph.
        output_spec: How `outputs` are put together for the caller (a pytree spec), or None.
        autocast: Dtype of the autocast that the graph was captured and runs under, or None.
        notices: What the user should know of the capture, e.g. that a size is fixed.
    """

    graph_module: torch.fx.GraphModule
    model_name: str
    parameters: tuple[TensorSpec, ...]
    buffers: tuple[TensorSpec, ...]
    constants: Mapping[str, torch.Tensor]
    inputs: tuple[InputSpec, ...]
    outputs: tuple[str, ...]
    symbols: Mapping[str, tuple[int, int]]
    example_sizes: Mapping[str, int]
    tied: tuple[tuple[str, ...], ...]
    mutations: Mapping[str, str]
    fingerprint: str
    order: tuple[str, ...] = ()
    rematerialised: frozenset[str] = frozenset()
    requires_grad: frozenset[str] = frozenset()
    random: tuple[str, ...] = ()
    cuts: tuple[Cut, ...] = ()
    last_name: str = ""
    output_spec: object = None
    autocast: torch.dtype | None = None
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class NodeCost:
    """What one node costs for one microbatch; expressions in the capture's symbols.

    Attributes:
        op_class: "matmul", "attention", "convolution", "elementwise", "reduction", "gather" or "view".
        forward_flops: Floating point operations of the forward (a multiply-add counts 2).
        backward_flops: The same for the backward, without recompute; 0 where no gradient flows.
        read_bytes: Bytes the forward reads.
        write_bytes: Bytes the forward writes.
        backward_read_bytes: Bytes the backward reads.
        backward_write_bytes: Bytes the backward writes.
        saved_bytes: Bytes kept for the backward by torch's derivative formulas: what a report says of one
            node. A segment's need is found by running it, see `rpcompile/peak_memory.py`.
        source: Where the formula is from; "bytes only" for an operator without one.
        saved: The nodes whose memory `saved_bytes` counts whole (others may keep them too); what
            remains is the operator's own.
    """

    op_class: str
    forward_flops: sympy.Expr
    backward_flops: sympy.Expr
    read_bytes: sympy.Expr
    write_bytes: sympy.Expr
    backward_read_bytes: sympy.Expr
    backward_write_bytes: sympy.Expr
    saved_bytes: sympy.Expr
    source: str
    saved: tuple[str, ...] = ()


@dataclass(frozen=True)
class CostedGraph:
    """A capture with the cost of each of its nodes, and the operators no formula is known for."""

    capture: Capture
    costs: Mapping[str, NodeCost]
    unknown: tuple[str, ...]


# --------------------------------------------------------------------------- segments


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
        nodes: The attention nodes that can be kept.
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


# --------------------------------------------------------------------------- partition


class StageKind(StrEnum):
    """F: forward; B: backward with recompute; FB: forward and backward at once, no recompute."""

    F = "F"
    B = "B"
    FB = "FB"


@dataclass(frozen=True)
class Stage:
    """A run of segments `first..last` (both included). Indices follow execution order: F..., FB, B...

    `workspace_bytes` is what one microbatch needs on its device besides the stage's buffers, found by running
    the stage on tensors without data (see `Action`); None: not found, bounded by `stage_bytes.Workspaces`.
    """

    index: int
    kind: StageKind
    first: int
    last: int
    workspace_bytes: int | None = None

    @property
    def segments(self) -> range:
        return range(self.first, self.last + 1)


@dataclass(frozen=True)
class Partition:
    """The stages of one iteration, with what the solver can say about them.

    Attributes:
        stages: In execution order: forward stages up the model, the fused tail, backward stages down.
        memory_limit_bytes: Limit that each job's residency was held to.
        objective_s: Predicted time of one iteration under the solver's model.
        bound_s: Proved lower bound on it over all partitions considered.
        status: "OPTIMAL" or "FEASIBLE".
        solve_s: Seconds the solver took.
        solver: E.g. "CP-SAT 9.15".
    """

    stages: tuple[Stage, ...]
    memory_limit_bytes: int
    objective_s: float
    bound_s: float
    status: str
    solve_s: float
    solver: str

    @property
    def gap(self) -> float:
        """(objective - bound) / objective, 0 when proved optimal."""
        return 0.0 if self.objective_s == 0 else (self.objective_s - self.bound_s) / self.objective_s


# --------------------------------------------------------------------------- schedule


class Stream(StrEnum):
    """A queue that runs its actions in order.

    H2D and WEIGHTS share a link upwards, D2H and GRADIENTS one downwards: activations take what they need
    first, the bulk takes what they leave.
    """

    COMPUTE = "compute"
    H2D = "h2d"  # activations and inputs
    WEIGHTS = "weights"  # weights and buffers of whole jobs
    D2H = "d2h"  # activations, losses and changed buffers
    GRADIENTS = "gradients"  # weight gradients of whole jobs
    HOST = "host"


UP_STREAMS = frozenset({Stream.H2D, Stream.WEIGHTS})
DOWN_STREAMS = frozenset({Stream.D2H, Stream.GRADIENTS})


class Op(StrEnum):
    """What an action does; the value is its letter in the text form."""

    PREFETCH = "P"  # weights: weights and buffers of one segment, for a job
    LOAD = "L"  # h2d: user inputs, the saved stage input and attention outputs of one microbatch
    RECEIVE = "V"  # h2d: a handed-off activation or gradient of one microbatch
    FORWARD = "F"  # compute: forward without autograd
    RECOMPUTE = "R"  # compute: forward of a backward stage under autograd, right before its BACKWARD
    BACKWARD = "B"  # compute: backward through what RECOMPUTE kept; it alone needs the gradient
    FUSED = "FB"  # compute: forward, loss and backward at once
    HANDOFF = "H"  # d2h: an activation or gradient that the next job waits for
    OFFLOAD = "O"  # d2h: a stage input kept for recompute, attention outputs, a loss, or changed buffers
    GRADIENT = "G"  # gradients: weight gradients of one segment, after a job's last microbatch
    SUM = "S"  # host: jobs' gradients of one segment are added to those of the jobs before
    UPDATE = "U"  # host: optimizer update
    FREE = "X"  # any stream: buffers whose life ends


COMPUTE_OPS = frozenset({Op.FORWARD, Op.RECOMPUTE, Op.BACKWARD, Op.FUSED})


@dataclass(frozen=True)
class ActionId:
    """The text form of an action: `<stage><op>[<microbatch>][@<job>][.<part>]`.

    `2F0` is stage 2, forward, microbatch 0; `5FB3` the fused stage 5 on microbatch 3; `2P@2.7`
    the upload of segment 7's weights for job 2, which runs stage 2; `1O0.6` the offload of the
    boundary behind segment 6, from stage 1, microbatch 0. It round-trips through `parse`.
    """

    stage: int
    op: Op
    microbatch: int | None = None
    job: int | None = None
    part: int | None = None

    _PATTERN = re.compile(r"(\d+)(FB|[PLVFRBHOGSUX])(\d+)?(?:@(\d+))?(?:\.(\d+))?")

    def __str__(self) -> str:
        text = f"{self.stage}{self.op.value}"
        text += "" if self.microbatch is None else str(self.microbatch)
        text += "" if self.job is None else f"@{self.job}"
        return text + ("" if self.part is None else f".{self.part}")

    @classmethod
    def parse(cls, text: str) -> ActionId:
        match = cls._PATTERN.fullmatch(text)
        if match is None:
            raise ScheduleError(f"{text!r} is not an action; write e.g. 2F0, 5FB3, 2P@2.7 or 1O0.6")
        stage, op, microbatch, job, part = match.groups()
        optional = [None if digits is None else int(digits) for digits in (microbatch, job, part)]
        return cls(int(stage), Op(op), *optional)


@dataclass(frozen=True)
class Job:
    """One upload of one stage's weights to one GPU, then its microbatches in order."""

    index: int
    stage: int
    round: int
    replica: int
    microbatches: tuple[int, ...]
    gpu: int


@dataclass(frozen=True)
class Dispatch:
    """Which GPU runs which microbatches of which stage, and in which order.

    A stage may have several jobs (replicas) that share its microbatches, on any GPUs; each
    (stage, microbatch) belongs to one of them. A GPU may go back and forth between its jobs.

    Attributes:
        policy: Name of the rule that made it, e.g. "round_robin".
        gpus: Number of GPUs.
        microbatches: Number of microbatches.
        jobs: In dispatch order; `Job.index` is the position.
        order: By GPU, its compute actions in order, each as (job, microbatch).
        recompute_ahead: Whether a backward's recompute may run before the gradient is there, once its
            saved input is. Asked by `simulate_dispatch` alone: a schedule's RECOMPUTE always may.
        rotate: GPUs by which each of chained iterations is shifted against the one before: job j of
            iteration i runs on GPU (jobs[j].gpu + i * rotate) mod `gpus`.
    """

    policy: str
    gpus: int
    microbatches: int
    jobs: tuple[Job, ...]
    order: tuple[tuple[tuple[int, int], ...], ...]
    recompute_ahead: bool = False
    rotate: int = 0


@dataclass(frozen=True, slots=True)
class Action:
    """One instruction of one stream.

    Buffers are named `<space>:<what>`, space being `host` or `gpu<k>` (see `rpcompile/buffers.py`).

    Attributes:
        id: Text form of an `ActionId`; unique in a schedule.
        gpu: GPU whose stream runs it.
        stream: The stream.
        op: What it does.
        job: Index of the job it belongs to.
        stage: Stage of that job.
        microbatch: Microbatch, None for actions of a whole job.
        nbytes: Bytes moved; 0 for compute and FREE.
        seconds: Predicted duration.
        reads: Buffers read.
        writes: Buffers written; a buffer both read and written is updated in place.
        frees: Buffers whose life ends here (FREE only).
        after: Ids of actions that must be over first for a reason other than data: memory slots.
        waits: Events that must have happened before it starts.
        records: Events that happen when it is over.
        workspace_bytes: Device memory that a compute action needs besides its buffers while it runs; below 0
            where values that it hands on are values it was given, which both have buffers.
    """

    id: str
    gpu: int
    stream: Stream
    op: Op
    job: int
    stage: int
    microbatch: int | None = None
    nbytes: int = 0
    seconds: float = 0.0
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    frees: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    waits: tuple[str, ...] = ()
    records: tuple[str, ...] = ()
    workspace_bytes: int = 0


@dataclass(frozen=True)
class Queue:
    """The actions of one stream of one GPU, in the order they run."""

    gpu: int
    stream: Stream
    actions: tuple[Action, ...]


@dataclass(frozen=True)
class Schedule:
    """What every stream of every GPU does in one iteration.

    Attributes:
        policy: "round_robin", ...
        mode: How iterations follow one another in training, "sync" or "async" (see `simulate`); or
            "forward" (evaluation only).
        gpus: Number of GPUs.
        microbatches: Number of microbatches.
        jobs: In dispatch order.
        queues: One a GPU and stream that has work, ordered by GPU then stream.
        buffers: Buffer name -> size in bytes.
        rotate: As in `Dispatch`.
    """

    policy: str
    mode: str
    gpus: int
    microbatches: int
    jobs: tuple[Job, ...]
    queues: tuple[Queue, ...]
    buffers: dict[str, int] = field(default_factory=dict[str, int])
    rotate: int = 0

    def actions(self) -> Iterator[Action]:
        """Every action, queue by queue."""
        for queue in self.queues:
            yield from queue.actions


# --------------------------------------------------------------------------- program


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
