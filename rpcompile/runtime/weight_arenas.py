"""The model's weights in few large pieces of host memory, so that few large copies upload a stage."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from rpcompile.runtime.host_slots import ALIGNMENT, aligned, allocate

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from rpcompile.runtime.stage_runner import Tensors

CHUNK_BYTES = 4 << 20
"""Bytes of one copy of weights or gradients: 0.17 ms at 25 GB/s. A device's copy engine takes copies of
several streams in turn and cannot stop one. Activations are copied whole: each waits for one such piece."""


def copy_in_chunks(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copies between host and device so that other streams' copies pass between; enqueued, if it can be."""
    if source.nbytes <= CHUNK_BYTES or not (source.is_contiguous() and target.is_contiguous()):
        target.copy_(source, non_blocking=True)
        return
    elements = CHUNK_BYTES // source.element_size()
    for piece, place in zip(source.view(-1).split(elements), target.view(-1).split(elements), strict=True):
        place.copy_(piece, non_blocking=True)


@dataclass(frozen=True)
class _Place:
    """Where a tensor's bytes lie in an arena; `follows` if the tensor reads them from there itself."""

    arena: torch.Tensor
    offset: int
    nbytes: int
    view: torch.Tensor
    source: torch.Tensor

    @property
    def follows(self) -> bool:
        return self.source.data_ptr() == self.view.data_ptr()


@dataclass
class _Run:
    """Neighbours in an arena, from `begin` to `end`, and what lies there: name, tensor and offset."""

    arena: torch.Tensor
    begin: int
    end: int
    members: list[tuple[str, torch.Tensor, int]] = field(default_factory=list)


class WeightArenas:
    """One arena a segment for weights that train and one for those that do not.

    A tensor becomes a view into its arena where nobody can tell: it is contiguous, on the host, and no tensor
    but the model's shares its storage. Otherwise its bytes are copied into the arena before each iteration.
    Weights that train lie apart, since `torch.save` of one tensor writes the whole arena.

    Args:
        pin: Register the arenas with CUDA.
        adopt: Use arenas at all; otherwise weights stay where they are (memory-mapped files do) and are
            uploaded one by one.
        versions: Tensors of one name that take turns and are each kept a place; the oldest gives way.
    """

    def __init__(self, pin: bool = False, adopt: bool = False, versions: int = 1) -> None:
        self._pin = pin
        self._adopt = adopt
        self._versions = versions
        self._places: dict[str, tuple[_Place, ...]] = {}

    def refresh(self, groups: Sequence[Sequence[str]], tensors: Mapping[str, torch.Tensor]) -> None:
        """Makes the arenas agree with the model; to be called before an iteration.

        Args:
            groups: Names of the tensors of each segment.
            tensors: The model's tensors by name.
        """
        if not self._adopt:
            return
        private: set[int] | None = None
        for names in groups:
            for trainable in (True, False):
                strange = {
                    name: tensor
                    for name in names
                    if self._find(name, tensor := tensors[name]) is None and tensor.requires_grad is trainable
                }
                if strange:
                    private = _private(tensors.values()) if private is None else private
                    self._place(strange, private)
        with torch.no_grad():
            for name in {name for names in groups for name in names}:
                place = self._find(name, tensors[name])
                if place is not None and not place.follows:
                    place.view.copy_(place.source)

    def follow(self, groups: Sequence[Sequence[str]], tensors: Mapping[str, torch.Tensor]) -> bool:
        """Whether `refresh` would have nothing to copy."""
        return not self._adopt or all(
            (place := self._find(name, tensors[name])) is not None and place.follows
            for names in groups
            for name in names
        )

    def upload(self, tensors: Tensors, device: torch.device) -> Tensors:
        """Copies of host tensors on a device; enqueued, where the device is asynchronous."""
        made: Tensors = {}
        found = {name: self._find(name, tensor) for name, tensor in tensors.items()}
        placed = {name: (tensors[name], place) for name, place in found.items() if place is not None}
        for run in self._runs(placed):
            flat = torch.empty(run.end - run.begin, dtype=torch.uint8, device=device)
            copy_in_chunks(flat, run.arena[run.begin : run.end])
            for name, tensor, offset in run.members:
                # `.data` has a version counter of its own: autograd must not take an update of one tensor
                # for an update of all.
                made[name] = flat[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape).data
        for name, tensor in tensors.items():
            if name not in made:
                made[name] = torch.empty_like(tensor, device=device, requires_grad=False)
                copy_in_chunks(made[name], tensor.detach())
        return {name: made[name] for name in tensors}

    def _find(self, name: str, tensor: torch.Tensor) -> _Place | None:
        pointer = tensor.data_ptr()
        places = self._places.get(name, ())
        return next((place for place in places if place.source.data_ptr() == pointer), None)

    def _place(self, tensors: Tensors, private: set[int]) -> None:
        """Puts tensors into a new arena; one that has several names is put there once."""
        fitting = {name: t for name, t in tensors.items() if t.is_contiguous() and t.nbytes}
        pointers = {name: tensor.data_ptr() for name, tensor in fitting.items()}
        offsets: dict[int, int] = {}
        total = 0
        for name, pointer in pointers.items():
            if pointer not in offsets:
                offsets[pointer], total = total, total + aligned(fitting[name].nbytes)
        arena = allocate(total, self._pin)
        for name, tensor in fitting.items():
            start = offsets[pointers[name]]
            view = arena[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            with torch.no_grad():
                view.copy_(tensor)
            if pointers[name] in private:
                tensor.data = view.data
            places = *self._places.get(name, ()), _Place(arena, start, tensor.nbytes, view, tensor)
            self._places[name] = places[-self._versions :]

    def _runs(self, placed: Mapping[str, tuple[torch.Tensor, _Place]]) -> list[_Run]:
        by_arena: dict[int, list[str]] = defaultdict(list)
        for name, (_, place) in placed.items():
            by_arena[place.arena.data_ptr()].append(name)
        runs: list[_Run] = []
        for names in by_arena.values():
            names.sort(key=lambda name: placed[name][1].offset)
            end: int | None = None
            for name in names:
                tensor, place = placed[name]
                if end is None or place.offset - end >= ALIGNMENT:
                    runs.append(_Run(place.arena, place.offset, place.offset))
                run = runs[-1]
                run.end = end = max(run.end, place.offset + place.nbytes)
                run.members.append((name, tensor, place.offset - run.begin))
        return runs


def _private(tensors: Iterable[torch.Tensor]) -> set[int]:
    """Addresses of the tensors that lie on the host in storages which only these tensors use.

    Tensors of one storage must lie side by side in it (one memory-mapped file) or be one and the same.
    """
    sharers: dict[int, list[torch.Tensor]] = defaultdict(list)
    for tensor in {id(tensor): tensor for tensor in tensors}.values():
        if tensor.device.type == "cpu":
            sharers[tensor.untyped_storage()._cdata].append(tensor)
    found: set[int] = set()
    for same in sharers.values():
        storage = same[0].untyped_storage()
        extents = sorted({(tensor.data_ptr(), tensor.nbytes) for tensor in same})
        apart = all(begin + nbytes <= after for (begin, nbytes), (after, _) in pairwise(extents))
        others = torch._C._storage_Use_Count(storage._cdata) - 1 - len(same)
        if apart and not others and not storage.is_shared():
            found.update(begin for begin, _ in extents)
    return found
