"""From a model, or a profile of one, to a plan: the line of passes, without running anything.

    capture_model -> CapturedModel.bind -> SegmentChain -> plan_chain -> Plan

A model is captured and priced once and can then be bound to any microbatch size in its range, and
planned for any GPUs. `rpcompile/api.py` goes on from here to a program.
"""

from __future__ import annotations

import logging
import platform
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from rpcompile import hardware as catalogue
from rpcompile.cost_file import CostFile
from rpcompile.errors import InvalidArgument, PartitionError, PlanMismatch
from rpcompile.host_memory import host_memory
from rpcompile.memory_bound import gpu_memory_bounds
from rpcompile.passes.bind_chain import BindChain
from rpcompile.passes.canonicalize_graph import CanonicalizeGraph
from rpcompile.passes.capture_graph import CaptureGraph, ExampleInputs
from rpcompile.passes.choose_tiles import ChooseTiles
from rpcompile.passes.dispatch_round_robin import DispatchRoundRobin
from rpcompile.passes.estimate_costs import EstimateCosts
from rpcompile.passes.find_cuts import FindCuts
from rpcompile.passes.find_stage_memory import FindStageMemory
from rpcompile.passes.insert_transfers import InsertTransfers
from rpcompile.passes.measure_chain import MeasureChain
from rpcompile.passes.partition_stages import PartitionStages
from rpcompile.plan import Plan, Prediction
from rpcompile.runtime.stopwatch import Stopwatch
from rpcompile.simulate import Timeline, simulate
from rpcompile.unknown_operators import WORTH_A_WARNING, UnknownShare, unknown_shares
from rpcompile.variations import dispatch_of, lay_out
from rpcompile.verify import verify_schedule

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from os import PathLike

    from torch import nn

    from rpcompile.ir import Capture, CostedGraph, Dispatch, Hardware, Partition, Schedule, SegmentChain
    from rpcompile.profile import Profile

DEFAULT_GPUS = 8
DEFAULT_GPU = "rtx4090"
EFFORTS = ("fast", "default", "thorough")
SOURCES = ("estimated", "measured")  # of seconds, besides profiles
_MEMORY_SHARES = (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5)
_log = logging.getLogger("rpcompile")


@dataclass(frozen=True)
class PlanOptions:
    """What a plan is made for.

    Attributes:
        gpus: Number of GPUs.
        microbatches: Parts that each batch is split into.
        mode: "sync" (training), or "forward" (evaluation).
        solver_time_s: Seconds the partition solver may take.
        seed: Seed of the partition solver and of the search.
        effort: None: the solver's stages, one job each, round robin. "fast" (2 s), "default" (20 s) or
            "thorough" (90 s): also searches for stages, replicas and order together, and takes what is
            predicted to be faster. Replicas' gradients are summed job by job, which rounds otherwise than
            one sum over microbatches.
        max_traffic: Most uploads that a search may use, in units of `SearchedSchedule.traffic`; None for no
            limit.
    """

    gpus: int
    microbatches: int
    mode: str = "sync"
    solver_time_s: float = 3.0
    seed: int = 0
    effort: str | None = None
    max_traffic: float | None = None


@dataclass(frozen=True)
class CapturedModel:
    """A model captured and priced once, to be bound to any microbatch size in its range."""

    costed: CostedGraph

    @property
    def capture(self) -> Capture:
        return self.costed.capture

    def bind(
        self,
        hardware: Hardware,
        sizes: Mapping[str, int] | None = None,
        *,
        seconds: str | Profile = "estimated",
        device: str = "cpu",
        tiles: str | int = "auto",
        head_groups: str | int = "auto",
        progress: bool | None = None,
    ) -> SegmentChain:
        """Prices the segments for one size of microbatch on one kind of GPU. Nothing is captured again.

        Args:
            hardware: The GPU.
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

        Raises:
            InvalidArgument: A size is unknown or out of the captured range, or the profile is of
                another model.
            ExecutionError: A segment fails on the device.
        """
        bindings = {**self.capture.example_sizes, **(sizes or {})}
        chain = BindChain(bindings, hardware).run(self.costed)
        chain = ChooseTiles(self.costed, tiles, head_groups).run(chain)
        if seconds == "estimated":
            _report(unknown_shares(self.costed, bindings, hardware))
            return chain
        if seconds == "measured":
            return MeasureChain(self.capture, Stopwatch(device), progress=progress).run(chain)
        if isinstance(seconds, str):
            raise InvalidArgument(f"seconds={seconds!r}; it must be 'estimated', 'measured' or a profile")
        return _with_given_seconds(chain, seconds)

    def plan(self, chain: SegmentChain, options: PlanOptions, progress: bool | None = None) -> Plan:
        """Partitions and schedules a chain that `bind` made.

        Raises:
            PartitionError: Nothing fits.
        """
        with progress_bar(progress) as bar:
            return plan_chain(chain, options, self.described(), bar, self.capture)

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
        chain = self.bind(plan.chain.hardware, {**plan.chain.bindings, **sizes})
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
    profile: Profile, options: PlanOptions, name: str = "profile", progress: bool | None = None
) -> Plan:
    """A plan from somebody's measurement, without the model.

    Args:
        profile: What the segments cost; `rpcompile/profile.py` describes the file.
        options: What to plan for.
        name: What to call the model.
        progress: Show a progress bar; default: if standard error is a terminal.

    Returns:
        A plan that can be printed, simulated, verified and saved, but not run: it has no graph.

    Raises:
        PartitionError: Nothing fits.
    """
    with progress_bar(progress) as bar:
        return plan_chain(profile.to_chain(), options, ModelDescription(name, "", "given"), bar)


