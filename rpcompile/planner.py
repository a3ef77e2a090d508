"""From a model, or a profile of one, to a plan: the line of passes, without running anything.

    capture_model -> CapturedModel.bind -> SegmentChain -> plan_chain -> Plan

A model is captured and priced once and can then be bound to any microbatch size in its range, and
planned for any GPUs. `rpcompile/api.py` goes on from here to a program.
"""

from __future__ import annotations

import logging
import math
import platform
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from rpcompile import hardware as catalogue
from rpcompile.attention_choice import (
    Means,
    check_attention,
    choose_attention,
    offload,
    offload_these,
    over,
)
from rpcompile.collection import collection_paused
from rpcompile.cost_file import CostFile
from rpcompile.errors import InvalidArgument, PartitionError, PlanMismatch
from rpcompile.host_memory import host_memory
from rpcompile.mixed_gpus import Box, box_of, with_ratios, with_speeds
from rpcompile.passes.bind_chain import BindChain
from rpcompile.passes.canonicalize_graph import CanonicalizeGraph
from rpcompile.passes.capture_graph import CaptureGraph, ExampleInputs
from rpcompile.passes.choose_tiles import ChooseTiles
from rpcompile.passes.estimate_costs import EstimateCosts
from rpcompile.passes.find_cuts import FindCuts
from rpcompile.passes.find_stage_memory import FindStageMemory
from rpcompile.passes.measure_chain import MeasureChain
from rpcompile.passes.price_attention import PriceAttention
from rpcompile.plan import Plan, Prediction
from rpcompile.progress import announce, progress_bar
from rpcompile.runtime.stopwatch import Stopwatch
from rpcompile.scheduling import (
    Found,
    PlanOptions,
    find_schedule,
    on_its_stages,
    traffic_of,
    with_exact_memory,
)
from rpcompile.unknown_operators import WORTH_A_WARNING, UnknownShare, unknown_shares
from rpcompile.variations import dispatch_of, laid_out_as
from rpcompile.verify import verify_schedule

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from os import PathLike

    from torch import nn
    from tqdm import tqdm

    from rpcompile.ir import Capture, CostedGraph, Hardware, Segment, SegmentChain
    from rpcompile.profile import Profile, ProfileSegment

DEFAULT_GPUS = 8
DEFAULT_GPU = "rtx4090"
SOURCES = ("estimated", "measured")  # of seconds, besides profiles
QUICK_S = 1.0  # of the partition solver, where plans are only compared
_log = logging.getLogger("rpcompile")


