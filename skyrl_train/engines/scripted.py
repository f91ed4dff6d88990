"""An engine that says what a function tells it to: to replay a run, and to test whatever stands above the engines."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from skyrl_train.engines.base import Capabilities, Completion, Engine, Request


class ScriptedEngine(Engine):
    """Answers every request with ``script(request)``.

    Args:
        script: returns the token ids to "sample"; each gets the log-prob -1. More than ``max_new_tokens`` of
            them are cut there, with the reason "length". It may raise, as an engine may.
        delay: seconds before each answer, by request.
    """

    capabilities = Capabilities(name="scripted")

    def __init__(
        self, script: Callable[[Request], Sequence[int]], delay: Callable[[Request], float] = lambda _: 0.0
    ) -> None:
        self.script, self.delay = script, delay
        self.version = 0
        self.requests: list[Request] = []
        self.open: set[str] = set()
        self._waiting: dict[str, asyncio.Event] = {}

    async def generate(self, request: Request) -> list[Completion]:
        self.requests.append(request)
        aborted = self._waiting[request.id] = asyncio.Event()
        try:
            async with asyncio.timeout(self.delay(request)):
                await aborted.wait()
            return [Completion(stop_reason="abort", weight_version=self.version) for _ in range(request.params.n)]
        except TimeoutError:
            return [self._complete(request) for _ in range(request.params.n)]
        finally:
            del self._waiting[request.id]

    def _complete(self, request: Request) -> Completion:
        answer = list(self.script(request))
        ids = answer[: request.params.max_new_tokens]
        cut = len(ids) < len(answer)
        return Completion(
            token_ids=ids,
            logprobs=[-1.0] * len(ids),
            stop_reason="length" if cut else "stop",
            weight_version=self.version,
        )

    async def abort(self, request_ids: Sequence[str] | None = None) -> None:
        for name in list(self._waiting) if request_ids is None else request_ids:
            if name in self._waiting:
                self._waiting[name].set()

    async def commit_weights(self, version: int) -> None:
        self.version = version

    async def open_sessions(self, sessions: Sequence[str]) -> None:
        self.open.update(sessions)

    async def close_sessions(self, sessions: Sequence[str]) -> None:
        self.open.difference_update(sessions)