def plan_chain(
    chain: SegmentChain,
    options: PlanOptions,
    model: ModelDescription,
    bar: tqdm[Any] | None = None,
    capture: Capture | None = None,
) -> Plan:
    """Partition, schedule, simulation and proof of one chain.

    Args:
        chain: The segments, priced.
        options: What to plan for.
        model: What the plan says about the model.
        bar: Is advanced by one for each pass.
        capture: The graph, if it is known: the memory of the stages chosen is then found by running them on
            tensors without data, and not only bounded.

    Raises:
        InvalidArgument: An option is out of range.
        PartitionError: Nothing fits.
    """
    _check(options)
    started = time.perf_counter()
    partition, schedule, timeline = _schedule(chain, options, bar, capture)
    announce(bar, "verify")
    verify_schedule(schedule, chain, partition)
    prediction = _prediction(chain, schedule, timeline, model.dtype)
    _log.info("planned %s in %.2f s", model.name, time.perf_counter() - started)
    return Plan(
        model_name=model.name,
        fingerprint=model.fingerprint,
        dtype=model.dtype,
        gpus=options.gpus,
        microbatches=options.microbatches,
        mode=options.mode,
        chain=chain,
        partition=partition,
        schedule=schedule,
        prediction=prediction,
        provenance=_provenance(options),
    )


def laid_out_again(plan: Plan) -> Plan:
    """A plan with a new schedule and prediction for its chain: same stages, jobs and order; not verified.

    Raises:
        ScheduleError, PartitionError: The plan contradicts itself.
    """
    schedule = lay_out(plan.chain, plan.partition, dispatch_of(plan.schedule), plan.mode)
    prediction = _prediction(plan.chain, schedule, simulate(schedule), plan.dtype)
    return replace(plan, schedule=schedule, prediction=prediction)


def _prediction(chain: SegmentChain, schedule: Schedule, timeline: Timeline, dtype: str) -> Prediction:
    tokens = schedule.microbatches * chain.bindings.get("batch", 1) * chain.bindings.get("sequence", 1)
    host = host_memory(chain, schedule, dtype)
    return Prediction(
        iteration_s=timeline.makespan_s,
        tokens_per_s=tokens / timeline.makespan_s if "sequence" in chain.bindings else None,
        bubble=timeline.bubble,
        gpu_peak_bytes=timeline.gpu_peak_bytes,
        host_peak_bytes=host.total_bytes,
        host=host,
    )


def _schedule(
    chain: SegmentChain, options: PlanOptions, bar: tqdm[Any] | None, capture: Capture | None
) -> tuple[Partition, Schedule, Timeline]:
    """Stages and schedule whose peak fits, however long actions take; the fastest that was found."""

    def round_robin(limit_bytes: int) -> tuple[Partition, Dispatch, str]:
        return _round_robin(chain, options, limit_bytes, bar)

    if options.effort is None or options.mode == "forward":
        return _fitting(chain, bar, capture, round_robin)
    found = [_fitting(chain, bar, capture, lambda limit: _searched(chain, options, limit, bar))]
    if options.max_traffic is None:
        with suppress(PartitionError):
            found.append(_fitting(chain, bar, capture, round_robin))
    return min(found, key=lambda item: item[2].makespan_s)


