"""Which announced trajectories the engine waits for, so that timing decides nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable


class Sessions:
    """The open sessions and how many requests each has in flight.

    Results in floating point depend on which rows share a batch. So in deterministic mode a step is taken only while
    every open session has a request here: then the batches follow from the conversations alone, however long an env
    thinks. A session may be closed while its last request is still in flight.
    """

    def __init__(self) -> None:
        self._open: set[str] = set()
        self._in_flight: Counter[str] = Counter()
        self.absent: set[str] = set()
        """Open, with nothing in flight: their next request is waited for."""

    def open(self, sessions: Iterable[str]) -> None:
        """Announces sessions."""
        for session in sessions:
            self._open.add(session)
            if not self._in_flight[session]:
                self.absent.add(session)

    def close(self, sessions: Iterable[str]) -> None:
        """Nothing further will come of these, beyond what is in flight."""
        self._open.difference_update(sessions)
        self.absent &= self._open

    def came(self, session: str | None) -> None:
        """A request of this session has come in."""
        if session is not None:
            self._in_flight[session] += 1
            self.absent.discard(session)

    def went(self, session: str | None) -> None:
        """A request of this session has ended."""
        if session is None:
            return
        self._in_flight[session] -= 1
        if not self._in_flight[session]:
            del self._in_flight[session]
            if session in self._open:
                self.absent.add(session)
