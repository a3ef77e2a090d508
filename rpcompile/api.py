"""`rpcompile.compile`: the line of passes from a module to a program."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rpcompile.attention_choice import check_attention
from rpcompile.compiled import Compiled, Executable, Makers, TrainingOptions, cast_floats
from rpcompile.errors import (
    BatchError,
    InvalidArgument,
    MissingExampleInputs,
    NotBuiltYet,
    PlanMismatch,
    require_at_least,
)
from rpcompile.fit import naming_the_longest
from rpcompile.host_memory import installed_bytes
from rpcompile.huggingface import infer_example_inputs
from rpcompile.mixed_gpus import Box, box_of
from rpcompile.model_loss import ModelWithLoss
from rpcompile.passes.capture_graph import ExampleInputs, symbol_dims
from rpcompile.passes.lower_to_program import LowerToProgram
from rpcompile.plan import Plan
from rpcompile.planner import (
    DEFAULT_GPUS,
    SOURCES,
    CapturedModel,
    PlanOptions,
    capture_model,
    find_gpu,
    plan_chain,
    update_s_per_byte,
)
from rpcompile.profile import Profile
from rpcompile.progress import announce, progress_bar
from rpcompile.runtime.batches import largest_divisor
from rpcompile.runtime.engine import Engine, RuntimeOptions
from rpcompile.runtime.host_weights import set_dtypes
from rpcompile.runtime.weight_arenas import WeightArenas

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from os import PathLike

    from torch import nn
    from torch.amp.grad_scaler import GradScaler
    from tqdm import tqdm

    from rpcompile.ir import Capture, Hardware, Program, SegmentChain


def compile(
    model: nn.Module,
    gpus: int | Sequence[str | Hardware] | None = None,
    *,
    example_inputs: Mapping[str, torch.Tensor] | Sequence[torch.Tensor] | torch.Tensor | None = None,
    microbatches: int | None = None,
    gpu: str | Hardware | None = None,
    devices: Sequence[str] | None = None,
    mode: str | None = None,
    compute_dtype: torch.dtype | None = None,
    grad_scaler: GradScaler | None = None,
    loss_fn: Callable[..., torch.Tensor] | None = None,
    plan: Plan | str | PathLike[str] | None = None,
    seconds: str | Profile | PathLike[str] = "estimated",
    tiles: str | int = "auto",
    attention: str = "auto",
    head_groups: str | int = "auto",
    effort: str | None = "fast",
    max_traffic: float | None = None,
    optimizer_ns: float | None = None,
    fused_segments: int | None = None,
    solver_time_s: float = 3.0,
    seed: int = 0,
    progress: bool | None = None,
    pin: str = "auto",
    timeout_s: float = 600.0,
    detect_nan: bool = False,
    compile_stages: bool = False,
) -> Compiled:
    """Compiles a model into a program that trains it on `gpus` GPUs, weights staying on the host.

    Args:
        model: The module, in the state it will train in: training flag, `requires_grad` and dtypes are
            captured. Its first output must be the loss, unless `loss_fn` is given. Weights may be on the
            meta device if only the plan is wanted.
        gpus: Number of GPUs, 8 unless a plan says otherwise; or, where they are not alike, a list with what
            each is, as for `gpu`: `["rtx4090", "rtx4090", "rtx3090"]`.
        example_inputs: One whole batch as it will be passed to `forward_backward`: a dict of keyword
            tensors, a tuple of positional ones, or one tensor. Only shapes and dtypes matter. Inferred
            for Hugging Face models that take `input_ids` and `labels`. At run time the batch size, and
            the sequence length of integer inputs, may differ.
        microbatches: Parts that each batch is split into. Default: the largest divisor of the example's
            batch size up to twice the number of GPUs.
        gpu: Kind of GPU to plan for: a name from `rpcompile.hardware.names()`, or a `Hardware` with
            figures of your own, or the path of a hardware file of `rpcompile probe`. Default: the one that is
            found, else "rtx4090". What such files say of host memory and links that GPUs share is simulated.
        devices: One device name per GPU: all "cpu" (virtual GPUs, on threads of their own), or CUDA devices,
            of which several GPUs may share one: `["cuda:0"] * 4`. Default: the first `gpus` CUDA devices
            where there are as many, else "cpu".
        mode: "sync": every iteration computes with all updates before it. "async": iteration i computes,
            forward and backward, with the weights after max(i - 1, 0) updates, while the next update is
            under way; the plan is the one whose iterations follow one another fastest. That is meant for
            fine-tuning, where weights change little in a step; it keeps a copy of the trainable weights on
            the host. Weights that you load or change are used at once; not so changes through `.data`, of
            which torch keeps no account. Default: as the plan says, else "sync".
        compute_dtype: torch.bfloat16 or torch.float16 to compute in it with float32 masters on the host.
            The model's own parameters become the masters: trainable ones are made float32, frozen ones
            `compute_dtype`, in place. Floating-point inputs are cast to it; buffers keep their dtype.
            Gradients come back in `compute_dtype` and are summed over jobs and calls in float32.
        grad_scaler: A `torch.amp.GradScaler`, for float16: `forward_backward` scales the gradients,
            `compiled.step` unscales them and skips what is not finite; call its `update` as usual.
        loss_fn: `loss_fn(outputs, labels)` for a model that returns no loss: a function or a module.
            `labels` are the keyword `labels`, or else the last position, and are not passed to the model;
            nor is `num_items_in_batch`, which `loss_fn` gets as a keyword where it is passed.
        plan: A plan, or the path of one saved by `plan.save`, to use without solving.
        seconds: Where the plan's seconds come from: "estimated" (a roofline over FLOPs and bytes), "measured"
            (each distinct segment is timed on the first device, once for all on one machine), or a profile of
            this model, or the path of one: "given".
        tiles: In how many chunks of tokens a stage runs what treats every token by itself, in its forward and
            backward (the LM head with its loss, norms, projections, MLPs and experts). "auto": as few
            as let each segment fit, and the loss in an eighth of a GPU's memory; "loss": the loss only; 1:
            none, so that every sum is taken in the order of plain PyTorch.
        attention: "auto": attention outputs, with their log-sum-exps, go to the host in the forward and come
            back for the backward, instead of being recomputed, where a plan with that is simulated to be
            faster; the host's memory is a limit if the model's weights are in it. "recompute": never.
            "offload": wherever it is possible. Results are the same bit for bit where the forward's kernel is
            the recompute's.
        head_groups: Into how many groups of heads attention's backward is divided, one after another, which
            shrinks the memory that its kernel takes. "auto": as few as let each segment fit; 1: none.
            Gradients are the same.
        effort: "fast" (2 s), "normal" (20 s) or "thorough" (90 s) search for stages, replicas and their
            order together and keep the plan that is predicted to be fastest. Gradients of replicas are
            summed job by job, so results differ from plain PyTorch by rounding. None: one job a stage, so
            that every sum is taken in the order of plain PyTorch.
        max_traffic: Most weight uploads of an iteration; 1.0 is every layer once for each pass of each
            round of `gpus` microbatches. None: no limit.
        optimizer_ns: Nanoseconds that `compiled.step` takes on the host for a trainable parameter, e.g. 0.15
            for AdamW where host memory moves 200 GB/s. The plan is then the fastest with the updates in its
            schedule, and predicts the time of whole steps. None: updates are no part of the plan.
        fused_segments: Most segments of the fused stage, whose forward and backward run at once and which are
            not computed twice. None: as many as pay.
        solver_time_s: Seconds the partition solver may take.
        seed: Seed of the partition solver.
        progress: Show a progress bar; default: if standard error is a terminal.
        pin: On CUDA devices, "auto" moves the model's weights into memory that is registered with CUDA, a
            few pieces a stage, which the GPUs read at full speed. "off" leaves them where they are, which
            is slower: for models that are memory-mapped because they are larger than the host's memory.
        timeout_s: Seconds in which at least one instruction must come to its end; otherwise
            `forward_backward` raises `WorkerTimeout`, which says who waits for whom.
        detect_nan: Check every stage's results and gradients, and raise `NonFinite` that names the stage,
            microbatch, GPU and module of the first that is not finite. Makes the host wait for the GPUs.
        compile_stages: Run stages through `torch.compile`, each distinct one compiled once. Results are
            then equal within rounding, not bit for bit.

    Returns:
        The compiled model.

    Raises:
        RpcompileError: A subclass that says what is wrong: see `rpcompile.errors`.
    """
    loaded = plan if plan is None or isinstance(plan, Plan) else Plan.load(Path(plan))
    hardware = _hardware(gpus, gpu, loaded)
    gpus = _check_gpus(len(gpus) if isinstance(gpus, Sequence) else gpus, loaded)
    mode = _check_mode(mode, loaded)
    _check_dtype(compute_dtype)
    runtime = _runtime(_devices(devices, gpus), pin, timeout_s, detect_nan, compile_stages)
    if compute_dtype is not None:
        runtime = replace(runtime, gradient_dtype=torch.float32)
    example, parts = _microbatch_example(model, example_inputs, gpus, microbatches, loaded)
    module = model if loss_fn is None else ModelWithLoss(model, loss_fn)
    if compute_dtype is not None:
        set_dtypes(module, compute_dtype)
        example = _cast(example, compute_dtype)
    check_attention(attention)
    search = (solver_time_s, seed, effort, max_traffic)
    host_bytes = None if _is_on_meta(module) else installed_bytes()
    means = (hardware.links, attention, host_bytes)
    options = PlanOptions(gpus, parts, mode, *search, *means, fused_segments=fused_segments)
    given = _seconds_source(seconds)
    with progress_bar(progress) as bar:
        captured = capture_model(module, example, bar, compute_dtype)
        if loaded is None:
            update_s = update_s_per_byte(optimizer_ns, captured.described().dtype)
            announce(bar, "bind-chain")
            device = "cpu" if runtime.devices is None else str(runtime.devices[0])
            divided: dict[str, Any] = {"tiles": tiles, "head_groups": head_groups}
            priced = {"seconds": given, "device": device, "progress": progress}
            bind = functools.partial(captured.bind, hardware, **divided, **priced)
            many = {"gpus": gpus, "microbatches": parts}
            with naming_the_longest(captured, hardware, captured.capture.example_sizes, **many, **divided):
                asked = replace(options, update_s_per_byte=update_s)
                others = captured.described(), bar, captured.capture, functools.partial(bind, offloading=True)
                loaded = plan_chain(bind(), asked, *others)
        else:
            _check_plan(loaded, captured.capture)
        pinned = runtime.cuda and pin == "auto"
        # Masters, and the two copies that asynchronous iterations take turns at.
        arenas = WeightArenas(pin=pinned, adopt=pinned, versions=3 if mode == "async" else 1)
        training = _executable(captured.capture, loaded, runtime, arenas, bar)
    chosen = loaded
    for_evaluation: list[CapturedModel] = []

    def evaluation(count: int) -> Executable:
        if not for_evaluation:
            for_evaluation.append(_capture_eval(module, example, compute_dtype))
        found = for_evaluation[0]
        forward = replace(options, microbatches=count, mode="forward", max_traffic=None)
        plan = found.plan(found.bind(hardware), forward, progress=False)
        return _executable(found.capture, plan, runtime, arenas, None)

    def with_outputs() -> Executable:
        return _executable(captured.capture, chosen, runtime, arenas, None, outputs=True)

    makers = Makers(with_outputs, evaluation)
    return Compiled(model, module, training, makers, TrainingOptions(mode, compute_dtype, grad_scaler))


def _is_on_meta(model: nn.Module) -> bool:
    return any(parameter.device.type == "meta" for parameter in model.parameters())


# ------------------------------------------------------------------- running


def _executable(
    capture: Capture,
    plan: Plan,
    runtime: RuntimeOptions,
    arenas: WeightArenas,
    bar: tqdm[Any] | None,
    outputs: bool = False,
) -> Executable:
    announce(bar, LowerToProgram.name)
    program: Program = LowerToProgram(capture, plan.chain, plan.partition, outputs).run(plan.schedule)
    return Executable(plan, program, Engine(program, plan.chain, runtime, arenas))


def _capture_eval(
    model: nn.Module, example: ExampleInputs, compute_dtype: torch.dtype | None
) -> CapturedModel:
    flags = {module: module.training for module in model.modules()}
    try:
        return capture_model(model.eval(), example, compute_dtype=compute_dtype)
    finally:
        for module, training in flags.items():
            module.training = training


# ------------------------------------------------------------------- arguments


def _check_gpus(gpus: int | None, plan: Plan | None) -> int:
    if plan is not None:
        if gpus is not None and gpus != plan.gpus:
            raise PlanMismatch(
                f"the plan is for {plan.gpus} GPUs, not {gpus}; leave gpus out, or compile without the plan"
            )
        return plan.gpus
    gpus = DEFAULT_GPUS if gpus is None else gpus
    require_at_least(1, gpus=gpus)
    return gpus


def _hardware(
    gpus: int | Sequence[str | Hardware] | None, gpu: str | Hardware | None, plan: Plan | None
) -> Box:
    """What each GPU is; or what one is, where all are alike.

    Raises:
        InvalidArgument: It is said twice, or a GPU is unknown.
        PlanMismatch: The plan is for others.
    """
    if isinstance(gpus, Sequence) and gpu is not None:
        raise InvalidArgument(f"gpus={gpus!r} says what the GPUs are, and so does gpu={gpu!r}; leave gpu out")
    if plan is None:
        return Box.of(gpus if isinstance(gpus, Sequence) else [find_gpu(gpu)])
    planned = replace(box_of(plan.chain, plan.gpus), links=plan.links)
    if isinstance(gpus, Sequence):
        asked = [hardware.name for hardware in Box.of(gpus).gpus]
        names = [hardware.name for hardware in planned.gpus]
        if asked != names:
            raise PlanMismatch(
                f"the plan is for {', '.join(names)}, not {', '.join(asked)}; leave gpus out, or compile "
                "without the plan"
            )
    return planned


def _check_mode(mode: str | None, plan: Plan | None) -> str:
    if mode not in (None, "sync", "async"):
        raise InvalidArgument(f"mode={mode!r}; it must be 'sync' or 'async'")
    if plan is None:
        return mode or "sync"
    if plan.mode == "forward":
        raise PlanMismatch("the plan is for evaluation (mode 'forward'), which trains nothing; make another")
    if mode not in (None, plan.mode):
        raise PlanMismatch(
            f"the plan is for mode {plan.mode!r}, not {mode!r}; leave mode out, or compile without the plan"
        )
    return plan.mode


def _devices(devices: Sequence[str] | None, gpus: int) -> tuple[torch.device, ...] | None:
    """The device of each GPU; None for CPU workers."""
    found = torch.cuda.device_count()
    if devices is None:
        return tuple(torch.device("cuda", index) for index in range(gpus)) if 0 < gpus <= found else None
    if len(devices) != gpus:
        raise InvalidArgument(f"devices has {len(devices)} entries for {gpus} GPUs; give one a GPU")
    try:
        named = [torch.device(device) for device in devices]
    except RuntimeError as error:
        raise InvalidArgument(
            f"devices={list(devices)!r}: one of them is unknown; use 'cpu' or 'cuda:<number>'"
        ) from error
    kinds = {device.type for device in named}
    if kinds == {"cpu"}:
        return None
    other = sorted(kinds - {"cuda", "cpu"})
    if other:
        raise NotBuiltYet(f"{other[0]!r} devices cannot run programs; use 'cpu' or 'cuda:<number>'")
    if "cpu" in kinds:
        raise InvalidArgument(f"devices={list(devices)!r} mixes 'cpu' with CUDA devices; use one kind")
    for device in named:
        if (device.index or 0) >= found:
            raise InvalidArgument(
                f"devices names {str(device)!r}, but torch {torch.__version__} sees {found} CUDA devices "
                f"here; use devices={['cpu'] * gpus!r} for CPU workers"
            )
    return tuple(torch.device("cuda", device.index or 0) for device in named)


def _runtime(
    devices: tuple[torch.device, ...] | None,
    pin: str,
    timeout_s: float,
    detect_nan: bool,
    compile_stages: bool,
) -> RuntimeOptions:
    if pin not in ("auto", "off"):
        raise InvalidArgument(f"pin={pin!r}; it must be 'auto' or 'off'")
    if timeout_s <= 0:
        raise InvalidArgument(f"timeout_s={timeout_s}; it must be above 0")
    return RuntimeOptions(devices, pin, timeout_s, detect_nan, compile_stages)


def _check_dtype(compute_dtype: torch.dtype | None) -> None:
    if compute_dtype not in (None, torch.bfloat16, torch.float16):
        raise InvalidArgument(
            f"compute_dtype={compute_dtype}; it must be torch.bfloat16 or torch.float16, or None to compute "
            f"in the parameters' own dtype"
        )


def _cast(example: ExampleInputs, dtype: torch.dtype) -> ExampleInputs:
    return ExampleInputs(
        tuple(cast_floats(value, dtype) for value in example.args),
        {name: cast_floats(value, dtype) for name, value in example.kwargs.items()},
    )


def _seconds_source(seconds: str | Profile | PathLike[str]) -> str | Profile:
    if isinstance(seconds, Profile) or (isinstance(seconds, str) and seconds in SOURCES):
        return seconds
    return Profile.load(seconds)


def _microbatch_example(
    model: nn.Module, example_inputs: object, gpus: int, microbatches: int | None, plan: Plan | None
) -> tuple[ExampleInputs, int]:
    """The example of one microbatch, and the number of microbatches."""
    if plan is not None:
        if microbatches is not None and microbatches != plan.microbatches:
            raise PlanMismatch(f"the plan is for {plan.microbatches} microbatches, not {microbatches}")
        microbatches = plan.microbatches
    if microbatches is not None:
        require_at_least(1, microbatches=microbatches)
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
