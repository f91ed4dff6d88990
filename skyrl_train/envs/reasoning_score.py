"""Scores answers to tasks of reasoning-gym. Runs in a helper of ``killable``, as some tasks evaluate the answer."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from reasoning_gym import get_score_answer_fn

from skyrl_train.data.truth import decode


def score(task: str, answer: str, entry: str) -> float | None:
    """The package's score; None where its scoring raises at the answer. ``entry`` is as ``data.truth`` encodes it."""
    score_answer = _scorer(task)
    known = decode(entry)
    try:
        return float(score_answer(answer, known))
    except Exception:  # the answer is any text, and so are the errors of what evaluates it
        return None


@cache
def _scorer(task: str) -> Callable[[str, Any], float]:
    return get_score_answer_fn(task)  # pyright: ignore[reportReturnType] - the package declares no arguments
