"""Text <-> expression for costs such as `128*batch*sequence*(sequence + 1)`, without `eval`.

The text is parsed as Python and only a few kinds of nodes are let through: numbers, names,
`+ - * / // % **` with small whole exponents, and the functions `floor`, `ceiling`, `Max`, `Min`, `Mod`,
`Abs`. Length, depth and the size of numbers are bounded, so that no text takes long. Neither torch nor
sympy is needed to evaluate.
"""

from __future__ import annotations

import ast
import math
import operator
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from rpcompile.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

MOST_CHARACTERS = 10_000
MOST_DEPTH = 50
MOST_EXPONENT = 8
MOST_DIGITS = 40  # of a number in the text
MOST_BITS = 4_096  # of a number on the way

_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda left, right: Fraction(left // right),
    ast.Mod: operator.mod,
}
_FUNCTIONS: dict[str, tuple[int | None, Callable[..., Any]]] = {  # name -> (arguments, function)
    "floor": (1, lambda value: Fraction(math.floor(value))),
    "ceiling": (1, lambda value: Fraction(math.ceil(value))),
    "Abs": (1, abs),
    "Mod": (2, operator.mod),
    "Max": (None, lambda *values: max(values)),
    "Min": (None, lambda *values: min(values)),
}


@dataclass(frozen=True)
class Expression:
    """A checked expression. Make one with `parse`.

    Attributes:
        text: As it was written.
        names: The sizes it depends on.
    """

    text: str
    names: frozenset[str]
    _tree: ast.expr

    def evaluate(self, sizes: Mapping[str, int]) -> float:
        """Its value, worked out exactly and rounded once.

        Raises:
            InvalidArgument: A size is missing, something is divided by 0, or a number gets too large.
        """
        missing = self.names - sizes.keys()
        if missing:
            raise InvalidArgument(f"{self.text!r} needs a value for {', '.join(sorted(missing))}")
        try:
            return float(_evaluate(self._tree, sizes))
        except (ZeroDivisionError, OverflowError) as error:
            raise InvalidArgument(f"{self.text!r} has no value at {dict(sizes)}: {error}") from error

    def __str__(self) -> str:
        return self.text


def parse(text: str, names: Iterable[str]) -> Expression:
    """Reads an expression.

    Args:
        text: E.g. `4*batch*sequence + 128`.
        names: The names that may occur.

    Raises:
        InvalidArgument: Anything else occurs, or it is too long or too deep.
    """
    if len(text) > MOST_CHARACTERS:
        raise InvalidArgument(
            f"an expression of {len(text):,} characters; at most {MOST_CHARACTERS:,} are read"
        )
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InvalidArgument(f"{_short(text)} is no expression: {type(error).__name__}") from error
    known, found = frozenset(names), set[str]()
    _check(tree, known, found, text, 0)
    return Expression(text, frozenset(found), tree)


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _check(node: ast.expr, known: frozenset[str], found: set[str], text: str, depth: int) -> None:
    if depth > MOST_DEPTH:
        raise InvalidArgument(f"{_short(text)} is nested more than {MOST_DEPTH} deep")
    parts: list[ast.expr] = []
    match node:
        case ast.Constant(value=bool()):
            raise InvalidArgument(f"{_short(text)} holds {node.value!r}; only numbers are allowed")
        case ast.Constant(value=int() | float() as value) if _is_fair(value):
            pass
        case ast.Name(id=name) if name in known:
            found.add(name)
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=operand):
            parts = [operand]
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            exponent = _exponent(right)
            if exponent is None:
                raise InvalidArgument(
                    f"{_short(text)} has an exponent that is no whole number from -{MOST_EXPONENT} to "
                    f"{MOST_EXPONENT}"
                )
            parts = [left]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            parts = [left, right]
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS:
            count = _FUNCTIONS[name][0]
            if not arguments or (count is not None and len(arguments) != count):
                raise InvalidArgument(
                    f"{_short(text)}: {name} takes {count or 'some'} arguments, not {len(arguments)}"
                )
            parts = list(arguments)
        case _:
            names = ", ".join(sorted(known)) or "none"
            raise InvalidArgument(
                f"{_short(text)} holds {_short(ast.unparse(node))}; only numbers, the sizes ({names}), "
                f"+ - * / // % **, {', '.join(_FUNCTIONS)} are allowed"
            )
    for part in parts:
        _check(part, known, found, text, depth + 1)


def _is_fair(value: float) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return abs(value) < 10**MOST_DIGITS


def _exponent(node: ast.expr) -> int | None:
    sign = 1
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node, sign = node.operand, -1
    if isinstance(node, ast.Constant) and type(node.value) is int and node.value <= MOST_EXPONENT:
        return sign * node.value
    return None


def _evaluate(node: ast.expr, sizes: Mapping[str, int]) -> Fraction:
    match node:
        case ast.Constant(value=value):
            return Fraction(value)  # type: ignore[arg-type]
        case ast.Name(id=name):
            return Fraction(sizes[name])
        case ast.UnaryOp(op=op, operand=operand):
            value = _evaluate(operand, sizes)
            return -value if isinstance(op, ast.USub) else value
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            exponent = _exponent(right)
            assert exponent is not None  # `parse` checked
            return _bounded(_evaluate(left, sizes) ** exponent)
        case ast.BinOp(left=left, op=op, right=right):
            return _bounded(_OPERATORS[type(op)](_evaluate(left, sizes), _evaluate(right, sizes)))
        case ast.Call(func=ast.Name(id=name), args=arguments):
            return _FUNCTIONS[name][1](*(_evaluate(argument, sizes) for argument in arguments))
        case _:
            raise AssertionError(ast.dump(node))  # `parse` lets nothing else through


def _bounded(value: Fraction) -> Fraction:
    if value.numerator.bit_length() > MOST_BITS or value.denominator.bit_length() > MOST_BITS:
        raise OverflowError("a number gets too large")
    return value
