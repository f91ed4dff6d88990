"""Finding the answer in a completion. Everything here takes time linear in the text, whatever the policy wrote."""

from __future__ import annotations

import re
from collections.abc import Iterator

_SIGN = r"(?:(?<![\w).])[-\u2212]\s?)?"
_NUMBER = re.compile(rf"{_SIGN}\$?{_SIGN}(?:[0-9]{{1,3}}(?:,[0-9]{{3}})++(?![0-9])|[0-9]++)(?:\.[0-9]++)?|\.[0-9]++")
_PLAIN = re.compile(r"-?[0-9]*\.?[0-9]*")


def last_tag(text: str, tag: str) -> str | None:
    """What stands in the last complete ``<tag>...</tag>``; None if there is none."""
    end = text.rfind(f"</{tag}>")
    if end < 0:
        return None
    begin = text.rfind(f"<{tag}>", 0, end)
    return None if begin < 0 else text[begin + len(tag) + 2 : end]


def last_boxed(text: str) -> str | None:
    """What stands in the last ``\\boxed{...}`` or ``\\fbox{...}``, inner braces included; None if it is not closed."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    begin = text.find("{", start) + 1
    if start < 0 or begin == 0 or text[start:begin].rstrip("{ ") not in ("\\boxed", "\\fbox"):
        return None
    depth, escaped = 1, False
    for place in range(begin, len(text)):
        char = text[place]
        depth += 0 if escaped else {"{": 1, "}": -1}.get(char, 0)
        escaped = char == "\\" and not escaped
        if depth == 0:
            return text[begin:place]
    return None


def numbers(text: str) -> Iterator[str]:
    """The numbers in a text, each as ``canonical`` writes it."""
    for match in _NUMBER.finditer(text):
        if (number := canonical(match[0])) is not None:
            yield number


def canonical(text: str) -> str | None:
    """One spelling for each number: ``$1,234.50`` -> ``1234.5``, ``-0`` -> ``0``; None if it is no decimal number.

    Works on the digits: a number of a million digits is no trouble, and nothing is rounded.
    """
    plain = text.strip().replace("\u2212", "-").replace(",", "").replace("$", "").replace(" ", "")
    if not _PLAIN.fullmatch(plain) or not any(char in "0123456789" for char in plain):
        return None
    whole, _, decimals = plain.lstrip("-").partition(".")
    whole, decimals = whole.lstrip("0") or "0", decimals.rstrip("0")
    number = f"{whole}.{decimals}" if decimals else whole
    return f"-{number}" if plain.startswith("-") and number != "0" else number
