"""Which actions use which buffers and how, as columns that numpy can look through."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from rpcompile.ir import Action

    Numbers = NDArray[np.int32]


class Role(IntEnum):
    """What an action does to a buffer."""

    MAKE = 0  # writes it from scratch
    UPDATE = 1  # reads and writes it, in place
    READ = 2
    FREE = 3


@dataclass(frozen=True)
class BufferUses:
    """Every use of every buffer, sorted by buffer and then by the order of the actions.

    Attributes:
        buffers: Names, by number; in order of first use.
        buffer: Number of each use's buffer.
        action: Number of the action that uses it.
        role: A `Role`.
    """

    buffers: tuple[str, ...]
    buffer: Numbers
    action: Numbers
    role: Numbers

    @classmethod
    def of(cls, actions: Sequence[Action], order: Numbers) -> BufferUses:
        """The uses by some actions in the given order of their numbers: what each reads, writes, frees."""
        operands = [a.reads for a in actions] + [a.writes for a in actions] + [a.frees for a in actions]
        index: dict[str, int] = {}
        named = [index.setdefault(name, len(index)) for names in operands for name in names]
        buffer, names = np.array(named, np.int64), [*index]
        lengths = np.fromiter(map(len, operands), np.int64, len(operands))
        # Reads of action n are operand n, its writes operand n + len(actions), its frees the one behind.
        way, action = np.divmod(np.repeat(np.arange(len(operands)), lengths), max(1, len(actions)))
        place = np.empty(len(actions), np.int64)
        place[order] = np.arange(len(actions))
        # Moments, one after another as in the docstring.
        moment = np.arange(len(named)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        moment += (3 * place[action] + way) * lengths.max(initial=1)
        first = np.full(len(names), np.iinfo(np.int64).max)
        np.minimum.at(first, buffer, moment)
        by_first = np.argsort(first)
        number = np.empty(len(names), np.int64)
        number[by_first] = np.arange(len(names))
        in_order = np.argsort(number[buffer] * (1 + moment.max(initial=0)) + moment)
        buffer, action, way = number[buffer][in_order], action[in_order], way[in_order]
        # What one action does to one buffer: read and written it is updated, and that counts once.
        pair = np.cumsum((np.diff(buffer, prepend=-1) != 0) | (np.diff(action, prepend=-1) != 0)) - 1
        is_read, is_written = (np.bincount(pair[way == what], minlength=len(pair)) > 0 for what in (0, 1))
        role = np.array([Role.READ, Role.MAKE, Role.FREE], np.int32)[way]
        role[(way == 0) & is_written[pair]] = Role.UPDATE
        kept = (way != 1) | ~is_read[pair]
        return cls(
            tuple([names[name] for name in by_first.tolist()]),
            buffer[kept].astype(np.int32),
            action[kept].astype(np.int32),
            role[kept],
        )

    def count(self, role: Role) -> Numbers:
        """How many uses of this kind each buffer has."""
        return np.bincount(self.buffer[self.role == role], minlength=len(self.buffers)).astype(np.int32)

    def last(self, role: Role) -> Numbers:
        """The last action that uses each buffer in this way; -1 for none."""
        found = np.full(len(self.buffers), -1, np.int32)
        mine = self.role == role
        # Of several values for one place numpy keeps the last.
        found[self.buffer[mine]] = self.action[mine]
        return found

    def users(self, buffer: int, *roles: Role) -> list[int]:
        """Numbers of the actions that use a buffer in one of these ways (any, if none is named)."""
        here = slice(self._starts[buffer], self._starts[buffer + 1])
        pairs = zip(self.action[here].tolist(), self.role[here].tolist(), strict=True)
        return [action for action, role in pairs if not roles or role in roles]

    @cached_property
    def _starts(self) -> Numbers:
        return np.searchsorted(self.buffer, np.arange(len(self.buffers) + 1)).astype(np.int32)
