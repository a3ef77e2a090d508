"""`plan` and `fit`: from a model or a profile to a plan, or to the largest size that fits."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rpcompile.cli import options
from rpcompile.errors import InvalidArgument

if TYPE_CHECKING:
    from rpcompile.mixed_gpus import Box
    from rpcompile.planner import CapturedModel

DEFAULT_BATCH = 64
DEFAULT_GPUS = 8


def plan(
    model: options.ModelName = None,
    profile: options.ProfileFile = None,
    gpus: options.Gpus = None,
    gpu: options.Box = None,
    batch: options.Batch = None,
    seq: options.Sequence = None,
    microbatches: options.Microbatches = None,
    mode: options.Mode = "sync",
    lora: options.Lora = None,
    dtype: options.Dtype = None,
    effort: options.Effort = "fast",
    max_traffic: options.MaxTraffic = None,
    optimizer_ns: options.OptimizerNs = None,
    fused_segments: options.FusedSegments = None,
    tiles: options.Tiles = "auto",
    attention: options.Attention = "auto",
    head_groups: options.HeadGroups = "auto",
    host_gb: Annotated[
        float | None,
        typer.Option(
            "--host-gb",
            min=0,
            help="Host memory in GB that attention outputs and the gradients of replicas must fit in "
            "(default: enough).",
        ),
    ] = None,
    solver_time: options.SolverTime = 3.0,
    seed: Annotated[int, typer.Option("--seed", help="Of the solver and the search.")] = 0,
    out: Annotated[Path | None, typer.Option("--out", help="Save the plan here.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="List built-in models and GPUs.")] = False,
    as_json: options.Json = False,
) -> None:
    """Partition and schedule a model for some GPUs, which need not be here."""
    if list_:
        _list(as_json)
        return
    from rpcompile.chain_planner import PlanOptions, plan_profile, update_s_per_byte

    check_one_source(model, profile)
    # A profile says what its GPUs are; looking for one here would load torch.
    unnamed = profile is not None and gpu is None
    box, number = (None, gpus or DEFAULT_GPUS) if unnamed else find_box(gpu, gpus)
    level = _level(effort)
    host_bytes = None if host_gb is None else int(host_gb * 1e9)

    def asked(count: int, dtype: str) -> PlanOptions:
        search = (solver_time, seed, level, max_traffic)
        update_s = update_s_per_byte(optimizer_ns, dtype)
        links = None if box is None else box.links
        more = (links, attention, host_bytes, update_s, fused_segments)
        return PlanOptions(number, count, mode, *search, *more)

    if profile is not None:
        given = {"tiles": tiles, "head_groups": head_groups}
        chosen = {name: None if value == "auto" else value for name, value in given.items()}
        _refuse_sizes(batch=batch, seq=seq, lora=lora, dtype=dtype, **chosen)
        from rpcompile.profile import Profile

        loaded = Profile.load(profile)
        given = asked(microbatches or 2 * number, "given")
        found = plan_profile(loaded, given, profile.stem, None, box)
    else:
        from rpcompile.fit import naming_the_longest

        assert model is not None
        assert box is not None
        if any(box.speeds):
            raise InvalidArgument(f"--gpu {gpu}: speeds are for --profile; a model is priced for each GPU")
        rows, count = divide(batch, microbatches, number)
        captured = capture(model, dtype, lora)
        sizes, given = sizes_of(captured, rows, seq), asked(count, captured.described().dtype)
        divided = _divided(tiles, head_groups)
        bind = functools.partial(captured.bind, box, sizes, **divided)
        with naming_the_longest(captured, box, sizes, gpus=number, microbatches=count, **divided):
            found = captured.plan(bind(), given, offloading=functools.partial(bind, offloading=True))
    if out is not None:
        found.save(out)
    from rpcompile.plan_summary import summary

    text = str(found) + (f"Saved to {out}\n" if out is not None else "")
    options.show(text, summary(found), as_json)


def fit(
    model: options.ModelName,
    gpu: options.Box = None,
    gpus: options.Gpus = None,
    batch: Annotated[
        int | None,
        typer.Option("--batch", min=1, help="Rows of a microbatch; asks for the longest sequence."),
    ] = None,
    seq: Annotated[
        int | None, typer.Option("--seq", min=1, help="Tokens of a row; asks for the largest microbatch.")
    ] = None,
    microbatches: Annotated[int, typer.Option("--microbatches", min=1, help="Of a batch.")] = 16,
    host_gb: Annotated[
        float | None, typer.Option("--host-gb", min=0, help="Host memory in GB (default: this machine's).")
    ] = None,
    lora: options.Lora = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
) -> int:
    """Find the largest microbatch, or the longest sequence, whose plan fits GPU and host."""
    from rpcompile.fit import largest_that_fits
    from rpcompile.host_memory import installed_bytes

    assert model is not None
    if (batch is None) == (seq is None):
        raise InvalidArgument(
            "give --seq to find the largest microbatch, or --batch to find the longest sequence"
        )
    box, number = find_box(gpu, gpus)
    captured = capture(model, dtype, lora)
    asked, fixed = ("batch", {"sequence": seq}) if batch is None else ("sequence", {"batch": batch})
    found = largest_that_fits(
        captured,
        box,
        asked,
        {name: size for name, size in fixed.items() if size is not None},
        gpus=number,
        microbatches=microbatches,
        host_bytes=installed_bytes() if host_gb is None else int(host_gb * 1e9),
    )
    options.show(str(found), found.as_dict(), as_json)
    return 0 if found.size else 1


COMMANDS = (plan, fit)


# ------------------------------------------------------------------- what other commands use too


def check_one_source(model: str | None, profile: Path | None) -> None:
    """A model or a profile, not both."""
    if (model is None) == (profile is None):
        raise InvalidArgument("give a MODEL or --profile FILE, one of them")


def divide(batch: int | None, microbatches: int | None, gpus: int) -> tuple[int, int]:
    """Rows of a microbatch, and microbatches."""
    from rpcompile.runtime.batches import largest_divisor

    batch = DEFAULT_BATCH if batch is None else batch
    count = microbatches or largest_divisor(batch, 2 * gpus)
    if batch % count:
        raise InvalidArgument(
            f"--batch {batch} does not divide into --microbatches {count}; use a multiple of {count}, or "
            f"--microbatches {largest_divisor(batch, count)}"
        )
    return batch // count, count


def capture(name: str, dtype: str | None = None, lora: int | None = None) -> CapturedModel:
    """Captures a model by name, with example inputs of two rows."""
    from rpcompile import named_models

    named_models.check(name)
    from rpcompile.huggingface import infer_example_inputs
    from rpcompile.planner import ExampleInputs, capture_model
    from rpcompile.progress import progress_bar

    found = named_models.build(name, dtype, lora)
    example = found.example_inputs
    if example is None:
        example = infer_example_inputs(found.module, 2)
    if example is None:
        raise InvalidArgument(
            f"the inputs of {type(found.module).__name__} cannot be inferred; give module:factory that "
            "returns the module and its example inputs"
        )
    with progress_bar(None) as bar:
        return capture_model(found.module, ExampleInputs.of(example), bar)


def _level(effort: str) -> str | None:
    """`--effort` as `PlanOptions` has it."""
    from rpcompile.scheduling import EFFORTS

    if effort not in ("none", *EFFORTS):
        raise InvalidArgument(f"--effort {effort!r}; choose none, {', '.join(EFFORTS)}")
    return None if effort == "none" else effort


def _divided(tiles: str, head_groups: str) -> dict[str, Any]:
    """The two as options of `CapturedModel.bind`."""
    given = {"tiles": tiles, "head_groups": head_groups}
    return {name: int(text) if text.isdigit() else text for name, text in given.items()}


def find_box(gpu: str | None, gpus: int | None) -> tuple[Box, int]:
    """What `--gpu` and `--gpus` say: the GPUs, or one if all are alike; and how many there are."""
    from rpcompile.mixed_gpus import Box

    if gpu is None:
        from rpcompile.planner import find_gpu

        found = Box.of([find_gpu(None)])
    else:
        found = Box.parse(gpu)
    listed = gpu is not None and ("," in gpu or re.match(r"\d+x", gpu) is not None)
    if listed and gpus not in (None, len(found.gpus)):
        raise InvalidArgument(
            f"--gpu {gpu} lists {len(found.gpus)} GPUs, --gpus says {gpus}; leave --gpus out"
        )
    return found, len(found.gpus) if listed else gpus or DEFAULT_GPUS


def sizes_of(captured: CapturedModel, rows: int, sequence: int | None) -> dict[str, int]:
    """Sizes of one microbatch, by the names that the model was captured with."""
    sizes = {"batch": rows}
    if sequence is not None:
        sizes["sequence"] = sequence
    elif "sequence" in captured.capture.symbols:
        sizes["sequence"] = captured.capture.example_sizes["sequence"]
    return sizes


def _refuse_sizes(**given: Any) -> None:
    for option, value in given.items():
        if value is not None:
            raise InvalidArgument(
                f"--{option.replace('_', '-')} {value}: a profile is for one size of microbatch; leave it out"
            )


def _list(as_json: bool) -> None:
    from rpcompile import hardware, named_models

    found = {"models": list(named_models.names()), "gpus": list(hardware.names())}
    text = f"Models  {', '.join(found['models'])}\nGPUs    {', '.join(found['gpus'])}\n"
    options.show(text, found, as_json)
