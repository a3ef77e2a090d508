"""The catalogue of GPUs that plans can be made for, without having one.

Every figure says whether it was measured, quoted from a specification or assumed; see the notes in
`rpcompile/data/hardware.json`.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from rpcompile.errors import InvalidArgument
from rpcompile.ir import Hardware
from rpcompile.shared_links import SharedLinks

if TYPE_CHECKING:
    from collections.abc import Iterable

_RESERVE_BYTES = 3 * 2**29  # 1.5 GiB
_LATENCY_S = 10e-6
_DTYPES = ("bfloat16", "float16", "float32")
_DEFAULT_REASON = {
    "quoted": "public specification listing",
    "assumed": "no source opened; probe the machine",
    "measured": "see the catalogue's notes",
}


FORMAT, VERSION = "rpcompile.hardware", 1
Seconds = Annotated[float, msgspec.Meta(ge=0)]
Bytes = Annotated[int, msgspec.Meta(ge=0)]
Rate = Annotated[float, msgspec.Meta(gt=0)]


class HardwareNumbers(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One GPU and its link as files hold them; fields as in `ir.Hardware`.

    `flops_per_s` and `memory_bytes_per_s` do not matter to a plan whose times are given.
    """

    name: str
    memory_bytes: Bytes
    usable_bytes: Bytes
    h2d_bytes_per_s: Rate
    d2h_bytes_per_s: Rate
    latency_s: Seconds = 0.0
    flops_per_s: Rate = 1.0
    memory_bytes_per_s: Rate = 1.0
    sources: dict[str, str] = msgspec.field(default_factory=dict[str, str])
    efficiency: dict[str, Rate] = msgspec.field(default_factory=dict[str, float])


class HardwareFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A hardware file, as `rpcompile.probe` writes it; fields as in `HardwareProbe`.

    `roots` and `root_bytes_per_s`, as in `SharedLinks`, are not probed: whoever knows them adds them.
    """

    format: str
    version: int
    hardware: HardwareNumbers
    host_memory_bytes_per_s: Rate | None = None
    h2d_both_bytes_per_s: Rate | None = None
    d2h_both_bytes_per_s: Rate | None = None
    roots: tuple[tuple[Bytes, ...], ...] = ()
    root_bytes_per_s: Rate | None = None


def names() -> tuple[str, ...]:
    """Catalogue names, e.g. "rtx4090"."""
    return tuple(_catalogue())


def lookup(name: str, dtype: str = "bfloat16", *, accumulate: str = "fp32") -> Hardware:
    """One GPU of the catalogue, or of a hardware file.

    Memory is what the card is sold as, in GiB: a "24 GB" card has 24 x 2**30 bytes (drivers report up to
    1 % less). 1.5 GiB of it is reserved for the CUDA context and the allocator's fragmentation.

    Args:
        name: Catalogue name, case does not matter; or the path of a file ending in .json, whose
            figures are for the dtype that they were measured with, whatever `dtype` is.
        dtype: Training dtype: "bfloat16", "float16" or "float32". The catalogue has 16-bit tensor-core
            throughput only; for float32 it is returned as it is, which is an optimistic bound, and
            `sources` says so.
        accumulate: What matrix products are summed in: "fp32", or "fp16", which consumer cards do twice
            as fast and less exactly, for float16 only
            (`torch.backends.cuda.matmul.allow_fp16_accumulation`).

    Raises:
        InvalidArgument: No such GPU, dtype or accumulation, or the file is damaged.
    """
    if name.endswith(".json"):
        return _load(Path(name))
    key = name.lower()
    catalogue = _catalogue()
    if key not in catalogue:
        near = difflib.get_close_matches(key, catalogue, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(catalogue)}"
        raise InvalidArgument(f"hardware {name!r} is not in the catalogue; {hint}")
    if dtype not in _DTYPES:
        raise InvalidArgument(f"dtype {dtype!r} has no throughput; choose one of {', '.join(_DTYPES)}")
    if accumulate not in ("fp32", "fp16") or (accumulate == "fp16" and dtype != "float16"):
        raise InvalidArgument(
            f"accumulate={accumulate!r} with dtype {dtype!r}; choose 'fp32', or 'fp16' with dtype 'float16'"
        )
    entry = catalogue[key]
    efficiency, reached = _efficiency(entry, accumulate)
    compute, link = _source(entry["status"]["compute"]), _source(entry["status"]["link"])
    if dtype == "float32":
        compute += "; 16-bit tensor-core figure, an optimistic bound for float32"
    memory_bytes = entry["memory_gb"] * 2**30
    return Hardware(
        name=key,
        memory_bytes=memory_bytes,
        usable_bytes=memory_bytes - _RESERVE_BYTES,
        flops_per_s=entry[f"tflops_{accumulate}_acc"] * 1e12,
        memory_bytes_per_s=entry["memory_gb_per_s"] * 1e9,
        h2d_bytes_per_s=entry["h2d_gb_per_s"] * 1e9,
        d2h_bytes_per_s=entry["d2h_gb_per_s"] * 1e9,
        latency_s=_LATENCY_S,
        sources={
            "memory_bytes": _source("quoted"),
            "usable_bytes": "assumed: 1.5 GiB reserved for the CUDA context and the allocator",
            "flops_per_s": compute,
            "memory_bytes_per_s": _source("quoted"),
            "h2d_bytes_per_s": link,
            "d2h_bytes_per_s": link,
            "latency_s": "assumed: 10 us to start a transfer",
            "efficiency": reached,
        },
        efficiency=efficiency,
    )


def shared_links(names: Iterable[str]) -> SharedLinks | None:
    """What the transfers of a box share, as far as its hardware files say; None where they say nothing.

    Args:
        names: As for `lookup`; the catalogue knows no box.

    Raises:
        InvalidArgument: Two files say different things, or one is damaged.
    """
    files = [_file(Path(name)) for name in dict.fromkeys(names) if name.endswith(".json")]
    said: list[SharedLinks] = []
    for file in files:
        links = replace(SharedLinks.of(file), roots=file.roots, root_bytes_per_s=file.root_bytes_per_s)
        if links != SharedLinks(host_bytes_per_s=None) and links not in said:
            said.append(links)
    if len(said) > 1:
        raise InvalidArgument(
            f"the hardware files say different things about one box: {said[0]} and {said[1]}; leave host "
            "memory, both directions and roots to one of them"
        )
    return said[0] if said else None


def detect() -> str | None:
    """The catalogue name of this machine's first CUDA device; None without one or if it is not listed."""
    import torch  # takes seconds; who names a GPU need not wait

    if not torch.cuda.is_available():
        return None
    device = torch.cuda.get_device_name(0)
    return next((name for name, entry in _catalogue().items() if device in entry["cuda_names"]), None)


