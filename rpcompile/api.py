"""`rpcompile.compile`: the line of passes from a module to a program."""

from __future__ import annotations

import logging
import platform
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from rpcompile import hardware as catalogue
from rpcompile.compiled import Compiled, Executable
from rpcompile.errors import (
    BatchError,
    InvalidArgument,
    MissingExampleInputs,
    NotBuiltYet,
    PartitionError,
    PlanMismatch,
)
from rpcompile.huggingface import infer_example_inputs
from rpcompile.ir import Capture, Hardware, Partition, Program, Schedule, SegmentChain
from rpcompile.passes.bind_chain import BindChain
from rpcompile.passes.canonicalize_graph import CanonicalizeGraph
from rpcompile.passes.capture_graph import CaptureGraph, ExampleInputs, symbol_dims
from rpcompile.passes.estimate_costs import EstimateCosts
from rpcompile.passes.find_cuts import FindCuts
from rpcompile.passes.insert_event_waits import InsertEventWaits
from rpcompile.passes.insert_transfers import InsertTransfers
from rpcompile.passes.lower_to_program import LowerToProgram
from rpcompile.passes.partition_stages import PartitionStages
from rpcompile.passes.schedule_round_robin import ScheduleRoundRobin
from rpcompile.plan import Plan, Prediction
from rpcompile.runtime.batches import largest_divisor
from rpcompile.runtime.engine import Engine
from rpcompile.simulate import Timeline, simulate
from rpcompile.unknown_operators import WORTH_A_WARNING, UnknownShare, unknown_shares
from rpcompile.verify import verify_schedule

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from os import PathLike

    from torch import nn

DEFAULT_GPUS = 8
DEFAULT_GPU = "rtx4090"
_MEMORY_SHARES = (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5)
_log = logging.getLogger("rpcompile")


@dataclass(frozen=True)
class _Options:
    """What a plan is made for, after defaults are filled in."""

    gpus: int
    microbatches: int
    hardware: Hardware
    solver_time_s: float
    seed: int


def compile(
    model: nn.Module,
    gpus: int | None = None,
    *,
    example_inputs: Mapping[str, torch.Tensor] | Sequence[torch.Tensor] | torch.Tensor | None = None,
    microbatches: int | None = None,
    gpu: str | Hardware | None = None,
    devices: Sequence[str] | None = None,
    mode: str = "sync",
    plan: Plan | str | PathLike[str] | None = None,
    solver_time_s: float = 3.0,
    seed: int = 0,
    progress: bool | None = None,
) -> Compiled:
    """Compiles a model into a program that trains it on `gpus` GPUs, weights staying on the host.

    Args:
        model: The module, in the state it will train in: training flag, `requires_grad` and dtypes are
            captured. Its first output must be the loss. Weights may be on the meta device if only the
            plan is wanted.
        gpus: Number of GPUs; 8 unless a plan says otherwise.
        example_inputs: One whole batch as it will be passed to `forward_backward`: a dict of keyword
            tensors, a tuple of positional ones, or one tensor. Only shapes and dtypes matter. Inferred
            for Hugging Face models that take `input_ids` and `labels`. At run time the batch size, and
            the sequence length of integer inputs, may differ.
        microbatches: Parts that each batch is split into. Default: the largest divisor of the example's
            batch size up to twice the number of GPUs.
        gpu: Kind of GPU to plan for: a name from `rpcompile.hardware.names()`, or a `Hardware` with
            figures of your own. Default: the one that is found, else "rtx4090".
        devices: One device name per GPU. Only "cpu" (a virtual GPU on a thread of its own) so far.
        mode: "sync": the gradients of an iteration are complete when `forward_backward` returns.
        plan: A plan, or the path of one saved by `plan.save`, to use without solving.
        solver_time_s: Seconds the partition solver may take.
        seed: Seed of the partition solver.
        progress: Show a progress bar; default: if standard error is a terminal.

    Returns:
        The compiled model.

    Raises:
        RpcompileError: A subclass that says what is wrong: see `rpcompile.errors`.
    """
    loaded = plan if plan is None or isinstance(plan, Plan) else Plan.load(Path(plan))
    gpus = _check_gpus(gpus, loaded)
    _check_modes(mode, devices, gpus)
    example, parts = _microbatch_example(model, example_inputs, gpus, microbatches, loaded)
    options = _Options(gpus, parts, _hardware(gpu, loaded), solver_time_s, seed)
    bar = tqdm(total=10, desc="capture", leave=False, disable=None if progress is None else not progress)
    with bar:
        capture = _capture(model, example, bar)
        if loaded is None:
            loaded = _make_plan(capture, options, "sync", bar)
        else:
            _check_plan(loaded, capture)
        training = _executable(capture, loaded, bar)
    captured: list[Capture] = []

    def evaluation(count: int) -> Executable:
        if not captured:
            captured.append(_capture_eval(model, example))
        evaluated = _make_plan(captured[0], replace(options, microbatches=count), "forward", None)
        return _executable(captured[0], evaluated, None)

    return Compiled(model, training, evaluation)


