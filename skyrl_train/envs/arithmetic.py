"""Expressions of whole numbers, ``+ - * /`` and brackets: read without ``eval``, worked out with exact fractions."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from fractions import Fraction

Token = int | str
"""A number, one of ``+ - * /``, or ``neg`` (the sign before a number)."""

_TOKEN = re.compile(r"\s*([0-9]{1,18}(?![0-9])|[-+*/()])")
_SPELLINGS = str.maketrans({"\u00d7": "*", "\u22c5": "*", "\u00b7": "*", "\u00f7": "/", "\u2212": "-"})
_BINDS = {"+": 1, "-": 1, "*": 2, "/": 2, "neg": 3}
_APPLY = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def parse(text: str, *, limit: int) -> list[Token]:
    """The expression in postfix order: ``2*(3-1)`` -> ``2 3 1 - *``. Signs before numbers and brackets are allowed.

    Args:
        limit: most tokens; more are refused unread.

    Raises:
        ValueError: not such an expression.
    """
    output: list[Token] = []
    waiting: list[str] = []
    operand_next = True
    for token in _tokens(text.translate(_SPELLINGS).strip(), limit):
        if isinstance(token, int) or token == "(":
            if not operand_next:
                raise ValueError(f"{token} where an operator belongs")
            output.append(token) if isinstance(token, int) else waiting.append(token)
            operand_next = token == "("
        elif operand_next:
            if token != "-":
                raise ValueError(f"{token} where a number belongs")
            waiting.append("neg")
        elif token == ")":
            while waiting and waiting[-1] != "(":
                output.append(waiting.pop())
            if not waiting:
                raise ValueError("a bracket closes that was not opened")
            waiting.pop()
        else:
            while waiting and waiting[-1] != "(" and _BINDS[waiting[-1]] >= _BINDS[token]:
                output.append(waiting.pop())
            waiting.append(token)
            operand_next = True
    if operand_next or "(" in waiting:
        raise ValueError("the expression is not complete")
    return output + waiting[::-1]


def evaluate(postfix: Sequence[Token]) -> Fraction | None:
    """The value; None where it divides by zero."""
    stack: list[Fraction] = []
    for token in postfix:
        if isinstance(token, int):
            stack.append(Fraction(token))
        elif token == "neg":
            stack.append(-stack.pop())
        else:
            right, left = stack.pop(), stack.pop()
            if token == "/" and right == 0:
                return None
            stack.append(_APPLY[token](left, right))
    return stack[0]


def _tokens(text: str, limit: int) -> list[Token]:
    tokens: list[Token] = []
    place = 0
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None or len(tokens) == limit:
            raise ValueError(f"cannot be read at character {place}")
        tokens.append(int(match[1]) if match[1].isdigit() else match[1])
        place = match.end()
    return tokens
