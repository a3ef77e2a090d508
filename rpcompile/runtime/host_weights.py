"""The weights that workers upload: the model's own tensors, or copies of them on the host.

Copies are of trainable parameters only, and are made on the host queue:

- for a compute dtype that is not the masters', at the beginning of every iteration, segment by segment
  behind the segment's update;
- in asynchronous mode, segment by segment behind the update, for the iterations behind the next step. There
  are two sets, for an iteration is in flight while the next one begins: iterations between two steps read one
  of them, those behind the next step the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from rpcompile.runtime.updates import FINISH, PUBLISH, UPDATE, Updates

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from concurrent.futures import Future

    from rpcompile.runtime.stage_runner import Tensors


class HostWeights:
    """Who reads what, and behind which piece of work.

    Args:
        segments: Per segment, the names of the parameters and buffers it reads.
        trainable: Names of the parameters that are updated.
        updates: What is queued.
        compute_dtype: What trainable parameters are cast to, None for their own dtype.
        asynchronous: Whether iterations compute with the weights of before the last step.
    """

    def __init__(
        self,
        segments: Sequence[Sequence[str]],
        trainable: frozenset[str],
        updates: Updates,
        compute_dtype: torch.dtype | None,
        asynchronous: bool,
    ) -> None:
        self._names: list[list[str]] = []
        seen: set[str] = set()
        for names in segments:
            self._names.append([name for name in names if name in trainable and name not in seen])
            seen.update(names)
        self._updates = updates
        self._dtype = compute_dtype
        self._asynchronous = asynchronous
        self._copies: Tensors = {}
        self._sets: tuple[Tensors, Tensors] = {}, {}
        self._filled: list[dict[int, Future[None]]] = []  # by set: segment -> what makes it
        self._turn = 0  # the set of this iteration
        self._stepped = False
        self._versions: dict[str, tuple[int, int]] = {}

    def owners(self) -> dict[str, int]:
        """Name of a trainable parameter -> the first segment that reads it."""
        return {name: segment for segment, names in enumerate(self._names) for name in names}

    def before_step(self, masters: Mapping[str, torch.Tensor]) -> None:
        """Asynchronous mode: what the user has changed in the weights is for the next iteration already.

        Args:
            masters: The model's tensors by name.
        """
        if self._filled and not self._stepped:
            if self._edited(masters):
                other = 1 - self._turn
                self._filled[other] = self._copy(PUBLISH, masters, self._sets[other])
            self._stepped = True

    def after_step(self, masters: Mapping[str, torch.Tensor]) -> None:
        """Asynchronous mode: keeps what the step makes for the iteration behind the next step.

        It also notes what the weights are when the step is over, to tell a later edit.
        """
        if not self._filled:
            return
        self._filled[self._turn] = self._copy(UPDATE, masters, self._sets[self._turn])
        self._versions = {}

        def note() -> None:
            self._versions = self._current(masters)

        self._updates.put(FINISH, 1, note)

    def for_iteration(self, masters: Mapping[str, torch.Tensor]) -> tuple[Tensors, dict[int, Future[None]]]:
        """What an iteration uploads.

        Args:
            masters: The model's tensors by name; the caller reads guarded ones.

        Returns:
            Tensors by name; and segment -> the work that must be over before anything is uploaded that
            this segment was the first to read.
        """
        if self._asynchronous:
            return self._take_turns(masters)
        if self._dtype is None:
            return dict(masters), dict(self._updates.pending)
        pending = self._copy(UPDATE, masters, self._copies)
        return {**masters, **self._copies}, pending

    def restart(self) -> None:
        """Asynchronous mode: the next iteration computes with the weights as they are then."""
        self._filled = []

    def for_evaluation(self, masters: Mapping[str, torch.Tensor]) -> Tensors:
        """The weights as they are, in the compute dtype; nothing may be in flight."""
        if self._dtype is None:
            return dict(masters)
        # The memory of iterations, which CUDA knows already; in asynchronous mode theirs is still needed.
        copies: Tensors = {} if self._asynchronous else self._copies
        for copied in self._copy(UPDATE, masters, copies).values():
            copied.result()
        return {**masters, **copies}

    def _take_turns(self, masters: Mapping[str, torch.Tensor]) -> tuple[Tensors, dict[int, Future[None]]]:
        if not self._filled or self._edited(masters):
            self._updates.wait()
            self._filled = [self._copy(PUBLISH, masters, copies) for copies in self._sets]
            self._versions = self._current(masters)
        elif self._stepped:
            self._turn = 1 - self._turn
        self._stepped = False
        return {**masters, **self._sets[self._turn]}, self._filled[self._turn]

    def _edited(self, masters: Mapping[str, torch.Tensor]) -> bool:
        """Whether the user has loaded other weights; never while a step is under way: that would wait."""
        return bool(self._versions) and self._versions != self._current(masters)

    def _current(self, masters: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, int]]:
        """What tells whether a tensor has been changed in place or replaced."""
        return {
            name: (masters[name].data_ptr(), masters[name]._version)
            for names in self._names
            for name in names
        }

    def _copy(
        self, kind: int, masters: Mapping[str, torch.Tensor], copies: Tensors
    ) -> dict[int, Future[None]]:
        return {
            segment: self._updates.put(kind, segment, self._copy_task(names, masters, copies))
            for segment, names in enumerate(self._names)
            if names
        }

    def _copy_task(
        self, names: list[str], masters: Mapping[str, torch.Tensor], copies: Tensors
    ) -> Callable[[], None]:
        for name in names:
            if name not in copies:
                copies[name] = torch.empty_like(masters[name], dtype=self._dtype)

        def task() -> None:
            with torch.no_grad():
                for name in names:
                    copies[name].copy_(masters[name])

        return task


def set_dtypes(module: torch.nn.Module, compute_dtype: torch.dtype) -> None:
    """Makes trainable floating-point parameters float32 masters and frozen ones `compute_dtype`, in place."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else compute_dtype)