# ------------------------------------------------------------------- the line


def _capture(model: nn.Module, example: ExampleInputs, bar: tqdm[Any] | None) -> Capture:
    capture = CaptureGraph(example).run(model)
    for notice in capture.notices:
        _log.warning(notice)
    for step in (CanonicalizeGraph(), FindCuts()):
        _announce(bar, step.name)
        capture = step.run(capture)
    return capture


def _make_plan(capture: Capture, options: _Options, mode: str, bar: tqdm[Any] | None) -> Plan:
    started = time.perf_counter()
    _announce(bar, EstimateCosts.name)
    costed = EstimateCosts().run(capture)
    _report_unknown(unknown_shares(costed, capture.example_sizes, options.hardware))
    _announce(bar, BindChain.name)
    chain = BindChain(dict(capture.example_sizes), options.hardware).run(costed)
    partition, schedule, timeline = _schedule(chain, options, mode, bar)
    _announce(bar, "verify")
    verify_schedule(schedule, chain, partition)
    tokens = options.microbatches * chain.bindings.get("batch", 1) * chain.bindings.get("sequence", 1)
    prediction = Prediction(
        iteration_s=timeline.makespan_s,
        tokens_per_s=tokens / timeline.makespan_s if "sequence" in chain.bindings else None,
        bubble=timeline.bubble,
        gpu_peak_bytes=timeline.gpu_peak_bytes,
        host_peak_bytes=timeline.host_peak_bytes,
    )
    _log.info("planned %s in %.2f s", capture.model_name, time.perf_counter() - started)
    return Plan(
        model_name=capture.model_name,
        fingerprint=capture.fingerprint,
        dtype=_main_dtype(capture),
        gpus=options.gpus,
        microbatches=options.microbatches,
        mode=mode,
        chain=chain,
        partition=partition,
        schedule=schedule,
        prediction=prediction,
        provenance=_provenance(options),
    )


def _report_unknown(shares: tuple[UnknownShare, ...]) -> None:
    if shares:
        large = sum(share.time_share for share in shares) > WORTH_A_WARNING
        text = ", ".join(str(share) for share in shares)
        _log.log(
            logging.WARNING if large else logging.INFO,
            "no FLOP formula is known for %s; counted by their bytes, so the prediction may be low",
            text,
        )


def _schedule(
    chain: SegmentChain, options: _Options, mode: str, bar: tqdm[Any] | None
) -> tuple[Partition, Schedule, Timeline]:
    """Stages and schedule whose simulated peak fits.

    The partition is held to a bound on what its schedule takes. Should the simulated peak exceed the
    memory all the same, the partition is made again for less.
    """
    usable, excess = chain.hardware.usable_bytes, 0
    for share in _MEMORY_SHARES:
        _announce(bar, PartitionStages.name)
        stages = PartitionStages(
            options.gpus,
            options.microbatches,
            memory_limit_bytes=int(share * usable),
            time_limit_s=options.solver_time_s,
            seed=options.seed,
            mode=mode,
        )
        try:
            partition = stages.run(chain)
        except PartitionError:
            if excess:
                break
            raise
        schedule = ScheduleRoundRobin(chain, options.gpus, options.microbatches, mode).run(partition)
        for step in (InsertTransfers(chain), InsertEventWaits()):
            _announce(bar, step.name)
            schedule = step.run(schedule)
        timeline = simulate(schedule)
        excess = max(timeline.gpu_peak_bytes) - usable
        if excess <= 0:
            return replace(partition, memory_limit_bytes=usable), schedule, timeline
    raise PartitionError(
        f"no schedule was found whose peak fits in the {usable:,} usable bytes of {chain.hardware.name}: the "
        f"last one needs {usable + excess:,}. Use more microbatches (smaller ones) or GPUs with more memory"
    )


def _executable(capture: Capture, plan: Plan, bar: tqdm[Any] | None) -> Executable:
    _announce(bar, LowerToProgram.name)
    program: Program = LowerToProgram(capture, plan.chain, plan.partition).run(plan.schedule)
    return Executable(plan, program, Engine(program, plan.chain))


def _capture_eval(model: nn.Module, example: ExampleInputs) -> Capture:
    flags = {module: module.training for module in model.modules()}
    try:
        return _capture(model.eval(), example, None)
    finally:
        for module, training in flags.items():
            module.training = training


def _announce(bar: tqdm[Any] | None, step: str) -> None:
    if bar is not None:
        bar.update()
        bar.set_description(step)


# ------------------------------------------------------------------- arguments


