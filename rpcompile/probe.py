"""Measures this machine: what its devices compute, and what moves between them and the host."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import torch

from rpcompile import hardware as catalogue
from rpcompile.files import write_in_one_step
from rpcompile.hardware import HardwareFile, HardwareNumbers

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from rpcompile.ir import Hardware

_CUDA_MATRIX, _CPU_MATRIX = 8192, 1024
_CUDA_BLOCK_BYTES, _CPU_BLOCK_BYTES = 2**28, 2**26  # too big for caches


@dataclass(frozen=True)
class HardwareProbe:
    """What a probe found.

    Attributes:
        hardware: The device and its link; `sources` says which figures were measured.
        host_memory_bytes_per_s: Bytes that the host reads and writes a second while it copies.
        h2d_both_bytes_per_s: Host to device while the other direction is busy; None without CUDA.
        d2h_both_bytes_per_s: Device to host while the other direction is busy; None without CUDA.
    """

    hardware: Hardware
    host_memory_bytes_per_s: float
    h2d_both_bytes_per_s: float | None = None
    d2h_both_bytes_per_s: float | None = None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a hardware file, which `hardware.lookup(path)` reads; give it a name ending in .json.

        Raises:
            OSError: It cannot be written.
        """
        fields = HardwareNumbers.__struct_fields__
        file = HardwareFile(
            format=catalogue.FORMAT,
            version=catalogue.VERSION,
            hardware=HardwareNumbers(**{name: getattr(self.hardware, name) for name in fields}),
            host_memory_bytes_per_s=self.host_memory_bytes_per_s,
            h2d_both_bytes_per_s=self.h2d_both_bytes_per_s,
            d2h_both_bytes_per_s=self.d2h_both_bytes_per_s,
        )
        text = msgspec.json.format(msgspec.json.encode(file, order="sorted"), indent=1)
        write_in_one_step(Path(path), text.decode() + "\n")


def probe(like: str | None = None, dtype: torch.dtype | None = None, seconds: float = 0.5) -> HardwareProbe:
    """Measures the first CUDA device and its link; without one, the CPU in the device's place.

    Throughput and bandwidth are what long runs of large products and copies reach, so the shares in
    `efficiency` are relative to that. What does not exist here is taken from the catalogue and marked
    "assumed".

    Args:
        like: Catalogue entry for what is not measured; the device's own by default, else "rtx4090".
        dtype: Of the matrix product; bfloat16 on CUDA and float32 on the CPU by default.
        seconds: How long each measurement runs at least.

    Raises:
        InvalidArgument: The catalogue has no entry `like`.
    """
    base = catalogue.lookup(like or catalogue.detect() or "rtx4090")
    if torch.cuda.is_available():
        return _probe_cuda(base, dtype or torch.bfloat16, seconds)
    return _probe_cpu(base, dtype or torch.float32, seconds)


def _probe_cpu(base: Hardware, dtype: torch.dtype, seconds: float) -> HardwareProbe:
    cpu = torch.device("cpu")
    flops_per_s = _matmul_flops_per_s(cpu, _CPU_MATRIX, dtype, seconds)
    bytes_per_s = _copy_bytes_per_s(cpu, _CPU_BLOCK_BYTES, seconds)
    how = f"on the CPU with {torch.get_num_threads()} threads"
    sources = dict.fromkeys(base.sources, f"assumed: {base.name}'s, this machine has no CUDA device")
    sources["flops_per_s"] = f"measured: {dtype} product of {_CPU_MATRIX} x {_CPU_MATRIX} {how}"
    sources["memory_bytes_per_s"] = f"measured: copy {how}"
    sources["efficiency"] = "measured: throughput and bandwidth are what was reached"
    found = replace(
        base,
        name="cpu",
        flops_per_s=flops_per_s,
        memory_bytes_per_s=bytes_per_s,
        sources=sources,
        efficiency={},
    )
    return HardwareProbe(found, host_memory_bytes_per_s=bytes_per_s)


def _probe_cuda(base: Hardware, dtype: torch.dtype, seconds: float) -> HardwareProbe:
    device = torch.device("cuda", 0)
    memory_bytes = torch.cuda.get_device_properties(device).total_memory
    reserve_bytes = base.memory_bytes - base.usable_bytes
    host = torch.empty(_CUDA_BLOCK_BYTES, dtype=torch.uint8, pin_memory=True)
    back = torch.empty_like(host, pin_memory=True)
    block, other = (torch.empty(_CUDA_BLOCK_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    h2d = _rate(lambda: block.copy_(host, non_blocking=True), _CUDA_BLOCK_BYTES, device, seconds)
    d2h = _rate(lambda: back.copy_(other, non_blocking=True), _CUDA_BLOCK_BYTES, device, seconds)
    up, down = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def both_ways() -> None:
        with torch.cuda.stream(up):
            block.copy_(host, non_blocking=True)
        with torch.cuda.stream(down):
            back.copy_(other, non_blocking=True)

    # The slower direction ends later, so each moved at least this fast.
    both = _rate(both_ways, _CUDA_BLOCK_BYTES, device, seconds)
    name = torch.cuda.get_device_name(device)
    sources = {
        **base.sources,
        "memory_bytes": f"measured: {name} reports it",
        "flops_per_s": f"measured: {dtype} product of {_CUDA_MATRIX} x {_CUDA_MATRIX} on {name}",
        "memory_bytes_per_s": f"measured: copy on {name}",
        "h2d_bytes_per_s": f"measured: pinned memory to {name}",
        "d2h_bytes_per_s": f"measured: {name} to pinned memory",
        "efficiency": f"{base.sources['efficiency']}; relative to the measured throughput and bandwidth",
    }
    # A long run of products measures what they sustain.
    sustained = base.efficiency["matmul_sustained"]
    found = replace(
        base,
        name=catalogue.detect() or name,
        memory_bytes=memory_bytes,
        usable_bytes=max(0, memory_bytes - reserve_bytes),
        flops_per_s=_matmul_flops_per_s(device, _CUDA_MATRIX, dtype, seconds),
        memory_bytes_per_s=_copy_bytes_per_s(device, _CUDA_BLOCK_BYTES, seconds),
        h2d_bytes_per_s=h2d,
        d2h_bytes_per_s=d2h,
        sources=sources,
        efficiency={key: share / sustained for key, share in base.efficiency.items()} | {"memory": 1.0},
    )
    host_bytes_per_s = _copy_bytes_per_s(torch.device("cpu"), _CPU_BLOCK_BYTES, seconds)
    return HardwareProbe(found, host_bytes_per_s, both, both)


def _matmul_flops_per_s(device: torch.device, size: int, dtype: torch.dtype, seconds: float) -> float:
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    result = torch.empty(size, size, device=device, dtype=dtype)
    return _rate(lambda: torch.mm(left, right, out=result), 2 * size**3, device, seconds)


def _copy_bytes_per_s(device: torch.device, nbytes: int, seconds: float) -> float:
    source = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return _rate(lambda: target.copy_(source), 2 * nbytes, device, seconds)


def _rate(run: Callable[[], object], amount: float, device: torch.device, seconds: float) -> float:
    """`amount` over the median time of runs that take `seconds` together, behind a warm-up; at least 3."""
    _timed(run, device)
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        times.append(_timed(run, device))
    return amount / statistics.median(times)


def _timed(run: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
