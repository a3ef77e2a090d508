"""Expressions: what is read, what is refused, and that values are sympy's."""

from __future__ import annotations

import ast

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from rpcompile.errors import InvalidArgument
from rpcompile.expressions import parse
from rpcompile.sizes import symbol

NAMES = ("batch", "sequence")
B, S = map(symbol, NAMES)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("1152*batch*sequence + 56623104", 1152 * 4 * 10 + 56623104),
        ("128*batch*sequence*(sequence + 1)", 128 * 4 * 10 * 11),
        ("-batch + 2**3", 4),
        ("sequence**2/4", 25),
        ("batch*sequence**-1", 0.4),
        ("floor(sequence/4) + ceiling(sequence/4)", 5),
        ("sequence//4 + sequence%4", 4),
        ("Max(batch, sequence, 7) - Min(batch, sequence) + Mod(sequence, 3) + Abs(-1)", 10 - 4 + 1 + 1),
    ],
)
def test_values(text: str, value: float) -> None:
    expression = parse(text, NAMES)
    assert expression.evaluate({"batch": 4, "sequence": 10}) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("__import__('os').system('true')", "only numbers, the sizes"),
        ("batch.__class__", r"holds 'batch.__class__'"),
        ("heads*2", "holds 'heads'"),
        ("(lambda: 1)()", "only numbers"),
        ("[1][0]", "only numbers"),
        ("True", "holds True"),
        ("'text'", "only numbers"),
        ("1e999", "only numbers"),
        ("9" * 50, "only numbers"),
        ("9" * 5000, "is no expression|only numbers"),
        ("2**9", "an exponent that is no whole number from -8 to 8"),
        ("2**batch", "an exponent"),
        ("2**2.0", "an exponent"),
        ("floor(1, 2)", "floor takes 1 arguments, not 2"),
        ("Max()", "Max takes some arguments, not 0"),
        ("Max(*[1])", "only numbers"),
        ("eval(1)", "only numbers"),
        ("batch if 1 else 2", "only numbers"),
        ("batch +", "is no expression: SyntaxError"),
        ("(" * 300 + "1" + ")" * 300, "is no expression"),
        ("+" * 60 + "1", "nested more than 50 deep"),
        ("1+" * 6000 + "1", "12,001 characters; at most 10,000"),
        ("batch\x00", "is no expression"),
    ],
)
def test_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        parse(text, NAMES)


def test_no_value() -> None:
    with pytest.raises(InvalidArgument, match="needs a value for sequence"):
        parse("batch*sequence", NAMES).evaluate({"batch": 1})
    with pytest.raises(InvalidArgument, match=r"'1/\(batch - 1\)' has no value at \{'batch': 1\}"):
        parse("1/(batch - 1)", NAMES).evaluate({"batch": 1})
    with pytest.raises(InvalidArgument, match="a number gets too large"):
        parse("*".join(["batch**8"] * 9), NAMES).evaluate({"batch": 10**39})


def expressions() -> st.SearchStrategy[sympy.Expr]:
    leaves = st.sampled_from([B, S, sympy.Integer(2), sympy.Integer(7), sympy.Rational(1, 2)])

    def larger(inner: st.SearchStrategy[sympy.Expr]) -> st.SearchStrategy[sympy.Expr]:
        pairs = st.tuples(inner, inner)
        return st.one_of(
            pairs.map(lambda p: p[0] + p[1]),
            pairs.map(lambda p: p[0] * p[1]),
            pairs.map(lambda p: sympy.Max(*p)),
            inner.map(sympy.floor),
            inner.map(sympy.ceiling),
            inner.map(lambda e: e**2),
        )

    return st.recursive(leaves, larger, max_leaves=6)


@settings(max_examples=60, deadline=None)
@given(expressions(), st.integers(1, 99), st.integers(1, 99))
def test_what_sympy_prints_has_sympys_value(expression: sympy.Expr, batch: int, sequence: int) -> None:
    found = parse(str(expression), NAMES)
    value = float(expression.subs({B: batch, S: sequence}))
    assert found.evaluate({"batch": batch, "sequence": sequence}) == pytest.approx(value, rel=1e-12)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40) | st.text(alphabet="batchsequn0123456789+-*/%() .,_'[]", max_size=40))
def test_any_text_gives_an_expression_or_a_clean_error(text: str) -> None:
    try:
        found = parse(text, NAMES)
    except InvalidArgument:
        return
    assert {
        node.id for node in ast.walk(ast.parse(text.strip(), mode="eval")) if isinstance(node, ast.Name)
    } <= {
        *NAMES,
        "floor",
        "ceiling",
        "Abs",
        "Mod",
        "Max",
        "Min",
    }
    try:
        found.evaluate({"batch": 3, "sequence": 5})
    except InvalidArgument as error:
        assert "has no value" in str(error)  # noqa: PT017
