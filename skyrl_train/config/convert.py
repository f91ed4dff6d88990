"""One value to its type and within its limits, or the reason why not."""

from __future__ import annotations

import difflib
import math
import os
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

from skyrl_train.config.fields import Key, one_of
from skyrl_train.config.schema import type_text

IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


class Mismatch(Exception):
    """The value cannot be taken: ``reason`` and ``remedy`` for the user."""

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(reason)
        self.reason, self.remedy = reason, remedy


def convert(value: Any, hint: Any, key: Key) -> Any:
    """``value`` as ``hint`` wants it, checked against the key's choices and limits, ``~`` expanded.

    Raises:
        Mismatch: it does not fit.
    """
    typed = _typed(value, hint, key)
    for one in typed if isinstance(typed, list) else [typed]:
        if one is not None:
            _check_choice(one, key)
            _check_limits(one, key)
    if not key.path:
        return typed
    return [os.path.expanduser(p) for p in typed] if isinstance(typed, list) else typed and os.path.expanduser(typed)


def _typed(value: Any, hint: Any, key: Key) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, types.UnionType) or origin is typing.Union:
        return _first_that_fits(value, hint, key)
    if origin is list:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise _wrong_type(value, hint, key)
        return [_typed(item, arguments[0], key) for item in items]
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _wrong_type(value, hint, key)
        return {_typed(k, arguments[0], key): _typed(v, arguments[1], key) for k, v in value.items()}
    if hint is Any:
        return value
    return _scalar(value, hint, key)


def _first_that_fits(value: Any, hint: Any, key: Key) -> Any:
    options = typing.get_args(hint)
    if value is None:
        if type(None) in options:
            return None
        raise _wrong_type(value, hint, key)
    for option in options:
        if option is not type(None) and not (option is str and isinstance(value, list | tuple | Mapping)):
            try:
                return _typed(value, option, key)
            except Mismatch:
                continue
    raise _wrong_type(value, hint, key)


def _scalar(value: Any, hint: Any, key: Key) -> Any:
    if hint is bool:
        if isinstance(value, bool):
            return value
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, float) and value.is_integer():  # 1e3
            return int(value)
    elif hint is float:
        if (
            isinstance(value, str) and _NUMBER.fullmatch(value) and "e" in value.lower()
        ):  # plain YAML reads 1e-6 as text
            value = float(value)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    elif isinstance(value, str):
        return value
    elif isinstance(value, int | float) and not isinstance(value, bool):  # run_name=7
        return str(value)
    raise _wrong_type(value, hint, key)


def _wrong_type(value: Any, hint: Any, key: Key) -> Mismatch:
    unit = f" of {key.unit}" if key.unit and type_text(hint).startswith(("integer", "number")) else ""
    wanted = type_text(hint)
    article = "" if wanted.startswith("true/false") else "an " if wanted[0] in "aeiou" else "a "
    base = wanted.split(" or ")
    wanted = " or ".join([base[0] + unit, *base[1:]])
    remedy = "Write true or false." if wanted.startswith("true/false") else ""
    if isinstance(value, str) and unit and re.match(r"\s*\d", value):
        remedy = f"Write the number alone, in {key.unit}."
    return Mismatch(f"expects {article}{wanted}, not {_kind(value)}.", remedy)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, bool):
        return "true/false"
    if isinstance(value, float):
        return "a number with a fraction" if math.isfinite(value) else "a number that is not finite"
    return {int: "an integer", str: "text"}.get(type(value), type(value).__name__)


def _check_choice(value: Any, key: Key) -> None:
    if not key.choices or value in key.choices:
        return
    if key.import_path and isinstance(value, str) and ":" in value:
        if IMPORT_PATH.fullmatch(value):
            return
        raise Mismatch("is not an import path.", "Write package.module:name.")
    near = difflib.get_close_matches(str(value), [str(choice) for choice in key.choices], n=1)
    own = ", or your own as package.module:name" if key.import_path else ""
    remedy = f"Did you mean {near[0]}?" if near else ""
    raise Mismatch(f"is not one of the choices {one_of(key.choices)}{own}.", remedy)


def _check_limits(value: Any, key: Key) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    low, high = key.minimum, key.maximum
    unit = f" {key.unit}" if key.unit else ""
    if low is not None and value < low:
        raise Mismatch(f"must be at least {low:g}{unit}.")
    if key.above is not None and value <= key.above:
        raise Mismatch(f"must be above {key.above:g}{unit}.")
    if high is not None and value > high:
        raise Mismatch(f"must be at most {high:g}{unit}.")
    if key.below is not None and value >= key.below:
        raise Mismatch(f"must be below {key.below:g}{unit}.")
