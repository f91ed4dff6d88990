import ast
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyrl_train.envs.arithmetic import evaluate, parse


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1+2*3", 7),
        ("(1+2)*3", 9),
        ("8-3-2", 3),
        ("8/4/2", 1),
        ("-2*3", -6),
        ("2*-3", -6),
        ("-(1+2)", -3),
        ("--4", 4),
        ("1/3*3", 1),
        ("7\u00d72\u22124\u00f72", 12),
        (" ( 5 ) ", 5),
        ("1/3", Fraction(1, 3)),
    ],
)
def test_value(text: str, value: Fraction) -> None:
    assert evaluate(parse(text, limit=50)) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        *["1+", "+1", "1 2", "(1", "1)", "()", "1**2", "1//2", "2^3", "1.5", "x", "1=1", "f(1)", ")1(", "\u0661"],
        "1" * 19,
        "(" * 40 + "1" + ")" * 40,
    ],
)
def test_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse(text, limit=50)


def test_division_by_zero_has_no_value() -> None:
    assert evaluate(parse("1/(2-2)", limit=50)) is None


expressions = st.recursive(
    st.integers(0, 99).map(str),
    lambda inner: st.builds("({}{}{})".format, inner, st.sampled_from("+-*"), inner) | inner.map("-{}".format),
    max_leaves=12,
)


@given(expressions)
def test_agrees_with_python(text: str) -> None:
    code = compile(ast.parse(text, mode="eval"), "expression", "eval")
    assert evaluate(parse(text, limit=500)) == eval(code)
