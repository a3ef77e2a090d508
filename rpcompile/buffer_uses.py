"""Which actions use which buffers and how, as columns that numpy can look through."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

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
    def of(cls, actions: Sequence[Action], order: Iterable[int]) -> BufferUses:
        """The uses by some actions, in the given order of their numbers."""
        numbers: dict[str, int] = {}
        found: list[int] = []
        users: list[int] = []
        roles: list[int] = []
        for number in order:
            action = actions[number]
            reads, writes = action.reads, action.writes
            for buffer in reads:
                found.append(numbers.setdefault(buffer, len(numbers)))
                roles.append(Role.UPDATE if buffer in writes else Role.READ)
            made = [buffer for buffer in writes if buffer not in reads]
            for buffer in made:
                found.append(numbers.setdefault(buffer, len(numbers)))
                roles.append(Role.MAKE)
            for buffer in action.frees:
                found.append(numbers.setdefault(buffer, len(numbers)))
                roles.append(Role.FREE)
            users += [number] * (len(reads) + len(made) + len(action.frees))
        buffer_of = np.array(found, np.int32)
        places = np.argsort(buffer_of, kind="stable")
        return cls(
            tuple(numbers),
            buffer_of[places],
            np.array(users, np.int32)[places],
            np.array(roles, np.int32)[places],
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
