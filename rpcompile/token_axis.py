"""Where the tokens lie in a tensor, and which operators treat every token by itself.

An operator is *token-wise* if each token's part of its result depends only on the same token's part of
its arguments, and on arguments that have no tokens (weights). What is not known to be token-wise is a
*barrier*: attention, sums over tokens, operators without a rule here.

In row-major order an element of a tensor with tokens has the index (l, t, r): token t, what lies outside
of it l < L, and what lies inside r < R. Views keep that order, so L and R are all that a view needs.

Mixtures of experts sort the rows of a tensor by expert, work on the sorted rows and put them back. Between
the two an axis remembers which sort its rows are in the order of; `Role` marks the numbers that do the
sorting, which no other operator may touch. `rpcompile/token_rules.py` has a rule for each operator.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import sympy
from torch.fx import Node

from rpcompile.sizes import arguments, tensors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rpcompile.token_rules import TokenRules

Shape = tuple[sympy.Expr, ...]


@dataclass(frozen=True)
class TokenAxis:
    """Dimension `dim` has `outer * sequence * inner` entries.

    Attributes:
        order: The sort whose order they are in; None: in order of `outer`, token, `inner`.
        sorted_keys: Whether the entries are what that sort sorted by.
    """

    dim: int
    outer: sympy.Expr = sympy.S.One
    inner: sympy.Expr = sympy.S.One
    order: Node | None = None
    sorted_keys: bool = False

    @property
    def whole(self) -> bool:
        """Whether the dimension holds tokens and nothing else, so that tokens can be sliced."""
        return self.outer == 1 and self.inner == 1 and self.order is None

    def at(self, dim: int) -> TokenAxis:
        """The same entries in another dimension, of a tensor with other contents."""
        return replace(self, dim=dim, sorted_keys=False)


@dataclass(frozen=True)
class Role:
    """Numbers that say how rows are sorted.

    Attributes:
        kind: "index": of each sorted row where it came from; "rows": the same over `number`; "inverse":
            of each row where it went; "blank": memory for that; "counts": how many rows have each of
            `number` keys; "offsets": where those with the next key begin.
        axis: The rows before they were sorted.
        order: The sort.
        number: A divisor or a number of keys.
    """

    kind: str
    axis: TokenAxis
    order: Node
    number: int = 1


# What is known of each tensor of a node: where its tokens are; None: it has none.
Axes = tuple[TokenAxis | Role | None, ...]


class Barrier(Exception):
    """The operator mixes tokens, or may for all that is known."""


class _Arguments(dict[str, object]):
    """By schema name. Overloads of an operator differ in what they have: a rule needs what it asks for."""

    def __missing__(self, name: str) -> object:
        raise Barrier


class Call:
    """One operator's arguments by name, with what is known of them."""

    def __init__(self, node: Node, known: Mapping[Node, Axes], rules: TokenRules) -> None:
        self.node, self.sizes, self.sequence = node, rules.sizes, rules.sequence
        self.bound = _Arguments(arguments(node))
        self._known, self._rules = known, rules

    def is_known(self, node: Node) -> bool:
        return node in self._known

    def what(self, node: Node) -> TokenAxis | Role | None:
        if node not in self._known or len(self._known[node]) != 1:
            raise Barrier
        return self._known[node][0]

    def axis(self, node: Node) -> TokenAxis | None:
        found = self.what(node)
        if isinstance(found, Role):
            raise Barrier
        return found

    def role(self, name: str, kind: str) -> Role:
        """An argument that must have this role."""
        found = self.what(self.tensor(name))
        if not isinstance(found, Role) or found.kind != kind:
            raise Barrier
        return found

    def only_index(self) -> Node:
        """The one tensor that indexes the first dimension."""
        found = self.bound["indices"]
        if not isinstance(found, list | tuple) or len(found) != 1 or not isinstance(found[0], Node):
            raise Barrier
        return found[0]

    def tensor(self, name: str) -> Node:
        value = self.bound[name]
        if not isinstance(value, Node) or len(tensors(value)) != 1:
            raise Barrier
        return value

    def tokens(self, name: str) -> TokenAxis:
        """The token axis of an argument that must have one."""
        axis = self.axis(self.tensor(name))
        if axis is None:
            raise Barrier
        return axis

    def shape(self, node: Node) -> Shape:
        return self.sizes.shape(tensors(node)[0])

    def rank(self, name: str) -> int:
        return len(self.shape(self.tensor(name)))

    def out(self) -> Shape:
        return self.shape(self.node)

    def number(self, name: str) -> int:
        value = self.bound[name]
        if not isinstance(value, int):
            raise Barrier
        return value

    def dim(self, name: str, rank: int) -> int:
        return self.number(name) % rank

    def dims(self, name: str, rank: int) -> set[int]:
        value = self.bound[name]
        if isinstance(value, int):
            return {value % rank}
        if not isinstance(value, list | tuple) or not value:
            raise Barrier  # all of them
        return {cast("int", item) % rank for item in value}

    def without_tokens(self, *names: str) -> None:
        """Requires that these arguments are None or tensors without tokens."""
        for name in names:
            value = self.bound.get(name)
            if value is not None and (not isinstance(value, Node) or self.axis(value) is not None):
                raise Barrier

    def numbers_only(self) -> None:
        """Requires that no argument is a size that counts tokens."""
        for value in self.bound.values():
            for item in value if isinstance(value, list | tuple) else (value,):
                if isinstance(item, Node) and not tensors(item) and self._rules.counts_tokens(item):
                    raise Barrier