def _load(path: Path) -> Hardware:
    return Hardware(**msgspec.structs.asdict(_file(path).hardware))


def _file(path: Path) -> HardwareFile:
    try:
        file = msgspec.json.decode(path.read_bytes(), type=HardwareFile)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidArgument(f"hardware file {path} cannot be read: {error}; probe the machine") from error
    if (file.format, file.version) != (FORMAT, VERSION):
        raise InvalidArgument(
            f"{path} has format {file.format!r} version {file.version}; this rpcompile reads {FORMAT!r} "
            f"version {VERSION}"
        )
    return file


def _catalogue() -> dict[str, dict[str, Any]]:
    return _data()["gpus"]


@functools.cache
def _data() -> dict[str, Any]:
    text = resources.files("rpcompile").joinpath("data/hardware.json").read_text(encoding="utf-8")
    return json.loads(text)


def _efficiency(entry: dict[str, Any], accumulate: str) -> tuple[dict[str, float], str]:
    """Shares of `flops_per_s` and of the memory bandwidth that kernels reach, and where they are from."""
    section = _data()["efficiency"]
    slower = entry["tflops_fp32_acc"] < entry["tflops_fp16_acc"]
    attention_rate = "half_rate" if slower else "full_rate"
    rate = attention_rate if accumulate == "fp32" else "full_rate"
    # Attention's share is of the throughput with 32-bit accumulation, which it always has.
    attention = section[attention_rate]["attention"] * entry["tflops_fp32_acc"]
    shares = {**section[rate], "memory": section["memory"]}
    shares["attention"] = attention / entry[f"tflops_{accumulate}_acc"]
    status = section["status"]
    return shares, f"{_source(status[rate])}; memory {status['memory']}"


def _source(status: str) -> str:
    """`quoted; sustained 158` -> `quoted: sustained 158`; a status alone gets its usual reason."""
    match = re.fullmatch(r"(measured|calibrated|quoted|assumed)[;: ]*(.*)", status)
    assert match is not None, status  # a test reads the whole catalogue
    kind, reason = match.groups()
    return f"{kind}: {reason or _DEFAULT_REASON[kind]}"
