"""The weights that workers upload: the model's own tensors, or copies of them on the host.

Copies are of trainable parameters only, and are made on the host queue:

- for a compute dtype that is not the masters', at the beginning of every iteration, segment by segment
  behind the segment's update;
- in asynchronous mode, before the first update of a step, so that the next iteration computes with
  the weights of before the step while the step is under way.
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
        self._published: dict[int, Future[None]] | None = None
        self._stepped = False
        self._versions: dict[str, tuple[int, int]] = {}

    def owners(self) -> dict[str, int]:
        """Name of a trainable parameter -> the first segment that reads it."""
        return {name: segment for segment, names in enumerate(self._names) for name in names}

    def before_step(self, masters: Mapping[str, torch.Tensor]) -> None:
        """Asynchronous mode: keeps the weights as they are for the next iteration.

        Args:
            masters: The model's tensors by name.
        """
        if self._asynchronous and not self._stepped:
            self._updates.wait()
            self._published = self._copy(PUBLISH, masters, self._copies)
            self._stepped = True

    def after_step(self, masters: Mapping[str, torch.Tensor]) -> None:
        """Asynchronous mode: notes what the weights are when the step is over, to tell a later edit."""
        if not self._asynchronous:
            return
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
        self._stepped = False
        if self._versions and self._versions != self._current(masters):
            self._published = None  # the user has loaded other weights
        if self._published is not None:
            return {**masters, **self._copies}, self._published
        if self._dtype is None:
            return dict(masters), dict(self._updates.pending)
        pending = self._copy(UPDATE, masters, self._copies)
        return {**masters, **self._copies}, pending

    def for_evaluation(self, masters: Mapping[str, torch.Tensor]) -> Tensors:
        """The weights as they are, in the compute dtype; nothing may be in flight."""
        if self._dtype is None:
            return dict(masters)
        # The memory of iterations, which CUDA knows already; in asynchronous mode theirs is still needed.
        copies: Tensors = {} if self._asynchronous else self._copies
        for copied in self._copy(UPDATE, masters, copies).values():
            copied.result()
        return {**masters, **copies}

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
