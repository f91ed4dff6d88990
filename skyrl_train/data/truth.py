"""Ground truths that are not texts, as JSON text and back, so that a column of them has one type.

Tuples survive: some scoring functions compare with one, and JSON alone would give back a list.
"""

from __future__ import annotations

import json
from typing import Any

_TUPLE = "__tuple__"


def encode(value: Any) -> str:
    """JSON text of plain Python data. Sets become sorted lists, arrays become lists, other objects their text."""
    return json.dumps(_marked(value))


def decode(text: str) -> Any:
    """What ``encode`` was given.

    Raises:
        ValueError: not JSON text.
    """
    try:
        return json.loads(text, object_hook=lambda found: tuple(found[_TUPLE]) if found.keys() == {_TUPLE} else found)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _marked(value: Any) -> Any:
    if isinstance(value, str | int | float | bool | None):
        return value
    if isinstance(value, dict):
        return {str(name): _marked(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_marked(inner) for inner in value]
    if isinstance(value, tuple):
        return {_TUPLE: [_marked(inner) for inner in value]}
    if isinstance(value, set | frozenset):
        return [_marked(inner) for inner in sorted(value, key=str)]
    return _marked(value.tolist()) if hasattr(value, "tolist") else str(value)
