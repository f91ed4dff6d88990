"""``Calls``: how a question is put to an SGLang server. Each has a deadline, and none is repeated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from skyrl_train.engines.http import ServerClient
from skyrl_train.engines.sglang.facts import ServerFacts
from skyrl_train.errors import EngineError, NotSupportedError


class Calls:
    """One server, and what is known of it.

    Args:
        client: speaks to the server.
        facts: what the server said of itself.
        control_timeout: seconds for each call.
    """

    def __init__(self, client: ServerClient, facts: ServerFacts, control_timeout: float) -> None:
        self.client, self.facts, self.control_timeout = client, facts, control_timeout

    async def _get(self, path: str) -> Any:
        return await self.client.get(path, deadline=self.control_timeout)

    async def _post(self, path: str, body: Any, *, deadline: float | None = None) -> Any:
        return await self.client.post(path, body, deadline=deadline or self.control_timeout)

    async def _update(self, path: str, body: dict[str, Any]) -> None:
        succeeded(self.client.url, path, await self._post(path, body))

    def _needs(self, path: str, what: str) -> None:
        if path != "/unload_lora_adapter" and path not in self.facts.endpoints:
            raise NotSupportedError(
                "generator.backend", "sglang",
                f"{self.client.url} runs SGLang {self.facts.version}, which has no {path}: {what} needs it.",
                "Use SGLang 0.5.17.",
            )  # fmt: skip


def succeeded(url: str, path: str, answer: Any) -> Any:
    """The answer, unless it says that it is a failure."""
    if isinstance(answer, Mapping) and answer.get("success") is False:
        raise EngineError(f"{url}{path}: {answer.get('message') or answer.get('error_message') or 'it failed'}")
    return answer
