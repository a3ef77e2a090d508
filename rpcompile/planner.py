"""From a model to a plan: the line of passes, without running anything.

    capture_model -> CapturedModel.bind -> SegmentChain -> plan_chain -> Plan

A model is captured and priced once and can then be bound to any microbatch size in its range, and
planned for any GPUs. `rpcompile/chain_planner.py` makes the plan of a chain, also from a profile;
`rpcompile/api.py` goes on from here to a program.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from rpcompile import hardware as catalogue
from rpcompile.attention_choice import offload, offload_these
from rpcompile.chain_planner import (
    ModelDescription,
    laid_out_again,
    plan_chain,
    plan_profile,
    update_s_per_byte,
)
from rpcompile.cost_file import CostFile
from rpcompile.errors import InvalidArgument, PlanMismatch
from rpcompile.mixed_gpus import Box, box_of, with_ratios
from rpcompile.passes.bind_chain import BindChain
from rpcompile.passes.canonicalize_graph import CanonicalizeGraph
from rpcompile.passes.capture_graph import CaptureGraph, ExampleInputs
from rpcompile.passes.choose_tiles import ChooseTiles
from rpcompile.passes.estimate_costs import EstimateCosts
from rpcompile.passes.find_cuts import FindCuts
from rpcompile.passes.find_stage_memory import FindStageMemory
from rpcompile.passes.measure_chain import MeasureChain
from rpcompile.passes.price_attention import PriceAttention
from rpcompile.progress import announce, progress_bar
from rpcompile.runtime.stopwatch import Stopwatch
from rpcompile.scheduling import PlanOptions
from rpcompile.unknown_operators import WORTH_A_WARNING, UnknownShare, unknown_shares

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from os import PathLike

    from torch import nn
    from tqdm import tqdm

    from rpcompile.ir import Capture, CostedGraph, Hardware, Segment, SegmentChain
    from rpcompile.plan import Plan
    from rpcompile.profile import Profile, ProfileSegment

__all__ = [
    "CapturedModel",
    "ExampleInputs",
    "ModelDescription",
    "PlanOptions",
    "capture_model",
    "find_gpu",
    "find_hardware",
    "laid_out_again",
    "plan_chain",
    "plan_profile",
    "update_s_per_byte",
]

DEFAULT_GPUS = 8
DEFAULT_GPU = "rtx4090"
SOURCES = ("estimated", "measured")  # of seconds, besides profiles
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
