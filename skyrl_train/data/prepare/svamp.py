"""``svamp``: one-step word problems, fit for small models. Raw file: SVAMP.json of arkilpatel/SVAMP."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from fractions import Fraction

from skyrl_train.data.files import read_rows
from skyrl_train.data.prepare.gsm8k import HINT
from skyrl_train.data.prepare.options import PrepareOptions, Row, Splits, hold_out, make_row, text_of
from skyrl_train.errors import DataError

_SIGNS: dict[type[ast.operator], tuple[str, Callable[[Fraction, Fraction], Fraction]]] = {
    ast.Add: ("+", operator.add),
    ast.Sub: ("-", operator.sub),
    ast.Mult: ("*", operator.mul),
    ast.Div: ("/", operator.truediv),
}


def prepare(options: PrepareOptions) -> Splits:
    """The published file has no split: 300 of its 1,000 problems are held out. The hub's copy comes split."""
    task = options.take(validation_size=300)
    if options.raw is None:
        train = list(options.read("SVAMP.json", "ChilleD/SVAMP"))
        held_out = list(options.read("SVAMP.json", "ChilleD/SVAMP", split="test"))[: task.validation_size]
    else:
        rows = [row for _, row in read_rows(options.raw_file("SVAMP.json"))]
        train, held_out = hold_out(rows, task.validation_size, options.random("split"))
    validation = [_row(options, row) for row in held_out]
    return {"train": options.drop_seen([_row(options, row) for row in train], validation), "validation": validation}


def steps(equation: str) -> tuple[list[str], Fraction]:
    """An equation as single steps, and its value: ``( 3.0 + 2.0 ) * 4.0`` -> ``["3 + 2 = 5", "5 * 4 = 20"], 20``.

    Raises:
        ValueError: it is more than numbers, brackets and the four signs, or divides by zero.
    """
    written: list[str] = []

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            return Fraction(str(node.value))
        if not isinstance(node, ast.BinOp) or type(node.op) not in _SIGNS:
            raise ValueError(f"not an equation of numbers: {equation}")
        sign, apply = _SIGNS[type(node.op)]
        left, right = value(node.left), value(node.right)
        result = apply(left, right)
        written.append(f"{_number(left)} {sign} {_number(right)} = {_number(result)}")
        return result

    try:
        total = value(ast.parse(equation.strip(), mode="eval").body)
    except (SyntaxError, ZeroDivisionError) as error:
        raise ValueError(f"not an equation of numbers: {equation}") from error
    return written, total


def _row(options: PrepareOptions, raw: Row) -> Row:
    body, question = text_of(options, raw, "Body"), text_of(options, raw, "Question")
    equation = text_of(options, raw, "Equation")
    try:
        answer = Fraction(str(raw.get("Answer")))
        lines, total = steps(equation)
    except ValueError as error:
        raise DataError(f"{options.name}: row {raw.get('ID')}: {error}") from error
    worked = None
    if total == answer:
        worked = ["\n".join([*lines, f"#### {_number(answer)}"])]
    else:
        options.dropped["worked answer only: the equation does not give the answer"] += 1
    story = body if body.endswith((".", "?", "!")) else body + "."
    return make_row(
        "svamp",
        f"{story} {question}{HINT}",
        _number(answer),
        env_class="gsm8k",
        extra_info={"id": text_of(options, raw, "ID"), "type": text_of(options, raw, "Type")},
        worked=worked,
    )


def _number(value: Fraction) -> str:
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.6g}"