def _check_gpus(gpus: int | None, plan: Plan | None) -> int:
    if plan is not None:
        if gpus is not None and gpus != plan.gpus:
            raise PlanMismatch(
                f"the plan is for {plan.gpus} GPUs, not {gpus}; leave gpus out, or compile without the plan"
            )
        return plan.gpus
    gpus = DEFAULT_GPUS if gpus is None else gpus
    if gpus < 1:
        raise PartitionError(f"gpus={gpus}; at least 1 is needed")
    return gpus


def _check_modes(mode: str, devices: Sequence[str] | None, gpus: int) -> None:
    if mode == "async":
        raise NotBuiltYet("mode='async' is not built yet; use mode='sync'")
    if mode != "sync":
        raise InvalidArgument(f"mode={mode!r}; it must be 'sync'")
    if devices is None:
        return
    if len(devices) != gpus:
        raise InvalidArgument(f"devices has {len(devices)} entries for {gpus} GPUs; give one a GPU")
    other = [device for device in devices if torch.device(device).type != "cpu"]
    if other:
        raise NotBuiltYet(f"device {other[0]!r} cannot run programs yet; use devices={['cpu'] * gpus!r}")


def _hardware(gpu: str | Hardware | None, plan: Plan | None) -> Hardware:
    if plan is not None:
        return plan.chain.hardware
    if isinstance(gpu, Hardware):
        return gpu
    return catalogue.lookup(gpu or catalogue.detect() or DEFAULT_GPU)


def _microbatch_example(
    model: nn.Module, example_inputs: object, gpus: int, microbatches: int | None, plan: Plan | None
) -> tuple[ExampleInputs, int]:
    """The example of one microbatch, and the number of microbatches."""
    if plan is not None:
        if microbatches is not None and microbatches != plan.microbatches:
            raise PlanMismatch(f"the plan is for {plan.microbatches} microbatches, not {microbatches}")
        microbatches = plan.microbatches
    if microbatches is not None and microbatches < 1:
        raise InvalidArgument(f"microbatches={microbatches}; at least 1 is needed")
    if example_inputs is None:
        example_inputs = infer_example_inputs(model, microbatches or 2 * gpus)
    if example_inputs is None:
        raise MissingExampleInputs(
            f"the inputs of {type(model).__name__} cannot be inferred; pass one batch as it will be passed "
            f"to forward_backward, e.g. example_inputs={{'input_ids': ids, 'labels': labels}} for keywords, "
            f"or example_inputs=(x, y) for positions"
        )
    whole = ExampleInputs.of(example_inputs)
    dims = symbol_dims(whole.named())
    sizes = [whole.named()[key].shape[0] for key, names in dims.items() if names.get(0) == "batch"]
    batch = sizes[0] if sizes else 1
    count = microbatches or largest_divisor(batch, 2 * gpus)
    if batch % count:
        raise BatchError(
            f"the example's batch of {batch} does not divide into {count} microbatches; pass a batch that is "
            f"a multiple of {count}, or microbatches={largest_divisor(batch, count)}"
        )
    return _narrow(whole, dims, batch // count), count


def _narrow(whole: ExampleInputs, dims: dict[str, dict[int, str]], size: int) -> ExampleInputs:
    def cut(key: str, value: torch.Tensor) -> torch.Tensor:
        batch_dim = next((dim for dim, name in dims.get(key, {}).items() if name == "batch"), None)
        return value if batch_dim is None else value.narrow(batch_dim, 0, size)

    args = tuple(cut(str(index), value) for index, value in enumerate(whole.args))
    return ExampleInputs(args, {key: cut(key, value) for key, value in whole.kwargs.items()})


def _check_plan(plan: Plan, capture: Capture) -> None:
    if plan.fingerprint != capture.fingerprint:
        raise PlanMismatch(
            f"the plan was made for another model: {plan.model_name} {plan.fingerprint[:12]}, this one is "
            f"{capture.model_name} {capture.fingerprint[:12]} (parameter names, shapes, dtypes, "
            f"requires_grad and the captured graph must be the same); compile without plan= to make a new one"
        )
    for problem in _differences(plan.chain, capture):
        raise PlanMismatch(problem)


def _differences(chain: SegmentChain, capture: Capture) -> Iterator[str]:
    planned = tuple(name for segment in chain.segments for name in segment.nodes)
    if planned != capture.order:
        yield (
            "the plan divides the model into other segments than this version of rpcompile does; compile "
            "without plan= to make a new one"
        )


def _main_dtype(capture: Capture) -> str:
    bytes_of: dict[str, int] = {}
    for spec in capture.parameters:
        bytes_of[spec.dtype] = bytes_of.get(spec.dtype, 0) + spec.nbytes
    return max(bytes_of, key=lambda dtype: bytes_of[dtype], default="none")


def _provenance(options: _Options) -> dict[str, str]:
    from rpcompile import __version__

    return {
        "rpcompile": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "solver_seed": str(options.seed),
    }
