"""``Control``: everything one asks of an SGLang server beside sampling.

What would end the server is refused here: waking what is not asleep, sleeping while requests run, a flush inside an
update. The server keeps no account of these, so this side does.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from skyrl_train.engines.faults import EngineRefusedError
from skyrl_train.engines.http import ServerClient
from skyrl_train.engines.sglang.calls import succeeded
from skyrl_train.engines.sglang.facts import UNKNOWN_VERSION, ServerFacts, version_of
from skyrl_train.engines.sglang.updates import WeightUpdates
from skyrl_train.errors import EngineError, NotSupportedError

log = logging.getLogger("skyrl.engines.sglang")

PauseMode = Literal["abort", "in_place", "retract"]
MEMORY = ("weights", "kv_cache", "cuda_graph")
"""What sleeps and wakes by itself, in the order in which it should wake."""
HELD = "held"
"""How an engine is paused of which the server has not been told."""
PROFILES = "/tmp/sglang_profile"
SETTLES = 0.01
"""Seconds from an answer until the server knows that it has given it. One that is paused with requests left looks again
after a whole second."""


class Control(WeightUpdates):
    """State and calls of one server; its weights' are in ``WeightUpdates``. ``SGLangEngine`` adds sampling."""

    def __init__(self, client: ServerClient, facts: ServerFacts, control_timeout: float) -> None:
        super().__init__(client, facts, control_timeout)
        self.committed: int | None = None
        """The version committed here; None: whatever the server started with."""
        self.adapter: str | None = None
        """The LoRA adapter that every request samples with."""
        self.salt: str | None = None
        """Set where the prefix cache could not be emptied: requests share prefixes with those of the same salt only."""
        self._unloaded: set[str] = set()
        self.asleep: set[str] = set()
        self.lost_weights = False
        """The weights went to sleep with no copy: they must be sent anew and committed."""
        self.paused: str | None = None
        self.answered_at = 0.0
        """When the server last answered a request (``time.monotonic``)."""
        self.running = asyncio.Event()
        self.running.set()

    @property
    def in_flight(self) -> int:
        raise NotImplementedError

    @property
    def idle(self) -> bool:
        """Whether the server has nothing to do that came from here."""
        raise NotImplementedError

    async def abort(self, request_ids: Sequence[str] | None = None) -> None:
        raise NotImplementedError

    async def abort_sent(self) -> None:
        """Aborts what the server has been sent, and waits a moment for it to come back."""
        raise NotImplementedError

    def check_awake(self) -> None:
        """Raises EngineError if nothing can be sampled now."""
        if self.asleep:
            raise EngineError(f"{self.client.url}: asleep ({', '.join(sorted(self.asleep))}). Call wake_up() first.")
        if self.lost_weights:
            raise EngineError(f"{self.client.url}: its weights were given up in sleep. Send and commit weights first.")

    def check_adapter(self, lora_name: str | None) -> None:
        """Raises EngineRefusedError for an unloaded adapter, which the server would load again without a word."""
        if lora_name in self._unloaded:
            raise EngineRefusedError(f"{self.client.url}: the adapter {lora_name!r} has been unloaded.")

    async def check_health(self, deadline: float) -> None:
        """Returns if the server computes: it has answered a request since, or answers one now.

        Raises:
            EngineError: it did not within ``deadline`` seconds.
        """
        await self.client.get("/health", deadline=deadline)

    def dtype(self, checkpoint_dtype: str) -> str:
        """The number format of the weights in memory. SGLang's "auto" makes float16 of a float32 checkpoint."""
        if self.facts.dtype not in ("auto", "half", "float"):
            return self.facts.dtype
        named = {"half": "float16", "float": "float32"}.get(self.facts.dtype)
        return named or ("float16" if checkpoint_dtype == "float32" else checkpoint_dtype)

    # Versions.

    async def version(self) -> int:
        """The weight version that the server reports now; ``UNKNOWN_VERSION`` if its label is no number."""
        info = await self._get("/model_info")
        return version_of(info.get("weight_version"))

    async def set_version(self, version: int, *, check: bool = True) -> None:
        """Sets the label alone and reads it back. Running requests go on.

        Args:
            check: read it back.

        Raises:
            EngineError: the server reports another version afterwards.
        """
        body = {"new_version": str(version), "abort_all_requests": False}
        succeeded(self.client.url, "/update_weight_version", await self._post("/update_weight_version", body))
        found = await self.version() if check else version
        if found != version:
            shown = "a label that is no number" if found == UNKNOWN_VERSION else str(found)
            raise EngineError(f"{self.client.url}: reports weight version {shown} after {version} was committed.")
        self.committed, self.lost_weights = version, False

    # Pausing.

    async def pause(self, mode: PauseMode = "abort") -> None:
        """Stops generation. New requests wait on this side.

        Args:
            mode: "abort" ends what runs, with what was sampled; "in_place" freezes it; "retract" puts it back into the
                queue, to be computed again.
        """
        self._needs("/pause_generation", "pausing")
        self.paused = mode
        self.running.clear()
        if mode == "abort":
            await self.abort_sent()
            await asyncio.sleep(self.answered_at + SETTLES - time.monotonic())
        await self._post("/pause_generation", {"mode": mode})

    def hold(self) -> None:
        """In place of ``pause``, of an idle server that nobody else asks: requests wait on this side, and that is all.

        A ``flush`` that succeeds afterwards says that it was idle.
        """
        self.paused = HELD
        self.running.clear()

    async def resume(self, *, admit: bool = True) -> None:
        """Goes on after ``pause`` or ``hold``.

        Args:
            admit: also let requests go to the server again; False leaves that to ``admit``.
        """
        if self.paused != HELD:
            await self._post("/continue_generation", {})
        if admit:
            self.admit()

    def admit(self) -> None:
        """Lets requests that wait on this side go to the server."""
        self.paused = None
        self.running.set()

    async def prompt_logprobs(
        self, rows: Sequence[Sequence[int]], starts: Sequence[int], *, adapter: str | None = None,
        salt: str | None = None,
    ) -> list[list[float]]:  # fmt: skip
        """Log-probs of ``rows[i][starts[i]:]`` under the model, at temperature 1. Goes past the gate of ``pause``.

        What lies before the start is taken from the prefix cache if it is there: a cache that should have been
        flushed shows. All rows are one request, so that they are computed together.
        """
        body: dict[str, Any] = {
            "input_ids": [list(row) for row in rows],
            "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
            "return_logprob": True,
            "logprob_start_len": [start - 1 for start in starts],
        }
        body |= {"lora_path": adapter} if adapter else {}
        body |= {"extra_key": salt} if salt else {}
        answers = await self.client.generate("/generate", body, deadline=self.control_timeout)
        self.answered_at = time.monotonic()
        found = []
        for row, start, answer in zip(rows, starts, answers, strict=True):
            values = [entry[0] for entry in answer["meta_info"]["input_token_logprobs"]][-(len(row) - start) :]
            if len(values) != len(row) - start or None in values:
                raise EngineError(f"{self.client.url}/generate: no log-probs of a prompt's last tokens came back.")
            found.append(values)
        return found

    async def flush(self, wait: float = 5.0) -> None:
        """Empties the prefix cache, after waiting up to ``wait`` seconds for the server to be idle.

        Raises:
            EngineError: requests are running or queued.
        """
        await self._post(f"/flush_cache?timeout={wait:g}", {}, deadline=self.control_timeout + wait)

    # Sleep.

    async def sleep(self, level: Literal[1, 2] = 2, *, tags: Iterable[str] | None = None) -> None:
        """Gives memory back. Requests in flight are aborted first.

        Args:
            level: 1 keeps the weights (in host memory, or where they are); 2 gives everything up, so that weights must
                be sent again after waking.
            tags: of ``MEMORY``; in place of a level.

        Raises:
            EngineError: an unknown tag, or the server did not become idle.
        """
        wanted = self._tags(tags) if tags is not None else set(MEMORY)
        if tags is None and level == 1 and not self.facts.weights_backup:
            wanted.discard("weights")
        wanted -= self.asleep
        if not wanted:
            return
        if self.in_flight:
            await self.abort()
        if not self.asleep:
            await self.flush()  # the server dies if it is not idle
        if not self.facts.memory_saver:
            log.warning("%s was started without enable_memory_saver: sleep frees nothing.", self.client.url)
        await self._post("/release_memory_occupation", {"tags": [tag for tag in MEMORY if tag in wanted]})
        self.asleep |= wanted
        if "weights" in wanted and not self.facts.weights_backup:
            self.lost_weights, self.committed = True, None

    async def wake_up(self, tags: Iterable[str] | None = None) -> None:
        """Takes memory again: all of it, or the ``tags`` given. What is awake already is left alone."""
        wanted = self.asleep & (set(MEMORY) if tags is None else self._tags(tags))
        for tag in (tag for tag in MEMORY if tag in wanted):
            await self._post("/resume_memory_occupation", {"tags": [tag]})
            self.asleep.discard(tag)

    # Adapters.

    async def load_lora_adapter(self, lora_name: str, lora_path: str, *, pinned: bool = False) -> list[str]:
        """Loads a PEFT folder that the server can read, under a name that is not taken; returns the names of all."""
        return await self._lora(
            "/load_lora_adapter", {"lora_name": lora_name, "lora_path": lora_path, "pinned": pinned}
        )

    async def load_lora_tensors(
        self, lora_name: str, payloads: Sequence[str], config: Mapping[str, Any], load_format: str | None = None
    ) -> list[str]:
        """Loads an adapter from tensors under PEFT's names; ``config`` is its ``adapter_config.json``."""
        body = {"lora_name": lora_name, "serialized_named_tensors": list(payloads), "config_dict": dict(config)}
        return await self._lora("/load_lora_adapter_from_tensors", body | {"load_format": load_format})

    async def unload_lora_adapter(self, lora_name: str) -> None:
        await self._lora("/unload_lora_adapter", {"lora_name": lora_name})
        self._unloaded.add(lora_name)
        if self.adapter == lora_name:
            self.adapter = None

    def use_adapter(self, lora_name: str | None) -> None:
        """Every later request samples with this adapter; None: with the base model."""
        self.adapter = lora_name

    # Profiling.

    async def start_profile(self, **options: Any) -> None:
        """Starts SGLang's profiler. ``options`` are its own: num_steps, activities, with_stack, ...

        Args:
            output_dir: folder for the trace, where the server runs; left out: ``PROFILES``.
        """
        self._needs("/start_profile", "profiling")
        options = {"output_dir": PROFILES} | options
        await self._post("/start_profile", options)

    async def stop_profile(self) -> None:
        """Stops it; the trace is written."""
        await self._post("/stop_profile", {}, deadline=max(self.control_timeout, 600.0))

    async def _lora(self, path: str, body: dict[str, Any]) -> list[str]:
        if not self.facts.lora:
            raise NotSupportedError(
                "generator.enable_lora", False, f"{self.client.url} was started without LoRA.",
                "Set generator.enable_lora=true, or start the server with --enable-lora --max-lora-rank N "
                "--lora-target-modules all.",
            )  # fmt: skip
        self._needs(path, "this way to load an adapter")
        answer = succeeded(self.client.url, path, await self._post(path, body))
        self._unloaded.discard(body["lora_name"])
        return list(answer.get("loaded_adapters") or ()) if isinstance(answer, Mapping) else []

    def _tags(self, tags: Iterable[str]) -> set[str]:
        wanted = set(tags)
        if unknown := wanted - set(MEMORY):
            raise EngineRefusedError(
                f"{self.client.url}: no memory is called {', '.join(sorted(unknown))}; there are {', '.join(MEMORY)}."
            )
        return wanted
