"""One row of a data set as a ``Prompt``, or the one error that says what is wrong with it."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

from skyrl_train.data.truth import decode
from skyrl_train.errors import DataError
from skyrl_train.types import Message, Prompt

ROLES = ("system", "developer", "user", "assistant", "tool")
_OTHER_NAMES = {"human": "user", "gpt": "assistant", "model": "assistant"}
_OWN_COLUMNS = ("prompt", "env_class", "data_source")


def to_prompt(row: Mapping[str, Any], *, file: str, where: str, number: int, env_class: str | None) -> Prompt:
    """Makes the prompt of one row::

        {"prompt": [{"role": "user", "content": "47+85"}], "env_class": "addition", "data_source": "addition",
         "reward_spec": {"ground_truth": "132"}, "extra_info": {...}}

    ``prompt`` may be one text, which becomes a user message. ``reward_spec`` and ``extra_info`` may be JSON text. Numpy
    and Arrow values become plain Python, and fields that are null (Arrow fills structs with them) are left out.

    Args:
        file: the row's file or data set, and ``where`` its place in there, for messages.
        number: the row's number in its file, from 0.
        env_class: taken where the row names none.

    Raises:
        DataError: names file, place, field and value.
    """
    at = _Place(file, where)
    columns = {str(name): plain(value) for name, value in row.items()}
    columns = {name: value for name, value in columns.items() if not _missing(value)}
    messages = _messages(at, columns)
    source = columns.get("data_source", "unknown")
    if not isinstance(source, str) or not source.strip():
        raise at.error("data_source", source, "must be a text that names where the row comes from.")
    chosen = columns.get("env_class", env_class)
    if not isinstance(chosen, str) or not chosen.strip():
        remedy = "Add the column env_class, or set environment.env_class."
        raise at.error("env_class", chosen, "must be the name of an environment.", remedy)
    extras = {name: value for name, value in columns.items() if name not in _OWN_COLUMNS}
    if "reward_spec" not in extras and isinstance(extras.get("reward_model"), dict):
        extras["reward_spec"] = extras.pop("reward_model")  # verl's name of the column
    for field in ("reward_spec", "extra_info"):
        extras[field] = _mapping(at, field, extras.get(field, {}))
    if extras["reward_spec"].pop("ground_truth_is_json", False):
        extras["reward_spec"]["ground_truth"] = _ground_truth(at, extras["reward_spec"].get("ground_truth"))
    return Prompt(
        uid=f"{source}/{number}",
        messages=messages,
        env_class=chosen.strip(),
        data_source=source,
        extras=extras,
    )


def plain(value: Any) -> Any:
    """``value`` as plain Python: arrays as lists, scalars as numbers, mappings as dicts without their null fields."""
    if isinstance(value, str | int | float | bool | None):
        return value
    if isinstance(value, Mapping):
        return {str(name): plain(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if hasattr(value, "tolist"):  # numpy, without importing it
        return plain(value.tolist())
    if hasattr(value, "as_py"):  # an Arrow scalar
        return plain(value.as_py())
    return value


class _Place:
    """Makes the errors of one row."""

    def __init__(self, file: str, where: str) -> None:
        self.file, self.where = file, where

    def error(self, field: str, value: Any, reason: str, remedy: str = "") -> DataError:
        shown = repr(value)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        return DataError(f"{self.file}: {self.where}: {field}={shown} {reason}" + (f" {remedy}" if remedy else ""))


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))  # pandas writes NaN for "none"


def _messages(at: _Place, columns: Mapping[str, Any]) -> tuple[Message, ...]:
    if "prompt" not in columns:
        names = ", ".join(columns) or "none"
        remedy = (
            "A prompt is a list of chat messages or a text; `skyrl data NAME` prepares known data sets in this form."
        )
        raise DataError(f"{at.file}: {at.where}: the column 'prompt' is missing or null (there are: {names}). {remedy}")
    value = columns["prompt"]
    if isinstance(value, str):
        value = _json_messages(value) or [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise at.error("prompt", value, "must be a list of chat messages or a text.")
    if not value:
        raise at.error("prompt", value, "has no message.")
    messages = tuple(_message(at, f"prompt[{i}]", message) for i, message in enumerate(value))
    if messages[-1]["role"] == "assistant":
        remedy = "End it with the message to answer; a worked answer belongs into extra_info.worked."
        raise at.error(
            f"prompt[{len(messages) - 1}].role", "assistant", "means the prompt is answered already.", remedy
        )
    if not any(message["content"].strip() for message in messages):
        raise at.error("prompt", value, "is empty.")
    return messages


def _message(at: _Place, field: str, value: Any) -> Message:
    if not isinstance(value, dict):
        raise at.error(field, value, "must be a message: an object with role and content.")
    for name in ("role", "content"):
        if name not in value:
            raise at.error(field, value, f"has no '{name}'.")
    role, content = value["role"], value["content"]
    if role not in ROLES:
        close = difflib.get_close_matches(str(role).lower(), [*ROLES, *_OTHER_NAMES], n=1)
        hint = f"Did you mean '{_OTHER_NAMES.get(close[0], close[0])}'?" if close else ""
        raise at.error(f"{field}.role", role, f"is not one of {', '.join(ROLES)}.", hint)
    if not isinstance(content, str):
        raise at.error(f"{field}.content", content, "must be a text.", "Images and other parts are not served.")
    if any("\ud800" <= letter <= "\udfff" for letter in content):
        raise at.error(f"{field}.content", content, "holds half of a surrogate pair, which no tokenizer takes.")
    return cast(Message, value)


def _json_messages(text: str) -> list[Any] | None:
    """The messages, if ``text`` is a JSON list of objects with a role (a prompt about JSON is only a text)."""
    parsed = _parse(text) if text.lstrip().startswith("[") else None
    is_chat = isinstance(parsed, list) and parsed and all(isinstance(m, dict) and "role" in m for m in parsed)
    return parsed if is_chat else None


def _mapping(at: _Place, field: str, value: Any) -> dict[str, Any]:
    parsed = plain(_parse(value)) if isinstance(value, str) else value
    if not isinstance(parsed, dict):
        raise at.error(field, value, "must be an object with named fields, or JSON text of one.")
    return dict(parsed)


def _ground_truth(at: _Place, value: Any) -> Any:
    """The value written as JSON text. Other texts are left alone: to a math env ``[-2,2]`` is an interval."""
    try:
        return decode(value)
    except (TypeError, ValueError) as error:
        reason = "must be JSON text, as ground_truth_is_json says."
        raise at.error("reward_spec.ground_truth", value, reason) from error


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return None


def conversation(messages: Sequence[Mapping[str, Any]]) -> str:
    """The messages as one text, to compare and to show prompts."""
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)