@dataclass(frozen=True)
class CapturedModel:
    """A model captured and priced once, to be bound to any microbatch size in its range."""

    costed: CostedGraph

    @property
    def capture(self) -> Capture:
        return self.costed.capture

    def bind(
        self,
        hardware: Hardware | Box,
        sizes: Mapping[str, int] | None = None,
        *,
        seconds: str | Profile = "estimated",
        device: str = "cpu",
        tiles: str | int = "auto",
        head_groups: str | int = "auto",
        progress: bool | None = None,
        offloading: bool = False,
    ) -> SegmentChain:
        """Prices the segments for one size of microbatch on a kind of GPU. Nothing is captured again.

        Args:
            hardware: The GPU; or a box of several, for which segments have to fit in the smallest, and of
                which each takes longer or shorter by the ratio of the estimates for it and for the smallest.
            sizes: Sizes of one microbatch, e.g. {"batch": 4, "sequence": 2048}; those left out are
                as in the example inputs.
            seconds: Where seconds come from. "estimated": a roofline over FLOPs and bytes. "measured": each
                distinct segment is timed on `device`, once for all on one machine. A profile of this model
                at these sizes: "given", as it says.
            device: What measures, e.g. "cpu" or "cuda:0".
            tiles: In how many chunks of tokens token-wise regions run. "auto": as few as let each
                segment, and a loss in an eighth of the memory, fit; "loss": the loss only; 1: none.
            head_groups: Into how many groups of heads attention's backward is divided. "auto": as few as
                let a segment fit; 1: none.
            progress: Show a progress bar while measuring; default: if standard error is a terminal.
            offloading: Divide tokens and heads as it takes for segments to fit that offload all attention
                outputs that can be. Whether they do is decided by `plan`.

        Raises:
            InvalidArgument: A size is unknown or out of the captured range, or the profile is of
                another model.
            ExecutionError: A segment fails on the device.
        """
        if isinstance(hardware, Box):
            chain = self.bind(
                hardware.smallest,
                sizes,
                seconds=seconds,
                device=device,
                tiles=tiles,
                head_groups=head_groups,
                progress=progress,
                offloading=offloading,
            )
            if len(hardware.kinds) == 1:
                return chain
            return with_ratios(chain, hardware, self._ratios(hardware, chain.bindings))
        bindings = {**self.capture.example_sizes, **(sizes or {})}
        divide, price = ChooseTiles(self.costed, tiles, head_groups), PriceAttention(self.costed)
        bound = BindChain(bindings, hardware).run(self.costed)
        if offloading:
            divided = divide.run(offload(price.run(bound)))
            chain = price.run(offload(divided, 0))
        else:
            chain = price.run(divide.run(bound))
        if seconds == "estimated":
            _report(unknown_shares(self.costed, bindings, hardware))
            return chain
        if seconds == "measured":
            return MeasureChain(self.capture, Stopwatch(device), progress=progress).run(chain)
        if isinstance(seconds, str):
            raise InvalidArgument(f"seconds={seconds!r}; it must be 'estimated', 'measured' or a profile")
        return _with_given_seconds(chain, seconds)

    def _ratios(self, box: Box, bindings: Mapping[str, int]) -> list[tuple[list[float], list[float]]]:
        """By kind of GPU, the estimated time of each segment's passes over that on the smallest GPU."""
        own = BindChain(bindings, box.smallest).seconds(self.costed)
        found: list[tuple[list[float], list[float]]] = []
        for hardware in box.kinds:
            other = BindChain(bindings, hardware).seconds(self.costed)
            pairs = list(zip(other, own, strict=True))
            forward, backward = ([a[i] / b[i] if b[i] else 1.0 for a, b in pairs] for i in (0, 1))
            found.append((forward, backward))
        return found

    def plan(
        self,
        chain: SegmentChain,
        options: PlanOptions,
        progress: bool | None = None,
        offloading: Callable[[], SegmentChain] | None = None,
    ) -> Plan:
        """Partitions and schedules a chain that `bind` made.

        Args:
            chain: The segments.
            options: What to plan for.
            progress: Show a progress bar; default: if standard error is a terminal.
            offloading: As for `plan_chain`.

        Raises:
            PartitionError: Nothing fits.
        """
        with progress_bar(progress) as bar:
            return plan_chain(chain, options, self.described(), bar, self.capture, offloading)

    def rebind(self, plan: Plan, sizes: Mapping[str, int]) -> Plan:
        """The plan for another batch or sequence: same stages and GPUs, new times, bytes and proof.

        Args:
            plan: A plan of this model.
            sizes: Sizes of one microbatch; those left out stay.

        Raises:
            PlanMismatch: The plan is of another model.
            InvalidArgument: A size is out of range.
            ScheduleError: The stages do not fit in memory at these sizes; make a new plan.
        """
        if plan.fingerprint != self.capture.fingerprint:
            raise PlanMismatch(
                f"the plan is of {plan.model_name} {plan.fingerprint[:12]}, this model is "
                f"{self.capture.model_name} {self.capture.fingerprint[:12]}; make a new plan"
            )
        box, sizes = box_of(plan.chain, plan.gpus), {**plan.chain.bindings, **sizes}
        chain = self.bind(box, sizes)
        pairs = zip(chain.segments, plan.chain.segments, strict=True)
        kept = {index for index, (new, old) in enumerate(pairs) if old.kept and new.attention}
        if kept:
            chain = offload_these(chain, kept, self.bind(box, sizes, offloading=True))
        partition = FindStageMemory(self.capture, chain).run(plan.partition)
        rebound = laid_out_again(replace(plan, chain=chain, partition=partition))
        rebound.verify()
        return rebound

    def save_costs(self, path: str | PathLike[str]) -> None:
        """Writes the FLOP and byte expressions of every operator; `rpcompile/cost_file.py` has the format."""
        CostFile.of(self.costed).save(path)

    def described(self) -> ModelDescription:
        """What a plan says about the model."""
        capture = self.capture
        return ModelDescription(capture.model_name, capture.fingerprint, _main_dtype(capture))


@dataclass(frozen=True)
class ModelDescription:
    """Name, fingerprint and main dtype of what a plan is for."""

    name: str
    fingerprint: str
    dtype: str


def capture_model(
    model: nn.Module,
    example_inputs: ExampleInputs,
    bar: tqdm[Any] | None = None,
    compute_dtype: torch.dtype | None = None,
) -> CapturedModel:
    """Captures a model's training graph and prices its nodes.

    Args:
        model: The module, in the state it will train in; its weights may be on the meta device.
        compute_dtype: What its trainable parameters will be cast to; None for their own dtype.
        example_inputs: Of one microbatch.
        bar: Is advanced by one for each pass.

    Raises:
        UnsupportedModel: The model cannot be captured; says where and what to change.
    """
    capture = CaptureGraph(example_inputs, compute_dtype=compute_dtype).run(model)
    for notice in capture.notices:
        _log.warning(notice)
    for step in (CanonicalizeGraph(), FindCuts()):
        announce(bar, step.name)
        capture = step.run(capture)
    announce(bar, EstimateCosts.name)
    return CapturedModel(EstimateCosts().run(capture))


