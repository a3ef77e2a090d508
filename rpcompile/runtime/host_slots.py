"""Host memory that a program's downloads go to: allocated once, used by every iteration."""

from __future__ import annotations

import mmap
import threading
import warnings
import weakref
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rpcompile import buffers

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rpcompile.runtime.stage_runner import Tensors

ALIGNMENT = 256  # bytes; what CUDA's allocator aligns to, and a multiple of what CPU kernels like
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device, not for the current one alone


def allocate(nbytes: int, pin: bool) -> torch.Tensor:
    """A flat uint8 tensor on the host, page aligned, whose pages go back to the system with it.

    Args:
        nbytes: Size; it is not rounded up to a power of two, as torch's pinned allocator does.
        pin: Register the memory with CUDA, so that copies from and to it are asynchronous. Where CUDA
            refuses, there is a warning; copies are right, but slower, and make the host wait.
    """
    # A fork (of a data loader, say) copies private pages when the parent next writes them, and the device
    # would go on reading the old ones.
    sharing = mmap.MAP_SHARED if pin else mmap.MAP_PRIVATE
    memory = mmap.mmap(-1, max(nbytes, 1), flags=sharing | mmap.MAP_ANONYMOUS)
    flat = torch.frombuffer(memory, dtype=torch.uint8)
    if pin and nbytes:
        _register(memory, flat)
    return flat if nbytes else flat[:0]


def _register(memory: mmap.mmap, flat: torch.Tensor) -> None:
    runtime: Any = torch.cuda.cudart()
    code = runtime.cudaHostRegister(flat.data_ptr(), flat.nbytes, _PORTABLE)
    if int(code) == 0:
        # The storage owns the mapping: it is unregistered just before the pages go.
        weakref.finalize(memory, runtime.cudaHostUnregister, flat.data_ptr()).atexit = False
        return
    warnings.warn(
        f"CUDA cannot pin {flat.nbytes:,} bytes of host memory ({runtime.cudaGetErrorString(code)}); copies "
        f"from and to them are slower and make the host wait. Free host memory, or allow this process to "
        f"lock more of it",
        RuntimeWarning,
        stacklevel=2,
    )
    with suppress(RuntimeError):
        # CUDA keeps the error for whatever asks next, which would be a kernel that is all right.
        torch.zeros(1, device="cuda")


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class _Layout:
    """Where the tensors of one buffer lie in a flat piece of memory."""

    members: tuple[tuple[str, torch.Size, tuple[int, ...], torch.dtype, int, int], ...]
    nbytes: int

    @classmethod
    def like(cls, tensors: Tensors, dtype: torch.dtype | None = None) -> _Layout:
        """Each tensor in the memory format that `clone` would give it, of `dtype` if one is given."""
        members: list[tuple[str, torch.Size, tuple[int, ...], torch.dtype, int, int]] = []
        offset = 0
        for name, tensor in tensors.items():
            stride = tensor.stride()
            if not tensor.is_contiguous():
                stride = torch.empty_like(tensor, device="meta").stride()
            made = dtype or tensor.dtype
            nbytes = tensor.numel() * made.itemsize
            members.append((name, tensor.shape, stride, made, offset, nbytes))
            offset += aligned(nbytes)
        return cls(tuple(members), offset)

    def views(self, flat: torch.Tensor) -> Tensors:
        made: Tensors = {}
        for name, shape, stride, dtype, offset, nbytes in self.members:
            made[name] = flat[offset : offset + nbytes].view(dtype).as_strided(shape, stride)
        return made


class HostSlots:
    """The memory behind a program's host buffers.

    Boundary activations, their gradients, and attention outputs, of one segment share an arena each, with a
    slot a microbatch; a slot belongs to one buffer for good, so that no copy can meet another iteration's or
    microbatch's.
    A job's weight gradients of one segment have an arena that is used again once nobody holds a tensor
    in it any more: the caller may keep gradients as long as it likes. What goes to the caller otherwise
    (losses, outputs, changed buffers) is allocated anew.

    Args:
        names: The host buffers of the schedule.
        pin: Register the memory with CUDA.
    """

    def __init__(self, names: Iterable[str], pin: bool) -> None:
        self._pin = pin
        self._numbers: dict[str, int] = {}
        self._counts: dict[tuple[str, int | None], int] = defaultdict(int)
        for buffer in sorted(names):
            name = buffers.parse(buffer)
            if name.space == buffers.HOST and name.kind in ("x", "kept", "dx"):
                self._numbers[buffer] = self._counts[name.kind, name.segment]
                self._counts[name.kind, name.segment] += 1
        self._slots: dict[str, torch.Tensor] = {}
        self._arenas: dict[tuple[str, int | None], torch.Tensor] = {}
        self._gradients: dict[tuple[str, torch.dtype | None], list[torch.Tensor]] = defaultdict(list)
        self._sizes: object = None
        self._lock = threading.Lock()

    def begin(self, sizes: object) -> None:
        """To be called before an iteration; memory of microbatches of other sizes is given up.

        Args:
            sizes: What the sizes of boundaries depend on; compared with the last call's.
        """
        if sizes != self._sizes:
            self._slots.clear()
            self._arenas.clear()
            self._sizes = sizes

    def empty_like(self, buffer: str, tensors: Tensors, dtype: torch.dtype | None = None) -> Tensors:
        """Host tensors for a buffer, to copy `tensors` into; gradients of another dtype, if one is given."""
        kind = buffers.parse(buffer).kind
        if kind not in ("x", "kept", "dx", "gradients"):
            return {
                name: torch.empty_like(tensor, device="cpu", pin_memory=self._pin)
                for name, tensor in tensors.items()
            }
        layout = _Layout.like(tensors, dtype)
        with self._lock:
            flat = (
                self._unused((buffer, dtype), layout) if kind == "gradients" else self._slot(buffer, layout)
            )
        return layout.views(flat)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for boundaries and gradients."""
        with self._lock:
            kept = [*self._slots.values(), *(flat for found in self._gradients.values() for flat in found)]
            storages = {flat.untyped_storage().data_ptr(): flat.untyped_storage().nbytes() for flat in kept}
        return sum(storages.values())

    def _slot(self, buffer: str, layout: _Layout) -> torch.Tensor:
        slot = self._slots.get(buffer)
        if slot is None or slot.nbytes < layout.nbytes:
            name = buffers.parse(buffer)
            key, number = (name.kind, name.segment), self._numbers[buffer]
            if key not in self._arenas:
                self._arenas[key] = allocate(layout.nbytes * self._counts[key], self._pin).view(
                    self._counts[key], layout.nbytes
                )
            slot = self._arenas[key][number]
            if slot.nbytes < layout.nbytes:  # microbatches of unequal size, a small one came first
                slot = allocate(layout.nbytes, self._pin)
            self._slots[buffer] = slot
        return slot

    def _unused(self, buffer: tuple[str, torch.dtype | None], layout: _Layout) -> torch.Tensor:
        held = [flat for flat in self._gradients[buffer] if _references(flat) > 1]
        free = [flat for flat in self._gradients[buffer] if _references(flat) == 1]
        fitting = [flat for flat in free if flat.nbytes == layout.nbytes]
        flat = fitting[0] if fitting else allocate(layout.nbytes, self._pin)
        self._gradients[buffer] = [*held, flat]
        return flat


def _references(tensor: torch.Tensor) -> int:
    """How many tensors share the storage."""
    storage = tensor.untyped_storage()
    return int(torch._C._storage_Use_Count(storage._cdata)) - 1
