"""When a sample ends: by token id, by text, or by length. What was sampled is never changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

CONTEXT = 4
"""Tokens before the answer that are decoded with it: some tokenizers write a first token unlike any later one."""
PATIENCE = 16
"""Tokens that may pass without a finished character before the text is taken as it is."""


class StopText:
    """Finds stop strings in the text of a growing list of tokens, also where a string spans several of them.

    Each token is decoded together with those just before it, and what that adds is the new text. Bytes of an unfinished
    character (shown as U+FFFD) wait for the tokens that finish it.
    """

    def __init__(self, stops: Sequence[str], decode: Callable[[list[int]], str], prompt_ids: Sequence[int]) -> None:
        self.stops, self._decode = stops, decode
        self._ids = list(prompt_ids[-CONTEXT:])
        self._known = len(self._ids)
        """Of ``_ids``, those whose text has been looked at."""
        self._tail = ""
        self._keep = max(map(len, stops)) - 1

    def push(self, token: int) -> str | None:
        """Adds a token. Returns the stop string that its text completes: the one that starts first, or None."""
        self._ids.append(token)
        before, now = self._decode(self._ids[: self._known]), self._decode(self._ids)
        unfinished = now.endswith("\ufffd") or len(now) <= len(before)
        if unfinished and len(self._ids) - self._known < PATIENCE:
            return None
        text = self._tail + now[len(before) :]
        del self._ids[:-CONTEXT]
        self._known = len(self._ids)
        self._tail = text[-self._keep :] if self._keep else ""
        found = [(at, -len(stop), stop) for stop in self.stops if (at := text.find(stop)) >= 0]
        return min(found)[2] if found else None