def _report(shares: tuple[UnknownShare, ...]) -> None:
    if shares:
        large = sum(share.time_share for share in shares) > WORTH_A_WARNING
        _log.log(
            logging.WARNING if large else logging.INFO,
            "no FLOP formula is known for %s; counted by their bytes, so the prediction may be low",
            ", ".join(str(share) for share in shares),
        )


def plan_profile(
    profile: Profile,
    options: PlanOptions,
    name: str = "profile",
    progress: bool | None = None,
    box: Box | None = None,
) -> Plan:
    """A plan from somebody's measurement, without the model.

    Args:
        profile: What the segments cost; `rpcompile/profile.py` describes the file.
        options: What to plan for.
        name: What to call the model.
        progress: Show a progress bar; default: if standard error is a terminal.
        box: The GPUs, with their speeds beside the one that the profile is of; None: all are that one.

    Returns:
        A plan that can be printed, simulated, verified and saved, but not run: it has no graph.

    Raises:
        InvalidArgument: A speed is missing.
        PartitionError: Nothing fits.
    """
    chain = profile.to_chain()
    chain = chain if box is None else with_speeds(chain, box)
    with progress_bar(progress) as bar:
        return plan_chain(chain, options, ModelDescription(name, "", "given"), bar)


@collection_paused()
def plan_chain(
    chain: SegmentChain,
    options: PlanOptions,
    model: ModelDescription,
    bar: tqdm[Any] | None = None,
    capture: Capture | None = None,
    offloading: Callable[[], SegmentChain] | None = None,
) -> Plan:
    """Partition, schedule, simulation and proof of one chain.

    Args:
        chain: The segments, priced.
        options: What to plan for.
        model: What the plan says about the model.
        bar: Is advanced by one for each pass.
        capture: The graph, if it is known: the memory of the stages chosen is then found by running them on
            tensors without data, and not only bounded.
        offloading: Makes the chain divided for segments that offload attention outputs (`bind` with
            `offloading=True`); None: they are divided as the others are.

    Raises:
        InvalidArgument: An option is out of range.
        PartitionError: Nothing fits.
    """
    started = time.perf_counter()
    check_attention(options.attention)
    chain, found, why = _with_attention(chain, options, model.dtype, bar, capture, offloading)
    announce(bar, "verify")
    verify_schedule(found.schedule, chain, found.partition)
    prediction = _prediction(chain, found, model.dtype)
    excess = over(prediction.host_peak_bytes, options.host_bytes)
    if excess and any(segment.offloads for segment in chain.segments):
        raise PartitionError(f"with attention outputs offloaded the host {excess}; use attention='recompute'")
    if excess:
        _log.warning("the host %s", excess)
    _log.info("planned %s in %.2f s", model.name, time.perf_counter() - started)
    return Plan(
        model_name=model.name,
        fingerprint=model.fingerprint,
        dtype=model.dtype,
        gpus=options.gpus,
        microbatches=options.microbatches,
        mode=options.mode,
        chain=chain,
        partition=found.partition,
        schedule=found.schedule,
        prediction=prediction,
        provenance=_provenance(options),
        attention=why,
        links=options.links,
        update_s_per_byte=options.update_s_per_byte,
    )


def _with_attention(
    chain: SegmentChain,
    options: PlanOptions,
    dtype: str,
    bar: tqdm[Any] | None,
    capture: Capture | None,
    offloading: Callable[[], SegmentChain] | None,
) -> tuple[SegmentChain, Found, str]:
    """The chain with its attention outputs offloaded or not, its plan, and why."""
    # One plan of each is enough to compare; only the chain that is chosen is searched on.
    seconds = min(QUICK_S, options.solver_time_s)
    quick = replace(options, effort=None, fused_segments=None, solver_time_s=seconds)
    means = Means(
        lambda trial: find_schedule(trial, quick, bar, capture),
        lambda trial, found, bound_s: on_its_stages(trial, found, quick, bound_s, capture),
        lambda trial, schedule: over(host_memory(trial, schedule, dtype).total_bytes, options.host_bytes),
    )
    asked = "recompute" if options.mode == "forward" else options.attention
    choice = choose_attention(chain, asked, means, offloading)
    found = choice.found
    if options.effort is None:
        found = found or find_schedule(choice.chain, options, bar, capture)
    else:
        found = _searched(choice.chain, found, means, options, bar, capture)
    if capture is not None:
        announce(bar, FindStageMemory.name)
        found = with_exact_memory(choice.chain, found, options, capture)
    return choice.chain, found, choice.why