def _fitting(
    chain: SegmentChain,
    bar: tqdm[Any] | None,
    capture: Capture | None,
    make: Callable[[int], tuple[Partition, Dispatch, str]],
) -> tuple[Partition, Schedule, Timeline]:
    """Makes a dispatch for less and less memory until its schedule fits.

    A partition is held to a bound on what its schedule takes, which the schedule's own can exceed.
    """
    usable, excess = chain.hardware.usable_bytes, 0
    for share in _MEMORY_SHARES:
        try:
            partition, dispatch, mode = make(int(share * usable))
        except PartitionError:
            if excess:
                break
            raise
        if capture is not None:
            announce(bar, FindStageMemory.name)
            partition = FindStageMemory(capture, chain).run(partition)
        announce(bar, InsertTransfers.name)
        schedule = lay_out(chain, partition, dispatch, mode)
        excess = max(gpu_memory_bounds(schedule)) - usable
        if excess <= 0:
            return replace(partition, memory_limit_bytes=usable), schedule, simulate(schedule)
    raise PartitionError(
        f"no schedule was found whose peak fits in the {usable:,} usable bytes of {chain.hardware.name}: the "
        f"last one needs {usable + excess:,}. Use more microbatches (smaller ones) or GPUs with more memory"
    )


def _round_robin(
    chain: SegmentChain, options: PlanOptions, limit_bytes: int, bar: tqdm[Any] | None
) -> tuple[Partition, Dispatch, str]:
    announce(bar, PartitionStages.name)
    partition = PartitionStages(
        options.gpus,
        options.microbatches,
        memory_limit_bytes=limit_bytes,
        time_limit_s=options.solver_time_s,
        seed=options.seed,
        mode=options.mode,
    ).run(chain)
    return partition, DispatchRoundRobin(options.gpus, options.microbatches).run(partition), options.mode


def _searched(
    chain: SegmentChain, options: PlanOptions, limit_bytes: int, bar: tqdm[Any] | None
) -> tuple[Partition, Dispatch, str]:
    # It compiles its inner loop; who does not search need not wait for that.
    from rpcompile.passes.search_schedule import SearchSchedule

    announce(bar, SearchSchedule.name)
    found = SearchSchedule(
        options.gpus,
        options.microbatches,
        max_traffic=options.max_traffic,
        effort=str(options.effort),
        seed=options.seed,
        memory_limit_bytes=limit_bytes,
    ).run(chain)
    if found.unused_gpus:
        names = ", ".join(map(str, found.unused_gpus))
        _log.warning("there is not enough work for %d GPUs; idle: %s", options.gpus, names)
    return found.partition, found.dispatch, "sync"


def progress_bar(progress: bool | None) -> tqdm[Any]:
    """A bar over the passes; None: after two seconds, if standard error is a terminal."""
    disable, delay = (None, 2.0) if progress is None else (not progress, 0.0)
    return tqdm(total=12, desc="capture", leave=False, disable=disable, delay=delay)


def announce(bar: tqdm[Any] | None, step: str) -> None:
    """Shows that a step begins."""
    if bar is not None:
        bar.update()
        bar.set_description(step)


def find_hardware(gpu: str | Hardware | None) -> Hardware:
    """The GPU that is named, else the one that is found, else the default.

    Raises:
        InvalidArgument: No such GPU.
    """
    if gpu is None or isinstance(gpu, str):
        return catalogue.lookup(gpu or catalogue.detect() or DEFAULT_GPU)
    return gpu


def _check(options: PlanOptions) -> None:
    for option, value in (("gpus", options.gpus), ("microbatches", options.microbatches)):
        if value < 1:
            raise InvalidArgument(f"{option}={value}; at least 1 is needed")
    if options.effort not in (None, *EFFORTS):
        raise InvalidArgument(f"effort={options.effort!r}; it must be None, {', '.join(map(repr, EFFORTS))}")


def _with_given_seconds(chain: SegmentChain, profile: Profile) -> SegmentChain:
    given = profile.segments
    names = [segment.name for segment in chain.segments]
    if [segment.name for segment in given] != names:
        raise InvalidArgument(
            f"the profile is of another model: it has {_names([s.name for s in given])}, this model "
            f"{_names(names)}; make one with `rpcompile profile`"
        )
    segments = tuple(
        replace(own, forward_s=other.forward_s, backward_s=other.backward_s, source="given")
        for own, other in zip(chain.segments, given, strict=True)
    )
    return replace(chain, segments=segments)


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
