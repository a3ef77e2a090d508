"""`probe` and `profile`: figures of this machine, and of a model's segments."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rpcompile.cli import options, planning
from rpcompile.errors import InvalidArgument


def probe(
    out: Annotated[Path, typer.Option("--out", help="Hardware file to write; end it in .json.")] = Path(
        "hardware.json"
    ),
    like: Annotated[
        str | None, typer.Option("--like", help="Catalogue GPU for what cannot be measured here.")
    ] = None,
    seconds: Annotated[float, typer.Option("--seconds", min=0.01, help="Of each measurement.")] = 0.5,
    as_json: options.Json = False,
) -> None:
    """Measure this machine: FLOP/s, memory bandwidth, transfers; writes a hardware file for --gpu."""
    if out.suffix != ".json":
        raise InvalidArgument(f"--out {out}: a hardware file ends in .json")
    from rpcompile.probe import probe as measure

    found = measure(like, seconds=seconds)
    found.save(out)
    hardware = found.hardware
    rows = {
        "flops_per_s": (hardware.flops_per_s, "matrix product"),
        "memory_bytes_per_s": (hardware.memory_bytes_per_s, "device memory"),
        "h2d_bytes_per_s": (hardware.h2d_bytes_per_s, "host to device"),
        "d2h_bytes_per_s": (hardware.d2h_bytes_per_s, "device to host"),
        "host_memory_bytes_per_s": (found.host_memory_bytes_per_s, "host memory"),
        "h2d_both_bytes_per_s": (found.h2d_both_bytes_per_s, "host to device, both directions busy"),
    }
    lines = [f"{hardware.name}"]
    for name, (rate, what) in rows.items():
        if rate is not None:
            unit = "TFLOP/s" if name == "flops_per_s" else "GB/s"
            source = hardware.sources.get(name, "measured")
            amount = rate / (1e12 if unit == "TFLOP/s" else 1e9)
            lines.append(f"  {what:<38} {amount:>8.2f} {unit:<8} {source}")
    data = {name: rate for name, (rate, _) in rows.items()} | {"written": str(out), "name": hardware.name}
    options.show("\n".join([*lines, f"Wrote {out}; plan for it with --gpu {out}"]), data, as_json)


def profile(
    model: options.ModelName,
    gpu: options.Gpu = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Rows of one microbatch.")] = 4,
    seq: options.Sequence = None,
    lora: options.Lora = None,
    dtype: options.Dtype = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time each distinct segment on --device, instead of estimating.")
    ] = False,
    device: Annotated[str, typer.Option("--device", help="What --measure runs on: cpu, cuda:0.")] = "cpu",
    costs: Annotated[
        Path | None, typer.Option("--costs", help="Write the FLOP and byte expressions here, too.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Profile file to write.")] = Path("profile.json"),
    as_json: options.Json = False,
) -> None:
    """Write what each segment of a model costs, for `plan --profile` here or elsewhere."""
    from rpcompile.planner import find_hardware
    from rpcompile.profile import Profile

    assert model is not None
    captured = planning.capture(model, dtype, lora)
    source = "measured" if measure else "estimated"
    hardware, sizes = find_hardware(gpu), planning.sizes_of(captured, batch, seq)
    chain = captured.bind(hardware, sizes, seconds=source, device=device)
    Profile.from_chain(chain).save(out)
    if costs is not None:
        captured.save_costs(costs)
    from rpcompile.units import seconds, size

    forward_s = sum(segment.forward_s for segment in chain.segments)
    backward_s = sum(segment.backward_s for segment in chain.segments)
    weights = sum(segment.weight_bytes for segment in chain.segments)
    data = {
        "written": str(out),
        "source": source,
        "segments": len(chain.segments),
        "sizes": chain.bindings,
        "forward_s": forward_s,
        "backward_s": backward_s,
        "weight_bytes": weights,
    }
    text = (
        f"{captured.capture.model_name} on {hardware.name}, one microbatch ({source}): "
        f"{len(chain.segments)} segments, forward {seconds(forward_s)}, backward {seconds(backward_s)}, "
        f"weights {size(weights)}\nWrote {out}\n"
    )
    options.show(text, data, as_json)


COMMANDS = (probe, profile)
