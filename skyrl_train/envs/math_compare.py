"""Compares answers as mathematics. Runs in a helper process of ``killable``: sympy may take any time and memory."""

from __future__ import annotations

import logging

from math_verify import parse, verify

logging.disable(logging.CRITICAL)  # it warns of having no deadline, which is ours to keep


def compare(truth: str, text: str, boxed: bool) -> str:
    """``same``, ``different``, ``no answer``, ``failed`` (at the answer), or ``bad truth``.

    Args:
        truth: LaTeX or a plain number.
        text: what stood in the box if ``boxed``, else the end of a response, in which the answer is looked for.
    """
    gold = parse(f"\\boxed{{{truth}}}", parsing_timeout=0)
    if not gold:
        return "bad truth"
    try:
        answer = parse(f"\\boxed{{{text}}}" if boxed else text, parsing_timeout=0)
        if not answer:
            return "no answer"
        return "same" if verify(gold, answer, timeout_seconds=None) else "different"
    except Exception:  # the response is any text, and so are the errors of what reads it
        return "failed"