def _searched(
    chain: SegmentChain,
    plain: Found | None,
    means: Means,
    options: PlanOptions,
    bar: tqdm[Any] | None,
    capture: Capture | None,
) -> Found:
    """What the search finds; or one job a stage where that is as fast, or all that there is room for.

    Raises:
        PartitionError: Nothing fits.
    """
    try:
        found = find_schedule(chain, options, bar, capture)
    except PartitionError:  # no search fits, where stages in turn may
        if plain is None:
            raise
        return plain
    if means.problem(chain, found.schedule) is None:
        return found if plain is None else min(found, plain, key=lambda item: item.iteration_s)
    # Replicas' gradients are more than the host has room for.
    try:
        return plain or find_schedule(chain, replace(options, effort=None), bar, capture)
    except PartitionError:
        return found


def laid_out_again(plan: Plan) -> Plan:
    """A plan with a new schedule and prediction for its chain: same stages, jobs and order; not verified.

    Raises:
        ScheduleError, PartitionError: The plan contradicts itself.
    """
    schedule = laid_out_as(plan, dispatch_of(plan.schedule))
    again = replace(plan, schedule=schedule)
    steady = again.simulate_steady() if plan.chained else None
    timed = Found(plan.partition, schedule, again.simulate(), steady)
    return replace(again, prediction=_prediction(plan.chain, timed, plan.dtype))


def _prediction(chain: SegmentChain, found: Found, dtype: str) -> Prediction:
    schedule, timeline, steady = found.schedule, found.timeline, found.steady
    tokens = schedule.microbatches * chain.bindings.get("batch", 1) * chain.bindings.get("sequence", 1)
    host = host_memory(chain, schedule, dtype)
    return Prediction(
        iteration_s=found.iteration_s,
        tokens_per_s=tokens / found.iteration_s if "sequence" in chain.bindings else None,
        bubble=timeline.bubble if steady is None else steady.steady_bubble,
        gpu_peak_bytes=(steady or timeline).gpu_peak_bytes,
        host_peak_bytes=host.total_bytes,
        host=host,
        traffic=traffic_of(chain, schedule, timeline),
        alone_s=None if steady is None else timeline.makespan_s,
    )


def update_s_per_byte(optimizer_ns: float | None, dtype: str) -> float:
    """What `PlanOptions` is told of an optimizer that takes so long for a trainable parameter.

    Args:
        optimizer_ns: Nanoseconds for a parameter; None for no updates.
        dtype: Of most parameters, and so of gradients; of another than torch's, 16 bits are assumed.

    Raises:
        InvalidArgument: It is not above 0 and finite.
    """
    if optimizer_ns is None:
        return 0.0
    if not 0 < optimizer_ns < math.inf:
        raise InvalidArgument(f"optimizer_ns={optimizer_ns}; it must be finite and above 0, or None")
    kind = getattr(torch, dtype, None)
    return optimizer_ns * 1e-9 / (kind.itemsize if isinstance(kind, torch.dtype) else 2)


def find_gpu(gpu: str | Hardware | None) -> str | Hardware:
    """The GPU that is named, else the one that is found, else the default."""
    return (gpu or catalogue.detect() or DEFAULT_GPU) if gpu is None or isinstance(gpu, str) else gpu


def find_hardware(gpu: str | Hardware | None) -> Hardware:
    """The GPU that is named, else the one that is found, else the default.

    Raises:
        InvalidArgument: No such GPU.
    """
    gpu = find_gpu(gpu)
    return catalogue.lookup(gpu) if isinstance(gpu, str) else gpu


def _with_given_seconds(chain: SegmentChain, profile: Profile) -> SegmentChain:
    given = profile.segments
    names = [segment.name for segment in chain.segments]
    if [segment.name for segment in given] != names:
        raise InvalidArgument(
            f"the profile is of another model: it has {_names([s.name for s in given])}, this model "
            f"{_names(names)}; make one with `rpcompile profile`"
        )
    pairs = zip(chain.segments, given, strict=True)
    return replace(chain, segments=tuple(_as_given(own, other) for own, other in pairs))


def _as_given(own: Segment, given: ProfileSegment) -> Segment:
    timed = own.timed(given.forward_s, given.backward_s, "given")
    if timed.attention is None or given.attention is None:
        return timed
    return replace(timed, attention=replace(timed.attention, forward_s=given.attention.forward_s))


def _names(names: Sequence[str]) -> str:
    return f"{len(names)} segments ({names[0]} … {names[-1]})"


def _main_dtype(capture: Capture) -> str:
    bytes_of: dict[str, int] = {}
    for spec in capture.parameters:
        bytes_of[spec.dtype] = bytes_of.get(spec.dtype, 0) + spec.nbytes
    return max(bytes_of, key=lambda dtype: bytes_of[dtype], default="none")


def _provenance(options: PlanOptions) -> dict[str, str]:
    from rpcompile import __version__

    return {
        "rpcompile": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "solver_seed": str(options.seed),
    }
