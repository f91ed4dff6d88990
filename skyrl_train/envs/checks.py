"""What an env returned, checked and copied: an env of the user's may return anything."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from skyrl_train.envs.base import StepResult
from skyrl_train.errors import EnvError
from skyrl_train.types import Message

_ROLES = ("system", "developer", "user", "assistant", "tool")


def checked_opening(value: object, where: str) -> list[Message]:
    """The messages of ``init``, as plain lists and dicts.

    Raises:
        EnvError: they are no conversation that the policy can answer.
    """
    messages = _messages(value, f"{where} returned", "its messages")
    if not messages:
        raise EnvError(f"{where} returned no message: the conversation must open with at least one.")
    if messages[-1]["role"] == "assistant":
        raise EnvError(f"{where} returned messages that end with role='assistant': there is nothing to answer.")
    return messages


def checked_step(value: object, where: str) -> StepResult:
    """The result of ``step``, with a float as reward and plain messages.

    Raises:
        EnvError: names the field and its value.
    """
    if not isinstance(value, StepResult):
        raise EnvError(f"{where} returned {_shown(value)}, which is not a StepResult (skyrl_train.envs.base).")
    observations = _messages(value.observations, f"{where}: observations", "observations")
    for place, message in enumerate(observations):
        if message["role"] == "assistant":
            raise EnvError(f"{where}: observations[{place}].role='assistant': only the policy speaks as the assistant.")
    result = StepResult(
        observations=observations,
        reward=_finite(value.reward, f"{where}: reward"),
        terminated=_flag(value.terminated, f"{where}: terminated"),
        truncated=_flag(value.truncated, f"{where}: truncated"),
        metadata=_metadata(value.metadata, f"{where}: metadata"),
    )
    over = "terminated" if result.terminated else "truncated" if result.truncated else ""
    if over and observations:
        raise EnvError(f"{where}: {over}=True with {len(observations)} observations, which nobody would answer.")
    if not over and not observations:
        raise EnvError(f"{where}: neither terminated nor truncated, and no observations: the policy has no next turn.")
    return result


def _messages(value: object, where: str, name: str) -> list[Message]:
    if not isinstance(value, list | tuple):
        remedy = 'Write [{"role": "user", "content": "..."}].'
        raise EnvError(f"{where} {_shown(value)}: {name} must be a list of chat messages. {remedy}")
    return [_message(message, f"{where}[{place}]" if "returned" not in where else f"{where} message {place}")
            for place, message in enumerate(value)]  # fmt: skip


def _message(value: object, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise EnvError(f"{where}={_shown(value)} must be a mapping with role and content.")
    if value.get("role") not in _ROLES:
        raise EnvError(f"{where}: role={_shown(value.get('role'))} must be one of {', '.join(_ROLES)}.")
    content = value.get("content")
    if not isinstance(content, str):
        raise EnvError(f"{where}: content={_shown(content)} must be a text.")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise EnvError(f"{where}: content has half of a surrogate pair at {error.start}, which is no text.") from error
    return {**value, "role": str(value["role"]), "content": content}  # pyright: ignore[reportReturnType]


def _finite(value: object, where: str) -> float:
    if not isinstance(value, Real):
        raise EnvError(f"{where}={_shown(value)} must be a number; a tensor needs .item().")
    try:
        number = float(value)
    except (OverflowError, ValueError, TypeError) as error:
        raise EnvError(f"{where}={_shown(value)} does not fit into a float.") from error
    if not math.isfinite(number):
        raise EnvError(f"{where}={number} must be finite.")
    return number


def _flag(value: object, where: str) -> bool:
    if isinstance(value, bool) or type(value).__name__ in ("bool", "bool_"):  # numpy's, without importing it
        return bool(value)
    raise EnvError(f"{where}={_shown(value)} must be True or False.")


def _metadata(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise EnvError(f"{where}={_shown(value)} must be a dict.")
    checked: dict[str, Any] = {}
    for name, item in value.items():
        if not isinstance(name, str):
            raise EnvError(f"{where} has the name {_shown(name)}, which is not a text.")
        place = f"{where}[{name!r:.60}]"
        if isinstance(item, bool) or type(item).__name__ == "bool_":
            checked[name] = bool(item)
        elif isinstance(item, Real):
            number = _finite(item, place)
            checked[name] = int(item) if isinstance(item, Integral) else number
        else:
            checked[name] = item
    return checked


def _shown(value: object) -> str:
    """``value`` for a message, whatever its ``__repr__`` does."""
    try:
        text = repr(value)
    except Exception as error:  # a user's __repr__ may raise anything
        text = f"an object whose repr raises {type(error).__name__}"
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"
